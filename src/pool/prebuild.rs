//! A pool of no machines: prepares the image of a configuration and ends.
//!
//! It takes its own share of the host, beside a plugin that may run with the same configuration,
//! and obtains the image just as that would: found if it is there, else built and proven by one
//! machine. What it made is kept for the configuration's group.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::builder::BuildError;
use super::host::Host;
use super::spec::PoolSpec;
use super::status::ImageStatus;
use super::{builder, refresh};
use crate::image::Generation;
use crate::vmm::VmHandle;

/// Whose image it is where the configuration names no group.
const NO_GROUP: &str = "prebuild";
/// How often progress is told.
const TELL: Duration = Duration::from_millis(500);

/// Who looks on while a prebuild's machine runs.
pub trait Onlooker: Send + Sync + std::fmt::Debug {
    /// Where the machine's console goes, given the file where it is kept.
    fn console(&self, log: File) -> std::io::Result<File>;
    /// The machine runs.
    fn started(&self, vm: &VmHandle);
    /// It has ended.
    fn ended(&self);
}

/// What came of it.
#[derive(Debug)]
pub struct Prebuilt {
    pub generation: Generation,
    /// Whether it had to be built.
    pub built: bool,
}

/// No image was prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrebuildError {
    /// Every problem with the host, one a line.
    #[error("{}", .0.join("\n"))]
    Host(Vec<String>),
    #[error("no image")]
    Build(#[from] BuildError),
}

/// Prepares the image; ends early when `closing` says so. `progress` is told about twice a second
/// what it is at.
pub async fn prebuild(
    mut spec: PoolSpec,
    onlooker: Option<Arc<dyn Onlooker>>,
    closing: watch::Receiver<bool>,
    progress: impl Fn(&ImageStatus),
) -> Result<Prebuilt, PrebuildError> {
    let group = spec.group.take().unwrap_or_else(|| NO_GROUP.to_owned());
    let (mut host, warnings) = Host::open(spec).await.map_err(PrebuildError::Host)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    host.onlooker = onlooker;
    let host = Arc::new(host);
    let prepared = {
        let mut prepared = std::pin::pin!(prepare(&host, group, closing));
        loop {
            tokio::select! {
                prepared = &mut prepared => break prepared,
                () = tokio::time::sleep(TELL) => progress(&host.image.get()),
            }
        }
    };
    host.close().await;
    Ok(prepared?)
}

async fn prepare(
    host: &Arc<Host>,
    group: String,
    mut closing: watch::Receiver<bool>,
) -> Result<Prebuilt, BuildError> {
    let mut inputs = builder::inputs(host).ok_or(BuildError::Closing)?;
    host.image.enter("checking");
    let (generation, _outdated) = refresh::newest(host, &mut inputs, &mut closing).await?;
    let made = generation.clone();
    refresh::with_store(host, move |store, _own| {
        Ok(store.keep_prebuilt(&group, &made, super::status::epoch())?)
    })
    .await?;
    let built = host.counters.get().images.contains_key("built");
    Ok(Prebuilt { generation, built })
}

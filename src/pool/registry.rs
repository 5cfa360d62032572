//! A prepared image out of a registry, with its way here in the log.
//!
//! It takes the place of a build; like one, it serves only after a worker has come up from it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::builder::BuildError;
use super::host::Host;
use super::status::ImageReport;
use super::{machine, refresh};
use crate::agent;
use crate::image::registry::{
    self, Access, Expected, ExpectedMachines, Pulled, RegistryName, TransferProgress, Trust,
};
use crate::image::{BuildInputs, Generation};

/// The generation that a registry has under this name, if it may be believed and fits.
pub async fn fetch(
    host: &Arc<Host>,
    name: &RegistryName,
    inputs: &BuildInputs,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    let store = host.store().ok_or(BuildError::Closing)?;
    let expected = expected(host, inputs).await?;
    let keyring = host.spec().image.keyring.as_deref();
    let teller = Teller {
        report: &host.image,
        last: Mutex::default(),
    };
    let tell = |progress| teller.tell(progress);
    let access = Access::of_host();
    host.image.enter("asking the registry");
    let pulled = tokio::select! {
        pulled = registry::pull(
            name, store, Trust::Shown(keyring), &expected, &access, &tell
        ) => pulled?,
        () = machine::asked(closing) => return Err(BuildError::Closing),
    };
    match pulled {
        Pulled::Present(generation) => Ok(*generation),
        Pulled::Fetched(fetched) => {
            host.counters.image("fetched");
            let lineage = inputs.lineage();
            refresh::with_store(
                host,
                move |store, _group| Ok(fetched.adopt(store, lineage)?),
            )
            .await
        }
    }
}

/// What this configuration asks of an image that it does not build.
async fn expected(host: &Arc<Host>, inputs: &BuildInputs) -> Result<Expected, BuildError> {
    let inputs = inputs.clone();
    refresh::with_store(host, move |store, _group| {
        let contents = inputs.contents(store)?;
        Ok(Expected {
            architecture: contents.architecture,
            machines: Some(ExpectedMachines {
                username: contents.username,
                lineage: inputs.lineage(),
                disk_gib: inputs.disk_gib,
                runner: contents.runner,
                agent: contents.agent,
                speaks: agent::speaks,
            }),
        })
    })
    .await
}

/// Puts a transfer's progress into the log every few seconds.
struct Teller<'a> {
    report: &'a ImageReport,
    last: Mutex<Option<Instant>>,
}

impl Teller<'_> {
    fn tell(&self, progress: TransferProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        let Ok(mut last) = self.last.lock() else {
            return;
        };
        if last.is_none() {
            self.report.enter("fetching");
        }
        if last.is_some_and(|at| at.elapsed() < EVERY) {
            return;
        }
        *last = Some(Instant::now());
        let (done, total) = (progress.done_bytes >> 20, progress.total_bytes >> 20);
        self.report.detail(format!("{done} of {total} MiB"));
        tracing::info!("image: {done} of {total} MiB fetched");
    }
}

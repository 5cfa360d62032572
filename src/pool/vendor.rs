//! The vendor's image for a build, with its download in the log.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::builder::BuildError;
use super::host::{Machines, chain};
use super::machine;
use super::spec::PoolSpec;
use crate::image::{self, LocalImage, SourceProgress};

/// The vendor's image as a verified local file.
pub async fn local_image(
    spec: &PoolSpec,
    machines: &Machines,
    closing: &mut watch::Receiver<bool>,
) -> Result<LocalImage, BuildError> {
    let teller = DownloadTeller::default();
    let tell = |progress| teller.tell(progress);
    let image = tokio::select! {
        image = image::obtain(&spec.image, &machines.store, &tell) => image?,
        () = machine::asked(closing) => return Err(BuildError::Closing),
    };
    if let Some(reason) = &image.outdated {
        tracing::warn!("going on with the last verified image: {}", chain(reason));
    }
    Ok(image)
}

/// Puts a download's progress into the log: each stage once, and a long one every few seconds.
#[derive(Default)]
struct DownloadTeller {
    last: Mutex<Option<Instant>>,
}

impl DownloadTeller {
    fn tell(&self, progress: SourceProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        match progress {
            SourceProgress::Looking => tracing::info!("image: asking what there is"),
            SourceProgress::Verifying => tracing::info!("image: verifying"),
            SourceProgress::Downloading {
                done_bytes,
                total_bytes,
            } => {
                let Ok(mut last) = self.last.lock() else {
                    return;
                };
                if last.is_some_and(|at| at.elapsed() < EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                let done = done_bytes >> 20;
                match total_bytes {
                    Some(total_bytes) => tracing::info!(
                        done_bytes,
                        total_bytes,
                        "image: {done} of {} MiB downloaded",
                        total_bytes >> 20
                    ),
                    None => tracing::info!(done_bytes, "image: {done} MiB downloaded"),
                }
            }
        }
    }
}

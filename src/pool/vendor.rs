//! The vendor's image for a build, with its download in the log.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::builder::BuildError;
use super::host::Host;
use super::machine;
use super::status::ImageReport;
use crate::chain::chain;
use crate::image::{self, LocalImage, SourceProgress};

/// The vendor's image as a verified local file.
pub async fn local_image(
    host: &Host,
    closing: &mut watch::Receiver<bool>,
) -> Result<LocalImage, BuildError> {
    let store = host.store().ok_or(BuildError::Closing)?;
    let teller = DownloadTeller {
        report: &host.image,
        last: Mutex::default(),
    };
    let tell = |progress| teller.tell(progress);
    let image = tokio::select! {
        image = image::obtain(&host.spec().image, store, &tell) => image?,
        () = machine::asked(closing) => return Err(BuildError::Closing),
    };
    if let Some(reason) = &image.outdated {
        tracing::warn!("going on with the last verified image: {}", chain(reason));
    }
    Ok(image)
}

/// Puts a download's progress into the log: each stage once, and a long one every few seconds.
struct DownloadTeller<'a> {
    report: &'a ImageReport,
    last: Mutex<Option<Instant>>,
}

impl DownloadTeller<'_> {
    fn tell(&self, progress: SourceProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        match progress {
            SourceProgress::Looking => tracing::info!("image: asking what there is"),
            SourceProgress::Verifying => {
                self.report.enter("verifying");
                tracing::info!("image: verifying");
            }
            SourceProgress::Downloading {
                done_bytes,
                total_bytes,
            } => {
                let Ok(mut last) = self.last.lock() else {
                    return;
                };
                if last.is_none() {
                    self.report.enter("downloading");
                }
                if last.is_some_and(|at| at.elapsed() < EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                let done = done_bytes >> 20;
                self.report.detail(match total_bytes {
                    Some(total_bytes) => format!("{done} of {} MiB", total_bytes >> 20),
                    None => format!("{done} MiB"),
                });
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

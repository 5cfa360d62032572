//! Why an image could not be had, each with its remedy.

use crate::image::ImageError;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Store(#[from] ImageError),
    #[error("a task of the download failed")]
    Task(#[source] tokio::task::JoinError),
}

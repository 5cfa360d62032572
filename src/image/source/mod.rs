//! Where the vendor's image comes from, and how it becomes a local file that may be trusted.
//!
//! [`obtain`] is the one way in: whoever builds a generation calls it and reads the file it
//! answers with.

mod error;

use std::path::PathBuf;

pub use error::SourceError;

use super::inputs::open_image;
use super::store::Store;

/// The vendor's image as the operator asks for it: `vm_image` and the keys beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSource {
    pub image: ImageName,
}

impl From<ImageName> for ImageSource {
    fn from(image: ImageName) -> Self {
        Self { image }
    }
}

/// What `vm_image` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// The operator's own qcow2 or raw file.
    Path(PathBuf),
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

/// What [`obtain`] is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceProgress {
    /// Asking the vendor what there is.
    Looking,
    /// Fetching the image. The size is not always told beforehand.
    Downloading {
        done_bytes: u64,
        total_bytes: Option<u64>,
    },
    /// Reading the file back against its checksums.
    Verifying,
}

/// Is told how far [`obtain`] is, several times a second; it must not block.
pub type TellProgress<'a> = &'a (dyn Fn(SourceProgress) + Send + Sync);

/// An image on this host, ready to be built from.
#[derive(Debug)]
pub struct LocalImage {
    pub path: PathBuf,
    /// SHA-256 of its content, in hexadecimal: what it counts as in a generation's key.
    pub sha256: String,
    /// Why this is not what the vendor offers now, but the last verified one.
    pub outdated: Option<SourceError>,
}

/// Makes the image of a source a local file: asks the vendor, downloads and verifies what is
/// not in the store yet.
pub async fn obtain(
    source: &ImageSource,
    store: &Store,
    _progress: TellProgress<'_>,
) -> Result<LocalImage, SourceError> {
    match &source.image {
        ImageName::Path(path) => {
            let path = path.clone();
            let hashes = store.hashes();
            blocking(move || {
                let file = open_image(&path)?;
                Ok(LocalImage {
                    sha256: hashes.content_hash(&path, &file)?,
                    path,
                    outdated: None,
                })
            })
            .await
        }
    }
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(SourceError::Task)?
}

//! Where the vendor's image comes from, and how it becomes a local file that may be trusted.
//!
//! [`obtain`] is the one way in: whoever builds a generation calls it and reads the file it
//! answers with.
//!
//! ```text
//!  ImageSource ─> what the vendor offers ─> older than before? ─> in the store? ─> LocalImage
//!  (name.rs)      (ubuntu.rs, debian.rs)     refused (offer.rs)    │ no              ^
//!                  signature (openpgp.rs)                          v                 │
//!                                              download, checksums (download.rs) ────┘
//! ```
//!
//! Nothing that fails touches what is there: the image that was verified last is answered with,
//! and why it is not a newer one.

mod checksum;
mod debian;
mod download;
mod error;
pub(super) mod http;
mod name;
mod offer;
pub(super) mod openpgp;
mod shelf;
#[cfg(test)]
pub(super) mod testing;
mod ubuntu;

use std::fs::File;
use std::path::{Path, PathBuf};

use reqwest::Url;

pub use checksum::Checksum;
pub use error::SourceError;
pub use name::{DebianRelease, ImageName, ImageSource, UbuntuRelease, Vendor, mirror};

use super::inputs::open_image;
use super::store::Store;
use http::{Client, Patience};
use offer::{Accepted, Offer};
use openpgp::Keyring;
use shelf::Shelf;

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

/// An image on this host, ready to be built from. One of the store stays there until this is
/// dropped.
#[derive(Debug)]
pub struct LocalImage {
    pub path: PathBuf,
    /// SHA-256 of its content: what it counts as in a generation's key.
    pub sha256: String,
    /// Why this is not what the vendor offers now, but the last verified one.
    pub outdated: Option<SourceError>,
    /// Locked, shared.
    _held: File,
}

impl LocalImage {
    fn held(path: PathBuf, sha256: String, file: File) -> Self {
        Self {
            path,
            sha256,
            outdated: None,
            _held: file,
        }
    }
}

/// Makes the image of a source a local file: asks the vendor, downloads and verifies what is
/// not in the store yet. Where that fails and an image of that source was verified before, that
/// one is the answer, with the failure beside it.
pub async fn obtain(
    source: &ImageSource,
    store: &Store,
    tell: TellProgress<'_>,
) -> Result<LocalImage, SourceError> {
    obtain_with(source, &Shelf::of(store), tell, Client::new).await
}

/// The image of a source that was verified last, without asking anybody.
pub async fn stored(
    source: &ImageSource,
    store: &Store,
) -> Result<Option<LocalImage>, SourceError> {
    let shelf = Shelf::of(store);
    match &source.image {
        ImageName::Path(path) => operators_own(path, &shelf).await.map(Some),
        ImageName::Url(_) => shelf.find(source.pinned()?).await,
        ImageName::Registry(name) => Err(SourceError::Prepared {
            name: name.to_string(),
        }),
        ImageName::Vendor(vendor) => shelf.last(vendor).await,
    }
}

async fn obtain_with(
    source: &ImageSource,
    shelf: &Shelf,
    tell: TellProgress<'_>,
    client: impl FnOnce(Patience) -> Result<Client, SourceError> + Send + 'static,
) -> Result<LocalImage, SourceError> {
    match &source.image {
        ImageName::Path(path) => operators_own(path, shelf).await,
        ImageName::Registry(name) => Err(SourceError::Prepared {
            name: name.to_string(),
        }),
        ImageName::Url(url) => {
            let checksum = source.pinned()?;
            // There is no newer one than the one that is named by its content.
            if let Some(image) = shelf.find(checksum.clone()).await? {
                return Ok(image);
            }
            let client = blocking(move || client(Patience::LONG)).await?;
            shelf
                .fetch(&client, &Offer::pinned(url, checksum), tell)
                .await
        }
        ImageName::Vendor(vendor) => {
            let last = shelf.last(vendor).await?;
            let patience = match last {
                Some(_) => Patience::SHORT,
                None => Patience::LONG,
            };
            let newest = async {
                let client = blocking(move || client(patience)).await?;
                newest(vendor, source, shelf, tell, &client).await
            };
            match (newest.await, last) {
                (Err(error), Some(last)) => Ok(LocalImage {
                    outdated: Some(error),
                    ..last
                }),
                (newest, _) => newest,
            }
        }
    }
}

async fn operators_own(path: &Path, shelf: &Shelf) -> Result<LocalImage, SourceError> {
    let (path, hashes) = (path.to_owned(), shelf.hashes().clone());
    blocking(move || {
        let file = open_image(&path)?;
        let sha256 = hashes.content_hash(&path, &file)?;
        Ok(LocalImage::held(path, sha256, file))
    })
    .await
}

/// What the vendor offers now, downloaded if need be.
async fn newest(
    vendor: &Vendor,
    source: &ImageSource,
    shelf: &Shelf,
    tell: TellProgress<'_>,
    client: &Client,
) -> Result<LocalImage, SourceError> {
    tell(SourceProgress::Looking);
    let offer = discover(vendor, source, client).await?;
    if let Some(accepted) = Accepted::read(shelf.images(), vendor)? {
        accepted.check(&offer, shelf.images(), vendor)?;
    }
    let image = match shelf.published(&offer.checksum).await? {
        Some(image) => image,
        None => {
            tracing::info!("image: {vendor} is {}", offer.url);
            shelf.fetch(client, &offer, tell).await?
        }
    };
    shelf.accept(vendor, &offer, &image).await?;
    Ok(image)
}

async fn discover(
    vendor: &Vendor,
    source: &ImageSource,
    client: &Client,
) -> Result<Offer, SourceError> {
    let base = |vendors: &str| match &source.mirror {
        Some(mirror) => Ok(mirror.clone()),
        None => Url::parse(vendors).map_err(|e| SourceError::BadIndex {
            url: vendors.to_owned(),
            reason: e.to_string(),
        }),
    };
    match vendor {
        Vendor::Ubuntu(release) => {
            let keyring = source.keyring.clone();
            let keyring = blocking(move || Keyring::ubuntu(keyring.as_deref())).await?;
            ubuntu::discover(client, &base(ubuntu::BASE)?, release, &keyring).await
        }
        Vendor::Debian(release) => debian::discover(client, &base(debian::BASE)?, release).await,
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

#[cfg(test)]
#[path = "obtain_test.rs"]
mod tests;

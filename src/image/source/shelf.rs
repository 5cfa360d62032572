//! The images that are in the store already, and the way of a new one there.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::checksum::Checksum;
use super::download::{PART_SUFFIX, Partial, Wanted, download, image_name, is_named};
use super::http::Client;
use super::name::Vendor;
use super::offer::{Accepted, Offer, RECORD_PREFIX};
use super::{LocalImage, SourceError, SourceProgress, TellProgress, blocking};
use crate::image::ImageError;
use crate::image::dir::Dir;
use crate::image::store::{Hashes, Store};

/// An interrupted download that nobody continued for so long is removed.
const PART_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// `images/` of the store.
#[derive(Debug, Clone)]
pub struct Shelf {
    images: Arc<Dir>,
    hashes: Hashes,
}

impl Shelf {
    pub fn of(store: &Store) -> Self {
        Self {
            images: store.images(),
            hashes: store.hashes(),
        }
    }

    pub fn images(&self) -> &Dir {
        &self.images
    }

    pub fn hashes(&self) -> &Hashes {
        &self.hashes
    }

    /// The last verified image of a vendor's release, if it is still what it was.
    pub async fn last(&self, vendor: &Vendor) -> Result<Option<LocalImage>, SourceError> {
        match Accepted::read(&self.images, vendor)? {
            Some(accepted) => self.find(accepted.sha256).await,
            None => Ok(None),
        }
    }

    /// The image of this content, held until dropped. One that has changed is removed.
    pub async fn find(&self, sha256: Checksum) -> Result<Option<LocalImage>, SourceError> {
        let shelf = self.clone();
        blocking(move || {
            let name = image_name(&sha256);
            let Some(file) = shelf.images.open(&name)? else {
                return Ok(None);
            };
            // Whoever has it alone is about to remove it.
            let held = flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
            if !held || !is_named(&shelf.images, &name, &file)? {
                return Ok(None);
            }
            let path = shelf.images.at(&name);
            if shelf.hashes.content_hash(&path, &file)? == sha256.as_str() {
                return Ok(Some(LocalImage::held(path, sha256.into(), file)));
            }
            tracing::warn!("{} has changed and is removed", path.display());
            shelf.images.remove(&name)?;
            Ok(None)
        })
        .await
    }

    /// The image of which a vendor publishes this checksum.
    pub async fn published(&self, checksum: &Checksum) -> Result<Option<LocalImage>, SourceError> {
        if checksum.is_sha256() {
            return self.find(checksum.clone()).await;
        }
        for record in self.records()? {
            if record.checksum == *checksum {
                return self.find(record.sha256).await;
            }
        }
        Ok(None)
    }

    fn records(&self) -> Result<Vec<Accepted>, SourceError> {
        let mut records = Vec::new();
        for name in self.images.names()? {
            if name.starts_with(RECORD_PREFIX) {
                records.extend(Accepted::read_file(&self.images, &name)?);
            }
        }
        Ok(records)
    }

    /// Downloads and verifies a file, unless it is there by the time it is our turn.
    pub async fn fetch(
        &self,
        client: &Client,
        offer: &Offer,
        tell: TellProgress<'_>,
    ) -> Result<LocalImage, SourceError> {
        let partial = Partial::open(&self.images, &offer.checksum).await?;
        if let Some(image) = self.published(&offer.checksum).await? {
            return Ok(image);
        }
        let wanted = Wanted {
            url: &offer.url,
            checksum: &offer.checksum,
            bytes: offer.bytes,
        };
        let continued = partial.len()? > 0;
        download(client, &wanted, &partial, tell).await?;
        tell(SourceProgress::Verifying);
        let (partial, result) = self.verify(partial, offer).await?;
        match result {
            Err(error @ SourceError::WrongChecksum { .. }) if continued => {
                // Perhaps its beginning was of another file of that name.
                tracing::warn!("downloading it anew: {error}");
                download(client, &wanted, &partial, tell).await?;
                tell(SourceProgress::Verifying);
                self.verify(partial, offer).await?.1
            }
            result => result,
        }
    }

    async fn verify(
        &self,
        partial: Partial,
        offer: &Offer,
    ) -> Result<(Partial, Result<LocalImage, SourceError>), SourceError> {
        let (shelf, offer) = (self.clone(), offer.clone());
        blocking(move || {
            let wanted = Wanted {
                url: &offer.url,
                checksum: &offer.checksum,
                bytes: offer.bytes,
            };
            let result = partial.finish(&wanted).and_then(|(file, sha256)| {
                shelf.hashes.remember(&file, sha256.as_str())?;
                let path = shelf.images.at(&image_name(&sha256));
                Ok(LocalImage::held(path, sha256.into(), file))
            });
            Ok((partial, result))
        })
        .await
    }

    /// Makes an image the last accepted one of its name, and removes what it replaces.
    pub async fn accept(
        &self,
        vendor: &Vendor,
        offer: &Offer,
        image: &LocalImage,
    ) -> Result<(), SourceError> {
        let sha256 = image.sha256.parse();
        let sha256 = sha256.map_err(|reason| SourceError::DamagedRecord {
            path: image.path.clone(),
            reason,
        })?;
        let mut new = Accepted::new(vendor, offer, sha256);
        let (shelf, vendor) = (self.clone(), vendor.clone());
        blocking(move || {
            let old = Accepted::read(&shelf.images, &vendor)?;
            if let Some(old) = &old {
                new.former = shelf.former(old, &new)?;
            }
            if old.as_ref() != Some(&new) {
                new.write(&shelf.images, &vendor)?;
            }
            // What is left over is untidy, not wrong.
            if let Err(e) = shelf.tidy(&new.former) {
                tracing::warn!("tidy {}: {e}", shelf.images.path().display());
            }
            Ok(())
        })
        .await
    }

    /// What a new image replaces and is still there.
    fn former(&self, old: &Accepted, new: &Accepted) -> Result<Vec<Checksum>, SourceError> {
        let mut former = Vec::new();
        for sha256 in old.former.iter().chain([&old.sha256]) {
            let is_there = self.images.open(&image_name(sha256))?.is_some();
            if is_there && *sha256 != new.sha256 && !former.contains(sha256) {
                former.push(sha256.clone());
            }
        }
        Ok(former)
    }

    /// Removes replaced images unless they are in use or have another name, and old partial files.
    fn tidy(&self, replaced: &[Checksum]) -> Result<(), SourceError> {
        let records = self.records()?;
        let named: Vec<&Checksum> = records.iter().map(|record| &record.sha256).collect();
        for sha256 in replaced.iter().filter(|sha256| !named.contains(sha256)) {
            self.remove_unused(&image_name(sha256), |_file| true)?;
        }
        let is_old = |file: &File| {
            let modified = file.metadata().and_then(|meta| meta.modified());
            let age = modified.map(|at| SystemTime::now().duration_since(at));
            matches!(age, Ok(Ok(age)) if age > PART_AGE)
        };
        for name in self.images.names()? {
            if name.ends_with(PART_SUFFIX) {
                self.remove_unused(&name, is_old)?;
            }
        }
        Ok(())
    }

    fn remove_unused(&self, name: &str, wanted: impl Fn(&File) -> bool) -> Result<(), ImageError> {
        let Some(file) = self.images.open(name)? else {
            return Ok(());
        };
        let unused = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if unused && wanted(&file) {
            self.images.remove(name)?;
        }
        Ok(())
    }
}

//! What a vendor offers, and what of it was taken before.
//!
//! For each name that operators use there is one small record in the store: the release, serial
//! and signature time that were accepted last. An offer that is older is refused, so whoever
//! controls a mirror cannot bring back an image with known holes, signed though it was.

use reqwest::Url;
use serde::{Deserialize, Serialize};

use super::SourceError;
use super::checksum::Checksum;
use super::name::Vendor;
use crate::image::ImageError;
use crate::image::dir::Dir;

/// The version that this program reads and writes.
const VERSION: u32 = 1;
const MAX_RECORD: u64 = 16 << 10;
/// The record of `ubuntu:24.04` is `accepted-ubuntu-24.04.json`.
pub const RECORD_PREFIX: &str = "accepted-";

/// One image file that a vendor offers.
#[derive(Debug, Clone)]
pub struct Offer {
    pub url: Url,
    pub checksum: Checksum,
    pub bytes: Option<u64>,
    /// Such as 24.04.
    pub release: String,
    /// The vendor's number of this build.
    pub serial: String,
    /// When it was signed, in seconds since 1970, where it is.
    pub signed_at: Option<u32>,
}

impl Offer {
    /// A file that the operator named by its content.
    pub fn pinned(url: &Url, checksum: Checksum) -> Self {
        Self {
            url: url.clone(),
            checksum,
            bytes: None,
            release: String::new(),
            serial: String::new(),
            signed_at: None,
        }
    }
}

/// What was taken last under a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    version: u32,
    image: String,
    release: String,
    serial: String,
    signed_at: Option<u32>,
    /// What the vendor publishes of it.
    pub checksum: Checksum,
    /// What it is called in the store.
    pub sha256: Checksum,
    /// What was taken before and could not be removed then.
    #[serde(default)]
    pub former: Vec<Checksum>,
}

impl Accepted {
    pub fn new(vendor: &Vendor, offer: &Offer, sha256: Checksum) -> Self {
        Self {
            version: VERSION,
            image: vendor.to_string(),
            release: offer.release.clone(),
            serial: offer.serial.clone(),
            signed_at: offer.signed_at,
            checksum: offer.checksum.clone(),
            sha256,
            former: Vec::new(),
        }
    }

    /// The record of a name. One that is damaged is an error: it must not read as "never taken".
    pub fn read(images: &Dir, vendor: &Vendor) -> Result<Option<Self>, SourceError> {
        Self::read_file(images, &record_name(vendor))
    }

    /// The record in a file of this name.
    pub fn read_file(images: &Dir, name: &str) -> Result<Option<Self>, SourceError> {
        let damaged = |reason: String| SourceError::DamagedRecord {
            path: images.at(name),
            reason,
        };
        if images.open(name)?.is_none() {
            return Ok(None);
        }
        let bytes = images.read_small(name, MAX_RECORD)?;
        let bytes = bytes.ok_or_else(|| damaged("it is too large".to_owned()))?;
        let record: Self = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("version {}", record.version)));
        }
        Ok(Some(record))
    }

    pub fn write(&self, images: &Dir, vendor: &Vendor) -> Result<(), SourceError> {
        let name = record_name(vendor);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| ImageError::file("encode", &images.at(&name))(e.into()))?;
        Ok(images.write_atomic(&name, &text)?)
    }

    /// Refuses an offer that is older than this.
    pub fn check(&self, offer: &Offer, images: &Dir, vendor: &Vendor) -> Result<(), SourceError> {
        let older = offer.signed_at < self.signed_at
            || numbers(&offer.release) < numbers(&self.release)
            || (offer.release == self.release && numbers(&offer.serial) < numbers(&self.serial));
        if !older {
            return Ok(());
        }
        let show = |release: &str, serial: &str, signed_at: Option<u32>| match signed_at {
            Some(at) => format!("{release} of {serial} signed at {at}"),
            None => format!("{release} of {serial}"),
        };
        Err(SourceError::Downgrade {
            image: vendor.to_string(),
            offered: show(&offer.release, &offer.serial, offer.signed_at),
            accepted: show(&self.release, &self.serial, self.signed_at),
            record: images.at(&record_name(vendor)),
        })
    }
}

fn record_name(vendor: &Vendor) -> String {
    format!("{RECORD_PREFIX}{}.json", vendor.slug())
}

/// The numbers in a version or serial, which sort as people mean them: 24.10 behind 24.4.
pub fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().unwrap_or(u64::MAX))
        .collect()
}

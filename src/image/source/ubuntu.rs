//! What Ubuntu offers: its index of released images, then the signed checksums beside the image.
//!
//! The index is not signed. It only says where to look: the name of the file must be the one of
//! the release that was asked for, and its checksum the one that was signed.

use std::collections::BTreeMap;

use reqwest::Url;
use serde::Deserialize;

use super::SourceError;
use super::checksum::{Checksum, listed};
use super::http::Client;
use super::name::UbuntuRelease;
use super::offer::{Offer, numbers};
use super::openpgp::Keyring;

pub const BASE: &str = "https://cloud-images.ubuntu.com/";
const INDEX: &str = "releases/streams/v1/com.ubuntu.cloud:released:download.json";
const ARCH: &str = "amd64";
/// The real index has some megabytes.
const MAX_INDEX: usize = 64 << 20;
const MAX_SUMS: usize = 1 << 20;
const MAX_SIGNATURE: usize = 64 << 10;

#[derive(Debug, Deserialize)]
struct Index {
    products: BTreeMap<String, Product>,
}

#[derive(Debug, Deserialize)]
struct Product {
    #[serde(default)]
    arch: String,
    /// The codename.
    #[serde(default)]
    release: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    release_title: String,
    #[serde(default)]
    supported: bool,
    #[serde(default)]
    versions: BTreeMap<String, Version>,
}

#[derive(Debug, Deserialize)]
struct Version {
    #[serde(default)]
    items: BTreeMap<String, Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    #[serde(default)]
    ftype: String,
    #[serde(default)]
    path: String,
    sha256: Option<Checksum>,
    size: Option<u64>,
}

/// Asks for the newest image of a release.
pub async fn discover(
    client: &Client,
    base: &Url,
    release: &UbuntuRelease,
    keyring: &Keyring,
) -> Result<Offer, SourceError> {
    let index_url = below(base, INDEX)?;
    let bytes = client.small(&index_url, MAX_INDEX, false).await?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| SourceError::BadIndex {
        url: index_url.to_string(),
        reason: e.to_string(),
    })?;
    let offer = choose(&index, base, &index_url, release)?;
    let sums_url = below(&offer.url, "SHA256SUMS")?;
    let signature_url = below(&offer.url, "SHA256SUMS.gpg")?;
    let sums = client.small(&sums_url, MAX_SUMS, false).await?;
    let signature = client.small(&signature_url, MAX_SIGNATURE, false).await?;
    let signed = keyring
        .verify(&sums, &signature)
        .map_err(|reason| SourceError::BadSignature {
            url: signature_url.to_string(),
            reason,
        })?;
    let name = file_name(&offer.url);
    let sum =
        listed(&String::from_utf8_lossy(&sums), name).ok_or_else(|| SourceError::NotListed {
            url: sums_url.to_string(),
            name: name.to_owned(),
        })?;
    if sum != offer.checksum {
        return Err(SourceError::IndexDisagrees {
            url: sums_url.to_string(),
            name: name.to_owned(),
        });
    }
    Ok(Offer {
        signed_at: Some(signed.at),
        ..offer
    })
}

/// The newest image that the index has of a release, not yet verified.
fn choose(
    index: &Index,
    base: &Url,
    index_url: &Url,
    release: &UbuntuRelease,
) -> Result<Offer, SourceError> {
    let ours = |product: &&Product| product.arch == ARCH;
    let product = index
        .products
        .iter()
        .filter(|(key, _)| key.starts_with("com.ubuntu.cloud:server:"))
        .map(|(_, product)| product)
        .filter(ours)
        .filter(|product| match release {
            UbuntuRelease::LatestLts => product.supported && product.release_title.contains("LTS"),
            UbuntuRelease::Version(version) => product.version == *version,
            UbuntuRelease::Codename(name) => product.release == *name,
        })
        .max_by_key(|product| numbers(&product.version))
        .ok_or_else(|| no_release(index, index_url, release))?;
    let bad = |reason: String| SourceError::BadIndex {
        url: index_url.to_string(),
        reason,
    };
    let newest = product
        .versions
        .iter()
        .filter_map(|(serial, version)| {
            let mut items = version.items.values();
            Some((serial, items.find(|item| item.ftype == "disk1.img")?))
        })
        .max_by_key(|(serial, _)| numbers(serial));
    let Some((serial, item)) = newest else {
        return Err(bad(format!("{} has no disk image", product.version)));
    };
    let url = below(base, &item.path)?;
    let expected = format!("ubuntu-{}-server-cloudimg-{ARCH}.img", product.version);
    if file_name(&url) != expected {
        return Err(bad(format!("{} is not {expected}", item.path)));
    }
    let checksum = item.sha256.clone().filter(Checksum::is_sha256);
    Ok(Offer {
        url,
        checksum: checksum.ok_or_else(|| bad(format!("{expected} has no SHA-256")))?,
        bytes: item.size,
        release: product.version.clone(),
        serial: serial.clone(),
        signed_at: None,
    })
}

fn no_release(index: &Index, url: &Url, release: &UbuntuRelease) -> SourceError {
    let mut known: Vec<&str> = index
        .products
        .values()
        .filter(|product| product.arch == ARCH && product.supported)
        .map(|product| product.version.as_str())
        .collect();
    known.sort_by_key(|version| numbers(version));
    SourceError::NoRelease {
        url: url.to_string(),
        wanted: match release {
            UbuntuRelease::LatestLts => "supported LTS release".to_owned(),
            UbuntuRelease::Version(name) | UbuntuRelease::Codename(name) => name.clone(),
        },
        known: known.join(", "),
    }
}

/// A path of an index below a base URL, which it must not leave.
pub fn below(base: &Url, path: &str) -> Result<Url, SourceError> {
    let plain = |part: &str| {
        let safe = |b: u8| b.is_ascii_alphanumeric() || b"-_.:+~".contains(&b);
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(safe)
    };
    let bad = || SourceError::BadIndex {
        url: base.to_string(),
        reason: format!("{path:?} is not a path below it"),
    };
    let inner = path.strip_suffix('/').unwrap_or(path);
    if !inner.split('/').all(plain) {
        return Err(bad());
    }
    // A first part with a colon would be taken for a scheme.
    base.join(&format!("./{path}")).map_err(|_bad| bad())
}

pub fn file_name(url: &Url) -> &str {
    url.path().rsplit('/').next().unwrap_or_default()
}

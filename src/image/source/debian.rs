//! What Debian offers: dated folders of a release, each with its checksums.
//!
//! Debian does not sign them: that they come over https from its server is all there is.

use reqwest::{StatusCode, Url};

use super::SourceError;
use super::checksum::listed;
use super::http::Client;
use super::name::DebianRelease;
use super::offer::{Offer, numbers};
use super::ubuntu::below;

pub const BASE: &str = "https://cloud.debian.org/images/cloud/";
const MAX_LISTING: usize = 4 << 20;
const MAX_SUMS: usize = 1 << 20;
/// Folders looked into; the newest may be in the middle of its upload.
const FOLDERS: usize = 3;

/// Asks for the newest image of a release.
pub async fn discover(
    client: &Client,
    base: &Url,
    release: &DebianRelease,
) -> Result<Offer, SourceError> {
    let folder = below(base, &format!("{}/", release.codename))?;
    let listing = client.small(&folder, MAX_LISTING, true).await?;
    let stamps = stamps(&String::from_utf8_lossy(&listing));
    for stamp in stamps.iter().rev().take(FOLDERS) {
        let sums_url = below(&folder, &format!("{stamp}/SHA512SUMS"))?;
        let sums = match client.small(&sums_url, MAX_SUMS, false).await {
            Err(SourceError::Status { status, .. }) if status == StatusCode::NOT_FOUND => continue,
            sums => sums?,
        };
        let name = format!("debian-{}-genericcloud-amd64-{stamp}.qcow2", release.number);
        let sum = listed(&String::from_utf8_lossy(&sums), &name)
            .filter(|sum| !sum.is_sha256())
            .ok_or_else(|| SourceError::NotListed {
                url: sums_url.to_string(),
                name: name.clone(),
            })?;
        return Ok(Offer {
            url: below(&sums_url, &name)?,
            checksum: sum,
            bytes: None,
            release: release.number.to_owned(),
            serial: stamp.clone(),
            signed_at: None,
        });
    }
    Err(SourceError::NoRelease {
        url: folder.to_string(),
        wanted: format!("image of Debian {}", release.number),
        known: match stamps.is_empty() {
            true => "no dated folders".to_owned(),
            false => format!("the folders {}", stamps.join(", ")),
        },
    })
}

/// The dated folders that a listing links to, oldest first.
fn stamps(listing: &str) -> Vec<String> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let mut found: Vec<String> = listing
        .split("href=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .map(|link| link.trim_start_matches("./").trim_end_matches('/'))
        .filter(|link| {
            let parts = link.split_once('-');
            parts.is_some_and(|(day, build)| day.len() == 8 && is_number(day) && is_number(build))
        })
        .map(str::to_owned)
        .collect();
    found.sort_by_key(|stamp| numbers(stamp));
    found.dedup();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_sort_as_numbers_and_other_links_are_not_folders() {
        let listing = r#"<a href="../">Up</a><a href="20260901-2300/">x</a>
            <a href="20260901-999/">x</a><a href="./20251231-1/">x</a>
            <a href="latest/">x</a><a href="daily/">x</a><a href="20260901-2300/">again</a>
            <a href="2026090-1/">x</a><a href="20260902-../">x</a>"#;
        assert_eq!(
            stamps(listing),
            ["20251231-1", "20260901-999", "20260901-2300"]
        );
    }
}

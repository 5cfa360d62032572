//! What the operator calls the image: `vm_image` and the keys beside it, parsed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use reqwest::Url;

use super::SourceError;
use super::checksum::Checksum;
use crate::image::registry::RegistryName;

/// Debian's releases, whose folders are named by codename alone.
const DEBIAN: [(&str, &str); 4] = [
    ("11", "bullseye"),
    ("12", "bookworm"),
    ("13", "trixie"),
    ("14", "forky"),
];

/// The vendor's image as the operator asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSource {
    /// `vm_image`
    pub image: ImageName,
    /// `vm_image_sha256`: what an image by URL must be.
    pub sha256: Option<Checksum>,
    /// `image_mirror`: stands for the vendor's own base URL; ends in a slash.
    pub mirror: Option<Url>,
    /// `vm_image_keyring`: a file of OpenPGP keys that may sign beside the vendor's.
    pub keyring: Option<PathBuf>,
}

impl ImageSource {
    /// What an image by URL must be.
    pub(super) fn pinned(&self) -> Result<Checksum, SourceError> {
        self.sha256.clone().ok_or(SourceError::NoChecksum)
    }
}

impl From<ImageName> for ImageSource {
    fn from(image: ImageName) -> Self {
        Self {
            image,
            sha256: None,
            mirror: None,
            keyring: None,
        }
    }
}

/// What `vm_image` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageName {
    /// The operator's own qcow2 or raw file: an absolute path.
    Path(PathBuf),
    /// A file on an https server, which a checksum must go with.
    Url(Url),
    /// What a vendor offers newest of a release.
    Vendor(Vendor),
    /// A prepared image in a registry.
    Registry(RegistryName),
}

/// A vendor that publishes images in a way known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vendor {
    Ubuntu(UbuntuRelease),
    Debian(DebianRelease),
}

/// Which Ubuntu.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UbuntuRelease {
    /// The newest long-term release that is supported.
    LatestLts,
    /// Such as 24.04.
    Version(String),
    /// Such as noble.
    Codename(String),
}

/// Which Debian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DebianRelease {
    pub number: &'static str,
    pub codename: &'static str,
}

impl FromStr for ImageName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Ok(Self::Path(PathBuf::from(text)));
        }
        if text.starts_with("https://") {
            return https_url(text).map(Self::Url);
        }
        if text.starts_with("http://") {
            return Err("plain http is not safe: use https".to_owned());
        }
        if text.starts_with("oci://") {
            return text.parse().map(Self::Registry);
        }
        let (vendor, release) = match text.split_once(':') {
            Some((vendor, release)) => (vendor, Some(release)),
            None => (text, None),
        };
        let vendor = match (vendor, release) {
            ("ubuntu", None) => Vendor::Ubuntu(UbuntuRelease::LatestLts),
            ("ubuntu", Some(release)) => Vendor::Ubuntu(ubuntu(release)?),
            ("debian", Some(release)) => Vendor::Debian(debian(release)?),
            ("debian", None) => return Err("name its release, such as debian:13".to_owned()),
            _ => return Err(String::new()),
        };
        Ok(Self::Vendor(vendor))
    }
}

fn ubuntu(release: &str) -> Result<UbuntuRelease, String> {
    let digits = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
    if let Some((year, month)) = release.split_once('.')
        && digits(year)
        && digits(month)
    {
        return Ok(UbuntuRelease::Version(release.to_owned()));
    }
    let is_word = (1..=32).contains(&release.len());
    if is_word && release.bytes().all(|b| b.is_ascii_lowercase()) {
        return Ok(UbuntuRelease::Codename(release.to_owned()));
    }
    Err("an Ubuntu release is a version such as 24.04 or a codename such as noble".to_owned())
}

fn debian(release: &str) -> Result<DebianRelease, String> {
    DEBIAN
        .iter()
        .find(|(number, codename)| [number, codename].contains(&&release))
        .map(|(number, codename)| DebianRelease { number, codename })
        .ok_or_else(|| {
            let known: Vec<&str> = DEBIAN.iter().map(|(number, _)| *number).collect();
            format!("the Debian releases known here are {}", known.join(", "))
        })
}

/// A URL that is safe to fetch from.
pub fn https_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| e.to_string())?;
    match url.scheme() {
        "https" => Ok(url),
        _ => Err("plain http is not safe: use https".to_owned()),
    }
}

/// `image_mirror`: a folder, whether or not its author wrote the last slash.
pub fn mirror(text: &str) -> Result<Url, String> {
    let mut url = https_url(text)?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err("a folder has no ? or #".to_owned());
    }
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

impl Vendor {
    /// The name as part of a file's name.
    pub(super) fn slug(&self) -> String {
        self.to_string().replace(':', "-")
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Url(url) => write!(f, "{url}"),
            Self::Vendor(vendor) => write!(f, "{vendor}"),
            Self::Registry(name) => write!(f, "{name}"),
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ubuntu(UbuntuRelease::LatestLts) => f.write_str("ubuntu"),
            Self::Ubuntu(UbuntuRelease::Version(name) | UbuntuRelease::Codename(name)) => {
                write!(f, "ubuntu:{name}")
            }
            Self::Debian(release) => write!(f, "debian:{}", release.number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ImageName, String> {
        text.parse()
    }

    #[test]
    fn names_are_read_as_they_are_shown() {
        for text in [
            "ubuntu",
            "ubuntu:24.04",
            "ubuntu:noble",
            "debian:13",
            "/srv/image.qcow2",
            "https://example.org/image.qcow2",
            "oci://registry.example.org/image:1",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(parse("debian:trixie"), parse("debian:13"));
    }

    #[test]
    fn names_that_could_mean_anything_are_refused() {
        for text in [
            "",
            "image.qcow2",
            "debian",
            "debian:99",
            "ubuntu:",
            "ubuntu:24.04.1",
            "ubuntu:../noble",
            "ubuntu:Noble",
            "fedora:41",
            "http://example.org/image.qcow2",
            "https://",
            "file:///etc/passwd",
            "oci://image:1",
            "oci://registry.example.org/image",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("debian:99").unwrap_err().contains("11, 12, 13"));
        assert!(parse("http://x/").unwrap_err().contains("use https"));
    }

    #[test]
    fn a_mirror_is_a_folder() {
        for text in ["https://example.org/ubuntu", "https://example.org/ubuntu/"] {
            assert_eq!(
                mirror(text).unwrap().as_str(),
                "https://example.org/ubuntu/"
            );
        }
        assert!(mirror("http://example.org/").is_err());
        assert!(mirror("https://example.org/?a").is_err());
    }
}

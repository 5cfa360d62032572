//! What an image in a registry is called: `oci://REGISTRY/NAME:TAG` or `...@sha256:DIGEST`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use oci_client::Reference;
use sha2::{Digest as _, Sha256};

use crate::image::inputs::hex;

const SCHEME: &str = "oci://";
const HEX_LEN: usize = 64;

/// A place in a registry. The registry and what is meant by it are always written out: nothing is
/// added in silence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryName {
    reference: Reference,
    digest: Option<Digest>,
}

/// SHA-256 of a blob, as 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(String);

impl RegistryName {
    /// What the manifest must be, where the name says so.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    pub(super) fn reference(&self) -> &Reference {
        &self.reference
    }

    /// What stands after the last part of the name in a request for the manifest.
    pub(super) fn wanted(&self) -> String {
        match (&self.digest, self.reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or_default().to_owned(),
        }
    }

    /// Another manifest of the same repository.
    pub(super) fn tagged(&self, tag: &str) -> Self {
        let (registry, repository) = (self.reference.registry(), self.reference.repository());
        Self {
            reference: Reference::with_tag(registry.into(), repository.into(), tag.into()),
            digest: None,
        }
    }

    /// Whether the registry is on this host, where plain http reaches nobody else.
    pub(super) fn is_local(&self) -> bool {
        let registry = self.reference.registry();
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for RegistryName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.strip_prefix(SCHEME).unwrap_or(text);
        let (registry, _path) = text.split_once('/').unwrap_or_default();
        if !registry.contains(['.', ':']) && registry != "localhost" {
            return Err("write REGISTRY/NAME:TAG, the registry with a dot or a port".to_owned());
        }
        let reference: Reference = text.parse().map_err(|e| format!("{e}"))?;
        let digest = match reference.digest() {
            Some(digest) => Some(digest.parse::<Digest>()?),
            None => None,
        };
        // The last part of the path: a port is no tag.
        let last = text.rsplit('/').next().unwrap_or_default();
        if digest.is_none() && !last.contains(':') {
            return Err("say which: end it with :TAG or @sha256:DIGEST".to_owned());
        }
        Ok(Self { reference, digest })
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.reference.whole())
    }
}

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    pub fn as_hex(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let hex = text.strip_prefix("sha256:");
        let good = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match hex {
            Some(hex) if hex.len() == HEX_LEN && hex.bytes().all(good) => Ok(Self(hex.to_owned())),
            _ => Err("a digest is sha256: and 64 hexadecimal digits".to_owned()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RegistryName, String> {
        text.parse()
    }

    #[test]
    fn names_are_read_as_they_are_shown() {
        let digest = Digest::of(b"").to_string();
        for text in [
            "oci://registry.example.org/ci/image:1.0",
            "oci://registry.example.org:5000/image:latest",
            "oci://localhost:5000/image:a",
            &format!("oci://127.0.0.1:5000/a/b/c@{digest}"),
        ] {
            let name = parse(text).unwrap();
            assert_eq!(name.to_string(), text);
            assert_eq!(parse(text.strip_prefix("oci://").unwrap()), Ok(name));
        }
    }

    #[test]
    fn names_that_leave_something_to_be_guessed_are_refused() {
        for text in [
            "",
            "oci://",
            "image:1",
            "ci/image:1",
            "registry.example.org/image",
            "registry.example.org:5000/image",
            "registry.example.org/Image:1",
            "registry.example.org/image@sha256:12",
            "registry.example.org/../image:1",
            "registry.example.org/image:../1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_addresses_of_this_host_are_local() {
        for (text, local) in [
            ("localhost:5000/a:1", true),
            ("127.0.0.1:5000/a:1", true),
            ("127.9.9.9/a:1", true),
            ("localhost.example.org/a:1", false),
            ("127.0.0.1.example.org/a:1", false),
            ("10.0.0.1:5000/a:1", false),
        ] {
            assert_eq!(parse(text).unwrap().is_local(), local, "{text}");
        }
    }
}

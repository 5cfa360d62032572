//! Checksums: as operators and vendors write them, and of files.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha512};

use crate::image::inputs::hex;
use crate::image::seed::FromStart;

/// Bytes read at once.
const PIECE: usize = 1 << 20;

/// A SHA-256 or SHA-512 in lower-case hexadecimal; which of them its length tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Checksum(String);

impl Checksum {
    pub fn is_sha256(&self) -> bool {
        self.0.len() == 64
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 64 digits: enough to name a file.
    pub fn short(&self) -> &str {
        self.0.get(..64).unwrap_or(&self.0)
    }
}

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().all(|b| b.is_ascii_hexdigit());
        if digits && [64, 128].contains(&text.len()) {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err("not 64 or 128 hexadecimal digits".to_owned())
        }
    }
}

impl TryFrom<String> for Checksum {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        checksum.0
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Both checksums of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    pub sha256: Checksum,
    sha512: Option<Checksum>,
}

impl Sums {
    /// Reads a file from its start, and takes the SHA-512 only where `wanted` is one. Blocks.
    pub fn of(file: &File, wanted: &Checksum) -> io::Result<Self> {
        let mut sha256 = Sha256::new();
        let mut sha512 = (!wanted.is_sha256()).then(Sha512::new);
        let mut reader = FromStart::new(file);
        let mut piece = vec![0; PIECE];
        loop {
            let read = reader.read(&mut piece)?;
            let bytes = piece.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                return Ok(Self {
                    sha256: Checksum(hex(&sha256.finalize())),
                    sha512: sha512.map(|hash| Checksum(hex(&hash.finalize()))),
                });
            }
            sha256.update(bytes);
            if let Some(hash) = &mut sha512 {
                hash.update(bytes);
            }
        }
    }

    /// The one of the same kind as `wanted`.
    pub fn like(&self, wanted: &Checksum) -> &Checksum {
        match &self.sha512 {
            Some(sha512) if !wanted.is_sha256() => sha512,
            _ => &self.sha256,
        }
    }
}

/// The checksum of `name` in a SHA256SUMS or SHA512SUMS: lines of a sum, a space, a space or an
/// asterisk, and a name. Two different sums for one name are as good as none.
pub fn listed(sums: &str, name: &str) -> Option<Checksum> {
    let mut found = None;
    for line in sums.lines() {
        let Some((sum, rest)) = line.split_once(' ') else {
            continue;
        };
        if rest.strip_prefix(['*', ' ']) != Some(name) {
            continue;
        }
        let sum: Checksum = sum.parse().ok()?;
        if found.as_ref().is_some_and(|other| *other != sum) {
            return None;
        }
        found = Some(sum);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    #[test]
    fn a_sum_is_found_by_the_whole_name_and_no_other() {
        let sums = format!("{A} *image.img\n{B}  image.img.zip\n{A} *other/image.img.zip\n");
        assert_eq!(listed(&sums, "image.img").unwrap().as_str(), A);
        assert_eq!(listed(&sums, "image.img.zip").unwrap().as_str(), B);
        assert_eq!(listed(&sums, "image"), None);
        assert_eq!(listed("<html> *image.img\n", "image.img"), None);
    }

    #[test]
    fn two_sums_for_one_name_are_none() {
        let sums = format!("{A} *image.img\n{B} *image.img\n");
        assert_eq!(listed(&sums, "image.img"), None);
        let sums = format!("{A} *image.img\n{A} *image.img\n");
        assert_eq!(listed(&sums, "image.img").unwrap().as_str(), A);
    }

    #[test]
    fn a_file_has_the_sums_that_coreutils_print() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; (2 << 20) + 5]).unwrap();
        for tool in ["sha256sum", "sha512sum"] {
            let printed = crate::testing::run(&format!("{tool} {}", path.display()));
            let wanted: Checksum = printed.split(' ').next().unwrap().parse().unwrap();
            let sums = Sums::of(&File::open(&path).unwrap(), &wanted).unwrap();
            assert_eq!(*sums.like(&wanted), wanted);
        }
    }
}

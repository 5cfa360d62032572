//! What was taken last under a tag, so that a registry cannot bring back an older image, signed
//! though it was.

use serde::{Deserialize, Serialize};

use super::RegistryError;
use super::name::{Digest, RegistryName};
use crate::image::dir::Dir;
use crate::image::{ImageError, SourceError};

const VERSION: u32 = 1;
const MAX_RECORD: u64 = 16 << 10;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    version: u32,
    name: String,
    pub digest: String,
    /// In seconds since 1970, as its signer says.
    signed_at: u32,
}

impl Accepted {
    pub fn new(name: &RegistryName, digest: &Digest, signed_at: u32) -> Self {
        Self {
            version: VERSION,
            name: name.to_string(),
            digest: digest.to_string(),
            signed_at,
        }
    }

    /// The record of a name. One that is damaged is an error: it must not read as "never taken".
    pub fn read(pulls: &Dir, name: &RegistryName) -> Result<Option<Self>, RegistryError> {
        let file = record_name(name);
        if pulls.open(&file)?.is_none() {
            return Ok(None);
        }
        let bytes = pulls.read_small(&file, MAX_RECORD)?.unwrap_or_default();
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(record) if record.version == VERSION => Ok(Some(record)),
            other => Err(SourceError::DamagedRecord {
                path: pulls.at(&file),
                reason: match other {
                    Ok(record) => format!("version {}", record.version),
                    Err(e) => e.to_string(),
                },
            }
            .into()),
        }
    }

    /// Takes the place of what was taken before, unless that was signed later.
    pub fn follow(
        &self,
        before: Option<&Self>,
        pulls: &Dir,
        name: &RegistryName,
    ) -> Result<(), RegistryError> {
        let file = record_name(name);
        if let Some(before) = before.filter(|before| before.signed_at > self.signed_at) {
            return Err(RegistryError::WentBack {
                name: name.to_string(),
                digest: self.digest.parse().unwrap_or_else(|_bad| Digest::of(&[])),
                accepted: before.digest.clone(),
                record: pulls.at(&file),
            });
        }
        if before == Some(self) {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| ImageError::file("encode", &pulls.at(&file))(e.into()))?;
        Ok(pulls.write_atomic(&file, &text)?)
    }
}

fn record_name(name: &RegistryName) -> String {
    let digest = Digest::of(name.to_string().as_bytes());
    format!("accepted-{}.json", digest.as_hex())
}

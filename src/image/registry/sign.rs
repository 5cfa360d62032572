//! Signs a manifest with the operator's OpenPGP key.

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use pgp::composed::{ArmorOptions, Deserializable, DetachedSignature, SignedSecretKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::types::Password;
use rand_08::rngs::OsRng;

use super::RegistryError;

const MAX_KEY: u64 = 1 << 20;

/// A secret key that may sign.
pub struct Signer {
    path: PathBuf,
    key: SignedSecretKey,
}

impl Signer {
    /// Reads an armored or binary secret key. One with a passphrase is refused when it signs.
    pub fn read(path: &Path) -> Result<Self, RegistryError> {
        let refuse = |reason: String| RegistryError::SignKey {
            path: path.to_owned(),
            reason,
        };
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_KEY).read_to_end(&mut bytes))
            .map_err(|e| refuse(e.to_string()))?;
        let (key, _armor) = SignedSecretKey::from_reader_single(Cursor::new(bytes))
            .map_err(|e| refuse(e.to_string()))?;
        Ok(Self {
            path: path.to_owned(),
            key,
        })
    }

    /// A detached signature, armored: by the newest subkey that is for signing, else by the
    /// primary key.
    pub fn sign(&self, content: &[u8]) -> Result<Vec<u8>, RegistryError> {
        let subkeys = self.key.secret_subkeys.iter();
        let newest = subkeys
            .filter(|sub| sub.signatures.iter().any(|s| s.key_flags().sign()))
            .max_by_key(|sub| pgp::types::KeyDetails::created_at(&sub.key).as_secs());
        let (none, hash) = (Password::empty(), HashAlgorithm::Sha512);
        let content = Cursor::new(content);
        let signed = match newest {
            Some(sub) => DetachedSignature::sign_binary_data(OsRng, &sub.key, &none, hash, content),
            None => {
                let primary = &self.key.primary_key;
                DetachedSignature::sign_binary_data(OsRng, primary, &none, hash, content)
            }
        };
        signed
            .and_then(|signature| signature.to_armored_bytes(ArmorOptions::default()))
            .map_err(|e| RegistryError::SignKey {
                path: self.path.clone(),
                reason: e.to_string(),
            })
    }
}

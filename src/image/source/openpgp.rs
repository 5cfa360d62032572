//! Whether one of our keys has signed a text, and when.

use std::io::Cursor;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pgp::composed::{Deserializable, DetachedSignature, SignedPublicKey, SignedPublicSubKey};
use pgp::packet::{Signature, SignatureType};
use pgp::types::{Duration, KeyDetails, Tag, Timestamp, VerifyingKey};

use super::SourceError;

/// "UEC Image Automatic Signing Key", which signs Ubuntu's cloud images.
const UBUNTU_KEY: &str = include_str!("uec-image-signing-key.asc");
/// A keyring beyond this is none.
const MAX_KEYRING: u64 = 1 << 20;
/// Signatures looked at in one file.
const MAX_SIGNATURES: usize = 16;

/// Keys that may sign.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: Vec<SignedPublicKey>,
}

/// A signature that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signed {
    /// When it was made, in seconds since 1970, as the signer says under the signature.
    pub at: u32,
}

impl Keyring {
    /// Ubuntu's own key and those of the operator's file.
    pub fn ubuntu(more: Option<&Path>) -> Result<Self, SourceError> {
        let mut keyring = Self::default();
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |reason: String| SourceError::Keyring { path, reason }
        };
        keyring
            .add(UBUNTU_KEY.as_bytes())
            .map_err(unusable(Path::new("the built-in keyring")))?;
        if let Some(path) = more {
            let bytes = read_keyring(path).map_err(unusable(path))?;
            keyring.add(&bytes).map_err(unusable(path))?;
        }
        Ok(keyring)
    }

    /// The keys of the operator's file, and no others.
    pub fn of_operator(path: &Path) -> Result<Self, SourceError> {
        let mut keyring = Self::default();
        let added = read_keyring(path).and_then(|bytes| keyring.add(&bytes));
        added.map_err(|reason| SourceError::Keyring {
            path: path.to_owned(),
            reason,
        })?;
        Ok(keyring)
    }

    /// Adds all keys of a keyring, armored or not.
    pub fn add(&mut self, bytes: &[u8]) -> Result<(), String> {
        let (keys, _armor) =
            SignedPublicKey::from_reader_many(Cursor::new(bytes)).map_err(|e| e.to_string())?;
        let before = self.keys.len();
        for key in keys {
            self.keys.push(own_words(key.map_err(|e| e.to_string())?));
        }
        if self.keys.len() == before {
            return Err("no OpenPGP public key in it".to_owned());
        }
        Ok(())
    }

    /// Checks a detached signature, or several in one file of which one must hold.
    pub fn verify(&self, content: &[u8], signature: &[u8]) -> Result<Signed, String> {
        let (signatures, _armor) = DetachedSignature::from_reader_many(Cursor::new(signature))
            .map_err(|e| format!("no OpenPGP signature: {e}"))?;
        let mut reason = "no OpenPGP signature in it".to_owned();
        for signature in signatures.take(MAX_SIGNATURES) {
            let checked = signature
                .map_err(|e| format!("no OpenPGP signature: {e}"))
                .and_then(|signature| self.verify_one(content, &signature.signature));
            match checked {
                Ok(signed) => return Ok(signed),
                Err(e) => reason = e,
            }
        }
        Err(reason)
    }

    fn verify_one(&self, content: &[u8], signature: &Signature) -> Result<Signed, String> {
        let made = signature
            .created()
            .ok_or("it does not say when it was made")?;
        if !matches!(
            signature.typ(),
            Some(SignatureType::Binary | SignatureType::Text)
        ) {
            return Err("it is not a signature of a file".to_owned());
        }
        let lifetime = signature.signature_expiration_time();
        if lifetime.is_some_and(|life| ended(made, life, now())) {
            return Err("it has expired".to_owned());
        }
        let mut reason = format!("made by {}, which is no key of ours", signer(signature));
        for key in &self.keys {
            for candidate in signing_keys(key, made) {
                match candidate.check(signature, content) {
                    Some(Ok(())) => return Ok(Signed { at: made.as_secs() }),
                    Some(Err(e)) => reason = e,
                    None => {}
                }
            }
        }
        Err(reason)
    }
}

/// A key without what others say of it, and without what it cannot prove to say itself.
fn own_words(mut key: SignedPublicKey) -> SignedPublicKey {
    let primary = key.primary_key.clone();
    for user in &mut key.details.users {
        let id = user.id.clone();
        let own = |s: &Signature| s.verify_certification(&primary, Tag::UserId, &id).is_ok();
        user.signatures.retain(own);
    }
    let direct = &mut key.details.direct_signatures;
    direct.retain(|s| s.verify_key(&primary).is_ok());
    let revocations = &mut key.details.revocation_signatures;
    revocations.retain(|s| s.verify_key(&primary).is_ok());
    key.public_subkeys
        .retain(|sub| sub.verify_bindings(&primary).is_ok());
    key
}

/// A key, or a key below it, that may sign files.
enum SigningKey<'a> {
    Primary(&'a SignedPublicKey),
    Sub(&'a SignedPublicSubKey),
}

impl SigningKey<'_> {
    /// `None`: another key's signature.
    fn check(&self, signature: &Signature, content: &[u8]) -> Option<Result<(), String>> {
        match self {
            Self::Primary(key) => check(&key.primary_key, signature, content),
            Self::Sub(key) => check(&key.key, signature, content),
        }
    }
}

fn check(
    key: &impl VerifyingKey,
    signature: &Signature,
    content: &[u8],
) -> Option<Result<(), String>> {
    let ids = signature.issuer_key_id();
    let prints = signature.issuer_fingerprint();
    let named = ids.iter().any(|id| **id == key.legacy_key_id())
        || prints.iter().any(|print| **print == key.fingerprint());
    named.then(|| signature.verify(key, content).map_err(|e| e.to_string()))
}

/// The keys of one owner that may sign and were valid when the signature was made.
fn signing_keys(key: &SignedPublicKey, made: Timestamp) -> Vec<SigningKey<'_>> {
    if !key.details.revocation_signatures.is_empty() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let users = key.details.users.iter().flat_map(|user| &user.signatures);
    let own: Vec<&Signature> = users.chain(&key.details.direct_signatures).collect();
    if may_sign(&own) && lives(&own, key.primary_key.created_at(), made) {
        found.push(SigningKey::Primary(key));
    }
    for sub in &key.public_subkeys {
        let own: Vec<&Signature> = sub.signatures.iter().collect();
        let revoked = own
            .iter()
            .any(|s| s.typ() == Some(SignatureType::SubkeyRevocation));
        let signs = own.iter().any(|s| s.key_flags().sign());
        if !revoked && signs && lives(&own, sub.key.created_at(), made) {
            found.push(SigningKey::Sub(sub));
        }
    }
    found
}

/// A primary key signs unless its own signatures say what it is for and leave that out.
fn may_sign(own: &[&Signature]) -> bool {
    let says = |s: &&&Signature| {
        let flags = s.key_flags();
        flags.sign() || flags.certify() || flags.encrypt_comms() || flags.encrypt_storage()
    };
    let saying: Vec<_> = own.iter().filter(says).collect();
    saying.is_empty() || saying.iter().any(|s| s.key_flags().sign())
}

/// Whether a key existed, and had not expired by any of its own signatures, at this time.
fn lives(own: &[&Signature], created: Timestamp, at: Timestamp) -> bool {
    let expired = own.iter().any(|s| {
        s.key_expiration_time()
            .is_some_and(|life| ended(created, life, at.as_secs()))
    });
    created.as_secs() <= at.as_secs() && !expired
}

/// Whether something of a lifetime, where zero means for ever, is over.
fn ended(start: Timestamp, life: Duration, now: u32) -> bool {
    let seconds = u64::from(life.as_secs());
    seconds > 0 && u64::from(start.as_secs()) + seconds < u64::from(now)
}

fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX))
}

/// Who says to have signed, for people.
fn signer(signature: &Signature) -> String {
    let prints = signature.issuer_fingerprint();
    let ids = signature.issuer_key_id();
    match (prints.first(), ids.first()) {
        (Some(print), _) => print.to_string().to_uppercase(),
        (None, Some(id)) => id.to_string().to_uppercase(),
        (None, None) => "an unnamed key".to_owned(),
    }
}

fn read_keyring(path: &Path) -> Result<Vec<u8>, String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_KEYRING + 1).read_to_end(&mut bytes))
        .map_err(|e| e.to_string())?;
    match u64::try_from(bytes.len()) {
        Ok(len) if len <= MAX_KEYRING => Ok(bytes),
        _ => Err("it is too large".to_owned()),
    }
}

#[cfg(test)]
#[path = "openpgp_test.rs"]
mod tests;

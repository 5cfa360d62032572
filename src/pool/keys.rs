//! Keys and identifiers that a machine gets from the host, fresh for every one.

use std::fmt::Write as _;
use std::sync::Arc;

use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, EcdsaCurve, PrivateKey};

/// What kind of SSH keys machines get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SshKeyType {
    #[default]
    Ed25519,
    EcdsaP256,
}

impl SshKeyType {
    fn algorithm(self) -> Algorithm {
        match self {
            Self::Ed25519 => Algorithm::Ed25519,
            Self::EcdsaP256 => Algorithm::Ecdsa {
                curve: EcdsaCurve::NistP256,
            },
        }
    }

    /// The file under /etc/ssh that sshd looks for.
    pub fn host_key_name(self) -> &'static str {
        match self {
            Self::Ed25519 => "ssh_host_ed25519_key",
            Self::EcdsaP256 => "ssh_host_ecdsa_key",
        }
    }
}

/// A key pair in the formats its users want.
#[derive(Debug, Clone)]
pub struct KeyPair {
    /// For our own SSH client.
    pub private: Arc<PrivateKey>,
    /// An OpenSSH private key file.
    pub private_pem: String,
    /// One line of authorized_keys.
    pub public_line: String,
}

/// No key could be made or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot make an SSH key")]
    Make(#[source] russh::keys::ssh_key::Error),
    #[error(
        "cannot read the connector's private key; hint: an unencrypted OpenSSH, PKCS#8 or PKCS#1 PEM"
    )]
    Read(#[source] russh::keys::Error),
}

impl KeyPair {
    /// A new pair; some 30 us for Ed25519.
    pub fn random(kind: SshKeyType) -> Result<Self, KeyError> {
        let private =
            PrivateKey::random(&mut rand::rng(), kind.algorithm()).map_err(KeyError::Make)?;
        Self::from_private(private)
    }

    /// The pair of a private key file that the operator gave.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        let private = russh::keys::decode_secret_key(pem, None).map_err(KeyError::Read)?;
        Self::from_private(private)
    }

    fn from_private(private: PrivateKey) -> Result<Self, KeyError> {
        let private_pem = private
            .to_openssh(LineEnding::LF)
            .map_err(KeyError::Make)?
            .to_string();
        let public_line = private.public_key().to_openssh().map_err(KeyError::Make)?;
        Ok(Self {
            private: Arc::new(private),
            private_pem,
            public_line,
        })
    }
}

/// 32 lower-case hexadecimal digits, a machine-id(5) of its own (a version 4 UUID).
pub fn machine_id() -> String {
    let mut bytes: [u8; 16] = rand::random();
    let [_, _, _, _, _, _, version, _, variant, ..] = &mut bytes;
    *version = (*version & 0x0f) | 0x40;
    *variant = (*variant & 0x3f) | 0x80;
    let mut text = String::with_capacity(32);
    for byte in bytes {
        let _infallible = write!(text, "{byte:02x}");
    }
    text
}

/// Fresh randomness for a guest's kernel.
pub fn entropy() -> Vec<u8> {
    rand::random::<[u8; 64]>().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_survive_a_round_trip_through_their_file() {
        for (kind, prefix) in [
            (SshKeyType::Ed25519, "ssh-ed25519 "),
            (SshKeyType::EcdsaP256, "ecdsa-sha2-nistp256 "),
        ] {
            let pair = KeyPair::random(kind).unwrap();
            assert!(pair.public_line.starts_with(prefix));
            let read = KeyPair::from_pem(&pair.private_pem).unwrap();
            assert_eq!(read.public_line, pair.public_line);
            assert_ne!(KeyPair::random(kind).unwrap().public_line, pair.public_line);
        }
    }

    #[test]
    fn no_key_is_an_error_with_a_hint() {
        let error = KeyPair::from_pem("not a key").unwrap_err().to_string();
        assert!(error.contains("hint:"), "{error}");
    }

    #[test]
    fn machine_ids_are_uuids_and_differ() {
        let (a, b) = (machine_id(), machine_id());
        assert_eq!(a.len(), 32);
        assert!(
            a.bytes()
                .all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
        );
        assert_eq!(a.as_bytes()[12], b'4');
        assert_ne!(a, b);
    }
}

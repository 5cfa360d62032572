//! Generations in OCI registries: one host prepares an image, the others fetch it.
//!
//! [`push`] puts one there, [`pull`] brings one here. A fetched generation is named by the digest
//! of its manifest, whatever it was called where it was made. The registry is an attacker: the
//! manifest is believed for its digest or a signature alone, everything else for the manifest, and
//! no size or count is taken unless it is within a limit. What is in an image is *not* changed
//! here: one with another runner than this host's is refused.

mod accepted;
mod credentials;
mod error;
mod fit;
mod format;
mod name;
mod pull;
mod push;
mod remote;
mod sign;
mod staging;
#[cfg(test)]
pub(crate) mod testing;

pub use error::RegistryError;
pub use fit::{Expected, ExpectedMachines};
pub use name::{Digest, RegistryName};
pub use pull::{Pulled, Trust, pull};
pub use push::{Pushed, push};
pub use remote::Access;
pub use staging::Fetched;

use format::{Flaw, MAX_LAYERS};

/// How far a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Is told how far a transfer is, many times a second; it must not block.
pub type Tell<'a> = &'a (dyn Fn(TransferProgress) + Send + Sync);

/// Where the signature of a manifest lies, in the same repository.
fn signature_tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.as_hex())
}

fn not_ours(name: &RegistryName, reason: &str) -> RegistryError {
    RegistryError::NotOurs {
        name: name.to_string(),
        reason: reason.to_owned(),
    }
}

impl Flaw {
    fn of(self, name: &RegistryName) -> RegistryError {
        match self {
            Self::Other(reason) => not_ours(name, &reason),
            Self::TooManyLayers(count) => RegistryError::TooManyLayers {
                name: name.to_string(),
                count,
                limit: MAX_LAYERS,
            },
        }
    }
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RegistryError> + Send + 'static,
) -> Result<T, RegistryError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(RegistryError::Task)?
}

#[cfg(test)]
#[path = "registry_test.rs"]
mod tests;

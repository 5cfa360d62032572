//! A generation on its way out of a registry.
//!
//! ```text
//!  name ─> manifest ─> trusted? ─> in the store? ─> config ─> fits? ─> chunks ─> Fetched
//!          (bounded)   digest or    │ yes                     (fit.rs)  (staging.rs)
//!                      signature    v
//!                                 Present
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oci_client::RegistryOperation;

use super::accepted::Accepted;
use super::fit::Expected;
use super::format::{Document, MAX_DOCUMENT, MAX_SIGNATURE};
use super::name::{Digest, RegistryName};
use super::remote::{Access, Remote};
use super::staging::{self, Fetched, Staging};
use super::{RegistryError, Tell, TransferProgress, blocking, not_ours, signature_tag};
use crate::image::dir::Dir;
use crate::image::generation::{DISK, Generation, Manifest};
use crate::image::source::openpgp::Keyring;
use crate::image::{GenerationKey, Store};

/// How often it is looked whether another process is done fetching the same.
const QUEUE_POLL: Duration = Duration::from_secs(1);

/// Why a generation may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust<'a> {
    /// The name has its digest, or one of the keys in this file signed it.
    Shown(Option<&'a Path>),
    /// Somebody will name it by its digest later.
    Later,
}

/// What [`pull`] came to.
#[derive(Debug)]
pub enum Pulled {
    /// It was there already.
    Present(Box<Generation>),
    /// It has come, and is to be adopted.
    Fetched(Box<Fetched>),
}

/// Fetches what is not in the store yet. What was interrupted goes on.
pub async fn pull(
    name: &RegistryName,
    store: &Store,
    trust: Trust<'_>,
    expected: &Expected,
    access: &Access,
    tell: Tell<'_>,
) -> Result<Pulled, RegistryError> {
    // What is named by its content needs no registry once it is here.
    if let Some(digest) = name.digest()
        && let Some(generation) = present(name, store, digest, expected)?
    {
        return Ok(Pulled::Present(Box::new(generation)));
    }
    let pulls = store.pulls()?;
    if let Err(e) = staging::tidy(&pulls) {
        tracing::warn!("tidy {}: {e}", pulls.path().display());
    }
    let remote = Remote::open(name, RegistryOperation::Pull, access).await?;
    let (bytes, digest) = remote.manifest(&name.wanted(), MAX_DOCUMENT).await?;
    if let Trust::Shown(keyring) = trust {
        believe(&remote, name, (&bytes, &digest), keyring, &pulls).await?;
    }
    loop {
        if let Some(generation) = present(name, store, &digest, expected)? {
            return Ok(Pulled::Present(Box::new(generation)));
        }
        if let Some(staging) = Staging::open(&pulls, &digest)? {
            let work = Work {
                remote: &remote,
                name,
                expected,
                tell,
            };
            return work.fetch(staging, &bytes).await;
        }
        tokio::time::sleep(QUEUE_POLL).await;
    }
}

/// The generation of this digest, if it is here and fits.
fn present(
    name: &RegistryName,
    store: &Store,
    digest: &Digest,
    expected: &Expected,
) -> Result<Option<Generation>, RegistryError> {
    let Some(generation) = store.find(&GenerationKey::of_manifest(digest))? else {
        return Ok(None);
    };
    let (_, manifest) = generation.manifest()?;
    expected.check(name, &manifest)?;
    Ok(Some(generation))
}

/// Has the manifest shown to be what the operator wants.
async fn believe(
    remote: &Remote,
    name: &RegistryName,
    (bytes, digest): (&[u8], &Digest),
    keyring: Option<&Path>,
    pulls: &Dir,
) -> Result<(), RegistryError> {
    if name.digest() == Some(digest) {
        return Ok(());
    }
    let Some(keyring) = keyring else {
        return Err(RegistryError::NoTrust {
            name: name.to_string(),
            digest: digest.clone(),
        });
    };
    let keyring = Keyring::of_operator(keyring)?;
    let before = Accepted::read(pulls, name)?;
    let document = remote.manifest(&signature_tag(digest), MAX_SIGNATURE).await;
    let (document, _) = document.map_err(|error| match error {
        RegistryError::NotThere { .. } => RegistryError::Unsigned {
            name: name.to_string(),
            digest: digest.clone(),
            before: before
                .as_ref()
                .map(|accepted| format!(" ({} when it was taken last)", accepted.digest))
                .unwrap_or_default(),
        },
        error => error,
    })?;
    let blob = Document::read_signature(&document).map_err(|flaw| flaw.of(name))?;
    let signature = remote.blob(&blob, &|_came| {}).await?;
    let signed =
        keyring
            .verify(bytes, &signature)
            .map_err(|reason| RegistryError::BadSignature {
                name: name.to_string(),
                digest: digest.clone(),
                reason,
            })?;
    Accepted::new(name, digest, signed.at).follow(before.as_ref(), pulls, name)
}

/// One fetch.
struct Work<'a> {
    remote: &'a Remote,
    name: &'a RegistryName,
    expected: &'a Expected,
    tell: Tell<'a>,
}

impl Work<'_> {
    /// All of it. What failed for good leaves nothing.
    async fn fetch(&self, staging: Staging, document: &[u8]) -> Result<Pulled, RegistryError> {
        let staging = Arc::new(staging);
        let fetched = self.fetch_into(&staging, document).await;
        let Some(staging) = Arc::into_inner(staging) else {
            // A task that was given up still writes; it is found by the next try.
            return Err(not_ours(self.name, "it was given up"));
        };
        match fetched {
            Ok(manifest) => Ok(Pulled::Fetched(Box::new(Fetched { staging, manifest }))),
            Err(error) => {
                if !error.leaves_use()
                    && let Err(e) = staging.discard()
                {
                    tracing::warn!("cannot remove what came of {}: {e}", self.name);
                }
                Err(error)
            }
        }
    }

    async fn fetch_into(
        &self,
        staging: &Arc<Staging>,
        document: &[u8],
    ) -> Result<Manifest, RegistryError> {
        let name = self.name;
        let document = Document::read_generation(document).map_err(|flaw| flaw.of(name))?;
        let config = document.config().map_err(|flaw| flaw.of(name))?;
        let config = self.remote.blob(&config, &|_came| {}).await?;
        let manifest = Manifest::foreign(&config).map_err(|reason| not_ours(name, &reason))?;
        self.expected.check(name, &manifest)?;
        let chunks = document.chunks(&manifest).map_err(|flaw| flaw.of(name))?;
        let done = staging.prepare(name, &manifest, &chunks)?;
        let total_bytes = chunks.iter().map(|chunk| chunk.blob.bytes).sum();
        let done_bytes = AtomicU64::new(0);
        for chunk in chunks {
            let before = done_bytes.load(Ordering::Relaxed);
            let tell = |came: u64| {
                (self.tell)(TransferProgress {
                    done_bytes: before.saturating_add(came),
                    total_bytes,
                });
            };
            if !done.contains(&(chunk.file.to_owned(), chunk.offset)) {
                let packed = self.remote.blob(&chunk.blob, &tell).await?;
                let (staging, name, chunk) = (Arc::clone(staging), name.clone(), chunk.clone());
                blocking(move || staging.write(&name, &chunk, &packed)).await?;
            }
            tell(chunk.blob.bytes);
            done_bytes.store(before.saturating_add(chunk.blob.bytes), Ordering::Relaxed);
        }
        Ok(manifest)
    }
}

/// What the disk of a manifest is long.
pub fn disk_bytes(manifest: &Manifest) -> u64 {
    let disk = manifest.files.iter().find(|file| file.name == DISK);
    disk.map_or(0, |disk| disk.bytes)
}

impl GenerationKey {
    /// The key of what was fetched from a registry: a digest of its manifest.
    pub(super) fn of_manifest(digest: &Digest) -> Self {
        Self::from_digest(digest.as_hex())
    }
}

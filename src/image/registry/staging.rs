//! The folder into which a generation is fetched: `pulls/<digest>` of the store.
//!
//! Each chunk is checked, unpacked, written and made durable before a line in `done` says so.
//! Whoever comes after an interruption goes on from there. The folder is flocked by its fetcher,
//! and becomes the generation by one rename when it is whole. Blocks.

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::RegistryError;
use super::format::{CHUNK, Chunk};
use super::name::{Digest, RegistryName};
use crate::image::dir::{Dir, write_sparse_at};
use crate::image::generation::{Generation, MANIFEST, Manifest};
use crate::image::{GenerationKey, ImageError, Lineage, Store};

const DONE: &str = "done";
/// Above what a full list of chunks takes.
const MAX_DONE: u64 = 1 << 20;
/// What was interrupted and nobody went on with for so long is removed.
const AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A generation on its way here; ours alone while it lives.
#[derive(Debug)]
pub struct Staging {
    parent: Arc<Dir>,
    dir: Dir,
    digest: Digest,
}

impl Staging {
    /// The folder of this manifest; `None` while somebody else fetches the same.
    pub fn open(parent: &Arc<Dir>, digest: &Digest) -> Result<Option<Self>, ImageError> {
        let dir = parent.sub(digest.as_hex())?;
        let ours = dir.try_lock(FlockOperation::NonBlockingLockExclusive)?;
        // Whoever had it before us may have made a generation of it.
        if !ours || !dir.is_still(parent, digest.as_hex()) {
            return Ok(None);
        }
        Ok(Some(Self {
            parent: Arc::clone(parent),
            dir,
            digest: digest.clone(),
        }))
    }

    /// Makes the files as long as they will be, and says what of them is here already. Refuses
    /// what there is no room for.
    pub fn prepare(
        &self,
        name: &RegistryName,
        manifest: &Manifest,
        chunks: &[Chunk],
    ) -> Result<BTreeSet<(String, u64)>, RegistryError> {
        let done = self.done()?;
        let missing = chunks.iter().filter(|chunk| !done.contains(&place(chunk)));
        let needed: u64 = missing.map(|chunk| chunk.bytes).sum();
        let stat = rustix::fs::statvfs(self.dir.path())
            .map_err(|e| ImageError::file("stat", self.dir.path())(e.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if needed > free {
            return Err(RegistryError::DiskFull {
                name: name.to_string(),
                path: self.dir.path().to_owned(),
                needed_mib: needed >> 20,
                free_mib: free >> 20,
            });
        }
        for file in &manifest.files {
            let made = self.dir.open_or_create(&file.name)?;
            made.set_len(file.bytes)
                .map_err(ImageError::file("extend", &self.dir.at(&file.name)))?;
        }
        Ok(done)
    }

    fn done(&self) -> Result<BTreeSet<(String, u64)>, ImageError> {
        let text = self.dir.read_small(DONE, MAX_DONE)?.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // A line that a crash cut off has no end; what it stands for is fetched again.
        let whole = text.split_inclusive('\n').filter_map(|line| {
            let (file, offset) = line.strip_suffix('\n')?.split_once(' ')?;
            Some((file.to_owned(), offset.parse().ok()?))
        });
        Ok(whole.collect())
    }

    /// Unpacks a chunk whose digest is right into its place.
    pub fn write(
        &self,
        name: &RegistryName,
        chunk: &Chunk,
        packed: &[u8],
    ) -> Result<(), RegistryError> {
        let bytes = unpack(packed, chunk.bytes).map_err(|reason| RegistryError::Unpack {
            name: name.to_string(),
            file: chunk.file,
            offset: chunk.offset,
            reason,
        })?;
        let path = self.dir.at(chunk.file);
        let file = self.dir.open_or_create(chunk.file)?;
        write_sparse_at(&file, &bytes, chunk.offset)
            .and_then(|()| file.sync_data())
            .map_err(ImageError::file("write", &path))?;
        let line = format!("{} {}\n", chunk.file, chunk.offset);
        self.dir
            .append(DONE, line.as_bytes())
            .map_err(RegistryError::from)
    }

    /// Forgets all of it.
    pub fn discard(self) -> Result<(), ImageError> {
        self.parent.remove_tree(self.digest.as_hex())
    }

    /// Makes a generation of it, named by the manifest's digest.
    fn publish(self, store: &Store, manifest: Manifest) -> Result<Generation, ImageError> {
        let name = self.digest.as_hex();
        let key = GenerationKey::of_manifest(&self.digest);
        for file in &manifest.files {
            if let Some(made) = self.dir.open(&file.name)? {
                made.sync_all()
                    .map_err(ImageError::file("sync", &self.dir.at(&file.name)))?;
            }
        }
        self.dir.remove(DONE)?;
        manifest.write(&self.dir)?;
        if store.generations.existing(name)?.is_some() {
            // It was not intact, or nobody would have fetched it again.
            let doomed = store.free_old_name(name)?;
            store.generations.rename(name, &doomed)?;
        }
        self.dir.try_lock(FlockOperation::NonBlockingLockShared)?;
        self.parent.rename_into(name, &store.generations, name)?;
        store.generations.sync()?;
        self.parent.sync()?;
        store.find(&key)?.ok_or_else(|| {
            ImageError::file("find", &store.generations.at(MANIFEST))(
                std::io::ErrorKind::NotFound.into(),
            )
        })
    }
}

/// A generation that has come whole; it is in the store once it was adopted.
#[derive(Debug)]
pub struct Fetched {
    pub(super) staging: Staging,
    pub(super) manifest: Manifest,
}

impl Fetched {
    /// Makes a generation of it that counts as asked for by a configuration of this lineage.
    pub fn adopt(self, store: &Store, lineage: Lineage) -> Result<Generation, RegistryError> {
        let key = GenerationKey::of_manifest(&self.staging.digest);
        let manifest = self.manifest.renamed(&key, lineage);
        Ok(self.staging.publish(store, manifest)?)
    }

    /// The same where nobody asked for it yet: it stands in for nothing.
    pub fn adopt_unasked(self, store: &Store) -> Result<Generation, RegistryError> {
        let lineage = self
            .manifest
            .lineage
            .of_nobody(self.staging.digest.as_hex());
        self.adopt(store, lineage)
    }
}

fn place(chunk: &Chunk) -> (String, u64) {
    (chunk.file.to_owned(), chunk.offset)
}

/// Unpacks one frame of exactly this length. In Rust, because the bytes may be an attacker's;
/// what would be longer is not unpacked further.
fn unpack(packed: &[u8], len: u64) -> Result<Vec<u8>, String> {
    let frame = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    frame
        .take(len.min(CHUNK) + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    match u64::try_from(bytes.len()) {
        Ok(got) if got == len => Ok(bytes),
        Ok(got) if got > len => Err(format!("more than {len} bytes")),
        _ => Err(format!("{} bytes instead of {len}", bytes.len())),
    }
}

/// Removes what was interrupted long ago. Goes on after failures: it is only tidying.
pub fn tidy(pulls: &Dir) -> Result<(), ImageError> {
    for name in pulls.names()? {
        if format!("sha256:{name}").parse::<Digest>().is_err() {
            continue;
        }
        let Some(dir) = pulls.existing(&name)? else {
            continue;
        };
        let alone = dir.try_lock(FlockOperation::NonBlockingLockExclusive)?;
        if alone && dir.is_still(pulls, &name) && is_old(&dir.at(DONE), dir.path()) {
            tracing::info!(
                "removing {}, which nobody went on with",
                dir.path().display()
            );
            pulls.remove_tree(&name)?;
        }
    }
    Ok(())
}

fn is_old(done: &Path, dir: &Path) -> bool {
    let meta = std::fs::symlink_metadata(done).or_else(|_none| std::fs::symlink_metadata(dir));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    meta.is_ok_and(|meta| {
        let changed = u64::try_from(meta.mtime()).unwrap_or_default();
        now.saturating_sub(changed) > AGE.as_secs()
    })
}

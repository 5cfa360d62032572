//! The store on disk, shared by every plugin process of the host.
//!
//! ```text
//!  <dir>/build.lock             flock: who builds
//!  <dir>/images/<sha256>.img    the vendors' images, verified; shared flock: in use
//!  <dir>/images/accepted-*.json what was taken last under a name
//!  <dir>/images/.*.part         half downloaded; exclusive flock: its downloader lives
//!  <dir>/images/hashes.json     contents already hashed
//!  <dir>/generations/<key>/     sealed; shared flock: in use
//!  <dir>/generations/.build-*   half built; exclusive flock: its builder lives
//!  <dir>/generations/.old-*     on its way out
//!  <dir>/pulls/<digest>/        half fetched from a registry; exclusive flock: its fetcher lives
//!  <dir>/pulls/accepted-*.json  what was taken last under a name in a registry
//!  <dir>/groups/<group>.json    what each group has served
//!  <dir>/snapshots/             of this host's golden workers
//!  <dir>/.instance_data/        consoles
//! ```
//!
//! The last two may have a folder of their own, such as one in memory.
//!
//! Locks are flocks, so they end with their process. Every folder is flocked (shared) while the
//! store is open, which keeps systemd-tmpfiles away.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::dir::{Dir, is_plain_name};
use super::generation::{Generation, hold};
use super::inputs::hex;
use super::{GenerationKey, ImageError};

pub(super) const BUILD_PREFIX: &str = ".build-";
pub(super) const OLD_PREFIX: &str = ".old-";
const BUILD_LOCK: &str = "build.lock";
const PULLS: &str = "pulls";
const HASHES: &str = "hashes.json";
/// Contents remembered at most; the oldest go first.
const MAX_HASHES: usize = 64;
const MAX_HASH_FILE: u64 = 256 << 10;
const PIECE: usize = 1 << 20;

/// The open store.
#[derive(Debug)]
pub struct Store {
    base: Dir,
    /// Held for its lock.
    disks: Dir,
    images: Arc<Dir>,
    pub(super) generations: Dir,
    pub(super) groups: Dir,
    instance_data: Dir,
    snapshots: Dir,
}

/// The right to build in one store; given up when dropped.
#[derive(Debug)]
pub struct BuildLock {
    file: File,
    store: PathBuf,
}

impl Drop for BuildLock {
    /// Explicitly: a child that is just being spawned still shares the descriptor.
    fn drop(&mut self) {
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl Store {
    /// Opens the store in `dir`, making what is not there. Refuses folders that somebody else
    /// could redirect.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        Self::open_apart(dir, dir)
    }

    /// The same with images and generations in one folder, and what belongs to running machines
    /// in another.
    pub fn open_apart(image_dir: &Path, disk_dir: &Path) -> Result<Self, ImageError> {
        let base = Dir::open_base(image_dir)?;
        let disks = Dir::open_base(disk_dir)?;
        let store = Self {
            images: Arc::new(base.sub("images")?),
            generations: base.sub("generations")?,
            groups: base.sub("groups")?,
            instance_data: disks.sub(".instance_data")?,
            snapshots: disks.sub("snapshots")?,
            base,
            disks,
        };
        for dir in [
            &store.base,
            &store.disks,
            &store.images,
            &store.generations,
            &store.groups,
            &store.instance_data,
            &store.snapshots,
        ] {
            // Only tmpfiles ever locks them otherwise, and only while it looks at them.
            dir.try_lock(FlockOperation::NonBlockingLockShared)?;
        }
        Ok(store)
    }

    /// Where images and generations lie.
    pub fn path(&self) -> &Path {
        self.base.path()
    }

    /// The sealed and intact generation of this key, held until dropped.
    pub fn find(&self, key: &GenerationKey) -> Result<Option<Generation>, ImageError> {
        let Some(dir) = self.generations.existing(key.as_str())? else {
            return Ok(None);
        };
        if !hold(&dir)? || !dir.is_still(&self.generations, key.as_str()) {
            return Ok(None);
        }
        Generation::open(key, dir)
    }

    /// The right to build, unless another process has it. Look with [`find`](Self::find) again
    /// after it was had: the other one may have built the same.
    pub fn try_build_lock(&self) -> Result<Option<BuildLock>, ImageError> {
        let file = self.base.open_or_create(BUILD_LOCK)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(BuildLock {
                file,
                store: self.path().to_owned(),
            })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(ImageError::file("lock", &self.base.at(BUILD_LOCK))(
                e.into(),
            )),
        }
    }

    pub(super) fn check_lock(&self, lock: &BuildLock) -> Result<(), ImageError> {
        if lock.store == self.path() {
            Ok(())
        } else {
            Err(ImageError::ForeignLock)
        }
    }

    /// A worker came up from it: it is current from now on, for every process.
    pub fn mark_tested(&self, generation: &Generation) -> Result<(), ImageError> {
        generation.mark_tested()
    }

    /// Where an instance's console is kept.
    pub fn console_path(&self, instance: &str) -> PathBuf {
        self.instance_data.at(&console_name(instance))
    }

    /// The console file of an instance, emptied, never through a symbolic link.
    pub fn create_console(&self, instance: &str) -> Result<File, ImageError> {
        if !is_plain_name(instance) {
            return Err(ImageError::file("create", &self.console_path(instance))(
                std::io::ErrorKind::InvalidInput.into(),
            ));
        }
        self.instance_data.create_truncated(&console_name(instance))
    }

    /// Removes all but the newest `keep` consoles of a group's workers, whose names sort by age.
    pub fn prune_consoles(&self, group: &str, keep: usize) -> Result<(), ImageError> {
        let (prefix, suffix) = (format!("{group}-"), console_name(""));
        let mut names = self.instance_data.names()?;
        names.retain(|name| name.starts_with(&prefix) && name.ends_with(&suffix));
        names.sort();
        let surplus = names.len().saturating_sub(keep);
        for name in names.iter().take(surplus) {
            self.instance_data.remove(name)?;
        }
        Ok(())
    }

    /// A name for something on its way out that is not taken.
    pub(super) fn free_old_name(&self, name: &str) -> Result<String, ImageError> {
        let taken = self.generations.names()?;
        let stem = name.trim_start_matches('.');
        let pid = std::process::id();
        Ok((0_u32..)
            .map(|n| format!("{OLD_PREFIX}{stem}-{pid}-{n}"))
            .find(|candidate| !taken.contains(candidate))
            .unwrap_or_default())
    }

    /// Where images lie.
    pub(super) fn images(&self) -> Arc<Dir> {
        Arc::clone(&self.images)
    }

    /// What comes from registries; made when first something does.
    pub(super) fn pulls(&self) -> Result<Arc<Dir>, ImageError> {
        self.base.sub(PULLS).map(Arc::new)
    }

    /// What is remembered of contents, to be asked from any thread.
    pub(super) fn hashes(&self) -> Hashes {
        Hashes(Arc::clone(&self.images))
    }
}

/// The contents already hashed, in `images/hashes.json`.
#[derive(Debug, Clone)]
pub struct Hashes(Arc<Dir>);

impl Hashes {
    /// SHA-256 of a file's content, from memory where the file is as it was.
    pub fn content_hash(&self, path: &Path, file: &File) -> Result<String, ImageError> {
        let identity = FileIdentity::of(file).map_err(ImageError::file("stat", path))?;
        let known = self.read_hashes()?;
        if let Some(entry) = known.iter().find(|entry| entry.identity == identity) {
            return Ok(entry.sha256.clone());
        }
        let sha256 = hash_whole(file).map_err(ImageError::file("read", path))?;
        if FileIdentity::of(file).map_err(ImageError::file("stat", path))? != identity {
            return Err(ImageError::ImageChanged {
                path: path.to_owned(),
            });
        }
        self.store(known, identity, &sha256)?;
        Ok(sha256)
    }

    /// Remembers the SHA-256 of a file that was hashed by somebody else.
    pub fn remember(&self, file: &File, sha256: &str) -> Result<(), ImageError> {
        let stat = ImageError::file("stat", self.0.path());
        let identity = FileIdentity::of(file).map_err(stat)?;
        self.store(self.read_hashes()?, identity, sha256)
    }

    fn store(
        &self,
        mut known: Vec<KnownHash>,
        identity: FileIdentity,
        sha256: &str,
    ) -> Result<(), ImageError> {
        known.retain(|entry| !entry.identity.same_file(&identity));
        known.push(KnownHash {
            identity,
            sha256: sha256.to_owned(),
        });
        let surplus = known.len().saturating_sub(MAX_HASHES);
        known.drain(..surplus);
        let text = serde_json::to_vec(&known)
            .map_err(|e| ImageError::file("encode", &self.0.at(HASHES))(e.into()))?;
        self.0.write_atomic(HASHES, &text)
    }

    /// What is remembered; nothing if the file is damaged.
    fn read_hashes(&self) -> Result<Vec<KnownHash>, ImageError> {
        let bytes = self.0.read_small(HASHES, MAX_HASH_FILE)?;
        Ok(bytes
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default())
    }
}

fn console_name(instance: &str) -> String {
    format!("{instance}_console")
}

/// What changes when a file's content does. The change time cannot be set back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    pub(super) fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct KnownHash {
    #[serde(flatten)]
    identity: FileIdentity,
    sha256: String,
}

/// Hashes a file from its start; its position is left alone.
fn hash_whole(file: &File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut reader = super::seed::FromStart::new(file);
    let mut piece = vec![0; PIECE];
    loop {
        match reader.read(&mut piece)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(piece.get(..n).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
#[path = "store_test.rs"]
mod tests;

//! A sealed generation: its folder, its manifest, and the lock that says it is in use.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::dir::Dir;
use super::{Contents, GenerationKey, ImageError, Lineage};

pub const DISK: &str = "disk.raw";
pub const VMLINUZ: &str = "vmlinuz";
pub const VMLINUX: &str = "vmlinux";
pub const INITRD: &str = "initrd";
pub const MANIFEST: &str = "manifest.json";
/// Every file that workers start from.
pub const FILES: [&str; 4] = [DISK, VMLINUZ, VMLINUX, INITRD];
/// There once a worker came up from it.
const TESTED: &str = "tested";
/// The version that this program reads and writes.
const VERSION: u32 = 2;
pub const MAX_MANIFEST: u64 = 64 << 10;

/// What `manifest.json` says. Written last, so a folder without it is no generation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    key: String,
    pub lineage: Lineage,
    /// Not told by versions that did not push.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contents: Option<Contents>,
    /// Seconds since the epoch.
    sealed_at: u64,
    /// The kernel's `root=`.
    root: String,
    /// The kernel's release, such as 6.1.0-40-cloud-amd64.
    kernel_release: String,
    pub files: Vec<ManifestFile>,
    /// What went wrong in the prebuild without failing it.
    warnings: Vec<String>,
}

/// What a prebuild's disk says of itself.
#[derive(Debug)]
pub struct GuestFacts {
    /// The kernel's `root=`.
    pub root: String,
    pub kernel_release: String,
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    pub name: String,
    pub bytes: u64,
}

impl Manifest {
    /// Describes the files that lie in `dir` now.
    pub fn describe(
        dir: &Dir,
        key: &GenerationKey,
        made: (Lineage, Contents),
        guest: GuestFacts,
    ) -> Result<Self, ImageError> {
        let (lineage, contents) = made;
        let mut files = Vec::new();
        for name in FILES {
            if let Some(bytes) = file_len(dir, name)? {
                let name = name.to_owned();
                files.push(ManifestFile { name, bytes });
            }
        }
        Ok(Self {
            version: VERSION,
            key: key.as_str().to_owned(),
            lineage,
            contents: Some(contents),
            sealed_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            root: guest.root,
            kernel_release: guest.kernel_release,
            files,
            warnings: guest.warnings,
        })
    }

    pub fn write(&self, dir: &Dir) -> Result<(), ImageError> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| ImageError::file("encode", &dir.at(MANIFEST))(e.into()))?;
        dir.write_atomic(MANIFEST, &text)
    }

    fn read(dir: &Dir) -> Result<Option<Self>, ImageError> {
        let bytes = dir.read_small(MANIFEST, MAX_MANIFEST)?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// One that came from elsewhere; why it is of no use otherwise.
    pub fn foreign(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        match manifest.version {
            VERSION => Ok(manifest),
            other => Err(format!("version {other}, this program reads {VERSION}")),
        }
    }

    /// The same under another name and for another configuration.
    pub fn renamed(mut self, key: &GenerationKey, lineage: Lineage) -> Self {
        key.as_str().clone_into(&mut self.key);
        self.lineage = lineage;
        self
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.name == name)
    }

    /// Whether the files are there, with the sizes they were sealed with.
    fn is_intact(&self, dir: &Dir, key: &GenerationKey) -> Result<bool, ImageError> {
        if self.version != VERSION || self.key != key.as_str() {
            return Ok(false);
        }
        for file in &self.files {
            let plain = FILES.contains(&file.name.as_str());
            if !plain || file_len(dir, &file.name)? != Some(file.bytes) {
                return Ok(false);
            }
        }
        Ok(self.has(DISK) && (self.has(VMLINUX) || self.has(VMLINUZ)))
    }
}

/// The length of a regular file; `None` if it is not there or something else.
fn file_len(dir: &Dir, name: &str) -> Result<Option<u64>, ImageError> {
    let Some(file) = dir.open(name)? else {
        return Ok(None);
    };
    let meta = file
        .metadata()
        .map_err(ImageError::file("stat", &dir.at(name)))?;
    Ok(meta.is_file().then_some(meta.len()))
}

/// A generation that workers can boot from. While a clone of this value lives, its files stay.
#[derive(Debug, Clone)]
pub struct Generation {
    pub key: GenerationKey,
    pub dir: PathBuf,
    /// The base of every worker's disk; never written.
    pub disk: PathBuf,
    /// The unpacked kernel, or the bzImage where it could not be unpacked.
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel's `root=`, such as `PARTUUID=...`.
    pub root: String,
    pub kernel_release: String,
    pub lineage: Lineage,
    /// Not told where a former version sealed it.
    pub contents: Option<Contents>,
    /// Seconds since the epoch.
    pub sealed_at: u64,
    /// Whether a worker has come up from it.
    pub tested: bool,
    /// What went wrong in the prebuild without failing it, for one log line each.
    pub warnings: Vec<String>,
    /// Holds a shared lock on the folder.
    held: Arc<Dir>,
}

impl Generation {
    /// Opens the generation in `dir` if it is whole; the lock must be held already.
    pub(super) fn open(key: &GenerationKey, dir: Dir) -> Result<Option<Self>, ImageError> {
        let Some(manifest) = Manifest::read(&dir)? else {
            return Ok(None);
        };
        if !manifest.is_intact(&dir, key)? {
            return Ok(None);
        }
        let kernel = if manifest.has(VMLINUX) {
            VMLINUX
        } else {
            VMLINUZ
        };
        Ok(Some(Self {
            key: key.clone(),
            dir: dir.path().to_owned(),
            disk: dir.at(DISK),
            kernel: dir.at(kernel),
            initrd: manifest.has(INITRD).then(|| dir.at(INITRD)),
            tested: dir.open(TESTED)?.is_some(),
            lineage: manifest.lineage,
            contents: manifest.contents,
            sealed_at: manifest.sealed_at,
            root: manifest.root,
            kernel_release: manifest.kernel_release,
            warnings: manifest.warnings,
            held: Arc::new(dir),
        }))
    }

    /// The disk, opened for reading through the held folder, whatever its path leads to by now.
    pub fn open_disk(&self) -> Result<File, ImageError> {
        self.open_file(DISK)
    }

    /// One of its files, in the same way.
    pub(super) fn open_file(&self, name: &str) -> Result<File, ImageError> {
        self.held.open(name)?.ok_or_else(|| {
            ImageError::file("open", &self.dir.join(name))(std::io::ErrorKind::NotFound.into())
        })
    }

    /// `manifest.json` as it is, and what it says.
    pub(super) fn manifest(&self) -> Result<(Vec<u8>, Manifest), ImageError> {
        let path = self.dir.join(MANIFEST);
        let bytes = self.held.read_small(MANIFEST, MAX_MANIFEST)?;
        let bytes = bytes.unwrap_or_default();
        let manifest = serde_json::from_slice(&bytes)
            .map_err(|e| ImageError::file("read", &path)(e.into()))?;
        Ok((bytes, manifest))
    }

    /// What its files take on storage, in bytes; holes take nothing.
    pub fn stored_bytes(&self) -> Result<u64, ImageError> {
        let mut bytes = 0_u64;
        for name in self.held.names()? {
            if let Some(file) = self.held.open(&name)? {
                let meta = file
                    .metadata()
                    .map_err(ImageError::file("stat", &self.held.at(&name)))?;
                // Blocks of 512 bytes, whatever the file system's own.
                bytes = bytes.saturating_add(meta.blocks().saturating_mul(512));
            }
        }
        Ok(bytes)
    }

    pub(super) fn mark_tested(&self) -> Result<(), ImageError> {
        let file = self.held.open_or_create(TESTED)?;
        file.sync_all()
            .map_err(ImageError::file("sync", &self.held.at(TESTED)))?;
        self.held.sync()
    }
}

/// Takes the lock that says a folder is in use; `false` while somebody removes it.
pub fn hold(dir: &Dir) -> Result<bool, ImageError> {
    dir.try_lock(FlockOperation::NonBlockingLockShared)
}

//! A folder of the store, held by its descriptor.
//!
//! Everything below it is opened by one name relative to that descriptor and never through a
//! symbolic link, so nobody can make us read or write elsewhere. A shared flock on the descriptor
//! keeps systemd-tmpfiles away: it skips what it cannot lock.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock};

use super::{ImageError, fault};

const DIR: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::RDONLY);

/// Numbers the temporary files of this process: two threads may replace one file.
static TEMPS: AtomicU64 = AtomicU64::new(0);

/// An open folder and the path it was reached by.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Drop for Dir {
    /// Gives the lock up at once: a child that is just being spawned still shares the descriptor.
    fn drop(&mut self) {
        let _ = flock(&self.fd, FlockOperation::Unlock);
    }
}

impl Dir {
    /// Opens the store's folder, making it if it is not there. Every folder on the way must
    /// belong to root or to this user, and others may write only where the sticky bit protects
    /// names.
    pub fn open_base(path: &Path) -> Result<Self, ImageError> {
        let refuse = |reason: String| ImageError::StoreUnsafe {
            path: path.to_owned(),
            reason,
        };
        if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
            return Err(refuse("not an absolute path without `..`".to_owned()));
        }
        let existing = path.ancestors().find(|p| fs::symlink_metadata(p).is_ok());
        check_way(existing.unwrap_or(path)).map_err(refuse)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| refuse(format!("cannot create it: {e}")))?;
        check_way(path).map_err(refuse)?;
        let mode = fs::metadata(path)
            .map_err(|e| refuse(e.to_string()))?
            .mode();
        if mode & 0o022 != 0 {
            return Err(refuse("others can write to it".to_owned()));
        }
        let fd = rustix::fs::open(path, DIR, Mode::empty())
            .map_err(|e| refuse(io::Error::from(e).to_string()))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// A folder in this one, made if it is not there.
    pub fn sub(&self, name: &str) -> Result<Self, ImageError> {
        fault::point();
        match rustix::fs::mkdirat(&self.fd, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(ImageError::file("create", &self.at(name))(e.into())),
        }
        let found = self.existing(name)?;
        found.ok_or_else(|| ImageError::StoreUnsafe {
            path: self.at(name),
            reason: "it vanished".to_owned(),
        })
    }

    /// A folder in this one, if it is there.
    pub fn existing(&self, name: &str) -> Result<Option<Self>, ImageError> {
        let path = self.at(name);
        let fd = match rustix::fs::openat(&self.fd, name, DIR, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => {
                return Err(ImageError::StoreUnsafe {
                    path,
                    reason: "not a folder but a symbolic link or a file".to_owned(),
                });
            }
            Err(e) => return Err(ImageError::file("open", &path)(e.into())),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| ImageError::file("stat", &path)(e.into()))?;
        if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o022 != 0 {
            return Err(ImageError::StoreUnsafe {
                path,
                reason: "not a private folder of this user".to_owned(),
            });
        }
        Ok(Some(Self { fd, path }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file for reading; `None` if it is not there. A symbolic link is an error.
    pub fn open(&self, name: &str) -> Result<Option<File>, ImageError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(e) => Err(ImageError::file("open", &self.at(name))(e.into())),
        }
    }

    /// Opens a file for reading and writing, making it (mode 0600) if it is not there.
    pub fn open_or_create(&self, name: &str) -> Result<File, ImageError> {
        self.create(name, OFlags::empty())
    }

    /// Makes a file (mode 0600); an old one is emptied.
    pub fn create_truncated(&self, name: &str) -> Result<File, ImageError> {
        self.create(name, OFlags::TRUNC)
    }

    /// Makes a file (mode 0600) that must not be there yet.
    pub fn create_new(&self, name: &str) -> Result<File, ImageError> {
        self.create(name, OFlags::EXCL)
    }

    fn create(&self, name: &str, more: OFlags) -> Result<File, ImageError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
        fault::point();
        rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|e| ImageError::file("create", &self.at(name))(e.into()))
    }

    /// The whole of a small file; `None` if it is not there or longer than `limit` bytes.
    pub fn read_small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(ImageError::file("read", &self.at(name)))?;
        let fits = u64::try_from(bytes.len()).is_ok_and(|len| len <= limit);
        Ok(fits.then_some(bytes))
    }

    /// Replaces a small file whole: after a crash it is the old one or the new one.
    pub fn write_atomic(&self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let number = TEMPS.fetch_add(1, Ordering::Relaxed);
        let temp = format!(".{name}.{}.{number}", std::process::id());
        let mut file = self.create_truncated(&temp)?;
        fault::point();
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(ImageError::file("write", &self.at(&temp)))?;
        fault::point();
        rustix::fs::renameat(&self.fd, &temp, &self.fd, name)
            .map_err(|e| ImageError::file("rename", &self.at(&temp))(e.into()))?;
        self.sync()
    }

    /// Adds to the end of a small file, which is made if it is not there, and makes that durable.
    pub fn append(&self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let mut file = self.open_or_create(name)?;
        fault::point();
        file.seek(SeekFrom::End(0))
            .and_then(|_end| file.write_all(bytes))
            .and_then(|()| file.sync_data())
            .map_err(ImageError::file("write", &self.at(name)))
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<(), ImageError> {
        fault::point();
        rustix::fs::renameat(&self.fd, from, &self.fd, to)
            .map_err(|e| ImageError::file("rename", &self.at(from))(e.into()))
    }

    /// Moves a file or folder into another folder of the same file system.
    pub fn rename_into(&self, from: &str, parent: &Self, to: &str) -> Result<(), ImageError> {
        fault::point();
        rustix::fs::renameat(&self.fd, from, &parent.fd, to)
            .map_err(|e| ImageError::file("rename", &self.at(from))(e.into()))
    }

    /// Removes a file; one that is not there is fine.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        fault::point();
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(ImageError::file("remove", &self.at(name))(e.into())),
        }
    }

    /// Removes a folder and all in it.
    pub fn remove_tree(&self, name: &str) -> Result<(), ImageError> {
        fault::point();
        match fs::remove_dir_all(self.at(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(ImageError::file("remove", &self.at(name))(e))
            }
            _ => Ok(()),
        }
    }

    /// Names in it, without `.` and `..`; those that are no UTF-8 are not ours and left out.
    pub fn names(&self) -> Result<Vec<String>, ImageError> {
        let fail = |e: rustix::io::Errno| ImageError::file("list", &self.path)(e.into());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name().to_str().unwrap_or_default();
            if !["", ".", ".."].contains(&name) {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Makes names in it durable.
    pub fn sync(&self) -> Result<(), ImageError> {
        fault::point();
        rustix::fs::fsync(&self.fd).map_err(|e| ImageError::file("sync", &self.path)(e.into()))
    }

    /// Takes or changes the lock on this folder without waiting; whether it was to be had.
    pub fn try_lock(&self, operation: FlockOperation) -> Result<bool, ImageError> {
        match flock(&self.fd, operation) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(ImageError::file("lock", &self.path)(e.into())),
        }
    }

    /// Whether `name` of `parent` is still this very folder.
    pub fn is_still(&self, parent: &Self, name: &str) -> bool {
        let here = rustix::fs::fstat(&self.fd);
        let there = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW);
        match (here, there) {
            (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }
}

/// Checks that only root and this user decide where a path leads: as it is written, links
/// included, and as it is after following them.
fn check_way(path: &Path) -> Result<(), String> {
    let real = fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let own = rustix::process::geteuid().as_raw();
    for step in path.ancestors().chain(real.ancestors()) {
        let meta = fs::symlink_metadata(step).map_err(|e| format!("{}: {e}", step.display()))?;
        if meta.uid() != own && meta.uid() != 0 {
            return Err(format!("{} is of user {}", step.display(), meta.uid()));
        }
        let others_write = meta.mode() & 0o022 != 0 && !meta.is_symlink();
        if others_write && meta.mode() & 0o1000 == 0 {
            return Err(format!("others can write to {}", step.display()));
        }
    }
    Ok(())
}

/// Whether a name can be a single component of ours: no separator, no traversal.
pub fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    components.next().is_none()
        && matches!(first, Some(Component::Normal(n)) if n == OsStr::new(name))
}

/// Writes `bytes` at `offset`, leaving holes where there are only zeroes.
pub fn write_sparse_at(file: &File, bytes: &[u8], mut offset: u64) -> io::Result<()> {
    /// What is looked at and written at once; a common block size of file systems is below it.
    const PIECE: usize = 64 << 10;
    for piece in bytes.chunks(PIECE) {
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, offset)?;
        }
        offset = offset.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
    }
    Ok(())
}

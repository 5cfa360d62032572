//! Host-wide locks in a folder that only root can write: what two processes must not share.
//!
//! A lock is a flock on a small file; it ends with the descriptor, so a killed process leaves
//! none. A living one unlocks before it closes: a child of ours that is between fork and exec still
//! has a copy of the descriptor. Files are never removed: removing one would let two processes lock different inodes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::NetError;

/// A held lock; dropping it gives it up.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The close that follows gives it up as well, if a little later.
        let _closed_anyway = flock(&self.file, FlockOperation::Unlock);
    }
}

/// The folder of locks.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Opens or makes the folder; refuses a symbolic link, another owner, or one others can write.
    pub fn open(path: &Path) -> Result<Self, NetError> {
        let fail = |source| NetError::RunDir {
            path: path.to_owned(),
            source,
        };
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fail(e)),
            _ => {}
        }
        let meta = fs::symlink_metadata(path).map_err(fail)?;
        let uid = rustix::process::geteuid().as_raw();
        if !meta.is_dir() || meta.uid() != uid || meta.mode() & 0o022 != 0 {
            return Err(fail(io::Error::other("not a private folder of this user")));
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Takes a lock if nobody has it.
    pub fn try_lock(&self, name: &str) -> Result<Option<Lock>, NetError> {
        let path = self.path.join(name);
        let fail = |source| NetError::Lock {
            path: path.clone(),
            source,
        };
        let nofollow = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits())
            .map_err(|e| fail(io::Error::other(e)))?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(nofollow)
            .open(&path)
            .map_err(fail)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(fail(e.into())),
        }
    }

    /// Takes the first free lock of `prefix` + number.
    pub fn lock_first(
        &self,
        prefix: &str,
        mut numbers: std::ops::Range<u32>,
    ) -> Result<(u32, Lock), NetError> {
        numbers
            .find_map(|n| match self.try_lock(&format!("{prefix}{n}")) {
                Ok(Some(lock)) => Some(Ok((n, lock))),
                Ok(None) => None,
                Err(e) => Some(Err(e)),
            })
            .unwrap_or_else(|| {
                Err(NetError::Lock {
                    path: self.path.join(format!("{prefix}*")),
                    source: io::Error::other("every number is taken"),
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_exclusive_until_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(&dir.path().join("run")).unwrap();
        let first = run.try_lock("tap.1").unwrap().unwrap();
        assert!(run.try_lock("tap.1").unwrap().is_none());
        assert_eq!(run.lock_first("tap.", 1..5).unwrap().0, 2);
        drop(first);
        assert!(run.try_lock("tap.1").unwrap().is_some());
    }

    #[test]
    fn a_symbolic_link_is_no_run_folder_and_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(RunDir::open(&link).is_err());
        let run = RunDir::open(&dir.path().join("run")).unwrap();
        let target = dir.path().join("victim");
        std::os::unix::fs::symlink(&target, dir.path().join("run/tap.1")).unwrap();
        assert!(run.try_lock("tap.1").is_err());
        assert!(!target.exists());
    }
}

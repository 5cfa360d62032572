//! A snapshot as a directory: `state`, `memory`, and `disk<n>` for each copy-on-write disk.
//!
//! Each file is written under another name, synced and renamed, the state last: a directory with a
//! state is whole, and a snapshot that is mapped by clones is replaced, never changed. A link is
//! followed nowhere.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, renameat, unlinkat};
use rustix::io::Errno;

use super::copy;
use super::error::SnapshotError;
use super::file::{self, StateProblem};
use super::key::HostKey;
use super::state::MachineState;

const STATE: &str = "state";
const MEMORY: &str = "memory";

/// A directory that a snapshot is written to or read from.
pub struct Directory {
    path: PathBuf,
    handle: rustix::fd::OwnedFd,
}

/// The name of a disk's delta.
fn disk(index: usize) -> String {
    format!("disk{index}")
}

impl Directory {
    /// Opens a directory that is there.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(CWD, path, flags, Mode::empty()) {
            Ok(handle) => Ok(Self {
                path: path.to_owned(),
                handle,
            }),
            Err(e) => Err(SnapshotError::Open {
                path: path.to_owned(),
                source: e.into(),
            }),
        }
    }

    /// Opens a directory to write to, made if it is not there; its parent must be. A snapshot
    /// that is in it stops being one.
    pub fn create(path: &Path) -> Result<Self, SnapshotError> {
        let fail = |e: Errno| SnapshotError::Write {
            path: path.to_owned(),
            source: e.into(),
        };
        match mkdirat(CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(e)),
        }
        let directory = Self::open(path)?;
        match unlinkat(&directory.handle, STATE, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(directory),
            Err(e) => Err(fail(e)),
        }
    }

    /// Writes one file: whole under its name, or not at all.
    fn write(
        &self,
        name: &str,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), SnapshotError> {
        let written = || {
            let temporary = format!(".{name}");
            match unlinkat(&self.handle, &temporary, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let owner_only = Mode::RUSR | Mode::WUSR;
            let file = openat(&self.handle, &temporary, flags, owner_only)?;
            let file = File::from(file);
            let filled = fill(&file).and_then(|()| file.sync_data());
            if filled.is_err() {
                // What there was no room for must not keep the rest of it.
                let _left = unlinkat(&self.handle, &temporary, AtFlags::empty());
            }
            filled?;
            Ok(renameat(&self.handle, &temporary, &self.handle, name)?)
        };
        written().map_err(|source| SnapshotError::Write {
            path: self.path.join(name),
            source,
        })
    }

    /// Writes the memory by a way of the caller's.
    pub fn write_memory(
        &self,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), SnapshotError> {
        self.write(MEMORY, fill)
    }

    /// Copies a disk's delta.
    pub fn write_disk(&self, index: usize, delta: &File) -> Result<(), SnapshotError> {
        self.write(&disk(index), |to| copy::copy_sparse(delta, to))
    }

    /// Writes the state, which makes the directory a snapshot.
    pub fn write_state(&self, state: &MachineState, host: &HostKey) -> Result<(), SnapshotError> {
        let bytes = file::encode(state, host).map_err(|source| self.state_error(source))?;
        self.write(STATE, |mut to| io::Write::write_all(&mut to, &bytes))?;
        let synced = openat(
            &self.handle,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(rustix::fs::fsync);
        synced.map_err(|e| SnapshotError::Write {
            path: self.path.clone(),
            source: e.into(),
        })
    }

    fn state_error(&self, source: StateProblem) -> SnapshotError {
        SnapshotError::State {
            path: self.path.join(STATE),
            source,
        }
    }

    fn read(&self, name: &str) -> Result<(File, u64), SnapshotError> {
        let opened = || {
            // Without O_NONBLOCK a FIFO of that name would be waited on for ever.
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(openat(&self.handle, name, flags, Mode::empty())?);
            let meta = file.metadata()?;
            if !meta.is_file() {
                return Err(io::Error::other("not a regular file"));
            }
            Ok((file, meta.len()))
        };
        opened().map_err(|source| SnapshotError::Open {
            path: self.path.join(name),
            source,
        })
    }

    /// A file that must have `wanted` bytes.
    fn read_exactly(&self, name: &str, wanted: u64) -> Result<Arc<File>, SnapshotError> {
        let (file, found) = self.read(name)?;
        if found != wanted {
            return Err(SnapshotError::Length {
                path: self.path.join(name),
                found,
                wanted,
            });
        }
        Ok(Arc::new(file))
    }

    /// Reads the state and checks all of it.
    pub fn state(&self, host: &HostKey) -> Result<MachineState, SnapshotError> {
        let (file, length) = self.read(STATE)?;
        file::read(&mut BufReader::new(file), length, host).map_err(|e| self.state_error(e))
    }

    /// Opens the memory of a machine with that state.
    pub fn memory(&self, state: &MachineState) -> Result<Arc<File>, SnapshotError> {
        self.read_exactly(MEMORY, u64::from(state.memory_mib()) << 20)
    }

    /// Opens the delta of a disk of `bytes`.
    pub fn disk(&self, index: usize, bytes: u64) -> Result<Arc<File>, SnapshotError> {
        self.read_exactly(&disk(index), bytes)
    }
}

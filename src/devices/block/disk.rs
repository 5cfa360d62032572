//! What a disk's bytes are kept in, and the storage work that is done on the block thread itself.
//!
//! Reads are planned here and carried out by the engine; writes and zeroing happen here, one after
//! the other.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::overlay::Overlay;
use super::vectored::{self, Direction, IoVecs};
use crate::devices::GuestMemory;
use crate::devices::queue::{Segment, cut};

/// The unit of a virtio disk's addresses, whatever its block size (virtio 1.2, 5.2).
pub const SECTOR: u64 = 512;
/// Zeroes to write where a file system can make no holes.
static ZEROES: [u8; 65_536] = [0; 65_536];

/// A disk's backing. Files may be block devices too.
#[derive(Debug)]
pub enum Disk {
    /// Read and written in place.
    Direct(Arc<File>),
    /// Never written, whatever the driver asks.
    ReadOnly(Arc<File>),
    /// A base that is never written and a private delta.
    Overlay(Overlay),
}

/// Part of a read: from one file at the disk's own offset, or zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// `None`: reads as zero.
    pub fd: Option<RawFd>,
    pub offset: u64,
    pub len: u64,
}

impl Disk {
    /// Its size: whole sectors.
    pub fn bytes(&self) -> io::Result<u64> {
        let bytes = match self {
            Self::Direct(file) | Self::ReadOnly(file) => file_bytes(file)?,
            Self::Overlay(overlay) => overlay.bytes(),
        };
        Ok(bytes - bytes % SECTOR)
    }

    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::ReadOnly(_))
    }

    /// The pieces of a read, in order.
    pub fn plan_read(&self, offset: u64, len: u64, pieces: &mut Vec<Piece>) {
        match self {
            Self::Direct(file) | Self::ReadOnly(file) => pieces.push(Piece {
                fd: Some(file.as_raw_fd()),
                offset,
                len,
            }),
            Self::Overlay(overlay) => overlay.plan_read(offset, len, pieces),
        }
    }

    /// Writes, with copies of what is written in part. Blocks for storage.
    pub fn write(&mut self, source: &GuestBytes<'_>, offset: u64) -> io::Result<()> {
        match self {
            Self::Direct(file) => source.write(file, 0, offset, source.bytes()),
            Self::ReadOnly(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Self::Overlay(overlay) => overlay.write(source, offset),
        }
    }

    /// Makes a range read as zero; with `unmap` its space may be given back. Blocks for storage.
    pub fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match self {
            Self::Direct(file) => zero_in_file(file, offset, len, unmap),
            Self::ReadOnly(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            Self::Overlay(overlay) => overlay.zero(offset, len),
        }
    }

    /// The file whose sync makes completed writes durable.
    pub fn written_file(&self) -> Option<&File> {
        match self {
            Self::Direct(file) => Some(file),
            Self::ReadOnly(_) => None,
            Self::Overlay(overlay) => Some(overlay.delta()),
        }
    }
}

/// Bytes in guest memory, as the source or target of storage work.
#[derive(Debug, Clone, Copy)]
pub struct GuestBytes<'a> {
    pub memory: &'a GuestMemory,
    pub segments: &'a [Segment],
}

impl GuestBytes<'_> {
    pub fn bytes(&self) -> u64 {
        crate::devices::queue::total(self.segments)
    }

    /// Writes `[skip, skip + len)` of the bytes to `file`.
    pub fn write(&self, file: &File, skip: u64, offset: u64, len: u64) -> io::Result<()> {
        self.transfer(Direction::Write, file.as_raw_fd(), skip, offset, len)
    }

    /// Moves `[skip, skip + len)` of the bytes between guest and file.
    pub fn transfer(
        &self,
        direction: Direction,
        fd: RawFd,
        skip: u64,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let mut vecs = IoVecs::default();
        vecs.extend(self.memory, &cut(self.segments, skip, len))
            .map_err(io::Error::other)?;
        let count = vecs.count();
        vectored::transfer(direction, fd, vecs.part(0..count), offset)
    }

    /// Copies `[skip, skip + into.len())` of the bytes.
    pub fn copy_to(&self, skip: u64, into: &mut [u8]) -> io::Result<()> {
        if crate::devices::queue::read_segments(self.memory, self.segments, skip, into) {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Fills `[skip, skip + len)` of the bytes with zeroes.
    pub fn fill_zero(&self, skip: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let zeroes = zeroes(len - done);
            let at = skip + done;
            if !crate::devices::queue::write_segments(self.memory, self.segments, at, zeroes) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += zeroes.len() as u64;
        }
        Ok(())
    }
}

/// At most `len` zeroes.
fn zeroes(len: u64) -> &'static [u8] {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    ZEROES.get(..len).unwrap_or(&ZEROES)
}

/// The length of a file or block device.
pub fn file_bytes(file: &File) -> io::Result<u64> {
    // The position is shared with whoever holds the file, but nobody here uses it.
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Gives back the space of a range; false if the file system can't.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    allocate(file, flags, offset, len)
}

fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
    loop {
        return match rustix::fs::fallocate(file, flags, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(e) => Err(e.into()),
        };
    }
}

fn zero_in_file(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    if (unmap && punch(file, offset, len)?) || allocate(file, keep, offset, len)? {
        return Ok(());
    }
    write_zeroes(file, offset, len)
}

/// Writes zeroes.
pub fn write_zeroes(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let zeroes = zeroes(len - done);
        file.write_all_at(zeroes, offset + done)?;
        done += zeroes.len() as u64;
    }
    Ok(())
}

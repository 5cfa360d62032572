//! Vectored file I/O straight from and to guest memory.
//!
//! Works on raw addresses, never on slices: the guest may change the bytes at any time.
#![expect(unsafe_code, reason = "the kernel is given addresses of guest memory")]

use std::io;
use std::os::fd::RawFd;

use crate::devices::GuestMemory;
use crate::devices::fault::GuestFault;
use crate::devices::queue::{self, Segment};

/// Host addresses for one or more vectored calls. The buffer is kept for reuse.
#[derive(Debug, Default)]
pub struct IoVecs(Vec<libc::iovec>);

// SAFETY: plain addresses and lengths; who passes them to the kernel keeps the memory mapped.
unsafe impl Send for IoVecs {}

impl IoVecs {
    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Appends the host addresses of `segments`.
    pub fn extend(&mut self, mem: &GuestMemory, segments: &[Segment]) -> Result<(), GuestFault> {
        queue::iovecs(mem, segments, &mut self.0)
    }

    /// The entries of `range`; empty if there are fewer.
    pub fn part(&mut self, range: std::ops::Range<usize>) -> &mut [libc::iovec] {
        self.0.get_mut(range).unwrap_or_default()
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file to the guest.
    Read,
    /// From the guest to the file.
    Write,
}

/// Moves all bytes of `vecs` or fails; an end of file in a read is a failure. Blocks for storage.
///
/// `vecs` is consumed: it describes nothing useful afterwards.
pub fn transfer(
    direction: Direction,
    fd: RawFd,
    mut vecs: &mut [libc::iovec],
    mut offset: u64,
) -> io::Result<()> {
    while !vecs.is_empty() {
        let at = i64::try_from(offset).map_err(|_beyond| io::ErrorKind::InvalidInput)?;
        let count = libc::c_int::try_from(vecs.len().min(1024)).unwrap_or(1024);
        let moved = match direction {
            // SAFETY: each entry lies in guest memory that the caller keeps mapped.
            Direction::Read => unsafe { libc::preadv(fd, vecs.as_ptr(), count, at) },
            // SAFETY: as above.
            Direction::Write => unsafe { libc::pwritev(fd, vecs.as_ptr(), count, at) },
        };
        let Ok(moved) = usize::try_from(moved) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if moved == 0 {
            return Err(short(direction));
        }
        offset = offset.saturating_add(moved as u64);
        vecs = advance(vecs, moved);
    }
    Ok(())
}

/// What is left of `vecs` after `bytes` of them.
pub fn advance(vecs: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for vec in vecs.iter() {
        if vec.iov_len > bytes {
            break;
        }
        bytes -= vec.iov_len;
        whole += 1;
    }
    let rest = vecs.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(bytes);
        first.iov_len -= bytes;
    }
    rest
}

fn short(direction: Direction) -> io::Error {
    match direction {
        Direction::Read => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the disk's file ends early; hint: something truncated it",
        ),
        Direction::Write => io::Error::new(io::ErrorKind::WriteZero, "nothing was written"),
    }
}

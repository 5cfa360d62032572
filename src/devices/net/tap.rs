//! The TAP as the data path sees it: whole frames between the kernel and the guest's own memory.
//!
//! Never blocks. The only place of the device that touches raw addresses: they come from guest
//! memory that is borrowed for as long as they are kept.
#![expect(
    unsafe_code,
    reason = "vectored I/O on guest memory and TUNSETOFFLOAD have no safe form"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

use super::frame::HEADER_BYTES;
use crate::devices::fault::GuestFault;
use crate::devices::queue::{Segment, iovecs};
use crate::devices::{GuestMemory, HostFault};

/// `_IOW('T', 208, unsigned int)` of linux/if_tun.h.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
/// `TUN_F_*` of the same file.
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;

/// Pieces of guest memory for one vectored call, valid while the memory is borrowed.
pub(super) struct GuestIovecs<'m> {
    memory: &'m GuestMemory,
    raw: Vec<libc::iovec>,
}

impl<'m> GuestIovecs<'m> {
    pub fn new(memory: &'m GuestMemory) -> Self {
        Self {
            memory,
            raw: Vec::with_capacity(64),
        }
    }

    /// Appends `segments` and returns how many pieces they made.
    pub fn push(&mut self, segments: &[Segment]) -> Result<usize, GuestFault> {
        let before = self.raw.len();
        iovecs(self.memory, segments, &mut self.raw)?;
        Ok(self.raw.len() - before)
    }

    pub fn len(&self) -> usize {
        self.raw.len()
    }

    pub fn clear(&mut self) {
        self.raw.clear();
    }

    pub fn remove_front(&mut self, pieces: usize) {
        self.raw.drain(..pieces.min(self.raw.len()));
    }

    /// Leaves out the first `bytes`.
    fn skip(&mut self, mut bytes: usize) {
        for piece in &mut self.raw {
            let cut = bytes.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(cut);
            piece.iov_len -= cut;
            bytes -= cut;
            if bytes == 0 {
                return;
            }
        }
    }
}

/// What came of one attempt to read a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Header and frame, in bytes; beyond the guest's pieces they lie in the spill.
    Bytes(usize),
    Nothing,
}

/// What came of one attempt to send a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    Done,
    /// The kernel did not take it: full, down, or not convinced by the frame.
    Refused,
}

/// The TAP's descriptor.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
}

impl Tap {
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            file: File::from(fd),
        }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Tells the kernel what the driver takes: frames without checksum, and segments to cut later.
    pub fn set_offload(&self, features: u64) -> Result<(), HostFault> {
        let has = |feature: u32| features & (1 << feature) != 0;
        let mut offload = 0;
        // virtio 1.2, 5.1.3.1: everything else needs GUEST_CSUM.
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= TUN_F_CSUM;
            if has(VIRTIO_NET_F_GUEST_TSO4) {
                offload |= TUN_F_TSO4;
            }
            if has(VIRTIO_NET_F_GUEST_TSO6) {
                offload |= TUN_F_TSO6;
            }
            if has(VIRTIO_NET_F_GUEST_ECN) && offload & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
                offload |= TUN_F_TSO_ECN;
            }
        }
        // SAFETY: the request takes its argument by value; no memory is passed.
        let set = unsafe {
            libc::ioctl(
                self.fd(),
                ioctl(TUNSETOFFLOAD),
                libc::c_ulong::from(offload),
            )
        };
        if set != 0 {
            let source = io::Error::last_os_error();
            return Err(HostFault::new("set offloads of the TAP", source));
        }
        Ok(())
    }

    /// Reads one frame with its header into the guest's pieces and, where they end, into `spill`.
    pub fn receive(
        &self,
        pieces: &mut GuestIovecs<'_>,
        spill: &mut [u8],
    ) -> Result<Received, HostFault> {
        pieces.raw.push(libc::iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        });
        let count = libc::c_int::try_from(pieces.raw.len()).unwrap_or(libc::c_int::MAX);
        let received = loop {
            // SAFETY: `GuestIovecs` borrows the mapping its pieces lie in, and `spill` is borrowed
            // for this call. The guest may write its own pieces meanwhile: so does the kernel.
            let read = unsafe { libc::readv(self.fd(), pieces.raw.as_ptr(), count) };
            if let Ok(bytes) = usize::try_from(read) {
                break Ok(Received::Bytes(bytes));
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // Only an empty TAP makes another edge.
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN) => break Ok(Received::Nothing),
                _ => break Err(HostFault::new("read a frame from the TAP", error)),
            }
        };
        pieces.raw.pop();
        received
    }

    /// Sends one frame: `header` is the checked copy, and the guest's pieces begin with the
    /// original, which is left out. Uses `pieces` up.
    pub fn send(
        &self,
        header: &[u8; HEADER_BYTES],
        pieces: &mut GuestIovecs<'_>,
    ) -> Result<Sent, HostFault> {
        pieces.skip(HEADER_BYTES);
        let first = libc::iovec {
            iov_base: header.as_ptr().cast_mut().cast(),
            iov_len: header.len(),
        };
        pieces.raw.insert(0, first);
        let count = libc::c_int::try_from(pieces.raw.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: `GuestIovecs` borrows the mapping its pieces lie in, `header` is borrowed for
        // this call, and the kernel only reads. A guest that writes meanwhile changes its frame.
        let written = unsafe { libc::writev(self.fd(), pieces.raw.as_ptr(), count) };
        let error = io::Error::last_os_error();
        pieces.raw.clear();
        if written >= 0 {
            return Ok(Sent::Done);
        }
        match error.raw_os_error() {
            // The interface is gone, or a page of the guest's memory is: no frame will pass again.
            Some(libc::EBADFD | libc::EBADF | libc::EFAULT) => {
                Err(HostFault::new("send a frame to the TAP", error))
            }
            _ => Ok(Sent::Refused),
        }
    }

    /// Throws away up to `frames` frames; returns how many, and whether none is left.
    pub fn discard(&self, frames: u32) -> Result<(u32, bool), HostFault> {
        // The kernel drops what does not fit.
        let mut start = [0_u8; 64];
        for done in 0..frames {
            match rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut start)) {
                Ok(_bytes) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok((done, true)),
                Err(e) => return Err(HostFault::new("read a frame from the TAP", e.into())),
            }
        }
        Ok((frames, false))
    }
}

/// musl takes ioctl numbers as `c_int`, glibc as `c_ulong`; the bits are the same.
#[expect(clippy::cast_possible_wrap, reason = "ioctl numbers have 32 bits")]
const fn ioctl(number: u32) -> libc::Ioctl {
    number as libc::Ioctl
}

//! A running virtqueue (virtio 1.2, 2.7): ring positions from virtio-queue, and a descriptor walk
//! of our own, because that crate ends silently where the driver broke the contract.
//!
//! Owned by the worker that runs the device. A chain is copied once, checked as a whole and only
//! the copy is used: a driver that rewrites its table later changes nothing.

use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::fault::GuestFault;
use super::{GuestMemory, Interrupt};

/// Size of a descriptor table entry (virtio 1.2, 2.7.5).
const DESCRIPTOR_BYTES: u64 = 16;
/// Few requests span more: bounds the work one chain can cause.
const MAX_CHAIN_BYTES: u64 = 64 << 20;

/// One piece of guest memory, checked to lie in RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub addr: GuestAddress,
    pub len: u32,
}

/// A request: what the device may read, then what it may write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Bytes the device may read.
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }
}

/// Sum of the lengths; cannot overflow, as a chain is capped far below.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// Copies `buf.len()` bytes out of `segments` starting at `offset`; false if they are too short.
pub fn read_segments(mem: &GuestMemory, segments: &[Segment], offset: u64, buf: &mut [u8]) -> bool {
    let mut done = 0;
    for piece in cut(segments, offset, buf.len() as u64) {
        let Some(target) = buf.get_mut(done..done + piece.len as usize) else {
            return false;
        };
        if mem.read_slice(target, piece.addr).is_err() {
            return false;
        }
        done += target.len();
    }
    done == buf.len()
}

/// Copies `buf` into `segments` starting at `offset`; false if they are too short.
pub fn write_segments(mem: &GuestMemory, segments: &[Segment], offset: u64, buf: &[u8]) -> bool {
    let mut done = 0;
    for piece in cut(segments, offset, buf.len() as u64) {
        let Some(source) = buf.get(done..done + piece.len as usize) else {
            return false;
        };
        if mem.write_slice(source, piece.addr).is_err() {
            return false;
        }
        done += source.len();
    }
    done == buf.len()
}

/// The part of `segments` that covers `[offset, offset + len)`; shorter if they end before.
pub fn cut(segments: &[Segment], offset: u64, len: u64) -> Vec<Segment> {
    let mut skip = offset;
    let mut left = len;
    let mut pieces = Vec::new();
    for segment in segments {
        let size = u64::from(segment.len);
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = (size - skip).min(left);
        // `take` is at most a segment's length, which is a u32.
        let Ok(take32) = u32::try_from(take) else {
            break;
        };
        if take32 == 0 {
            break;
        }
        pieces.push(Segment {
            addr: GuestAddress(segment.addr.0.wrapping_add(skip)),
            len: take32,
        });
        skip = 0;
        left -= take;
    }
    pieces
}

/// Host addresses of `segments`, in order, for vectored system calls. They stay valid as long as
/// `mem` is mapped; the guest may write them at any time.
pub fn iovecs(
    mem: &GuestMemory,
    segments: &[Segment],
    out: &mut Vec<libc::iovec>,
) -> Result<(), GuestFault> {
    for segment in segments {
        for slice in mem.get_slices(segment.addr, segment.len as usize) {
            let slice = slice.map_err(|_outside| GuestFault::RingMemory)?;
            out.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    Ok(())
}

/// A queue between DRIVER_OK and reset.
#[derive(Debug)]
pub struct RunningQueue {
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
    /// Where the used index was when the driver was last told or found deaf.
    signalled: Wrapping<u16>,
    max_chain_bytes: u64,
}

impl RunningQueue {
    /// Takes a validated queue, the descriptor its driver kicks and the line to answer on.
    pub fn new(queue: Queue, kick: Arc<EventFd>, interrupt: Interrupt) -> Self {
        Self {
            signalled: Wrapping(queue.next_used()),
            max_chain_bytes: MAX_CHAIN_BYTES,
            queue,
            kick,
            interrupt,
        }
    }

    /// Lets one chain span up to `bytes`, where the device's work does not grow with them.
    pub fn set_max_chain_bytes(&mut self, bytes: u64) {
        self.max_chain_bytes = bytes;
    }

    /// The descriptor to poll for kicks.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// The kick itself, for a back end that waits on it (vhost).
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// The line this queue answers on.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Clears the kick's counter; it is non-blocking and an empty one is fine.
    pub fn consume_kick(&self) {
        let _empty = self.kick.read();
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Addresses and positions, for vhost and for a snapshot.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Moves both positions: where an in-kernel back end stopped.
    pub fn set_positions(&mut self, next_avail: u16, next_used: u16) {
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
        self.signalled = Wrapping(next_used);
    }

    /// The used index as it stands in guest memory: where an in-kernel back end wrote last.
    pub fn used_index(&self, mem: &GuestMemory) -> Result<u16, GuestFault> {
        self.queue
            .used_idx(mem, Ordering::Acquire)
            .map(|index| index.0)
            .map_err(|_unreadable| GuestFault::RingMemory)
    }

    /// The next request, `None` when the driver has made no more available.
    pub fn pop(&mut self, mem: &GuestMemory) -> Result<Option<Chain>, GuestFault> {
        let mut chain = Chain::default();
        Ok(self.pop_into(mem, &mut chain)?.then_some(chain))
    }

    /// The same into a chain that was used before, so that nothing is allocated; false when the
    /// driver has made no more available.
    pub fn pop_into(&mut self, mem: &GuestMemory, chain: &mut Chain) -> Result<bool, GuestFault> {
        let index = self
            .queue
            .avail_idx(mem, Ordering::Acquire)
            .map_err(|_unreadable| GuestFault::RingMemory)?;
        let next = Wrapping(self.queue.next_avail());
        let ahead = (index - next).0;
        let size = self.queue.size();
        if ahead > size {
            return Err(GuestFault::AvailIndex {
                index: index.0,
                ahead,
                size,
            });
        }
        if ahead == 0 {
            return Ok(false);
        }
        let slot = u64::from(next.0.checked_rem(size).unwrap_or(0));
        // Avail ring: flags and idx are two bytes each, then the ring (virtio 1.2, 2.7.6).
        let at = self.queue.avail_ring().checked_add(4 + slot * 2);
        let head: u16 = at
            .and_then(|at| mem.load(GuestAddress(at), Ordering::Relaxed).ok())
            .map(u16::from_le)
            .ok_or(GuestFault::RingMemory)?;
        self.walk(mem, head, chain)?;
        self.queue.set_next_avail((next + Wrapping(1)).0);
        Ok(true)
    }

    /// Puts the last popped chain back: it is the next one again.
    pub fn undo_pop(&mut self) {
        let next = Wrapping(self.queue.next_avail()) - Wrapping(1);
        self.queue.set_next_avail(next.0);
    }

    /// Returns a chain with `len` bytes written. The driver learns of it by [`Self::signal`].
    pub fn push(&mut self, mem: &GuestMemory, head: u16, len: u32) -> Result<(), GuestFault> {
        self.queue
            .add_used(mem, head, len)
            .map_err(|_unwritable| GuestFault::RingMemory)
    }

    /// Returns several chains, each a head and the bytes written, under one index update: the
    /// driver sees all of them or none, as a frame in several buffers needs (virtio 1.2, 5.1.6.4).
    pub fn push_all(&mut self, mem: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), GuestFault> {
        let ring = self.queue.used_ring();
        let size = self.queue.size();
        let mut used = Wrapping(self.queue.next_used());
        for (head, len) in chains {
            let slot = u64::from(used.0.checked_rem(size).unwrap_or(0));
            // Used ring: flags and idx are two bytes each, then elements of eight (2.7.8).
            ring.checked_add(4 + slot * 8)
                .and_then(|at| {
                    // The head's index, then the length, 32 bits each.
                    let element = u64::from(*head) | u64::from(*len) << 32;
                    mem.write_obj(element.to_le(), GuestAddress(at)).ok()
                })
                .ok_or(GuestFault::RingMemory)?;
            used += Wrapping(1);
        }
        self.queue.set_next_used(used.0);
        ring.checked_add(2)
            .and_then(|at| {
                mem.store(used.0.to_le(), GuestAddress(at), Ordering::Release)
                    .ok()
            })
            .ok_or(GuestFault::RingMemory)
    }

    /// Raises the interrupt if something was returned since the last call and the driver has not
    /// asked for silence (virtio 1.2, 2.7.7 and 2.7.10).
    pub fn signal(&mut self, mem: &GuestMemory) -> Result<(), GuestFault> {
        let used = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.signalled, used);
        if used == old {
            return Ok(());
        }
        // The driver enables interrupts, then looks at the index: we do the reverse.
        fence(Ordering::SeqCst);
        let load = |at: u64| {
            self.queue
                .avail_ring()
                .checked_add(at)
                .and_then(|at| mem.load(GuestAddress(at), Ordering::Relaxed).ok())
                .map(u16::from_le)
                .ok_or(GuestFault::RingMemory)
        };
        let wanted = if self.queue.event_idx_enabled() {
            let event = Wrapping(load(4 + u64::from(self.queue.size()) * 2)?);
            used - event - Wrapping(1) < used - old
        } else {
            u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.signal();
        }
        Ok(())
    }

    /// Asks for kicks again; true if requests arrived meanwhile and must be taken first.
    pub fn enable_kicks(&mut self, mem: &GuestMemory) -> Result<bool, GuestFault> {
        self.queue
            .enable_notification(mem)
            .map_err(|_unwritable| GuestFault::RingMemory)
    }

    /// Tells the driver that kicks are not needed for now.
    pub fn disable_kicks(&mut self, mem: &GuestMemory) -> Result<(), GuestFault> {
        self.queue
            .disable_notification(mem)
            .map_err(|_unwritable| GuestFault::RingMemory)
    }

    fn walk(&self, mem: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), GuestFault> {
        let size = self.queue.size();
        if head >= size {
            return Err(GuestFault::HeadOutOfRange { head, size });
        }
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let mut walk = Walk {
            mem,
            head,
            chain,
            bytes: 0,
            max_bytes: self.max_chain_bytes,
            steps: 0,
        };
        let table = self.queue.desc_table();
        let mut next = head;
        loop {
            let descriptor = walk.descriptor(table, next, size)?;
            let flags = u32::from(descriptor.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                walk.indirect(&descriptor, size)?;
                break;
            }
            walk.take(&descriptor)?;
            if flags & VRING_DESC_F_NEXT == 0 {
                break;
            }
            walk.step(size)?;
            next = descriptor.next();
        }
        Ok(())
    }
}

/// One walk over a chain: everything a driver controls is bounded here.
struct Walk<'a> {
    mem: &'a GuestMemory,
    head: u16,
    chain: &'a mut Chain,
    bytes: u64,
    max_bytes: u64,
    steps: u16,
}

impl Walk<'_> {
    fn fault(&self, problem: &'static str) -> GuestFault {
        GuestFault::Chain {
            head: self.head,
            problem,
        }
    }

    fn descriptor(&self, table: u64, index: u16, entries: u16) -> Result<Descriptor, GuestFault> {
        if index >= entries {
            return Err(self.fault("next descriptor outside the table"));
        }
        table
            .checked_add(u64::from(index) * DESCRIPTOR_BYTES)
            .and_then(|at| self.mem.read_obj(GuestAddress(at)).ok())
            .ok_or_else(|| self.fault("table outside memory"))
    }

    /// One more step; a loop or a chain longer than `limit` ends here (virtio 1.2, 2.7.5.3.1).
    fn step(&mut self, limit: u16) -> Result<(), GuestFault> {
        self.steps += 1;
        if self.steps >= limit {
            return Err(self.fault("loops or is longer than the queue"));
        }
        Ok(())
    }

    fn indirect(&mut self, descriptor: &Descriptor, size: u16) -> Result<(), GuestFault> {
        let flags = u32::from(descriptor.flags());
        if flags & VRING_DESC_F_NEXT != 0 {
            return Err(self.fault("INDIRECT together with NEXT"));
        }
        let len = u64::from(descriptor.len());
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(self.fault("indirect table length is not a multiple of 16"));
        }
        let entries = len / DESCRIPTOR_BYTES;
        // virtio 1.2, 2.7.5.3.1: a chain, indirect ones included, is no longer than the queue.
        let entries = u16::try_from(entries)
            .ok()
            .filter(|n| *n <= size)
            .ok_or_else(|| self.fault("indirect table longer than the queue"))?;
        let table = descriptor.addr().0;
        let mut next = 0;
        self.steps = 0;
        loop {
            let inner = self.descriptor(table, next, entries)?;
            let flags = u32::from(inner.flags());
            if flags & VRING_DESC_F_INDIRECT != 0 {
                return Err(self.fault("nested indirect table"));
            }
            self.take(&inner)?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            self.step(entries)?;
            next = inner.next();
        }
    }

    fn take(&mut self, descriptor: &Descriptor) -> Result<(), GuestFault> {
        let writable = u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0;
        if !writable && !self.chain.writable.is_empty() {
            return Err(self.fault("readable after writable"));
        }
        self.bytes += u64::from(descriptor.len());
        if self.bytes > self.max_bytes {
            return Err(self.fault("spans more than this device takes"));
        }
        let segment = Segment {
            addr: descriptor.addr(),
            len: descriptor.len(),
        };
        if segment.len == 0 {
            return Ok(());
        }
        if !self.mem.check_range(segment.addr, segment.len as usize) {
            return Err(self.fault("buffer outside memory"));
        }
        if writable {
            self.chain.writable.push(segment);
        } else {
            self.chain.readable.push(segment);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "queue_test.rs"]
mod tests;

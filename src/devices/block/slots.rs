//! Requests in flight: one slot for each head of the queue.
//!
//! A head that comes twice finds its slot taken, and a slot's buffers are used again, so that a
//! request allocates nothing beyond its chain.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use super::request::Request;
use super::vectored::IoVecs;

/// One head's request while it is in flight.
#[derive(Debug, Default)]
pub struct Slot {
    pub request: Option<Request>,
    /// Entries that the kernel reads until the last operation has completed.
    pub vecs: IoVecs,
    pub parts: Vec<Part>,
    /// Operations to wait for.
    pub left: usize,
    pub error: Option<io::Error>,
}

/// One operation of a read.
#[derive(Debug, Clone)]
pub struct Part {
    pub fd: RawFd,
    pub offset: u64,
    pub bytes: u64,
    /// Its entries among the slot's.
    pub vecs: Range<usize>,
}

#[derive(Debug)]
pub struct Slots {
    slots: Vec<Slot>,
    /// Stands in for a head outside the queue, which the queue lets nobody see.
    spare: Slot,
}

impl Slots {
    pub fn new(queue_size: u16) -> Self {
        let slots = std::iter::repeat_with(Slot::default);
        Self {
            slots: slots.take(usize::from(queue_size)).collect(),
            spare: Slot::default(),
        }
    }

    pub fn get(&mut self, head: u16) -> &mut Slot {
        match self.slots.get_mut(usize::from(head)) {
            Some(slot) => slot,
            None => &mut self.spare,
        }
    }
}

/// Names an operation to the engine.
pub fn token(head: u16, index: usize) -> u64 {
    (u64::from(head) << 32) | index as u64
}

pub fn from_token(token: u64) -> (u16, usize) {
    let head = u16::try_from(token >> 32).unwrap_or(u16::MAX);
    let index = usize::try_from(token & 0xffff_ffff).unwrap_or(usize::MAX);
    (head, index)
}

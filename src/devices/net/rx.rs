//! Receive in user space: frames go from the TAP into the guest's buffers by one vectored read.
//!
//! Buffers are taken off the ring ahead and held until a frame of the largest size fits; what a
//! frame leaves stays held for the next one and goes back by position when the device stops.
//! Without buffers nothing is read: the TAP is polled by edge, so a flood neither spins this loop
//! nor is forgotten when the driver gives buffers again (CVE-2020-16843).

use std::collections::VecDeque;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress};

use super::active::{Budget, kick_again};
use super::counters::Counters;
use super::frame::{self, HEADER_BYTES, MAX_PACKET_BYTES, NUM_BUFFERS_OFFSET};
use super::tap::{GuestIovecs, Received, Tap};
use crate::devices::fault::{Fault, GuestFault};
use crate::devices::queue::write_segments;
use crate::devices::{Chain, GuestMemory, RunningQueue};

/// Pieces for one read: what is left of UIO_MAXIOV (1024) after the largest chain and the spill.
const MAX_PIECES: usize = 1024 - 256 - 1;
/// The running receive queue.
#[derive(Debug)]
pub(super) struct Rx {
    pub queue: RunningQueue,
    /// A frame may span several buffers.
    mergeable: bool,
    /// Bytes that must be held before a frame is read.
    wanted: u64,
    held: VecDeque<Held>,
    held_bytes: u64,
    /// Used again for the next buffers.
    spare: Vec<Chain>,
    /// Heads and lengths of the frame at hand.
    used: Vec<(u16, u32)>,
    /// Room for a frame that the guest's buffers cannot take.
    spill: Vec<u8>,
}

/// A buffer off the ring.
#[derive(Debug)]
struct Held {
    chain: Chain,
    bytes: u64,
    /// How many pieces of the vectored read it makes; counted anew at each wake-up.
    pieces: usize,
}

impl Rx {
    pub fn new(queue: RunningQueue, features: u64, mtu: u16) -> Self {
        let has = |feature: u32| features & (1 << feature) != 0;
        let large = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        Self {
            queue,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            wanted: frame::receive_bytes(large, mtu),
            held: VecDeque::new(),
            held_bytes: 0,
            spare: Vec::new(),
            used: Vec::new(),
            spill: vec![0; MAX_PACKET_BYTES],
        }
    }

    /// Reads frames until the TAP is empty, the buffers are used up, or the budget is spent; then
    /// it signals itself again.
    pub fn receive(
        &mut self,
        memory: &GuestMemory,
        tap: &Tap,
        counters: &Counters,
    ) -> Result<(), Fault> {
        let mut pieces = GuestIovecs::new(memory);
        for held in &mut self.held {
            held.pieces = pieces.push(&held.chain.writable)?;
        }
        let mut budget = Budget::default();
        self.queue.disable_kicks(memory)?;
        loop {
            if budget.is_spent() {
                kick_again(&self.queue);
                break;
            }
            if !self.hold_enough(memory, &mut pieces)? {
                // The driver refills when it sees what it got.
                self.queue.signal(memory)?;
                if !self.queue.enable_kicks(memory)? {
                    break;
                }
                self.queue.disable_kicks(memory)?;
                budget.spend(0);
                continue;
            }
            match tap.receive(&mut pieces, &mut self.spill)? {
                Received::Nothing => break,
                Received::Bytes(bytes) => {
                    self.complete(memory, &mut pieces, bytes as u64, counters)?;
                    budget.spend(bytes as u64);
                }
            }
        }
        self.queue.signal(memory)?;
        Ok(())
    }

    /// Gives held buffers back by position: the driver's ring looks as if they were never taken.
    pub fn release(&mut self) {
        for _buffer in self.held.drain(..) {
            self.queue.undo_pop();
        }
        self.held_bytes = 0;
    }

    /// Takes buffers until a frame fits; false if the driver has to give more first.
    fn hold_enough(
        &mut self,
        memory: &GuestMemory,
        pieces: &mut GuestIovecs<'_>,
    ) -> Result<bool, GuestFault> {
        while !self.is_enough(pieces.len()) {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !self.queue.pop_into(memory, &mut chain)? {
                self.spare.push(chain);
                // A small ring may never hold the largest frame: half of it must do.
                return Ok(self.held.len() * 2 >= usize::from(self.queue.size()));
            }
            if !chain.readable.is_empty() {
                return Err(fault("receive buffer is not device-writable"));
            }
            let bytes = chain.writable_bytes();
            // virtio 1.2, 5.1.6.3.1.
            if bytes < HEADER_BYTES as u64 {
                return Err(fault("receive buffer is shorter than a header"));
            }
            self.held_bytes += bytes;
            self.held.push_back(Held {
                pieces: pieces.push(&chain.writable)?,
                chain,
                bytes,
            });
        }
        Ok(true)
    }

    fn is_enough(&self, pieces: usize) -> bool {
        if self.mergeable {
            self.held_bytes >= self.wanted || pieces >= MAX_PIECES
        } else {
            !self.held.is_empty()
        }
    }

    /// Hands a frame of `bytes`, header included, to the driver.
    fn complete(
        &mut self,
        memory: &GuestMemory,
        pieces: &mut GuestIovecs<'_>,
        bytes: u64,
        counters: &Counters,
    ) -> Result<(), GuestFault> {
        let Some(frame_bytes) = bytes.checked_sub(HEADER_BYTES as u64) else {
            return Ok(());
        };
        if bytes > self.held_bytes {
            counters.rx_dropped.add(1);
            return Ok(());
        }
        self.used.clear();
        let mut left = bytes;
        let mut first = None;
        while left > 0 {
            // There is one: the frame is not longer than what is held.
            let Some(held) = self.held.pop_front() else {
                break;
            };
            let here = left.min(held.bytes);
            left -= here;
            self.held_bytes -= held.bytes;
            pieces.remove_front(held.pieces);
            self.used
                .push((held.chain.head, u32::try_from(here).unwrap_or(u32::MAX)));
            if first.is_none() {
                first = Some(held.chain);
            } else {
                self.spare.push(held.chain);
            }
        }
        if let Some(chain) = first {
            let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
            set_num_buffers(memory, &chain, count)?;
            self.spare.push(chain);
        }
        self.queue.push_all(memory, &self.used)?;
        counters.rx_frames.add(1);
        counters.rx_bytes.add(frame_bytes);
        Ok(())
    }
}

/// The kernel leaves this field alone (virtio 1.2, 5.1.6.4.1: it is 1 without merging).
fn set_num_buffers(memory: &GuestMemory, chain: &Chain, count: u16) -> Result<(), GuestFault> {
    let whole_header = chain
        .writable
        .first()
        .filter(|s| s.len as usize >= HEADER_BYTES);
    let written = match whole_header {
        Some(segment) => segment
            .addr
            .0
            .checked_add(NUM_BUFFERS_OFFSET)
            .is_some_and(|at| memory.write_obj(count.to_le(), GuestAddress(at)).is_ok()),
        None => write_segments(
            memory,
            &chain.writable,
            NUM_BUFFERS_OFFSET,
            &count.to_le_bytes(),
        ),
    };
    written.then_some(()).ok_or(GuestFault::RingMemory)
}

fn fault(problem: &'static str) -> GuestFault {
    GuestFault::Request {
        device: "net",
        problem,
    }
}

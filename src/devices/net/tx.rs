//! Transmit in user space: frames go from the guest's memory to the TAP by one vectored write.
//!
//! Nothing is in flight between two wake-ups. A frame that the kernel does not take at once is
//! dropped and counted: waiting would stop the other devices of this loop, and a network may lose
//! frames.

use vm_memory::Bytes;

use super::Link;
use super::active::{Budget, kick_again};
use super::counters::Counters;
use super::frame::{self, HEADER_BYTES};
use super::tap::{GuestIovecs, Sent, Tap};
use crate::devices::fault::{Fault, GuestFault};
use crate::devices::queue::{Segment, read_segments};
use crate::devices::{Chain, GuestMemory, RunningQueue};

/// The running transmit queue.
#[derive(Debug)]
pub(super) struct Tx {
    pub queue: RunningQueue,
    features: u64,
    /// Used again for each frame.
    chain: Chain,
}

impl Tx {
    pub fn new(queue: RunningQueue, features: u64) -> Self {
        Self {
            queue,
            features,
            chain: Chain::default(),
        }
    }

    /// Sends what the driver has made available, within a budget; what is left signals again.
    pub fn transmit(
        &mut self,
        memory: &GuestMemory,
        tap: &Tap,
        link: Link,
        counters: &Counters,
    ) -> Result<(), Fault> {
        let mut pieces = GuestIovecs::new(memory);
        let mut budget = Budget::default();
        self.queue.disable_kicks(memory)?;
        loop {
            while !budget.is_spent() && self.queue.pop_into(memory, &mut self.chain)? {
                let bytes = self.send(memory, tap, link, counters, &mut pieces)?;
                self.queue.push(memory, self.chain.head, 0)?;
                budget.spend(bytes);
            }
            self.queue.signal(memory)?;
            if budget.is_spent() {
                kick_again(&self.queue);
                return Ok(());
            }
            if !self.queue.enable_kicks(memory)? {
                return Ok(());
            }
            self.queue.disable_kicks(memory)?;
            // Kicks that come and go without a frame use the budget up as well.
            budget.spend(0);
        }
    }

    /// One frame, sent or dropped; returns its size.
    fn send(
        &self,
        memory: &GuestMemory,
        tap: &Tap,
        link: Link,
        counters: &Counters,
        pieces: &mut GuestIovecs<'_>,
    ) -> Result<u64, Fault> {
        if !self.chain.writable.is_empty() {
            return Err(fault("transmit buffer is device-writable").into());
        }
        let bytes = self.chain.readable_bytes();
        if link == Link::Down {
            counters.tx_dropped.add(1);
            return Ok(0);
        }
        // Copied once: the driver may write its own header again, and nobody looks.
        let frame_bytes = bytes.saturating_sub(HEADER_BYTES as u64);
        let Some(header) = copy_header(memory, &self.chain.readable)
            .and_then(|header| frame::check(header, frame_bytes, self.features).ok())
        else {
            counters.tx_refused.add(1);
            return Ok(0);
        };
        pieces.clear();
        pieces.push(&self.chain.readable)?;
        match tap.send(&header, pieces)? {
            Sent::Done => {
                counters.tx_frames.add(1);
                counters.tx_bytes.add(frame_bytes);
            }
            Sent::Refused => counters.tx_dropped.add(1),
        }
        Ok(frame_bytes)
    }
}

/// The header, wherever its pieces lie; `None` if the chain is shorter.
fn copy_header(memory: &GuestMemory, readable: &[Segment]) -> Option<[u8; HEADER_BYTES]> {
    let mut header = [0; HEADER_BYTES];
    let whole = readable.first().filter(|s| s.len as usize >= HEADER_BYTES);
    let copied = match whole {
        Some(segment) => memory.read_slice(&mut header, segment.addr).is_ok(),
        None => read_segments(memory, readable, 0, &mut header),
    };
    copied.then_some(header)
}

fn fault(problem: &'static str) -> GuestFault {
    GuestFault::Request {
        device: "net",
        problem,
    }
}

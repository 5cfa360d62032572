//! An activated disk: requests taken from its queue, in flight, and answered.
//!
//! Reads and flushes run concurrently in the engine; writes and zeroing are done on this thread.
//! Each head owns a slot, so that a head that comes twice is seen and nothing is allocated per
//! request beyond its chain.
//!
//! ```text
//!  kick ─> take ─> parse ─┬─> engine ──completion──┐
//!                         └─> done on the thread ──┴─> status, used ring ─> one interrupt
//! ```

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use super::disk::Piece;
use super::drive::Drive;
use super::engine::{Completion, Engine};
use super::request::{Action, Limits, Request, Status};
use super::slots::{Part, Slots, from_token};
use super::vectored::{self, Direction};
use crate::devices::fault::{Fault, GuestFault, HostFault};
use crate::devices::{GuestMemory, RunningQueue};

/// No request is taken while so many operations are in flight.
const MAX_OPERATIONS: u32 = 512;
/// Requests and bytes taken before other disks of this thread have their turn.
const BATCH_REQUESTS: u32 = 64;
const BATCH_BYTES: u64 = 8 << 20;

#[derive(Debug)]
pub struct Running {
    pub(super) memory: GuestMemory,
    queue: RunningQueue,
    pub(super) engine: Engine,
    limits: Limits,
    /// The driver does not flush, so each write must be durable (virtio 1.2, 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) slots: Slots,
    pub(super) operations: u32,
    pub(super) pieces: Vec<Piece>,
    /// Requests may wait in the queue for operations to complete; the driver kicks for none.
    stalled: bool,
    /// Answers that the driver was not told of.
    unsignalled: bool,
}

impl Running {
    pub fn new(
        memory: GuestMemory,
        queue: RunningQueue,
        engine: Engine,
        limits: Limits,
        write_through: bool,
    ) -> Self {
        Self {
            memory,
            slots: Slots::new(queue.size()),
            queue,
            engine,
            limits,
            write_through,
            operations: 0,
            pieces: Vec::new(),
            stalled: false,
            unsignalled: false,
        }
    }

    pub fn kick_fd(&self) -> RawFd {
        self.queue.kick_fd()
    }

    pub fn engine_fd(&self) -> Option<RawFd> {
        self.engine.fd()
    }

    /// The driver kicked, or we did.
    pub fn kicked(&mut self, drive: &mut Drive) -> Result<(), Fault> {
        self.queue.consume_kick();
        self.take(drive)?;
        self.turn(drive)
    }

    /// The engine has completions.
    pub fn completed(&mut self, drive: &mut Drive) -> Result<(), Fault> {
        self.engine.consume_event();
        self.turn(drive)?;
        if self.stalled {
            self.take(drive)?;
            self.turn(drive)?;
        }
        Ok(())
    }

    /// Kicks the queue itself: there may be requests that nobody will kick for.
    pub fn kick_self(&self) {
        // A full counter is readable as it is.
        let _saturated = self.queue.kick().write(1);
    }

    /// Waits for everything in flight, answers it, and gives the queue's position back.
    pub fn drain(mut self, drive: &mut Drive) -> virtio_queue::QueueState {
        while self.operations > 0 {
            if let Err(e) = self.engine.submit(1) {
                // The engine itself waits, without answers, when it is dropped.
                tracing::warn!("cannot wait for block i/o: {e}");
                break;
            }
            // A broken used ring is the driver's loss; the rest is waited for all the same.
            while let Err(_unanswered) = self.reap(drive) {}
        }
        let _unsignalled = self.signal();
        self.queue.state()
    }

    /// Takes requests until the queue is empty or others should have their turn.
    fn take(&mut self, drive: &mut Drive) -> Result<(), Fault> {
        let (mut requests, mut bytes) = (0, 0);
        self.stalled = false;
        loop {
            self.queue.disable_kicks(&self.memory)?;
            loop {
                if self.operations >= MAX_OPERATIONS {
                    self.stalled = true;
                    return Ok(());
                }
                if requests >= BATCH_REQUESTS || bytes >= BATCH_BYTES {
                    self.kick_self();
                    return Ok(());
                }
                let Some(chain) = self.queue.pop(&self.memory)? else {
                    break;
                };
                requests += 1;
                bytes += chain.readable_bytes() + chain.writable_bytes();
                if self.slots.get(chain.head).request.is_some() {
                    return Err(GuestFault::HeadInFlight { head: chain.head }.into());
                }
                let request = Request::parse(&self.memory, chain, self.limits)?;
                self.start(drive, request)?;
            }
            if !self.queue.enable_kicks(&self.memory)? {
                return Ok(());
            }
        }
    }

    /// Submits, answers what has completed, and interrupts the driver once.
    fn turn(&mut self, drive: &mut Drive) -> Result<(), Fault> {
        if self.operations > 0 {
            self.engine.submit(0).map_err(submit_fault)?;
            self.reap(drive)?;
        }
        self.signal()
    }

    fn signal(&mut self) -> Result<(), Fault> {
        if std::mem::take(&mut self.unsignalled) {
            self.queue.signal(&self.memory)?;
        }
        Ok(())
    }

    pub(super) fn reap(&mut self, drive: &mut Drive) -> Result<(), Fault> {
        while let Some(Completion { token, result }) = self.engine.next() {
            self.operations = self.operations.saturating_sub(1);
            let (head, index) = from_token(token);
            let result = match (result, self.slots.get(head).parts.get(index).cloned()) {
                (Ok(bytes), Some(part)) => self.complete_part(head, &part, bytes),
                (result, _) => result.map(drop),
            };
            self.operation_done(drive, head, result)?;
        }
        Ok(())
    }

    /// Moves the rest of what the kernel moved in part, to its end or to the error behind it.
    fn complete_part(&mut self, head: u16, part: &Part, bytes: u32) -> io::Result<()> {
        if u64::from(bytes) >= part.bytes {
            return Ok(());
        }
        let moved = usize::try_from(bytes).unwrap_or(0);
        let rest = vectored::advance(self.slots.get(head).vecs.part(part.vecs.clone()), moved);
        vectored::transfer(
            Direction::Read,
            part.fd,
            rest,
            part.offset + u64::from(bytes),
        )
    }

    pub(super) fn operation_done(
        &mut self,
        drive: &mut Drive,
        head: u16,
        result: io::Result<()>,
    ) -> Result<(), Fault> {
        let slot = self.slots.get(head);
        slot.left = slot.left.saturating_sub(1);
        if let Err(e) = result {
            slot.error.get_or_insert(e);
        }
        if slot.left > 0 {
            return Ok(());
        }
        let result = slot.error.take().map_or(Ok(()), Err);
        let Some(request) = slot.request.take() else {
            return Ok(());
        };
        if let (Action::Flush, Err(_)) = (&request.action, &result) {
            drive.sync_failed = true;
        }
        self.finish(drive, &request, result)
    }

    /// Answers a request that the storage has carried out or failed.
    pub(super) fn finish(
        &mut self,
        drive: &mut Drive,
        request: &Request,
        result: io::Result<()>,
    ) -> Result<(), Fault> {
        let (act, counter) = match &request.action {
            Action::Read(_) => ("read", Some(&drive.stats.read_bytes)),
            Action::Write(_) => ("write", Some(&drive.stats.written_bytes)),
            Action::Flush => ("flush", None),
            _ => ("make zero", None),
        };
        let range = request.range();
        let status = match result {
            Ok(()) => {
                if let (Some(counter), Some(range)) = (counter, range) {
                    counter.fetch_add(range.len, Ordering::Relaxed);
                }
                Status::Ok
            }
            Err(e) => {
                drive.report(act, range, &e);
                Status::IoError
            }
        };
        self.answer(request, status)
    }

    /// Writes the status and returns the chain.
    pub(super) fn answer(&mut self, request: &Request, status: Status) -> Result<(), Fault> {
        self.memory
            .write_obj(status.byte(), request.status)
            .map_err(|_outside| GuestFault::RingMemory)?;
        self.queue
            .push(&self.memory, request.head, request.used_bytes(status))?;
        self.unsignalled = true;
        Ok(())
    }
}

pub(super) fn submit_fault(error: io::Error) -> Fault {
    HostFault::new("submit block i/o", error).into()
}

#[cfg(test)]
#[path = "flight_test.rs"]
mod tests;

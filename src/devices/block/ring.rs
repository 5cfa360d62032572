//! The io_uring of one disk.
//!
//! Deferred task work where the kernel has it (6.1): completions are then made by our own calls
//! and interrupt nobody. An event descriptor tells when there is something to collect; polling the
//! ring itself misses completions there (measured on 6.18: a sync from a worker woke nobody).
//! A ring waits for all of its operations before it goes: the kernel must not touch guest memory
//! that may belong to somebody else by then.
#![expect(unsafe_code, reason = "the kernel is given addresses of guest memory")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::engine::{Completion, Op};

/// Entries to fill before the kernel is called.
const SUBMISSIONS: u32 = 256;
/// More than can be in flight, so that completions never overflow.
const COMPLETIONS: u32 = 2048;
/// Kernel threads for what cannot be done without blocking, per ring: each file's buffered
/// writes are done by one at a time anyway.
const MAX_WORKERS: u32 = 4;
/// IORING_ENTER_GETEVENTS: run deferred work and wait for completions.
const ENTER_GETEVENTS: u32 = 1;
/// How long to let the kernel recover when it is short of memory, and how often.
const BREATH: Duration = Duration::from_millis(1);
const MAX_BREATHS: u32 = 1000;

pub struct Ring {
    ring: IoUring,
    /// Signalled by the kernel at each completion.
    event: EventFd,
    /// Operations that have not completed.
    outstanding: u32,
}

impl Ring {
    /// A ring that only the calling thread may use.
    pub fn new() -> io::Result<Self> {
        let mut builder = IoUring::<squeue::Entry, cqueue::Entry>::builder();
        builder.setup_cqsize(COMPLETIONS);
        let mut modern = builder.clone();
        modern.setup_single_issuer().setup_defer_taskrun();
        let ring = modern
            .build(SUBMISSIONS)
            .or_else(|_older_kernel| builder.build(SUBMISSIONS))?;
        // Kernels before 5.15 have no such limit; theirs is the process's number of tasks.
        let _older_kernel = ring
            .submitter()
            .register_iowq_max_workers(&mut [MAX_WORKERS, 1]);
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            event,
            outstanding: 0,
        })
    }

    /// Adds an operation; the kernel learns of it by [`Self::enter`], at the latest.
    pub fn queue(&mut self, token: u64, op: Op<'_>) -> io::Result<()> {
        let entry = match op {
            Op::Read { fd, vecs, offset } => {
                let count =
                    u32::try_from(vecs.len()).map_err(|_many| io::ErrorKind::InvalidInput)?;
                opcode::Readv::new(types::Fd(fd), vecs.as_ptr(), count)
                    .offset(offset)
                    .build()
            }
            Op::Sync { fd } => opcode::Fsync::new(types::Fd(fd.as_raw_fd()))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        }
        .user_data(token);
        if self.ring.submission().is_full() {
            self.enter(0)?;
        }
        let mut submissions = self.ring.submission();
        // SAFETY: the entry's addresses stay valid until its completion: the caller keeps them
        // untouched, and `Drop` waits for every completion.
        unsafe { submissions.push(&entry) }.map_err(io::Error::other)?;
        self.outstanding += 1;
        Ok(())
    }

    /// Submits all entries, runs deferred work, and waits for `wait` completions.
    pub fn enter(&mut self, wait: u32) -> io::Result<()> {
        let wait = wait.min(self.outstanding);
        let mut breaths = 0;
        loop {
            let queued = u32::try_from(self.ring.submission().len()).unwrap_or(0);
            let submitter = self.ring.submitter();
            // SAFETY: no argument is passed, and the entries are valid (see `queue`).
            let entered =
                unsafe { submitter.enter::<libc::sigset_t>(queued, wait, ENTER_GETEVENTS, None) };
            match entered {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                // An entry that cannot start ends the batch, not the rest of it.
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if transient(&e) && breaths < MAX_BREATHS => {
                    breaths += 1;
                    std::thread::sleep(BREATH);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Clears the event; ask for completions after it.
    pub fn consume_event(&self) {
        let _empty = self.event.read();
    }

    /// The next completion.
    pub fn next(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        self.outstanding = self.outstanding.saturating_sub(1);
        let result = match u32::try_from(entry.result()) {
            Ok(bytes) => Ok(bytes),
            Err(_negative) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        Some(Completion {
            token: entry.user_data(),
            result,
        })
    }
}

/// Readable when completions wait.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("outstanding", &self.outstanding)
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.outstanding > 0 {
            if self.enter(1).is_err() {
                // Whatever it is, leaving now would let the kernel write to memory of others.
                std::thread::sleep(BREATH);
            }
            while self.next().is_some() {}
        }
    }
}

/// The kernel is short of memory, or has completions for us first.
fn transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

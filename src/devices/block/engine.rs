//! How reads and flushes of a disk reach the kernel: io_uring, or plain calls where the host
//! forbids it.
//!
//! One engine belongs to one activated disk and lives on its thread. The plain calls complete
//! before they return; the ring's completions are collected by [`Engine::next`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use super::ring::Ring;
use super::vectored::{self, Direction};

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring if the host allows it.
    #[default]
    Auto,
    /// io_uring or nothing.
    Ring,
    /// Plain calls.
    Plain,
}

/// One thing for the kernel to do.
#[derive(Debug)]
pub enum Op<'a> {
    /// Moves bytes from a file to guest memory. The entries, and the memory they name, stay as
    /// they are until the operation has completed.
    Read {
        fd: RawFd,
        vecs: &'a mut [libc::iovec],
        offset: u64,
    },
    /// Makes what was written to a file durable.
    Sync { fd: BorrowedFd<'a> },
}

/// A completed operation.
#[derive(Debug)]
pub struct Completion {
    pub token: u64,
    /// Bytes moved: fewer than asked for is no error yet.
    pub result: io::Result<u32>,
}

#[derive(Debug)]
pub enum Engine {
    Ring(Box<Ring>),
    Plain,
}

impl Engine {
    /// Makes an engine for the calling thread, which alone may use it.
    pub fn new(choice: EngineChoice) -> io::Result<Self> {
        match (choice, choice != EngineChoice::Plain) {
            (_, false) => Ok(Self::Plain),
            (choice, true) => match Ring::new() {
                Ok(ring) => Ok(Self::Ring(Box::new(ring))),
                Err(e) if choice == EngineChoice::Auto => {
                    tracing::debug!("block I/O without io_uring: {e}");
                    Ok(Self::Plain)
                }
                Err(e) => Err(e),
            },
        }
    }

    /// Readable when completions wait; `None` if they never do.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Ring(ring) => Some(ring.as_raw_fd()),
            Self::Plain => None,
        }
    }

    /// Clears the event behind [`Self::fd`]; completions that follow raise it again.
    pub fn consume_event(&self) {
        if let Self::Ring(ring) = self {
            ring.consume_event();
        }
    }

    /// Starts an operation. `Some` is its result, if it is done already.
    pub fn start(&mut self, token: u64, op: Op<'_>) -> io::Result<Option<io::Result<()>>> {
        match self {
            Self::Ring(ring) => ring.queue(token, op).map(|()| None),
            Self::Plain => Ok(Some(perform(op))),
        }
    }

    /// Hands what was started to the kernel and waits until `wait` operations have completed.
    pub fn submit(&mut self, wait: u32) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.enter(wait),
            Self::Plain => Ok(()),
        }
    }

    /// The next completion.
    pub fn next(&mut self) -> Option<Completion> {
        match self {
            Self::Ring(ring) => ring.next(),
            Self::Plain => None,
        }
    }
}

fn perform(op: Op<'_>) -> io::Result<()> {
    match op {
        Op::Read { fd, vecs, offset } => vectored::transfer(Direction::Read, fd, vecs, offset),
        Op::Sync { fd } => Ok(rustix::fs::fdatasync(fd)?),
    }
}

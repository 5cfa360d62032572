//! The host's end of the agent's channel: a socket that never blocks and is never read ahead.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::pump::is_temporary;
use crate::devices::HostFault;

/// The host's side of the second port.
#[derive(Debug)]
pub(super) struct Agent {
    /// Kept until the device goes even if `open` is false: the worker may still watch it.
    stream: UnixStream,
    pub(super) name: String,
    opened: Arc<OnceLock<Instant>>,
    open: bool,
    /// The socket is full: the transmit queue waits for it.
    pub(super) full: bool,
    /// The guest has no buffers: the socket waits for its receive queue.
    pub(super) starved: bool,
}

impl Agent {
    pub(super) fn new(
        stream: UnixStream,
        name: String,
        opened: Arc<OnceLock<Instant>>,
    ) -> Result<Self, HostFault> {
        stream
            .set_nonblocking(true)
            .map_err(|e| HostFault::new("make the agent channel non-blocking", e))?;
        Ok(Self {
            stream,
            name,
            opened,
            open: true,
            full: false,
            starved: false,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// The guest has opened its end.
    pub(super) fn note_opened(&self) {
        self.opened.get_or_init(Instant::now);
    }

    /// What to wait for on the socket.
    pub(super) fn interest(&self, guest_open: bool) -> EventSet {
        let mut events = EventSet::empty();
        if self.open && guest_open && !self.starved {
            events |= EventSet::IN;
        }
        if self.open && self.full {
            events |= EventSet::OUT;
        }
        events
    }

    /// Passes on bytes of the guest. An end that nobody listens at takes them all.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.open {
            return Ok(bytes.len());
        }
        match self.stream.write(bytes) {
            Err(e) if !is_temporary(&e) => {
                self.close();
                Ok(bytes.len())
            }
            written => written,
        }
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }

    pub(super) fn close(&mut self) {
        self.open = false;
        // It is closed anyhow where this fails.
        let _closed = self.stream.shutdown(Shutdown::Both);
    }
}

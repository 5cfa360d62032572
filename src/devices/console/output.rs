//! The file behind a console: a log, a terminal or a pipe, written without ever waiting for long.
//!
//! Terminals and pipes are written through a description of our own that does not block, so that
//! O_NONBLOCK is not forced on whoever shares the operator's terminal.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl, fstat, major, minor, open};
use rustix::io::Errno;

/// How long one write may wait for a reader in all. The guest waits with it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The largest console log. Its writer is the guest, the disk is the host's.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// An open output.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    /// Bytes it may still take; logs only.
    room: Option<u64>,
}

impl Output {
    pub(super) fn new(file: File) -> Self {
        if fstat(&file).is_ok_and(|s| FileType::from_raw_mode(s.st_mode).is_file()) {
            return Self {
                file,
                room: Some(MAX_LOG_BYTES),
            };
        }
        let file = match unblocked(&file) {
            Some(own) => File::from(own),
            None => file,
        };
        Self { file, room: None }
    }

    /// Writes all of `bytes` within [`PATIENCE`]; an error means that the file is of no more use.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if let Some(room) = &mut self.room {
            *room = room
                .checked_sub(bytes.len() as u64)
                .ok_or_else(|| io::Error::other("the log has reached 256 MiB"))?;
        }
        let mut deadline = None;
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let until = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
                    self.wait(until)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn set_room(&mut self, bytes: u64) {
        self.room = Some(bytes);
    }

    /// Waits until the file takes bytes again, or fails at `until`.
    fn wait(&self, until: Instant) -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "its reader does not keep up",
            ));
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
        match poll(&mut fds, Some(&timeout)) {
            // A signal for this vCPU's thread, or time is up: the caller looks again.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// A description of the same terminal or pipe that does not block. What cannot be opened again
/// (a socket; the master of a terminal, where that would make a new one) is itself made so.
fn unblocked(file: &File) -> Option<OwnedFd> {
    let ptmx = fstat(file).is_ok_and(|s| (major(s.st_rdev), minor(s.st_rdev)) == (5, 2));
    let again = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if !ptmx && let Ok(own) = open(again, flags, Mode::empty()) {
        return Some(own);
    }
    if let Ok(flags) = fcntl_getfl(file) {
        // Where even this fails the write reports it, or blocks as its owner wished.
        let _refused = fcntl_setfl(file, flags | OFlags::NONBLOCK);
    }
    None
}

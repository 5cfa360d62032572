//! Moves bytes between a port's queue and the host: in chunks, within bounds for one wake-up.

use std::io;

use crate::devices::queue::{read_segments, write_segments};
use crate::devices::{GuestFault, GuestMemory, RunningQueue};

/// Bytes copied at once.
const CHUNK_BYTES: usize = 4096;
/// Chains served before the other devices of this thread get their turn.
const CHAINS_PER_WAKE: u32 = 64;
/// Bytes likewise: a chain may hold far more than a console has to say.
const BYTES_PER_WAKE: u64 = 256 << 10;

/// Why a pump stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The driver has made nothing more available, and will kick when it does.
    Empty,
    /// The host's end takes or has nothing now.
    Blocked,
    /// The host's end is closed.
    Closed,
    /// Bounds were reached; there is more.
    Again,
}

/// Guest to host. `sent` is how much of the oldest chain has gone already: a chain that the host
/// took half of goes back to the ring, and its rest is all that will be sent of it.
pub(super) fn transmit(
    queue: &mut RunningQueue,
    mem: &GuestMemory,
    sent: &mut u64,
    write: &mut dyn FnMut(&[u8]) -> io::Result<usize>,
) -> Result<Stop, GuestFault> {
    let mut bytes_left = BYTES_PER_WAKE;
    for _ in 0..CHAINS_PER_WAKE {
        let Some(chain) = queue.pop(mem)? else {
            if queue.enable_kicks(mem)? {
                continue;
            }
            queue.signal(mem)?;
            return Ok(Stop::Empty);
        };
        if !chain.writable.is_empty() {
            return Err(fault("transmit buffer is writable"));
        }
        let length = chain.readable_bytes();
        let mut buffer = [0; CHUNK_BYTES];
        while *sent < length {
            let stop = if bytes_left == 0 {
                Some(Stop::Again)
            } else {
                let size = (length - *sent).min(CHUNK_BYTES as u64).min(bytes_left);
                let chunk = usize::try_from(size).ok().and_then(|s| buffer.get_mut(..s));
                let chunk = chunk.unwrap_or_default();
                if !read_segments(mem, &chain.readable, *sent, chunk) {
                    return Err(fault("transmit buffer cannot be read"));
                }
                match write(chunk) {
                    Ok(0) | Err(_) => Some(Stop::Blocked),
                    Ok(written) => {
                        *sent += written as u64;
                        bytes_left = bytes_left.saturating_sub(written as u64);
                        None
                    }
                }
            };
            if let Some(stop) = stop {
                queue.undo_pop();
                queue.signal(mem)?;
                return Ok(stop);
            }
        }
        *sent = 0;
        queue.push(mem, chain.head, 0)?;
    }
    queue.signal(mem)?;
    Ok(Stop::Again)
}

/// Host to guest: reads no more than the buffer at hand has room for.
pub(super) fn receive(
    queue: &mut RunningQueue,
    mem: &GuestMemory,
    read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
) -> Result<Stop, GuestFault> {
    let mut stop = Stop::Again;
    for _ in 0..CHAINS_PER_WAKE {
        let Some(chain) = queue.pop(mem)? else {
            if queue.enable_kicks(mem)? {
                continue;
            }
            stop = Stop::Empty;
            break;
        };
        if !chain.readable.is_empty() {
            return Err(fault("receive buffer is readable"));
        }
        let room = usize::try_from(chain.writable_bytes()).unwrap_or(CHUNK_BYTES);
        if room == 0 {
            return Err(fault("receive buffer has no room"));
        }
        let mut buffer = [0; CHUNK_BYTES];
        let chunk = buffer.get_mut(..room.min(CHUNK_BYTES)).unwrap_or_default();
        let got = match read(chunk) {
            Ok(0) => Err(Stop::Closed),
            Ok(got) => Ok(chunk.get(..got).unwrap_or_default()),
            Err(e) if is_temporary(&e) => Err(Stop::Blocked),
            Err(_broken) => Err(Stop::Closed),
        };
        match got {
            Ok(bytes) => {
                if !write_segments(mem, &chain.writable, 0, bytes) {
                    return Err(fault("receive buffer cannot be written"));
                }
                let len = u32::try_from(bytes.len()).unwrap_or(0);
                queue.push(mem, chain.head, len)?;
            }
            Err(reason) => {
                queue.undo_pop();
                stop = reason;
                break;
            }
        }
    }
    queue.signal(mem)?;
    Ok(stop)
}

/// Whether the same call may succeed later.
pub(super) fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

pub(super) fn fault(problem: &'static str) -> GuestFault {
    GuestFault::Request {
        device: "console",
        problem,
    }
}

//! Frames that carry a mark of ours, as they pass the interfaces of a network namespace.
//!
//! A frame is seen before any rule of the host drops it, so a capture on the host proves that a
//! machine sent it, and one in the outside that it was let through.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with};

use crate::outside::inside;

/// What every marked frame holds, followed by a word.
pub const MARK: &str = "e2e:";
/// `ETH_P_ALL` of linux/if_ether.h.
const ETH_P_ALL: u16 = 3;
const TICK: Duration = Duration::from_millis(100);

/// A capture, until it is dropped.
pub struct Capture {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    over: Arc<AtomicBool>,
}

impl Capture {
    /// Of the host, or of a named namespace.
    pub fn start(namespace: Option<&str>) -> io::Result<Self> {
        let socket = match namespace {
            Some(name) => inside(name, open)?,
            None => open()?,
        };
        let capture = Self {
            frames: Arc::default(),
            over: Arc::default(),
        };
        let (frames, over) = (Arc::clone(&capture.frames), Arc::clone(&capture.over));
        thread::spawn(move || {
            let mut frame = [0; 2048];
            while !over.load(Ordering::Relaxed) {
                let len = match recv(&socket, &mut frame, RecvFlags::empty()) {
                    Ok((len, _whole)) => len,
                    Err(Errno::AGAIN | Errno::INTR) => continue,
                    Err(_closed) => return,
                };
                let frame = frame.get(..len).unwrap_or_default();
                if holds(frame, MARK) {
                    let mut frames = frames.lock().unwrap_or_else(PoisonError::into_inner);
                    frames.push(frame.to_vec());
                }
            }
        });
        Ok(capture)
    }

    /// Frames with this mark.
    pub fn seen(&self, mark: &str) -> Vec<Vec<u8>> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let marked = frames.iter().filter(|frame| holds(frame, mark));
        marked.cloned().collect()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn open() -> io::Result<OwnedFd> {
    // The kernel wants it in network order.
    let protocol = NonZeroU32::new(u32::from(ETH_P_ALL.to_be())).map(Protocol::from_raw);
    let socket = socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    set_socket_timeout(&socket, Timeout::Recv, Some(TICK))?;
    Ok(socket)
}

fn holds(frame: &[u8], mark: &str) -> bool {
    frame
        .windows(mark.len())
        .any(|window| window == mark.as_bytes())
}

//! Where a guest's console output goes: the last 64 KiB in memory, and a file if there is one.
//!
//! One sink is shared by hvc0 (device thread) and the UART (vCPU threads), and read by whoever
//! asks how the machine ended; hence its two locks. The ring's is a leaf held for a copy. The
//! file's is held during a write, which [`Output`] bounds in time. Nothing is buffered beyond
//! the ring: a file that does not keep up slows the guest, then is given up.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::output::Output;

/// How much of the output every VM keeps.
pub const RING_BYTES: usize = 64 << 10;

/// How Linux announces its death (kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// A console's output. Clones are the same sink.
#[derive(Debug, Clone)]
pub struct ConsoleSink {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    ring: Mutex<Ring>,
    /// `None` without a file, and once it was given up.
    output: Mutex<Option<Output>>,
}

impl ConsoleSink {
    /// A sink that keeps the last [`RING_BYTES`] and copies everything to `file`.
    pub fn new(file: Option<File>) -> Self {
        Self {
            inner: Arc::new(Inner {
                ring: Mutex::new(Ring::default()),
                output: Mutex::new(file.map(Output::new)),
            }),
        }
    }

    /// Takes output of the guest. Waits for a slow file as long as [`Output::write`] does.
    pub fn write(&self, bytes: &[u8]) {
        lock(&self.inner.ring).push(bytes);
        let mut output = lock(&self.inner.output);
        if let Some(open) = output.as_mut()
            && let Err(e) = open.write(bytes)
        {
            tracing::warn!("console output goes to memory only from here: {e}");
            *output = None;
        }
    }

    /// The last `max_bytes` of output; what is no UTF-8 is replaced.
    pub fn tail(&self, max_bytes: usize) -> String {
        let bytes = lock(&self.inner.ring).tail(max_bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes written since the start.
    pub fn total_bytes(&self) -> u64 {
        lock(&self.inner.ring).total
    }

    /// When the first byte came.
    pub fn first_output(&self) -> Option<Instant> {
        lock(&self.inner.ring).first
    }

    /// Whether a kernel announced its panic here.
    pub fn panicked(&self) -> bool {
        lock(&self.inner.ring).panicked
    }
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    total: u64,
    first: Option<Instant>,
    /// Bytes of [`PANIC`] that the output ends with.
    matched: usize,
    panicked: bool,
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.first.get_or_insert_with(Instant::now);
        self.total += bytes.len() as u64;
        self.watch(bytes);
        let kept = bytes
            .get(bytes.len().saturating_sub(RING_BYTES)..)
            .unwrap_or_default();
        let excess = (self.bytes.len() + kept.len()).saturating_sub(RING_BYTES);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// Looks for [`PANIC`]. Its first letter stands in it once, so after a mismatch only the
    /// byte at hand can begin a new match.
    fn watch(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.matched = if PANIC.get(self.matched) == Some(byte) {
                self.matched + 1
            } else {
                usize::from(PANIC.first() == Some(byte))
            };
            if self.matched == PANIC.len() {
                self.panicked = true;
                self.matched = 0;
            }
        }
    }

    fn tail(&self, max_bytes: usize) -> Vec<u8> {
        let skipped = self.bytes.len().saturating_sub(max_bytes);
        self.bytes.iter().skip(skipped).copied().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whatever a panic left behind is still a ring of bytes, or a file.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod tests;

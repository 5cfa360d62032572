//! What went through a NIC's user-space path, readable from any thread.
//!
//! Plain counters with one writer each; nobody decides anything by them, so no order is needed.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// One count.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
}

/// Counts since the device was made; with vhost-net the kernel counts at the TAP instead.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames and bytes (headers excluded) that reached the guest.
    pub rx_frames: Counter,
    pub rx_bytes: Counter,
    /// Frames for the guest that did not fit its buffers or came while the link was down.
    pub rx_dropped: Counter,
    pub tx_frames: Counter,
    pub tx_bytes: Counter,
    /// Frames of the guest that the TAP did not take or that came while the link was down.
    pub tx_dropped: Counter,
    /// Frames of the guest whose header or length was wrong.
    pub tx_refused: Counter,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetCounts {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_dropped: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
    pub tx_refused: u64,
}

impl Counters {
    pub fn now(&self) -> NetCounts {
        NetCounts {
            rx_frames: self.rx_frames.get(),
            rx_bytes: self.rx_bytes.get(),
            rx_dropped: self.rx_dropped.get(),
            tx_frames: self.tx_frames.get(),
            tx_bytes: self.tx_bytes.get(),
            tx_dropped: self.tx_dropped.get(),
            tx_refused: self.tx_refused.get(),
        }
    }

    pub(super) fn restore(&self, counts: NetCounts) {
        self.rx_frames.set(counts.rx_frames);
        self.rx_bytes.set(counts.rx_bytes);
        self.rx_dropped.set(counts.rx_dropped);
        self.tx_frames.set(counts.tx_frames);
        self.tx_bytes.set(counts.tx_bytes);
        self.tx_dropped.set(counts.tx_dropped);
        self.tx_refused.set(counts.tx_refused);
    }
}

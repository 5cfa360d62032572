//! What a guest says about its memory, and what its balloon has given back.
//!
//! Shared with whoever watches the host's memory: one writer, plain numbers, no order between
//! them, hence atomics and no channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::devices::ConfigSpace;

/// Bytes of a statistic: a 16-bit tag and a 64-bit value (virtio 1.2, 5.5.6.3).
const ENTRY_BYTES: usize = 10;
/// Tags that exist.
const TAGS: usize = 16;
/// The most that is read of a buffer, whatever its length.
pub(super) const MAX_BYTES: usize = 4 * TAGS * ENTRY_BYTES;
/// A statistic the driver has not sent.
const ABSENT: u64 = u64::MAX;
/// Where the driver writes the balloon's size, in pages.
pub(super) const CONFIG_ACTUAL: usize = 4;

/// A statistic by its tag (virtio 1.2, 5.5.6.4). Memory is in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Statistic {
    SwapIn = 0,
    SwapOut = 1,
    MajorFaults = 2,
    MinorFaults = 3,
    FreeMemory = 4,
    TotalMemory = 5,
    AvailableMemory = 6,
    DiskCaches = 7,
}

/// A view of one balloon, from any thread.
#[derive(Debug, Clone)]
pub struct BalloonStats {
    numbers: Arc<Numbers>,
    config: Arc<ConfigSpace>,
}

#[derive(Debug)]
pub(super) struct Numbers {
    values: [AtomicU64; TAGS],
    reports: AtomicU64,
    inflated: AtomicU64,
    reported: AtomicU64,
    ignored: AtomicU64,
}

impl BalloonStats {
    pub(super) fn new(numbers: &Arc<Numbers>, config: &Arc<ConfigSpace>) -> Self {
        Self {
            numbers: Arc::clone(numbers),
            config: Arc::clone(config),
        }
    }

    /// What the driver last said; it is the guest's word.
    pub fn get(&self, statistic: Statistic) -> Option<u64> {
        let value = self.numbers.values.get(statistic as usize)?;
        Some(value.load(Ordering::Relaxed)).filter(|value| *value != ABSENT)
    }

    /// How often the driver has answered.
    pub fn reports(&self) -> u64 {
        self.numbers.reports.load(Ordering::Relaxed)
    }

    /// The size of the balloon in pages of 4 KiB, as the driver says.
    pub fn actual_pages(&self) -> u32 {
        let mut pages = [0; 4];
        self.config.read(CONFIG_ACTUAL, &mut pages);
        u32::from_le_bytes(pages)
    }

    /// Bytes given back by inflating, since the device was made.
    pub fn inflated_bytes(&self) -> u64 {
        self.numbers.inflated.load(Ordering::Relaxed)
    }

    /// Bytes given back by free page reports, since the device was made.
    pub fn reported_bytes(&self) -> u64 {
        self.numbers.reported.load(Ordering::Relaxed)
    }

    /// Bytes that were named but are no RAM, were named twice, or not taken back by the host.
    pub fn ignored_bytes(&self) -> u64 {
        self.numbers.ignored.load(Ordering::Relaxed)
    }
}

impl Default for Numbers {
    fn default() -> Self {
        Self {
            values: std::array::from_fn(|_| AtomicU64::new(ABSENT)),
            reports: AtomicU64::default(),
            inflated: AtomicU64::default(),
            reported: AtomicU64::default(),
            ignored: AtomicU64::default(),
        }
    }
}

impl Numbers {
    /// Takes a driver's buffer: unknown tags and a cut-off entry at its end are passed over.
    pub fn record(&self, buffer: &[u8]) {
        let (entries, _rest) = buffer.as_chunks::<ENTRY_BYTES>();
        for [t0, t1, value @ ..] in entries {
            let tag = u16::from_le_bytes([*t0, *t1]);
            if let Some(slot) = self.values.get(usize::from(tag)) {
                slot.store(u64::from_le_bytes(*value), Ordering::Relaxed);
            }
        }
        self.reports.fetch_add(1, Ordering::Relaxed);
    }

    pub fn add_inflated(&self, named: u64, given: u64) {
        self.inflated.fetch_add(given, Ordering::Relaxed);
        self.add_ignored(named, given);
    }

    pub fn add_reported(&self, named: u64, given: u64) {
        self.reported.fetch_add(given, Ordering::Relaxed);
        self.add_ignored(named, given);
    }

    fn add_ignored(&self, named: u64, given: u64) {
        self.ignored
            .fetch_add(named.saturating_sub(given), Ordering::Relaxed);
    }
}

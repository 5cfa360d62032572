//! A device's configuration space (virtio 1.2, 2.5): the few bytes that vCPU threads read while
//! the device itself lives on its worker.
//!
//! The lock is a leaf and held for a copy only; a channel will not do because a register read
//! must be answered within the exit.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The bytes, which of them the driver may write, and the generation that tells a torn read.
#[derive(Debug)]
pub struct ConfigSpace {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    bytes: Vec<u8>,
    writable: std::ops::Range<usize>,
    generation: u8,
}

impl ConfigSpace {
    /// A space of `bytes`, of which the driver may write `writable`.
    pub fn new(bytes: Vec<u8>, writable: std::ops::Range<usize>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                bytes,
                writable,
                generation: 0,
            }),
        }
    }

    /// Copies from `offset`; bytes beyond the end read as zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let inner = self.lock();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset
                .checked_add(i)
                .and_then(|at| inner.bytes.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    /// A write by the driver: bytes outside the writable range are ignored.
    pub fn write_by_driver(&self, offset: usize, data: &[u8]) {
        let mut inner = self.lock();
        for (i, byte) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(i) else {
                return;
            };
            if inner.writable.contains(&at)
                && let Some(slot) = inner.bytes.get_mut(at)
            {
                *slot = *byte;
            }
        }
    }

    /// A write by the device: counts a new generation. The caller raises the config interrupt.
    pub fn write_by_device(&self, offset: usize, data: &[u8]) {
        let mut inner = self.lock();
        for (i, byte) in data.iter().enumerate() {
            if let Some(slot) = offset.checked_add(i).and_then(|at| inner.bytes.get_mut(at)) {
                *slot = *byte;
            }
        }
        inner.generation = inner.generation.wrapping_add(1);
    }

    /// The generation to show in the common configuration (virtio 1.2, 4.1.4.3).
    pub fn generation(&self) -> u8 {
        self.lock().generation
    }

    /// A copy of all bytes, for a snapshot.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A poisoned lock holds plain bytes: still a valid configuration space.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! One interrupt line of a device: an event descriptor that the VMM has wired to a vector.
//!
//! While a vector is masked the VMM unwires the descriptor; a signal then stays in its counter
//! and is delivered when it is wired again, so nothing here needs to know about masks.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A vector to signal, or nothing where the driver chose VIRTIO_MSI_NO_VECTOR.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    fd: Option<Arc<EventFd>>,
}

impl Interrupt {
    /// An interrupt that signals `fd`, which must be non-blocking.
    pub fn new(fd: Arc<EventFd>) -> Self {
        Self { fd: Some(fd) }
    }

    /// An interrupt that goes nowhere.
    pub fn none() -> Self {
        Self::default()
    }

    /// Raises the interrupt; never blocks. A counter that is full already says "pending".
    pub fn signal(&self) {
        if let Some(fd) = &self.fd {
            // EAGAIN means the counter is saturated: the interrupt is pending as it is.
            let _saturated = fd.write(1);
        }
    }

    /// The descriptor, for a back end that signals by itself (vhost).
    pub fn event_fd(&self) -> Option<&Arc<EventFd>> {
        self.fd.as_ref()
    }
}

//! Guest fault and host fault are different types: the first costs the guest its device, the
//! second costs the VM; neither panics and neither reaches another VM.

use std::io;

/// The driver broke the contract. The device sets DEVICE_NEEDS_RESET and stops.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    #[error("available index {index} runs {ahead} ahead of a ring of {size}")]
    AvailIndex { index: u16, ahead: u16, size: u16 },
    #[error("descriptor head {head} is outside a ring of {size}")]
    HeadOutOfRange { head: u16, size: u16 },
    #[error("descriptor chain at head {head}: {problem}")]
    Chain { head: u16, problem: &'static str },
    #[error("head {head} was made available while in flight")]
    HeadInFlight { head: u16 },
    #[error("ring memory cannot be accessed")]
    RingMemory,
    #[error("{device}: {problem}")]
    Request {
        device: &'static str,
        problem: &'static str,
    },
}

/// The host failed this VM. It ends as [`HostFault`](crate::devices::HostFault) with this text.
#[derive(Debug, thiserror::Error)]
#[error("{act}")]
pub struct HostFault {
    /// The failed act, lower case, without the cause.
    pub act: String,
    #[source]
    pub source: Option<io::Error>,
}

impl HostFault {
    pub fn new(act: impl Into<String>, source: io::Error) -> Self {
        Self {
            act: act.into(),
            source: Some(source),
        }
    }

    pub fn msg(act: impl Into<String>) -> Self {
        Self {
            act: act.into(),
            source: None,
        }
    }
}

/// Why a device stopped.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("guest fault: {0}")]
    Guest(#[from] GuestFault),
    #[error("host fault")]
    Host(#[from] HostFault),
}

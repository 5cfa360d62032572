//! What comes into the brain and what goes out of it.

use std::time::Duration;

use super::super::spec::{InstanceId, InstanceState};

/// How much memory the host has left, as the watcher sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryLevel {
    Enough,
    /// No new machines.
    Low,
    /// One machine must go before the kernel's OOM killer ends the process.
    Critical,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Increase {
        n: u32,
        /// Seconds since the epoch, for new ids.
        epoch_seconds: u64,
    },
    Decrease {
        ids: Vec<String>,
    },
    Update,
    /// There is a generation to start machines from: the first, or another one from now on.
    ImageCurrent,
    /// The image task is done, and what serves is what should.
    ImageChecked,
    ImageFailed,
    /// The pause before an image task is over.
    BuildDue {
        ticket: u64,
    },
    /// The operator wants the image checked now.
    RefreshNow,
    /// The pause before another attempt is over.
    RetryDue {
        id: InstanceId,
    },
    /// The machine answers over SSH.
    Ready {
        id: InstanceId,
    },
    /// All that the instance held is released, whatever the reason.
    Released {
        id: InstanceId,
        /// Whether the host is to blame in a way that trying again may mend.
        retry: bool,
    },
    Memory(MemoryLevel),
    Shutdown,
}

/// What the driver does about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Take a slot and start a machine; ends in `Released` exactly once.
    Start {
        id: InstanceId,
        /// What is left of its deadline.
        within: Duration,
    },
    /// Send `RetryDue` after about this long.
    StartAfter { id: InstanceId, pause: Duration },
    /// End the machine; `Released` follows.
    Stop { id: InstanceId, why: Why },
    /// Begin the image task; ends in `ImageChecked` or `ImageFailed` exactly once.
    Build,
    /// Send `BuildDue` after about this long.
    BuildAfter {
        pause: Duration,
        ticket: u64,
        why: Pause,
    },
    /// The instance will not be tried again.
    GaveUp { id: InstanceId, attempts: u32 },
    /// Nothing is known of the instance any more.
    Forget { id: InstanceId },
}

/// Why the image task pauses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// It failed.
    Failure,
    /// All is well until the next refresh.
    Refresh,
    /// The host is short of memory.
    Memory,
}

/// Why a machine is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Asked,
    OutOfMemory,
    Shutdown,
}

/// What the caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Nothing,
    /// How many instances were accepted: at most as many as asked for.
    Accepted(u32),
    /// Which of the given ids go or are gone.
    Going(Vec<String>),
    Instances(Vec<(InstanceId, InstanceState)>),
    /// Whether the image task begins now; else it was under way, or the pool is closing.
    Refresh(bool),
}

/// Answer and work of one step.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub answer: Answer,
    pub actions: Vec<Action>,
}

impl From<Vec<Action>> for Outcome {
    fn from(actions: Vec<Action>) -> Self {
        Self {
            answer: Answer::Nothing,
            actions,
        }
    }
}

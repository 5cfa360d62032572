//! Where vCPU threads stand: running, parked, or told to leave.
//!
//! ```text
//!              pause                    stop
//!   Running ──────────> Paused ────┐
//!      ^  └──────────────── stop ──┴──────> Stopped
//!      └──── resume ───────┘
//! ```
//!
//! The supervisor sets what is wanted and kicks; a vCPU looks here whenever a kick took it out of
//! KVM_RUN. A lock and a condition are what parking a thread needs; a channel to each vCPU would
//! have to be polled.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the vCPUs are asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Running,
    Paused,
    /// Final.
    Stopped,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// vCPUs that wait here, or have left.
    out: usize,
}

/// One for the VM.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A gate that is open, or closed until the first change.
    pub fn new(wanted: Wanted) -> Self {
        Self {
            state: Mutex::new(State { wanted, out: 0 }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Two numbers: valid whatever happened.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is wanted; the caller kicks afterwards. Stopped stays.
    pub fn set(&self, wanted: Wanted) {
        let mut state = self.lock();
        if state.wanted != Wanted::Stopped {
            state.wanted = wanted;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A vCPU's look: waits while paused, and is false once it must leave.
    pub fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Paused {
            state.out += 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Paused {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.out -= 1;
        }
        state.wanted == Wanted::Running
    }

    /// A vCPU thread is about to end.
    pub fn leave(&self) {
        self.lock().out += 1;
        self.changed.notify_all();
    }

    /// Whether `vcpus` of them are out of KVM_RUN; waits for it up to `patience`.
    pub fn wait_out(&self, vcpus: usize, patience: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| state.out < vcpus);
        let (state, _timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
        state.out >= vcpus
    }
}

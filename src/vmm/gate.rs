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
//! have to be polled. A parked vCPU runs errands: KVM wants a vCPU's calls from its own thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_ioctls::VcpuFd;

/// What each parked vCPU is to do once, given its index.
pub type Errand = Arc<dyn Fn(u8, &VcpuFd) + Send + Sync>;

/// What the vCPUs are asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Running,
    Paused,
    /// Final.
    Stopped,
}

struct State {
    wanted: Wanted,
    /// vCPUs that wait here, or have left.
    out: usize,
    /// The last errand and its number.
    errand: Option<Errand>,
    round: u64,
    /// vCPUs that have not done it yet.
    left: usize,
}

/// One for the VM.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A gate that is open, or closed until the first change.
    pub fn new(wanted: Wanted) -> Self {
        Self {
            state: Mutex::new(State {
                wanted,
                out: 0,
                errand: None,
                round: 0,
                left: 0,
            }),
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

    /// The look of vCPU `index`: waits while paused, and is false once it must leave.
    pub fn pass(&self, index: u8, vcpu: &VcpuFd) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Paused {
            state.out += 1;
            self.changed.notify_all();
            let mut done = state.round;
            while state.wanted == Wanted::Paused {
                if state.round != done
                    && let Some(errand) = state.errand.clone()
                {
                    done = state.round;
                    drop(state);
                    errand(index, vcpu);
                    state = self.lock();
                    state.left = state.left.saturating_sub(1);
                    self.changed.notify_all();
                    continue;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.out -= 1;
        }
        state.wanted == Wanted::Running
    }

    /// Has all `vcpus`, which wait here, run an errand once; [`Self::wait_done`] waits for it.
    pub fn send(&self, vcpus: usize, errand: Errand) {
        let mut state = self.lock();
        state.errand = Some(errand);
        state.round += 1;
        state.left = vcpus;
        drop(state);
        self.changed.notify_all();
    }

    /// Whether the errand is done; waits for it up to `patience`.
    pub fn wait_done(&self, patience: Duration) -> bool {
        let state = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |state| state.left > 0);
        let (mut state, _timed_out) = waited.unwrap_or_else(PoisonError::into_inner);
        let done = state.left == 0;
        if done {
            state.errand = None;
        }
        done
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

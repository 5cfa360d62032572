//! The image task: there is one at a time. It finds, builds and tests what machines start from; what
//! serves keeps serving meanwhile, and a failed task changes nothing but the time of the next. A
//! timer that was overtaken carries an old ticket and is ignored.
//!
//! ```text
//!  Running ──ImageChecked──> Waiting (image_refresh; Idle where that is off)
//!     ^ │                       │
//!     │ └──ImageFailed──> Waiting (1 to 30 min)
//!     └──── BuildDue with the last ticket, or RefreshNow ───┘
//! ```

use std::time::Duration;

use super::Backoff;
use super::message::{Action, MemoryLevel, Pause};

/// First and longest wait before a failed task is tried again.
const RETRY: Backoff = Backoff {
    first: Duration::from_secs(60),
    longest: Duration::from_secs(30 * 60),
};
/// A refresh of an image that serves does not add to a shortage of memory; it waits this long.
const SHORT_OF_MEMORY: Duration = Duration::from_secs(60);

/// What machines start from, and the task that looks after it.
#[derive(Debug)]
pub struct Image {
    /// Whether machines can be made.
    pub serves: bool,
    pub(super) task: Task,
    /// Failed tasks since the last good one.
    failures: u32,
    /// Names the timer that counts.
    pub(super) ticket: u64,
    /// How long after a check the next one is due; `None` for never.
    refresh: Option<Duration>,
    closing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    Running,
    /// For a timer.
    Waiting,
    /// Until somebody asks.
    Idle,
}

impl Image {
    /// None serves yet, and the task is under way.
    pub fn new(refresh: Option<Duration>) -> Self {
        Self {
            serves: false,
            task: Task::Running,
            failures: 0,
            ticket: 0,
            refresh,
            closing: false,
        }
    }

    /// No task begins any more.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// The task is done.
    pub fn checked(&mut self) -> Vec<Action> {
        if self.task != Task::Running {
            return Vec::new();
        }
        self.failures = 0;
        match self.refresh {
            Some(pause) => self.wait(pause, Pause::Refresh),
            None => self.rest(),
        }
    }

    /// The task failed.
    pub fn failed(&mut self) -> Vec<Action> {
        if self.task != Task::Running {
            return Vec::new();
        }
        self.failures = self.failures.saturating_add(1);
        self.wait(RETRY.pause(self.failures), Pause::Failure)
    }

    /// A timer has run out.
    pub fn due(&mut self, ticket: u64, memory: MemoryLevel) -> Vec<Action> {
        if self.task != Task::Waiting || self.ticket != ticket || self.closing {
            return Vec::new();
        }
        if self.serves && memory != MemoryLevel::Enough {
            return self.wait(SHORT_OF_MEMORY, Pause::Memory);
        }
        self.task = Task::Running;
        vec![Action::Build]
    }

    /// Somebody wants it checked now: whether a task begins.
    pub fn now(&mut self) -> bool {
        let begins = self.task != Task::Running && !self.closing;
        if begins {
            self.task = Task::Running;
        }
        begins
    }

    /// The timer that begins the next task.
    fn wait(&mut self, pause: Duration, why: Pause) -> Vec<Action> {
        if self.closing {
            return self.rest();
        }
        self.ticket = self.ticket.wrapping_add(1);
        self.task = Task::Waiting;
        vec![Action::BuildAfter {
            pause,
            ticket: self.ticket,
            why,
        }]
    }

    fn rest(&mut self) -> Vec<Action> {
        self.task = Task::Idle;
        Vec::new()
    }
}

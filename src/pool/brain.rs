//! What the pool decides, as a pure state machine: `step(&mut State, now, Event) -> Outcome`.
//!
//! No clock, no I/O, no task: time comes in with each event, work goes out as actions, and the
//! driver feeds one event at a time. An instance that holds resources of the host (a slot, a VM)
//! is *held*: from its `Start` until the one event that says that all of it is released. How many
//! are held never exceeds `max_size`, whatever states they are shown in.
//!
//! ```text
//!  Increase ─> Creating ──Ready──> Running ──Decrease──> Deleting ──Released──> Deleted
//!                 │ ^                 │                                            ^
//!       Released  │ │ StartAfter      └── Released (the VM died) ──────────────────┤
//!                 └─┴── until its deadline, then ──────────────────────────────────┘
//! ```
//!
//! Beside the instances there is one image task at a time. It finds, builds and tests what machines
//! start from; what serves keeps serving meanwhile, and a failed task changes nothing but the time
//! of the next. A timer that was overtaken carries an old ticket and is ignored.
//!
//! ```text
//!  Running ──ImageChecked──> Waiting (image_refresh; Idle where that is off)
//!     ^ │                       │
//!     │ └──ImageFailed──> Waiting (1 to 30 min)
//!     └──── BuildDue with the last ticket, or RefreshNow ───┘
//! ```
//!
//! The provisioner's traps that shape it: a request whose id never appears stays pending for
//! ever, so every accepted instance is reported alive at least once; `succeeded` holds only ids
//! of the request; what is gone is shown as deleted a few times and then forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use super::ids::IdSource;
use super::spec::{InstanceId, InstanceState};

/// Updates that show an instance as deleted before it is forgotten: an Update whose stream broke
/// is dropped by the provisioner as a whole.
const DELETED_REPORTS: u8 = 3;
/// First and longest wait before a failed start is tried again.
const START_RETRY: Backoff = Backoff {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(60),
};
/// The same for a failed build.
const BUILD_RETRY: Backoff = Backoff {
    first: Duration::from_secs(60),
    longest: Duration::from_secs(30 * 60),
};

/// A refresh of an image that serves does not add to a shortage of memory; it waits this long.
const SHORT_OF_MEMORY: Duration = Duration::from_secs(60);

/// Time since the pool began. The driver's clock is monotonic.
pub type Now = Duration;

/// Everything the pool remembers.
#[derive(Debug)]
pub struct State {
    limits: Limits,
    ids: IdSource,
    image: Image,
    memory: MemoryLevel,
    instances: BTreeMap<InstanceId, Instance>,
    closing: bool,
}

/// What bounds the pool.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Instances that may be held at once.
    pub max_size: u32,
    /// How long a start may take, counted from the moment a generation is current.
    pub boot_timeout: Duration,
    /// How long after a check of the image the next one is due; `None` for never.
    pub refresh: Option<Duration>,
}

/// What machines start from, and the task that looks after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Image {
    /// Whether machines can be made.
    serves: bool,
    task: ImageTask,
    /// Failed tasks since the last good one.
    failures: u32,
    /// Names the timer that counts.
    ticket: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ImageTask {
    Running,
    /// For a timer.
    Waiting,
    /// Until somebody asks.
    Idle,
}

impl Image {
    /// The task is over: the timer that begins the next.
    fn wait(&mut self, pause: Duration, why: Pause) -> Vec<Action> {
        self.ticket = self.ticket.wrapping_add(1);
        self.task = ImageTask::Waiting;
        vec![Action::BuildAfter {
            pause,
            ticket: self.ticket,
            why,
        }]
    }
}

/// How much memory the host has left, as the watcher sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryLevel {
    Enough,
    /// No new machines.
    Low,
    /// One machine must go before the kernel's OOM killer ends the process.
    Critical,
}

#[derive(Debug)]
struct Instance {
    phase: Phase,
    born: Now,
    /// Whether an Update has shown it as creating or running.
    reported_alive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Waits for a generation.
    Queued,
    /// A start is under way or will be after a pause.
    Starting {
        attempt: u32,
        deadline: Now,
        held: bool,
    },
    Running,
    /// Asked to go; resources come back with `Released`.
    Stopping,
    Gone {
        reports_left: u8,
    },
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

impl State {
    /// A pool without instances whose image task is under way.
    pub fn new(limits: Limits, ids: IdSource) -> Self {
        Self {
            limits,
            ids,
            image: Image {
                serves: false,
                task: ImageTask::Running,
                failures: 0,
                ticket: 0,
            },
            memory: MemoryLevel::Enough,
            instances: BTreeMap::new(),
            closing: false,
        }
    }

    /// Instances that hold or will hold a slot.
    pub fn occupied(&self) -> u32 {
        let count = self
            .instances
            .values()
            .filter(|instance| instance.phase.occupies())
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// What is shown of an instance now; `None` if it is not known.
    pub fn state_of(&self, id: &str) -> Option<InstanceState> {
        let (_id, instance) = self.find(id)?;
        Some(instance.phase.shown())
    }

    /// Every instance that is known: its state, and when it was accepted.
    pub fn instances(&self) -> impl Iterator<Item = (&InstanceId, InstanceState, Now)> {
        self.instances
            .iter()
            .map(|(id, instance)| (id, instance.phase.shown(), instance.born))
    }

    /// How much memory the host has left, as was last told.
    pub fn memory_level(&self) -> MemoryLevel {
        self.memory
    }

    fn find(&self, id: &str) -> Option<(&InstanceId, &Instance)> {
        self.instances.get_key_value(&InstanceId(id.to_owned()))
    }

    fn set(&mut self, id: &InstanceId, phase: Phase) {
        if let Some(instance) = self.instances.get_mut(id) {
            instance.phase = phase;
        }
    }
}

impl Phase {
    fn occupies(&self) -> bool {
        !matches!(self, Self::Gone { .. })
    }

    fn shown(&self) -> InstanceState {
        match self {
            Self::Queued | Self::Starting { .. } => InstanceState::Creating,
            Self::Running => InstanceState::Running,
            Self::Stopping => InstanceState::Deleting,
            Self::Gone { .. } => InstanceState::Deleted,
        }
    }

    const fn gone() -> Self {
        Self::Gone {
            reports_left: DELETED_REPORTS,
        }
    }
}

/// One step: the only way the state changes.
pub fn step(state: &mut State, now: Now, event: Event) -> Outcome {
    match event {
        Event::Increase { n, epoch_seconds } => increase(state, now, n, epoch_seconds),
        Event::Decrease { ids } => decrease(state, ids),
        Event::Update => update(state),
        Event::ImageCurrent => image_current(state, now).into(),
        Event::ImageChecked => image_checked(state).into(),
        Event::ImageFailed => image_failed(state).into(),
        Event::BuildDue { ticket } => build_due(state, ticket).into(),
        Event::RefreshNow => refresh_now(state),
        Event::RetryDue { id } => retry(state, now, &id).into(),
        Event::Ready { id } => {
            if let Some(Phase::Starting { held: true, .. }) =
                state.instances.get(&id).map(|i| &i.phase)
            {
                state.set(&id, Phase::Running);
            }
            Vec::new().into()
        }
        Event::Released { id, retry } => released(state, now, &id, retry).into(),
        Event::Memory(level) => memory(state, level).into(),
        Event::Shutdown => shutdown(state).into(),
    }
}

fn increase(state: &mut State, now: Now, n: u32, epoch_seconds: u64) -> Outcome {
    let mut accepted = 0;
    let mut actions = Vec::new();
    let open = !state.closing && state.memory == MemoryLevel::Enough;
    while open && accepted < n && state.occupied() < state.limits.max_size {
        let id = state.ids.next(epoch_seconds);
        let phase = match state.image.serves {
            true => start(state.limits, now, &id, &mut actions),
            false => Phase::Queued,
        };
        let instance = Instance {
            phase,
            born: now,
            reported_alive: false,
        };
        state.instances.insert(id, instance);
        accepted += 1;
    }
    Outcome {
        answer: Answer::Accepted(accepted),
        actions,
    }
}

/// The first attempt of an instance: its deadline counts from here.
fn start(limits: Limits, now: Now, id: &InstanceId, actions: &mut Vec<Action>) -> Phase {
    actions.push(Action::Start {
        id: id.clone(),
        within: limits.boot_timeout,
    });
    Phase::Starting {
        attempt: 1,
        deadline: now + limits.boot_timeout,
        held: true,
    }
}

fn decrease(state: &mut State, ids: Vec<String>) -> Outcome {
    let mut actions = Vec::new();
    for id in &ids {
        let Some((id, instance)) = state.find(id) else {
            // Forgotten or never ours: gone either way, and it would be asked for again for ever.
            continue;
        };
        let id = id.clone();
        match instance.phase {
            Phase::Queued | Phase::Starting { held: false, .. } => state.set(&id, Phase::gone()),
            Phase::Starting { held: true, .. } | Phase::Running => {
                state.set(&id, Phase::Stopping);
                actions.push(Action::Stop {
                    id,
                    why: Why::Asked,
                });
            }
            Phase::Stopping | Phase::Gone { .. } => {}
        }
    }
    Outcome {
        answer: Answer::Going(ids),
        actions,
    }
}

fn update(state: &mut State) -> Outcome {
    let mut shown = Vec::new();
    let mut actions = Vec::new();
    state.instances.retain(|id, instance| {
        let mut kept = true;
        let mut now = instance.phase.shown();
        match &mut instance.phase {
            // The provisioner must see it alive once, or its request stays pending for ever.
            Phase::Gone { .. } | Phase::Stopping if !instance.reported_alive => {
                now = InstanceState::Creating;
            }
            Phase::Gone { reports_left } => {
                *reports_left = reports_left.saturating_sub(1);
                kept = *reports_left > 0;
            }
            _ => {}
        }
        instance.reported_alive |= matches!(now, InstanceState::Creating | InstanceState::Running);
        shown.push((id.clone(), now));
        if !kept {
            actions.push(Action::Forget { id: id.clone() });
        }
        kept
    });
    Outcome {
        answer: Answer::Instances(shown),
        actions,
    }
}

fn image_current(state: &mut State, now: Now) -> Vec<Action> {
    state.image.serves = true;
    let mut actions = Vec::new();
    for (id, instance) in &mut state.instances {
        if instance.phase == Phase::Queued {
            instance.phase = start(state.limits, now, id, &mut actions);
        }
    }
    actions
}

fn image_checked(state: &mut State) -> Vec<Action> {
    if state.image.task != ImageTask::Running {
        return Vec::new();
    }
    state.image.failures = 0;
    match state.limits.refresh {
        Some(pause) if !state.closing => state.image.wait(pause, Pause::Refresh),
        _ => {
            state.image.task = ImageTask::Idle;
            Vec::new()
        }
    }
}

fn image_failed(state: &mut State) -> Vec<Action> {
    if state.image.task != ImageTask::Running {
        return Vec::new();
    }
    state.image.failures = state.image.failures.saturating_add(1);
    if state.closing {
        state.image.task = ImageTask::Idle;
        return Vec::new();
    }
    let pause = BUILD_RETRY.pause(state.image.failures);
    state.image.wait(pause, Pause::Failure)
}

fn build_due(state: &mut State, ticket: u64) -> Vec<Action> {
    let due = state.image.task == ImageTask::Waiting && state.image.ticket == ticket;
    if !due || state.closing {
        return Vec::new();
    }
    if state.image.serves && state.memory != MemoryLevel::Enough {
        return state.image.wait(SHORT_OF_MEMORY, Pause::Memory);
    }
    state.image.task = ImageTask::Running;
    vec![Action::Build]
}

fn refresh_now(state: &mut State) -> Outcome {
    let begins = state.image.task != ImageTask::Running && !state.closing;
    let mut actions = Vec::new();
    if begins {
        state.image.task = ImageTask::Running;
        actions.push(Action::Build);
    }
    Outcome {
        answer: Answer::Refresh(begins),
        actions,
    }
}

fn retry(state: &mut State, now: Now, id: &InstanceId) -> Vec<Action> {
    let Some(instance) = state.instances.get_mut(id) else {
        return Vec::new();
    };
    match &mut instance.phase {
        Phase::Starting { deadline, held, .. } if !*held => {
            *held = true;
            vec![Action::Start {
                id: id.clone(),
                within: deadline.saturating_sub(now),
            }]
        }
        _ => Vec::new(),
    }
}

fn released(state: &mut State, now: Now, id: &InstanceId, retry: bool) -> Vec<Action> {
    let Some(instance) = state.instances.get_mut(id) else {
        return Vec::new();
    };
    match &mut instance.phase {
        Phase::Starting {
            attempt,
            deadline,
            held,
        } => {
            let pause = START_RETRY.pause(*attempt);
            if retry && now + pause < *deadline {
                *attempt = attempt.saturating_add(1);
                *held = false;
                return vec![Action::StartAfter {
                    id: id.clone(),
                    pause,
                }];
            }
            let attempts = *attempt;
            instance.phase = Phase::gone();
            vec![Action::GaveUp {
                id: id.clone(),
                attempts,
            }]
        }
        Phase::Running | Phase::Stopping => {
            instance.phase = Phase::gone();
            Vec::new()
        }
        Phase::Queued | Phase::Gone { .. } => Vec::new(),
    }
}

fn memory(state: &mut State, level: MemoryLevel) -> Vec<Action> {
    state.memory = level;
    if level < MemoryLevel::Critical {
        return Vec::new();
    }
    // One at a time: while its memory comes back nobody else has to go.
    if state.instances.values().any(|i| i.phase == Phase::Stopping) {
        return Vec::new();
    }
    // Ids begin with their time: the greatest is the youngest.
    let youngest =
        state.instances.iter().rev().find(|(_id, i)| {
            matches!(i.phase, Phase::Running | Phase::Starting { held: true, .. })
        });
    let Some(id) = youngest.map(|(id, _instance)| id.clone()) else {
        return Vec::new();
    };
    state.set(&id, Phase::Stopping);
    vec![Action::Stop {
        id,
        why: Why::OutOfMemory,
    }]
}

fn shutdown(state: &mut State) -> Vec<Action> {
    state.closing = true;
    let mut actions = Vec::new();
    for (id, instance) in &mut state.instances {
        match instance.phase {
            Phase::Queued | Phase::Starting { held: false, .. } => instance.phase = Phase::gone(),
            Phase::Starting { held: true, .. } | Phase::Running => {
                instance.phase = Phase::Stopping;
                actions.push(Action::Stop {
                    id: id.clone(),
                    why: Why::Shutdown,
                });
            }
            Phase::Stopping | Phase::Gone { .. } => {}
        }
    }
    actions
}

/// Doubling pauses.
struct Backoff {
    first: Duration,
    longest: Duration,
}

impl Backoff {
    /// The pause after the `failures`-th failure, counted from 1.
    fn pause(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        self.first.saturating_mul(1 << doublings).min(self.longest)
    }
}

#[cfg(test)]
#[path = "brain_test.rs"]
mod tests;

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
//! Beside the instances there is one image task at a time (`image.rs`).
//!
//! The provisioner's traps that shape it: a request whose id never appears stays pending for
//! ever, so every accepted instance is reported alive at least once; `succeeded` holds only ids
//! of the request; what is gone is shown as deleted a few times and then forgotten.

mod image;
mod message;

use std::collections::BTreeMap;
use std::time::Duration;

use super::ids::IdSource;
use super::spec::{InstanceId, InstanceState};
use image::Image;
pub use message::{Action, Answer, Event, MemoryLevel, Outcome, Pause, Why};

/// Updates that show an instance as deleted before it is forgotten: an Update whose stream broke
/// is dropped by the provisioner as a whole.
const DELETED_REPORTS: u8 = 3;
/// First and longest wait before a failed start is tried again.
const START_RETRY: Backoff = Backoff {
    first: Duration::from_secs(1),
    longest: Duration::from_secs(60),
};
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

impl State {
    /// A pool without instances whose image task is under way.
    pub fn new(limits: Limits, ids: IdSource) -> Self {
        Self {
            limits,
            ids,
            image: Image::new(limits.refresh),
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
        Event::ImageChecked => state.image.checked().into(),
        Event::ImageFailed => state.image.failed().into(),
        Event::BuildDue { ticket } => state.image.due(ticket, state.memory).into(),
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

fn refresh_now(state: &mut State) -> Outcome {
    let begins = state.image.now();
    Outcome {
        answer: Answer::Refresh(begins),
        actions: begins.then_some(Action::Build).into_iter().collect(),
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
    state.image.close();
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

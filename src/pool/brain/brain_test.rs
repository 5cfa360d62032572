//! The brain against a model of the provisioner and of a driver that may do everything wrong
//! that a host can: starts that fail, machines that die, releases that come late.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::image::Task;
use super::*;

const MAX_SIZE: u32 = 4;
const BOOT: Duration = Duration::from_secs(300);
const REFRESH: Duration = Duration::from_secs(24 * 60 * 60);

fn state() -> State {
    State::new(
        Limits {
            max_size: MAX_SIZE,
            boot_timeout: BOOT,
            refresh: Some(REFRESH),
        },
        IdSource::new("g"),
    )
}

fn at(seconds: u64) -> Now {
    Duration::from_secs(seconds)
}

fn increase(state: &mut State, n: u32) -> (u32, Vec<Action>) {
    let event = Event::Increase {
        n,
        epoch_seconds: 7,
    };
    let outcome = step(state, at(0), event);
    let Answer::Accepted(accepted) = outcome.answer else {
        panic!("{outcome:?}");
    };
    (accepted, outcome.actions)
}

fn update(state: &mut State) -> Vec<(InstanceId, InstanceState)> {
    match step(state, at(0), Event::Update).answer {
        Answer::Instances(shown) => shown,
        other => panic!("{other:?}"),
    }
}

/// A pool with a current image and `n` machines starting.
fn started(n: u32) -> (State, Vec<InstanceId>) {
    let mut state = state();
    step(&mut state, at(0), Event::ImageCurrent);
    let (_accepted, actions) = increase(&mut state, n);
    let ids = actions
        .into_iter()
        .map(|action| match action {
            Action::Start { id, .. } => id,
            other => panic!("{other:?}"),
        })
        .collect();
    (state, ids)
}

fn released(state: &mut State, now: Now, id: &InstanceId, retry: bool) -> Vec<Action> {
    let id = id.clone();
    step(state, now, Event::Released { id, retry }).actions
}

#[test]
fn instances_wait_for_an_image_and_their_deadline_counts_from_then() {
    let mut state = state();
    let (accepted, actions) = increase(&mut state, 2);
    assert_eq!((accepted, actions.len()), (2, 0));
    assert!(
        update(&mut state)
            .iter()
            .all(|(_, s)| *s == InstanceState::Creating)
    );
    let actions = step(&mut state, at(10_000), Event::ImageCurrent).actions;
    assert_eq!(actions.len(), 2);
    assert!(
        actions
            .iter()
            .all(|a| matches!(a, Action::Start { within, .. } if *within == BOOT))
    );
}

/// The one timer that a step started.
fn timer(actions: &[Action]) -> (Duration, u64, Pause) {
    match actions {
        [Action::BuildAfter { pause, ticket, why }] => (*pause, *ticket, *why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn builds_are_tried_again_with_longer_pauses_until_one_is_good() {
    let mut state = state();
    let fail = |state: &mut State| {
        let (pause, ticket, why) = timer(&step(state, at(0), Event::ImageFailed).actions);
        assert_eq!(why, Pause::Failure);
        let due = step(state, at(0), Event::BuildDue { ticket }).actions;
        assert_eq!(due, [Action::Build]);
        pause.as_secs() / 60
    };
    let pauses: Vec<u64> = (0..7).map(|_| fail(&mut state)).collect();
    assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    let (pause, ticket, why) = timer(&step(&mut state, at(0), Event::ImageChecked).actions);
    assert_eq!((pause, why), (REFRESH, Pause::Refresh));
    step(&mut state, at(0), Event::BuildDue { ticket });
    assert_eq!(fail(&mut state), 1, "it begins anew");
}

#[test]
fn machines_start_from_what_serves_while_the_next_is_built_and_after_it_failed() {
    let mut state = state();
    step(&mut state, at(0), Event::ImageCurrent);
    assert_eq!(increase(&mut state, 1).1.len(), 1, "the task still runs");
    step(&mut state, at(0), Event::ImageFailed);
    assert_eq!(increase(&mut state, 1).1.len(), 1);
}

#[test]
fn a_refresh_that_is_asked_for_overtakes_the_timer() {
    let mut state = state();
    step(&mut state, at(0), Event::ImageCurrent);
    let asked = |state: &mut State| step(state, at(0), Event::RefreshNow);
    assert_eq!(
        asked(&mut state).answer,
        Answer::Refresh(false),
        "under way"
    );
    let (_pause, old, _why) = timer(&step(&mut state, at(0), Event::ImageChecked).actions);
    let outcome = asked(&mut state);
    assert_eq!(outcome.answer, Answer::Refresh(true));
    assert_eq!(outcome.actions, [Action::Build]);
    let late = Event::BuildDue { ticket: old };
    assert_eq!(step(&mut state, at(1), late.clone()).actions, []);
    step(&mut state, at(1), Event::ImageChecked);
    assert_eq!(step(&mut state, at(2), late).actions, [], "nor later");
}

#[test]
fn a_refresh_waits_while_memory_is_short_and_a_first_build_does_not() {
    for serves in [true, false] {
        let mut state = state();
        if serves {
            step(&mut state, at(0), Event::ImageCurrent);
        }
        let (_pause, ticket, _why) = timer(&step(&mut state, at(0), Event::ImageFailed).actions);
        step(&mut state, at(1), Event::Memory(MemoryLevel::Low));
        let due = step(&mut state, at(1), Event::BuildDue { ticket }).actions;
        if serves {
            let (_pause, ticket, why) = timer(&due);
            assert_eq!(why, Pause::Memory);
            step(&mut state, at(2), Event::Memory(MemoryLevel::Enough));
            let due = step(&mut state, at(2), Event::BuildDue { ticket }).actions;
            assert_eq!(due, [Action::Build]);
        } else {
            assert_eq!(due, [Action::Build]);
        }
    }
}

#[test]
fn without_refreshes_an_image_is_checked_when_asked_for_only() {
    let mut state = state();
    state.image = Image::new(None);
    step(&mut state, at(0), Event::ImageCurrent);
    assert_eq!(step(&mut state, at(0), Event::ImageChecked).actions, []);
    let outcome = step(&mut state, at(0), Event::RefreshNow);
    assert_eq!(outcome.actions, [Action::Build]);
}

#[test]
fn more_than_max_size_is_accepted_in_part_and_a_dying_machine_counts_until_released() {
    let (mut state, ids) = started(MAX_SIZE + 3);
    assert_eq!(u32::try_from(ids.len()), Ok(MAX_SIZE));
    let gone = vec![ids[0].to_string()];
    step(&mut state, at(1), Event::Decrease { ids: gone });
    assert_eq!(increase(&mut state, 1).0, 0, "its slot is not free yet");
    released(&mut state, at(2), &ids[0], false);
    assert_eq!(increase(&mut state, 1).0, 1);
}

#[test]
fn decrease_is_idempotent_and_answers_ids_of_the_request_only() {
    let (mut state, ids) = started(2);
    let asked = vec![ids[1].to_string(), "g-nobody".to_owned()];
    for round in 0..3 {
        let event = Event::Decrease { ids: asked.clone() };
        let outcome = step(&mut state, at(1), event);
        assert_eq!(outcome.answer, Answer::Going(asked.clone()));
        assert_eq!(outcome.actions.len(), usize::from(round == 0));
    }
}

#[test]
fn a_dead_machine_is_deleted_in_the_next_update_and_forgotten_after_three() {
    let (mut state, ids) = started(1);
    let id = ids[0].clone();
    step(&mut state, at(1), Event::Ready { id: id.clone() });
    assert_eq!(update(&mut state), [(id.clone(), InstanceState::Running)]);
    released(&mut state, at(2), &id, true);
    for _update in 0..3 {
        assert_eq!(update(&mut state), [(id.clone(), InstanceState::Deleted)]);
    }
    assert_eq!(update(&mut state), []);
}

#[test]
fn an_instance_that_failed_before_the_first_update_is_shown_alive_once() {
    let (mut state, ids) = started(1);
    released(&mut state, at(1), &ids[0], false);
    assert_eq!(update(&mut state)[0].1, InstanceState::Creating);
    assert_eq!(update(&mut state)[0].1, InstanceState::Deleted);
}

#[test]
fn a_failed_start_is_tried_again_until_its_deadline() {
    let (mut state, ids) = started(1);
    let id = ids[0].clone();
    let mut now = at(0);
    let mut attempts = 1;
    loop {
        match &released(&mut state, now, &id, true)[..] {
            [Action::StartAfter { pause, .. }] => now += *pause,
            [Action::GaveUp { attempts: told, .. }] => {
                assert_eq!(*told, attempts);
                break;
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(state.state_of(id.as_str()), Some(InstanceState::Creating));
        let event = Event::RetryDue { id: id.clone() };
        match &step(&mut state, now, event).actions[..] {
            [Action::Start { within, .. }] => assert!(*within + now == BOOT),
            other => panic!("{other:?}"),
        }
        attempts += 1;
    }
    assert!(attempts >= 8 && now <= BOOT, "{attempts} attempts, {now:?}");
}

#[test]
fn a_retry_that_comes_after_the_decrease_starts_nothing() {
    let (mut state, ids) = started(1);
    let id = ids[0].clone();
    released(&mut state, at(1), &id, true);
    let gone = vec![id.to_string()];
    step(&mut state, at(2), Event::Decrease { ids: gone });
    let event = Event::RetryDue { id };
    assert_eq!(step(&mut state, at(3), event).actions, []);
}

#[test]
fn a_short_host_makes_nothing_new_and_then_ends_the_youngest_one_at_a_time() {
    let (mut state, ids) = started(3);
    step(&mut state, at(1), Event::Memory(MemoryLevel::Low));
    assert_eq!(increase(&mut state, 1).0, 0);
    let stop = |state: &mut State| step(state, at(2), Event::Memory(MemoryLevel::Critical)).actions;
    let youngest = Action::Stop {
        id: ids[2].clone(),
        why: Why::OutOfMemory,
    };
    assert_eq!(stop(&mut state), [youngest]);
    assert_eq!(stop(&mut state), [], "its memory is not back yet");
    released(&mut state, at(3), &ids[2], false);
    assert!(matches!(&stop(&mut state)[..], [Action::Stop { id, .. }] if *id == ids[1]));
    step(&mut state, at(4), Event::Memory(MemoryLevel::Enough));
    assert_eq!(increase(&mut state, 1).0, 1);
}

#[test]
fn after_shutdown_nothing_starts_any_more() {
    let (mut state, ids) = started(2);
    let actions = step(&mut state, at(1), Event::Shutdown).actions;
    assert_eq!(actions.len(), 2);
    assert_eq!(increase(&mut state, 5).0, 0);
    for id in &ids {
        assert_eq!(released(&mut state, at(2), id, true), []);
    }
    assert_eq!(state.occupied(), 0);
}

#[derive(Debug, Clone)]
enum Move {
    Increase(u32),
    /// Decrease of the n-th id ever seen, or of one that never was.
    Decrease(Vec<usize>),
    Update,
    ImageCurrent,
    ImageChecked,
    ImageFailed,
    /// The n-th timer ever started goes off.
    BuildDue(usize),
    RefreshNow,
    Ready(usize),
    Release(usize, bool),
    Retry(usize),
    Memory(u8),
    Wait(u64),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        3 => (0_u32..7).prop_map(Move::Increase),
        3 => prop::collection::vec(0_usize..12, 0..4).prop_map(Move::Decrease),
        4 => Just(Move::Update),
        1 => Just(Move::ImageCurrent),
        1 => Just(Move::ImageChecked),
        1 => Just(Move::ImageFailed),
        2 => (0_usize..6).prop_map(Move::BuildDue),
        1 => Just(Move::RefreshNow),
        4 => (0_usize..12).prop_map(Move::Ready),
        4 => ((0_usize..12), any::<bool>()).prop_map(|(n, retry)| Move::Release(n, retry)),
        2 => (0_usize..12).prop_map(Move::Retry),
        1 => (0_u8..3).prop_map(Move::Memory),
        2 => (0_u64..200).prop_map(Move::Wait),
    ];
    prop::collection::vec(one, 1..120)
}

/// What a driver holds and a provisioner believes.
struct World {
    now: u64,
    /// An image task is under way; the pool begins with one.
    building: bool,
    /// Timers of the image task, by the tickets they carry.
    tickets: Vec<u64>,
    closing: bool,
    seen: Vec<InstanceId>,
    /// Started and not yet released: each of these has a slot.
    held: BTreeSet<InstanceId>,
    stopping: BTreeSet<InstanceId>,
    pauses: BTreeSet<InstanceId>,
    accepted: usize,
    /// First state each id was shown in.
    first: BTreeMap<InstanceId, InstanceState>,
    last: BTreeMap<InstanceId, InstanceState>,
}

impl Default for World {
    fn default() -> Self {
        Self {
            now: 0,
            building: true,
            tickets: Vec::new(),
            closing: false,
            seen: Vec::new(),
            held: BTreeSet::new(),
            stopping: BTreeSet::new(),
            pauses: BTreeSet::new(),
            accepted: 0,
            first: BTreeMap::new(),
            last: BTreeMap::new(),
        }
    }
}

impl World {
    fn obey(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Start { id, .. } => {
                    assert!(self.held.insert(id.clone()), "{id} is started twice");
                    self.pauses.remove(&id);
                    assert!(
                        self.held.len() <= MAX_SIZE as usize,
                        "more slots than there are"
                    );
                    if !self.seen.contains(&id) {
                        self.seen.push(id);
                    }
                }
                Action::Stop { id, .. } => {
                    assert!(self.held.contains(&id), "{id} is stopped but not held");
                    assert!(self.stopping.insert(id.clone()), "{id} is stopped twice");
                }
                Action::StartAfter { id, .. } => {
                    assert!(!self.held.contains(&id));
                    self.pauses.insert(id);
                }
                Action::GaveUp { id, .. } => assert!(!self.held.contains(&id)),
                Action::Forget { id } => assert!(!self.held.contains(&id), "{id} loses its slot"),
                Action::Build => {
                    assert!(!self.building, "two image tasks at once");
                    assert!(!self.closing, "a build while closing");
                    self.building = true;
                }
                Action::BuildAfter { ticket, .. } => {
                    assert!(!self.building, "a timer beside a task");
                    assert!(!self.tickets.contains(&ticket), "a ticket is given once");
                    self.tickets.push(ticket);
                }
            }
        }
    }

    fn look(&mut self, shown: Vec<(InstanceId, InstanceState)>) {
        for (id, state) in shown {
            self.first.entry(id.clone()).or_insert(state);
            let before = self.last.insert(id.clone(), state);
            if before == Some(InstanceState::Deleted) {
                assert_eq!(state, InstanceState::Deleted, "{id} came back");
            }
            if before == Some(InstanceState::Running) {
                assert_ne!(state, InstanceState::Creating, "{id} went back");
            }
            if !self.seen.contains(&id) {
                self.seen.push(id);
            }
        }
    }

    fn run(&mut self, state: &mut State, one: Move) {
        let id = |world: &Self, n: usize| world.seen.get(n).cloned();
        let event = match one {
            Move::Increase(n) => Event::Increase {
                n,
                epoch_seconds: self.now,
            },
            Move::Decrease(picked) => Event::Decrease {
                ids: picked
                    .into_iter()
                    .map(|n| id(self, n).map_or("g-never".to_owned(), |id| id.to_string()))
                    .collect(),
            },
            Move::Update => Event::Update,
            Move::ImageCurrent => Event::ImageCurrent,
            Move::ImageChecked | Move::ImageFailed if !self.building => return,
            Move::ImageChecked => {
                self.building = false;
                Event::ImageChecked
            }
            Move::ImageFailed => {
                self.building = false;
                Event::ImageFailed
            }
            Move::BuildDue(n) => match self.tickets.get(n) {
                Some(ticket) => Event::BuildDue { ticket: *ticket },
                None => return,
            },
            Move::RefreshNow => Event::RefreshNow,
            Move::Ready(n) => match id(self, n).filter(|id| self.held.contains(id)) {
                Some(id) => Event::Ready { id },
                None => return,
            },
            Move::Release(n, retry) => match id(self, n).filter(|id| self.held.contains(id)) {
                Some(id) => {
                    self.held.remove(&id);
                    self.stopping.remove(&id);
                    Event::Released { id, retry }
                }
                None => return,
            },
            Move::Retry(n) => match id(self, n).filter(|id| self.pauses.contains(id)) {
                Some(id) => Event::RetryDue { id },
                None => return,
            },
            Move::Memory(0) => Event::Memory(MemoryLevel::Enough),
            Move::Memory(1) => Event::Memory(MemoryLevel::Low),
            Move::Memory(_) => Event::Memory(MemoryLevel::Critical),
            Move::Wait(seconds) => {
                self.now += seconds;
                return;
            }
        };
        let asked = event.clone();
        let outcome = step(state, at(self.now), event);
        match (asked, outcome.answer) {
            (Event::Increase { n, .. }, Answer::Accepted(accepted)) => {
                assert!(accepted <= n);
                self.accepted += accepted as usize;
            }
            (Event::Decrease { ids }, Answer::Going(going)) => assert_eq!(going, ids),
            (Event::Update, Answer::Instances(shown)) => self.look(shown),
            (Event::RefreshNow, Answer::Refresh(begins)) => assert_ne!(begins, self.building),
            (_, Answer::Nothing) => {}
            (asked, answer) => panic!("{asked:?} answered by {answer:?}"),
        }
        self.obey(outcome.actions);
        assert!(state.occupied() <= MAX_SIZE);
        self.image_is_looked_after(state);
    }

    /// Always a task, or the timer that begins one.
    fn image_is_looked_after(&self, state: &State) {
        let last = self.tickets.last();
        let armed = state.image.task == Task::Waiting && last == Some(&state.image.ticket);
        assert!(
            self.building || armed,
            "nobody will look at the image again"
        );
        assert_eq!(self.building, state.image.task == Task::Running);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_events_breaks_the_contract(all in moves()) {
        let mut state = state();
        let mut world = World::default();
        for one in all {
            world.run(&mut state, one);
        }
        // However it went, everything can be ended, and every accepted instance was shown alive.
        let outcome = step(&mut state, at(world.now), Event::Shutdown);
        world.closing = true;
        world.obey(outcome.actions);
        for ticket in world.tickets.clone() {
            let outcome = step(&mut state, at(world.now), Event::BuildDue { ticket });
            world.obey(outcome.actions);
        }
        for id in world.held.clone() {
            world.held.remove(&id);
            let outcome = step(&mut state, at(world.now), Event::Released { id, retry: true });
            world.obey(outcome.actions);
        }
        prop_assert_eq!(state.occupied(), 0);
        for _update in 0..=DELETED_REPORTS {
            world.run(&mut state, Move::Update);
        }
        let outcome = step(&mut state, at(world.now), Event::ImageFailed);
        prop_assert_eq!(outcome.actions, [], "a closing pool plans no build");
        prop_assert!(state.instances.is_empty(), "{:?}", state);
        prop_assert_eq!(world.first.len(), world.accepted, "an accepted instance never appeared");
        for (id, first) in &world.first {
            let alive = matches!(first, InstanceState::Creating | InstanceState::Running);
            prop_assert!(alive, "{} was first seen {:?}", id, first);
        }
    }
}

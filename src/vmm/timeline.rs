//! When a VM reached each phase of its boot; the first time counts.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::spec::BootPhase;

/// Written by whoever sees a phase, read by the VM's handle: the lock is a leaf, held for a copy.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    reached: Mutex<Vec<(BootPhase, Duration)>>,
}

impl Timeline {
    /// Starts the clock.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            reached: Mutex::new(Vec::new()),
        }
    }

    /// The phase is reached now, if it was not before.
    pub fn mark(&self, phase: BootPhase) {
        self.mark_at(phase, Instant::now());
    }

    /// The phase was reached at `when`.
    pub fn mark_at(&self, phase: BootPhase, when: Instant) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if reached.iter().all(|(known, _)| *known != phase) {
            reached.push((phase, when.saturating_duration_since(self.start)));
        }
    }

    /// What was reached so far, in order of time.
    pub fn phases(&self) -> Vec<(BootPhase, Duration)> {
        let reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut phases = reached.clone();
        phases.sort_by_key(|(_, at)| *at);
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_time_counts_and_phases_come_in_order() {
        let timeline = Timeline::start();
        let start = timeline.start;
        timeline.mark_at(BootPhase::FirstOutput, start + Duration::from_millis(7));
        timeline.mark_at(BootPhase::FirstRun, start + Duration::from_millis(3));
        timeline.mark_at(BootPhase::FirstOutput, start + Duration::from_millis(9));
        let expected = [(BootPhase::FirstRun, 3), (BootPhase::FirstOutput, 7)];
        let expected = expected.map(|(phase, ms)| (phase, Duration::from_millis(ms)));
        assert_eq!(timeline.phases(), expected);
    }
}

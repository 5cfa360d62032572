//! What the pool counts since it began: starts, their phases, failures, ends, image tasks.
//!
//! Written by the driver and by machine and build tasks, read by `status` and the metrics file. The
//! lock is a leaf, held for an addition or a copy.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a machine was started. Clones will be another kind.
pub const COLD: &str = "cold";

/// The counters of one pool.
#[derive(Debug, Default)]
pub struct Counters {
    counts: Mutex<Counts>,
}

/// Their values at one moment. Everything only grows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Instances that the runner asked for, and those that were accepted.
    pub asked: u64,
    pub accepted: u64,
    /// Machines that came up, by kind.
    pub boots: BTreeMap<String, Boots>,
    /// Starts that failed, by reason.
    pub failures: BTreeMap<String, u64>,
    /// Machines that ended after they had come up, by how.
    pub ends: BTreeMap<String, u64>,
    /// Image tasks by outcome.
    pub images: BTreeMap<String, u64>,
}

/// Machines of one kind that came up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Boots {
    pub count: u64,
    /// From the start to Running, and its parts.
    pub phases: BTreeMap<String, Spent>,
}

/// Time spent in a phase, over all machines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    pub seconds: f64,
    pub longest_seconds: f64,
}

impl Counters {
    /// The values now.
    pub fn get(&self) -> Counts {
        self.with(|counts| counts.clone())
    }

    pub fn increase(&self, asked: u32, accepted: u32) {
        self.with(|counts| {
            counts.asked += u64::from(asked);
            counts.accepted += u64::from(accepted);
        });
    }

    /// A machine came up; `phases` are the parts of its start and the whole.
    pub fn boot(&self, kind: &str, phases: &[(&'static str, Duration)]) {
        self.with(|counts| {
            let boots = counts.boots.entry(kind.to_owned()).or_default();
            boots.count += 1;
            for (phase, time) in phases {
                let spent = boots.phases.entry((*phase).to_owned()).or_default();
                spent.seconds += time.as_secs_f64();
                spent.longest_seconds = spent.longest_seconds.max(time.as_secs_f64());
            }
        });
    }

    pub fn failure(&self, reason: &str) {
        self.with(|counts| *counts.failures.entry(reason.to_owned()).or_default() += 1);
    }

    pub fn end(&self, how: &str) {
        self.with(|counts| *counts.ends.entry(how.to_owned()).or_default() += 1);
    }

    pub fn image(&self, outcome: &str) {
        self.with(|counts| *counts.images.entry(outcome.to_owned()).or_default() += 1);
    }

    fn with<T>(&self, act: impl FnOnce(&mut Counts) -> T) -> T {
        act(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_add_up_and_the_longest_is_kept() {
        let counters = Counters::default();
        for ms in [500, 1500, 1000] {
            let phases = [("ssh", Duration::from_millis(ms))];
            counters.boot(COLD, &phases);
        }
        let counts = counters.get();
        let boots = counts.boots.get(COLD).unwrap();
        assert_eq!(boots.count, 3);
        let ssh = boots.phases.get("ssh").unwrap();
        assert_eq!((ssh.seconds, ssh.longest_seconds), (3.0, 1.5));
    }
}

//! What others may see of a machine: its phase, its times, its address, what it uses.
//!
//! One view a start, written by the machine's task and read by the driver for `status`. It keeps
//! nothing alive: a VM's handle outlives its VM.

use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::vmm::{VmHandle, VmStats};

/// A machine from outside.
#[derive(Debug)]
pub struct MachineView {
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    phase: &'static str,
    since: Instant,
    begun: Instant,
    /// Phases that are over, in order.
    past: Vec<(&'static str, Duration)>,
    address: Option<Ipv4Addr>,
    vm: Option<VmHandle>,
}

/// A copy of what a view shows.
#[derive(Debug, Clone)]
pub struct Glance {
    pub phase: &'static str,
    pub address: Option<Ipv4Addr>,
    pub vm: Option<VmHandle>,
}

impl Glance {
    /// What the VM uses now; walks its memory's page map, so it blocks for milliseconds.
    pub fn stats(&self) -> Option<VmStats> {
        self.vm.as_ref().map(VmHandle::stats)
    }
}

impl Default for MachineView {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            seen: Mutex::new(Seen {
                phase: "slot",
                since: now,
                begun: now,
                past: Vec::new(),
                address: None,
                vm: None,
            }),
        }
    }
}

impl MachineView {
    /// The next phase begins.
    pub fn enter(&self, phase: &'static str) {
        self.with(|seen| {
            let now = Instant::now();
            let spent = now.saturating_duration_since(seen.since);
            seen.past.push((seen.phase, spent));
            seen.phase = phase;
            seen.since = now;
        });
    }

    pub fn phase(&self) -> &'static str {
        self.with(|seen| seen.phase)
    }

    /// How long each phase so far took, and the whole as `total`.
    pub fn times(&self) -> Vec<(&'static str, Duration)> {
        self.with(|seen| {
            let mut times = seen.past.clone();
            times.push(("total", seen.begun.elapsed()));
            times
        })
    }

    pub fn has_address(&self, address: Ipv4Addr) {
        self.with(|seen| seen.address = Some(address));
    }

    pub fn has_vm(&self, vm: VmHandle) {
        self.with(|seen| seen.vm = Some(vm));
    }

    pub fn glance(&self) -> Glance {
        self.with(|seen| Glance {
            phase: seen.phase,
            address: seen.address,
            vm: seen.vm.clone(),
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Seen) -> T) -> T {
        act(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_follow_each_other_and_add_up_to_the_whole() {
        let view = MachineView::default();
        view.enter("vm");
        view.enter("running");
        assert_eq!(view.phase(), "running");
        let times = view.times();
        let names: Vec<&str> = times.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["slot", "vm", "total"]);
        let parts: Duration = times.iter().take(2).map(|(_, time)| *time).sum();
        assert!(parts <= times[2].1);
    }
}

//! The watcher of the host's memory: better one machine than all of them.
//!
//! Overcommit with a balloon is a promise; when it fails, the kernel's OOM killer would end this
//! process and with it every job. One task looks once a second and tells the brain a level.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::brain::{Event, MemoryLevel};
use super::driver::Message;
use super::host::Host;
use super::limits::{self, LimitSources};

const PERIOD: Duration = Duration::from_secs(1);
/// Below these parts of all memory (and these absolute numbers) the host is short.
const LOW: Threshold = Threshold {
    part: 20,
    at_least_mib: 512,
};
const CRITICAL: Threshold = Threshold {
    part: 50,
    at_least_mib: 192,
};
/// Share of the last ten seconds in which all tasks waited for memory, in percent (PSI).
const STALLED_PERCENT: f64 = 10.0;

struct Threshold {
    /// One of this many parts.
    part: u64,
    at_least_mib: u64,
}

impl Threshold {
    fn mib(&self, total_mib: u64) -> u64 {
        (total_mib / self.part).max(self.at_least_mib)
    }
}

/// What is left, of a host or of a control group.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Room {
    available_mib: u64,
    total_mib: u64,
    stalled_percent: f64,
}

impl Room {
    fn level(self) -> MemoryLevel {
        if self.available_mib < CRITICAL.mib(self.total_mib) {
            MemoryLevel::Critical
        } else if self.available_mib < LOW.mib(self.total_mib)
            || self.stalled_percent > STALLED_PERCENT
        {
            MemoryLevel::Low
        } else {
            MemoryLevel::Enough
        }
    }
}

/// Starts the watcher; it ends with the pool.
pub fn watch(
    host: &Arc<Host>,
    outbox: mpsc::WeakUnboundedSender<Message>,
    mut closing: watch::Receiver<bool>,
) {
    if !host.boots_machines() {
        return;
    }
    tokio::spawn(async move {
        let sources = LimitSources::default();
        let mut last = MemoryLevel::Enough;
        loop {
            tokio::select! {
                () = tokio::time::sleep(PERIOD) => {}
                _ended = closing.changed() => return,
            }
            let level = worst(&sources);
            if level != last {
                tracing::warn!(?level, "memory of the host");
            }
            // A critical level is told again and again: each time one machine may have to go.
            let tell = level != last || level == MemoryLevel::Critical;
            last = level;
            let Some(sender) = outbox.upgrade().filter(|_sender| tell) else {
                continue;
            };
            let _ended = sender.send(Message::Tell(Event::Memory(level)));
        }
    });
}

/// The worst of the host and every control group above us.
fn worst(sources: &LimitSources) -> MemoryLevel {
    let groups = limits::ancestor_groups(sources);
    groups
        .iter()
        .filter_map(|group| room_of_group(group))
        .chain(room_of_host(&sources.proc))
        .map(Room::level)
        .max()
        .unwrap_or(MemoryLevel::Enough)
}

fn room_of_host(proc: &Path) -> Option<Room> {
    Some(Room {
        available_mib: limits::meminfo_mib(proc, "MemAvailable:")?,
        total_mib: limits::meminfo_mib(proc, "MemTotal:")?,
        stalled_percent: stalled(&proc.join("pressure/memory")),
    })
}

/// A group with a limit; what its page cache holds can be had back.
fn room_of_group(group: &Path) -> Option<Room> {
    let number = |file: &str| -> Option<u64> {
        fs::read_to_string(group.join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let max = number("memory.max")?;
    let current = number("memory.current")?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let cache = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "))
        .and_then(|bytes| bytes.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(Room {
        available_mib: max.saturating_sub(current.saturating_sub(cache)) >> 20,
        total_mib: max >> 20,
        stalled_percent: stalled(&group.join("memory.pressure")),
    })
}

/// `full avg10` of a PSI file; 0 where the kernel keeps none.
fn stalled(file: &Path) -> f64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("full avg10="))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(available_mib: u64, total_mib: u64, stalled_percent: f64) -> Room {
        Room {
            available_mib,
            total_mib,
            stalled_percent,
        }
    }

    #[test]
    fn levels_follow_what_is_left_and_how_long_tasks_wait() {
        assert_eq!(room(30_000, 64_000, 0.0).level(), MemoryLevel::Enough);
        assert_eq!(room(30_000, 64_000, 11.0).level(), MemoryLevel::Low);
        assert_eq!(room(3_000, 64_000, 0.0).level(), MemoryLevel::Low);
        assert_eq!(room(1_000, 64_000, 0.0).level(), MemoryLevel::Critical);
        assert_eq!(room(600, 2_000, 0.0).level(), MemoryLevel::Enough);
        assert_eq!(room(500, 2_000, 0.0).level(), MemoryLevel::Low);
        assert_eq!(room(150, 2_000, 0.0).level(), MemoryLevel::Critical);
    }

    #[test]
    fn the_tightest_group_decides_and_its_cache_counts_as_free() {
        let dir = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        file("proc/self/cgroup", "0::/a/b\n");
        file(
            "proc/meminfo",
            "MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n",
        );
        file(
            "proc/pressure/memory",
            "some avg10=50.00\nfull avg10=0.00 avg60=1\n",
        );
        file("cg/a/memory.max", "8589934592\n");
        file("cg/a/memory.current", "8489934592\n");
        let sources = LimitSources {
            proc: dir.path().join("proc"),
            cgroup: dir.path().join("cg"),
        };
        assert_eq!(worst(&sources), MemoryLevel::Critical);
        file("cg/a/memory.stat", "anon 5\ninactive_file 7000000000\n");
        assert_eq!(worst(&sources), MemoryLevel::Enough);
        file("cg/a/memory.pressure", "full avg10=40.00 avg60=1\n");
        assert_eq!(worst(&sources), MemoryLevel::Low);
    }
}

//! What `fleetingd status` shows of a pool, as values that travel over its socket.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::counters::Counts;

/// One pool at one moment. Times are seconds; memory and disks are bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    pub group: String,
    pub program_version: String,
    pub pid: u32,
    pub uptime_s: u64,
    /// `image_directory`: where its images lie.
    pub store: PathBuf,
    pub max_size: u32,
    /// Instances that hold a slot of `max_size`, or will.
    pub occupied: u32,
    /// `enough`, `low` or `critical`.
    pub host_memory: String,
    pub image: ImageStatus,
    pub instances: Vec<InstanceStatus>,
    pub counters: Counts,
    /// Packets that the rules dropped, by chain; `ingress` is what was no machine's own.
    pub dropped_packets: BTreeMap<String, u64>,
}

/// What machines start from, and what is being done about it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// The generation that serves.
    pub generation: Option<String>,
    pub pinned: bool,
    /// What the image task is at; `idle` between two.
    pub phase: String,
    pub phase_s: u64,
    /// More about the phase, such as a percentage or the prebuild's last console line.
    pub detail: String,
    /// Why the last task failed, if it did.
    pub last_error: Option<Told>,
    /// When an image task last went well, in seconds since the epoch.
    pub checked_at: Option<u64>,
}

/// A text and when it was said, in seconds since the epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Told {
    pub at: u64,
    pub text: String,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub id: String,
    /// `creating`, `running`, `deleting` or `deleted`.
    pub state: String,
    /// What its start is at; `running` after it.
    pub phase: String,
    pub age_s: u64,
    pub address: Option<Ipv4Addr>,
    pub generation: Option<String>,
    pub disk_delta_bytes: u64,
    /// Guest memory that is resident.
    pub memory_bytes: u64,
}

/// What the image task tells of itself while it runs. The lock is a leaf.
#[derive(Debug)]
pub struct ImageReport {
    seen: Mutex<(ImageStatus, Instant)>,
}

/// What the task is at between two tasks.
pub const IDLE: &str = "idle";

impl Default for ImageReport {
    fn default() -> Self {
        let status = ImageStatus {
            phase: IDLE.to_owned(),
            ..ImageStatus::default()
        };
        Self {
            seen: Mutex::new((status, Instant::now())),
        }
    }
}

impl ImageReport {
    /// The next phase begins.
    pub fn enter(&self, phase: &str) {
        self.with(|status, since| {
            phase.clone_into(&mut status.phase);
            status.detail.clear();
            *since = Instant::now();
        });
    }

    pub fn detail(&self, detail: String) {
        self.with(|status, _since| status.detail = detail);
    }

    /// What machines start from now.
    pub fn serves(&self, generation: &str, pinned: bool) {
        self.with(|status, _since| {
            status.generation = Some(generation.to_owned());
            status.pinned = pinned;
        });
    }

    /// The task is over.
    pub fn done(&self, failure: Option<String>) {
        self.enter(IDLE);
        self.with(|status, _since| match failure {
            Some(text) => status.last_error = Some(Told { at: epoch(), text }),
            None => {
                status.last_error = None;
                status.checked_at = Some(epoch());
            }
        });
    }

    pub fn get(&self) -> ImageStatus {
        self.with(|status, since| ImageStatus {
            phase_s: since.elapsed().as_secs(),
            ..status.clone()
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut ImageStatus, &mut Instant) -> T) -> T {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, since) = &mut *seen;
        act(status, since)
    }
}

/// Seconds since the epoch.
pub fn epoch() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

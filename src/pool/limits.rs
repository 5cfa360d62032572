//! What the host allows this process: descriptors, tasks, mappings and memory, in every limit
//! that applies, against what machines need.
//!
//! Pure but for reading files below a root, which tests replace. A limit that does not even allow
//! one machine and its build is an error; one that does not allow the maximum is a warning.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What one machine takes beside its memory: eventfds of its queues and vectors, KVM and device
/// descriptors (counted in a running process: 52 with one disk and one card).
const DESCRIPTORS_PER_VM: u64 = 64;
/// vCPU threads come on top: event loop, block loop, supervisor, up to four io_uring workers,
/// one vhost task.
const TASKS_PER_VM: u64 = 8;
/// Guest memory, KVM run pages, thread stacks, rings.
const MAPPINGS_PER_VM: u64 = 32;
/// Memory of a machine beyond its RAM, in MiB (budget 3, with the page tables of KVM on top).
const OVERHEAD_MIB: u64 = 16;
/// What the process itself needs of each.
const OWN_DESCRIPTORS: u64 = 128;
const OWN_TASKS: u64 = 64;
const OWN_MAPPINGS: u64 = 1024;
const OWN_MIB: u64 = 64;

/// What the machines will need.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// Most machines at once.
    pub machines: u32,
    pub vcpus: u8,
    pub memory_mib: u32,
    /// Promised guest memory per byte of the host's.
    pub overcommit: f64,
}

/// One limit that is too small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Not even one machine fits: an error. Otherwise a warning.
    pub fatal: bool,
    text: String,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Where to read limits: `/` but for tests.
#[derive(Debug, Clone)]
pub struct LimitSources {
    pub proc: PathBuf,
    pub cgroup: PathBuf,
}

impl Default for LimitSources {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            cgroup: "/sys/fs/cgroup".into(),
        }
    }
}

/// Raises RLIMIT_NOFILE to its hard limit (a Go parent hands down 1024) and returns that.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let effective = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_refused) => limit.current,
    };
    effective.unwrap_or(u64::MAX)
}

/// Every limit that the demand exceeds.
pub fn check(demand: &Demand, descriptors: u64, sources: &LimitSources) -> Vec<Shortage> {
    let mut found = Vec::new();
    found.extend(shortage(
        "open files (hard limit of RLIMIT_NOFILE)",
        descriptors,
        OWN_DESCRIPTORS,
        DESCRIPTORS_PER_VM,
        demand.machines,
        "LimitNOFILE=1048576 in gitlab-runner's unit",
    ));
    let per_vm_tasks = u64::from(demand.vcpus) + TASKS_PER_VM;
    let max_maps = read_number(&sources.proc.join("sys/vm/max_map_count"));
    if let Some(maps) = max_maps {
        found.extend(shortage(
            "memory mappings (vm.max_map_count)",
            maps,
            OWN_MAPPINGS,
            MAPPINGS_PER_VM,
            demand.machines,
            "sysctl vm.max_map_count=262144",
        ));
    }
    for group in ancestor_groups(sources) {
        let name = group.display();
        if let Some(tasks) = room(&group, "pids.max", "pids.current") {
            found.extend(shortage(
                &format!("tasks (pids.max of {name})"),
                tasks,
                OWN_TASKS,
                per_vm_tasks,
                demand.machines,
                "TasksMax=infinity in gitlab-runner's unit",
            ));
        }
        if let Some(bytes) = read_number(&group.join("memory.max")) {
            found.extend(memory_shortage(
                &format!("memory.max of {name}"),
                bytes >> 20,
                demand,
                "MemoryMax=infinity in gitlab-runner's unit",
            ));
        }
    }
    if let Some(total) = meminfo_mib(&sources.proc, "MemTotal:") {
        found.extend(memory_shortage(
            "the host's memory",
            total,
            demand,
            "a smaller vm_memory_mb or max_instances",
        ));
    }
    found
}

/// A field of /proc/meminfo in MiB.
pub fn meminfo_mib(proc: &Path, field: &str) -> Option<u64> {
    let text = fs::read_to_string(proc.join("meminfo")).ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib >> 10)
}

fn memory_shortage(what: &str, has_mib: u64, demand: &Demand, hint: &str) -> Option<Shortage> {
    let one = u64::from(demand.memory_mib) + OVERHEAD_MIB;
    if has_mib < one + OWN_MIB {
        return Some(Shortage {
            fatal: true,
            text: format!(
                "{what} is {has_mib} MiB, a machine of {} MiB needs {}; hint: {hint}",
                demand.memory_mib,
                one + OWN_MIB
            ),
        });
    }
    let machines = u64::from(demand.machines);
    // Numbers of MiB: exact in a float far beyond any host.
    #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
    let promised = (one * machines) as f64;
    #[expect(clippy::cast_precision_loss, reason = "below 2^53")]
    let allowed = has_mib as f64 * demand.overcommit;
    (promised > allowed).then(|| Shortage {
        fatal: false,
        text: format!(
            "{what} is {has_mib} MiB; {machines} machines of {} MiB promise {} MiB, more than memory_overcommit = {} allows; hint: {hint}",
            demand.memory_mib,
            one * machines,
            demand.overcommit
        ),
    })
}

fn shortage(
    what: &str,
    has: u64,
    own: u64,
    per_vm: u64,
    machines: u32,
    hint: &str,
) -> Option<Shortage> {
    let wanted = own.saturating_add(per_vm.saturating_mul(u64::from(machines)));
    if has >= wanted {
        return None;
    }
    let fits = has.saturating_sub(own).checked_div(per_vm).unwrap_or(0);
    Some(Shortage {
        fatal: fits < 2,
        text: format!(
            "{what}: {has} allowed, {wanted} needed for {machines} machines ({fits} fit); hint: {hint}"
        ),
    })
}

/// Our control group and all above it, innermost first (cgroup v2).
pub fn ancestor_groups(sources: &LimitSources) -> Vec<PathBuf> {
    let text = fs::read_to_string(sources.proc.join("self/cgroup")).unwrap_or_default();
    let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::")) else {
        return Vec::new();
    };
    let inner = sources.cgroup.join(path.trim_start_matches('/'));
    inner
        .ancestors()
        .take_while(|group| group.starts_with(&sources.cgroup))
        .map(Path::to_owned)
        .collect()
}

fn room(group: &Path, max: &str, current: &str) -> Option<u64> {
    let max = read_number(&group.join(max))?;
    let current = read_number(&group.join(current)).unwrap_or(0);
    Some(max.saturating_sub(current))
}

/// A number in a file; `None` for "max" and where there is no such file.
fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
#[path = "limits_test.rs"]
mod tests;

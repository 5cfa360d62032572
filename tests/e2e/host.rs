//! What can be seen of the host: interfaces, tables, locks, files, and what a process holds.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fleetingd::net::RUN_DIR;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

const POLL: Duration = Duration::from_millis(20);
/// The folder of consoles, which stays.
const CONSOLES: &str = ".instance_data";

/// Runs a command line split at spaces and returns what it printed.
pub fn run(line: &str) -> anyhow::Result<String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().context("an empty command")?)
        .args(words)
        .output()
        .with_context(|| line.to_owned())?;
    ensure!(
        output.status.success(),
        "{line}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What plugins could leave behind.
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// No plugin may be starting meanwhile: locks are tried.
    pub fn take(data: &Path) -> anyhow::Result<Self> {
        let mut all = BTreeSet::new();
        all.extend(interfaces()?.iter().map(|name| format!("interface {name}")));
        all.extend(tables()?);
        all.extend(held_locks()?.iter().map(|name| format!("lock {name}")));
        // Consoles are kept on purpose, and what others keep beside ours is theirs.
        for (folder, ours) in [("", false), ("generations", true), ("snapshots", true)] {
            for name in names(&data.join(folder))? {
                let left = name.starts_with('.') && name != CONSOLES;
                if ours || left || name.contains("delta") {
                    all.insert(format!("file {folder}/{name}"));
                }
            }
        }
        Ok(Self(all))
    }

    /// What is there now and was not before.
    pub fn left_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn names(folder: &Path) -> anyhow::Result<BTreeSet<String>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries.with_context(|| folder.display().to_string())?,
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

pub fn interfaces() -> anyhow::Result<BTreeSet<String>> {
    names(Path::new("/sys/class/net"))
}

/// The lines of `nft list tables`, such as `table inet fleetingd_0`.
pub fn tables() -> anyhow::Result<BTreeSet<String>> {
    let text = run("nft list tables")?;
    Ok(text.lines().map(|line| line.trim().to_owned()).collect())
}

/// Locks in our run folder that some process has.
pub fn held_locks() -> anyhow::Result<BTreeSet<String>> {
    let folder = Path::new(RUN_DIR);
    let mut held = BTreeSet::new();
    for name in names(folder)? {
        // What plugins listen on is no lock.
        if name.ends_with(".sock") {
            continue;
        }
        let file = File::open(folder.join(&name))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                held.insert(name);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(held)
}

/// The interface that has an address.
pub fn interface_of(address: Ipv4Addr) -> anyhow::Result<String> {
    let text = run("ip -o -4 address show")?;
    let wanted = format!(" {address}/");
    let line = text
        .lines()
        .find(|line| line.contains(&wanted))
        .with_context(|| format!("no interface has {address}"))?;
    let name = line.split_whitespace().nth(1);
    Ok(name.context("an interface without a name")?.to_owned())
}

/// Packets that the `dropnottap` chain counted for an interface; `None` without such a rule.
pub fn sent_packets(table: &str, tap: &str) -> anyhow::Result<Option<u64>> {
    let text = run(&format!("nft list chain inet {table} dropnottap"))?;
    let wanted = format!("\"{tap}\"");
    let line = text.lines().find(|line| line.contains(&wanted));
    Ok(line.and_then(counted))
}

/// Packets of an interface that its ingress rules dropped.
pub fn dropped_packets(table: &str, tap: &str) -> anyhow::Result<u64> {
    let text = run(&format!("nft list chain netdev {table} {tap}"))?;
    let drops = text.lines().filter(|line| line.trim().ends_with("drop"));
    Ok(drops.filter_map(counted).sum())
}

fn counted(line: &str) -> Option<u64> {
    let (_rule, counter) = line.split_once("packets ")?;
    counter.split_whitespace().next()?.parse().ok()
}

/// Polls until `condition` holds and says how long that took.
pub async fn eventually(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    while !condition()? {
        ensure!(begun.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
    Ok(begun.elapsed())
}

/// A process by its id.
#[derive(Debug, Clone, Copy)]
pub struct Process(pub u32);

impl Process {
    /// Whether it runs; a dead one that nobody has reaped does not.
    pub fn is_alive(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        // The name before the state is in parentheses and may hold anything.
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        state.is_some_and(|state| !"ZX".contains(state))
    }

    pub fn kill(self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0)?).context("no process id")?;
        Ok(kill_process(pid, Signal::KILL)?)
    }

    /// What its descriptors point to.
    pub fn descriptors(self) -> anyhow::Result<Vec<String>> {
        let folder = format!("/proc/{}/fd", self.0);
        let mut links = Vec::new();
        for name in names(Path::new(&folder))? {
            // It may have been closed since.
            if let Ok(link) = fs::read_link(format!("{folder}/{name}")) {
                links.push(link.display().to_string());
            }
        }
        Ok(links)
    }

    /// Names of the host's locks that it holds.
    pub fn locks(self) -> anyhow::Result<BTreeSet<String>> {
        let prefix = format!("{RUN_DIR}/");
        let links = self.descriptors()?;
        let ours = links.iter().filter_map(|link| link.strip_prefix(&prefix));
        Ok(ours.map(str::to_owned).collect())
    }

    /// Descriptors and threads that only a machine needs.
    pub fn held_for_machines(self, data: &Path) -> anyhow::Result<Vec<String>> {
        let data = format!("{}/", data.display());
        let mut held = self.descriptors()?;
        held.retain(|link| {
            let unlinked = link.starts_with(&data) && link.ends_with("(deleted)");
            unlinked
                || ["/dev/net/tun", "/dev/vhost-net", "kvm-v"]
                    .iter()
                    .any(|word| link.contains(word))
        });
        let tasks = format!("/proc/{}/task", self.0);
        for id in names(Path::new(&tasks))? {
            let name = fs::read_to_string(format!("{tasks}/{id}/comm")).unwrap_or_default();
            let name = name.trim();
            if name.starts_with("vm") {
                held.push(format!("thread {name}"));
            }
        }
        Ok(held)
    }
}

//! The host's network for machines: slots, TAPs, nftables, and what must hold before any of it.
//!
//! A slot is a TAP `fleetingd<s>` and a /30 of the subnet, both held by host-wide locks; `.1` is
//! the host, `.2` the guest, and s and the /30 are unrelated. [`Net`] is one process's share of
//! the host: its locks, its nftables tables and its slots. It knows nothing of guests or VMs.
//! All of it runs in tokio tasks of the pool; system calls here are short.
//!
//! **Invariant:** what must not outlive the process is held by a descriptor: TAPs are not
//! persistent and locks are flocks. Only the tables stay, and the next start removes them.

mod conntrack;
mod error;
mod link;
mod locks;
mod rules;
mod slot;
mod spec;
mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use conntrack::forget as forget_connections;
pub use error::NetError;
pub use locks::Lock;
pub use slot::{Slot, SlotRole};
pub use spec::{AllowHost, AllowPrivate, NetSpec, Protocol, Subnet};
pub use tap::open as open_tap;

use link::Links;
use locks::RunDir;
use rules::Rules;

/// Where every process of a host keeps its locks, whatever the config says.
pub const RUN_DIR: &str = "/run/fleetingd";

/// How long a slot that nobody uses stays open for the next machine of this process.
const IDLE_SLOT_SECONDS: u64 = 60;

/// What is true of the uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    pub interface: String,
    pub mtu: u16,
    pub dns: Vec<Ipv4Addr>,
}

/// One process's share of the host's network.
#[derive(Debug)]
pub struct Net {
    spec: NetSpec,
    run_dir: RunDir,
    /// n of `fleetingd_<n>`, held until the process ends.
    table: Lock,
    number: u32,
    links: Links,
    rules: Rules,
    uplink: Uplink,
    idle: Vec<(Slot, Instant)>,
}

impl Net {
    /// Checks the host against `spec` and takes a table number; removes tables whose process is
    /// gone. Returns every problem found, not only the first.
    pub async fn open(spec: NetSpec, run_dir: &Path) -> Result<Self, Vec<NetError>> {
        let run_dir = RunDir::open(run_dir).map_err(|e| vec![e])?;
        let links = Links::connect().map_err(|e| vec![e])?;
        let (uplink, tables) = preflight(&spec, &links).await?;
        let setup = async {
            let (number, table) = run_dir.lock_first("table.", 0..1024)?;
            rules::remove_orphans(&run_dir, &tables, number).await?;
            let lan = links.connected_networks().await?;
            let rules = Rules::apply(&spec, &uplink, number, lan).await?;
            Ok((number, table, rules))
        };
        let (number, table, rules) = setup.await.map_err(|e| vec![e])?;
        Ok(Self {
            spec,
            run_dir,
            table,
            number,
            links,
            rules,
            uplink,
            idle: Vec::new(),
        })
    }

    /// The number that names this process's tables and its default group.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The interface, MTU and resolvers that machines use.
    pub fn uplink(&self) -> &Uplink {
        &self.uplink
    }

    /// Machines that fit the subnet at once: its /30s less one for the build.
    pub fn max_slots(&self) -> u32 {
        self.spec.subnet.slots().saturating_sub(1)
    }

    /// Takes the group's name for this process; an error if a living process has it.
    pub fn lock_group(&self, name: &str) -> Result<Lock, NetError> {
        lock_group(&self.run_dir, name)
    }

    /// Packets that the rules of this process dropped, by chain; empty if nft does not say.
    pub fn drops(&self) -> impl Future<Output = BTreeMap<String, u64>> + Send + use<> {
        self.rules.drops()
    }

    /// A slot with an open, drained TAP whose rules are in place. For [`SlotRole::Build`] fails
    /// with [`NetError::BuildSlotTaken`] while another process of the host builds.
    pub async fn acquire(&mut self, role: SlotRole) -> Result<Slot, NetError> {
        if role == SlotRole::Worker
            && let Some((slot, _since)) = self.idle.pop()
        {
            slot.drain();
            return Ok(slot);
        }
        let slot = Slot::open(&self.run_dir, &self.spec.subnet, role)?;
        self.links.configure_tap(&slot, self.uplink.mtu).await?;
        self.rules.add_slot(&slot).await?;
        Ok(slot)
    }

    /// Takes a slot back; its VM must be gone. Workers' slots stay open for a while.
    pub fn release(&mut self, slot: Slot, now: Instant) {
        if slot.role() == SlotRole::Worker {
            self.idle.push((slot, now));
        }
    }

    /// Closes a slot now.
    pub async fn retire(&mut self, slot: Slot) -> Result<(), NetError> {
        self.rules.remove_slot(&slot).await
    }

    /// Closes slots that nobody wanted for a minute, so that other processes can have them.
    pub async fn retire_idle(&mut self, now: Instant) -> Result<(), NetError> {
        let mut kept = Vec::new();
        let mut retired = Vec::new();
        for (slot, since) in self.idle.drain(..) {
            if now.saturating_duration_since(since).as_secs() < IDLE_SLOT_SECONDS {
                kept.push((slot, since));
            } else {
                retired.push(slot);
            }
        }
        self.idle = kept;
        for slot in retired {
            self.rules.remove_slot(&slot).await?;
        }
        Ok(())
    }

    /// Puts our tables back if somebody flushed the ruleset; true if that was needed.
    pub async fn ensure_rules(&mut self) -> Result<bool, NetError> {
        self.rules.ensure().await
    }

    /// Removes this process's tables and closes its idle slots. Gathers what fails.
    pub async fn close(mut self) -> Vec<NetError> {
        self.idle.clear();
        let result = self.rules.remove().await;
        drop(self.table);
        result.err().into_iter().collect()
    }
}

/// The same where there is no network: for pools that boot nothing.
pub fn lock_group_in(run_dir: &Path, name: &str) -> Result<Lock, NetError> {
    lock_group(&RunDir::open(run_dir)?, name)
}

fn lock_group(run_dir: &RunDir, name: &str) -> Result<Lock, NetError> {
    run_dir
        .try_lock(&format!("group.{name}"))?
        .ok_or_else(|| NetError::GroupTaken {
            name: name.to_owned(),
        })
}

/// What must hold before the first machine: each problem by itself, with its remedy. Returns the
/// uplink and the nftables tables that are there.
async fn preflight(spec: &NetSpec, links: &Links) -> Result<(Uplink, String), Vec<NetError>> {
    let mut problems = Vec::new();
    let tables = match rules::list_tables().await {
        Ok(tables) => tables,
        Err(e) => {
            problems.push(e);
            String::new()
        }
    };
    match std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
        Ok(text) if text.trim() == "1" => {}
        _ => problems.push(NetError::ForwardingOff),
    }
    if spec.subnet.slots() < 2 {
        problems.push(NetError::SubnetTooSmall {
            subnet: spec.subnet,
            wanted: spec.subnet.widened(),
        });
    }
    let uplink = match links.uplink(spec.egress_interface.as_deref()).await {
        Ok((interface, mtu)) => Some((interface, mtu)),
        Err(e) => {
            problems.push(e);
            None
        }
    };
    match links.overlap(&spec.subnet).await {
        Ok(None) => {}
        Ok(Some(e)) | Err(e) => problems.push(e),
    }
    let dns = match &spec.dns[..] {
        [] => link::host_resolvers(),
        named => Ok(named.to_vec()),
    };
    match (uplink, dns) {
        (Some((interface, mtu)), Ok(dns)) if problems.is_empty() => {
            let uplink = Uplink {
                interface,
                mtu,
                dns,
            };
            Ok((uplink, tables))
        }
        (_, Err(e)) => {
            problems.push(e);
            Err(problems)
        }
        _ => Err(problems),
    }
}

/// Names of the TAPs in `/sys/class/net` that are ours, for leak checks and `status`.
pub fn taps_present() -> BTreeSet<String> {
    std::fs::read_dir(PathBuf::from("/sys/class/net"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| tap::is_ours(name))
        .collect()
}

#[cfg(test)]
mod net_test;

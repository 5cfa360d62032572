//! This process's share of the host, which all machine and build tasks use.
//!
//! Opened once with every problem reported, closed once after the last machine. The network is
//! behind an async lock because slots are made by netlink and nft one at a time anyhow; nothing
//! that answers the runner ever takes it.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::Mutex;

use super::counters::Counters;
use super::keys::KeyPair;
use super::prebuild::Onlooker;
use super::preflight;
#[cfg(feature = "test-vmm")]
use super::spec::VmmKind;
use super::spec::{FixedCredential, PoolSpec};
use super::status::ImageReport;
use crate::chain::chain;
use crate::image::Store;
use crate::net::{self, Net, Slot, Uplink, forget_connections};

/// What a pool stands on.
#[derive(Debug)]
pub struct Host {
    spec: PoolSpec,
    group: String,
    max_size: u32,
    backing: Backing,
    pub counters: Counters,
    pub image: ImageReport,
    /// Held while what the group serves changes: a promotion and a pin, one after the other.
    pub serving: Mutex<()>,
    /// Who looks on while a prebuild's machine runs.
    pub onlooker: Option<Arc<dyn Onlooker>>,
}

#[derive(Debug)]
enum Backing {
    Machines(Box<Machines>),
    #[cfg(feature = "test-vmm")]
    Nothing {
        /// Holds the group's name, where there is a run folder for it.
        _group: Option<crate::net::Lock>,
        /// Where there is one, generations come and go as everywhere, but for the VMs.
        store: Option<(Box<Store>, Arc<File>)>,
    },
}

/// What real machines need.
#[derive(Debug)]
pub struct Machines {
    /// `None` once it was closed.
    pub net: Mutex<Option<Net>>,
    pub uplink: Uplink,
    pub store: Store,
    /// This executable, as it was when the process started: an upgrade replaces the file.
    pub agent: Arc<File>,
    /// The login's key pair if the operator fixed it.
    pub fixed_key: Option<KeyPair>,
    /// Memory promised to machines that run, in MiB.
    promised_mib: AtomicU64,
    /// Holds the group's name.
    _group: crate::net::Lock,
}

impl Host {
    /// Takes the host's resources; all problems at once, or the host and warnings.
    pub async fn open(spec: PoolSpec) -> Result<(Self, Vec<String>), Vec<String>> {
        #[cfg(feature = "test-vmm")]
        if let VmmKind::Fake { .. } = spec.vmm {
            return Ok((Self::fake(spec)?, Vec::new()));
        }
        let ready = preflight::run(&spec).await?;
        let fixed_key = match &spec.login.fixed {
            Some(FixedCredential::Key(pem)) => {
                Some(KeyPair::from_pem(pem).map_err(|e| vec![chain(&e)])?)
            }
            _ => None,
        };
        let host = Self {
            group: ready.group,
            max_size: ready.net.max_slots(),
            backing: Backing::Machines(Box::new(Machines {
                uplink: ready.net.uplink().clone(),
                net: Mutex::new(Some(ready.net)),
                store: ready.store,
                agent: Arc::new(ready.agent),
                fixed_key,
                promised_mib: AtomicU64::new(0),
                _group: ready.group_lock,
            })),
            spec,
            counters: Counters::default(),
            image: ImageReport::default(),
            serving: Mutex::default(),
            onlooker: None,
        };
        Ok((host, ready.warnings))
    }

    #[cfg(feature = "test-vmm")]
    fn fake(spec: PoolSpec) -> Result<Self, Vec<String>> {
        let group = spec.group.clone().unwrap_or_else(|| "fake".to_owned());
        let problem = |e: &dyn std::error::Error| vec![chain(e)];
        let (lock, store) = match &spec.run_directory {
            Some(dir) => {
                let lock = net::lock_group_in(dir, &group).map_err(|e| problem(&e))?;
                let store = Store::open_apart(&spec.image_directory, &spec.disk_directory)
                    .map_err(|e| problem(&e))?;
                let agent = File::open("/proc/self/exe").map_err(|e| problem(&e))?;
                (Some(lock), Some((Box::new(store), Arc::new(agent))))
            }
            None => (None, None),
        };
        Ok(Self {
            group,
            max_size: spec.net.subnet.slots().saturating_sub(1),
            backing: Backing::Nothing {
                _group: lock,
                store,
            },
            spec,
            counters: Counters::default(),
            image: ImageReport::default(),
            serving: Mutex::default(),
            onlooker: None,
        })
    }

    /// Where this pool's socket belongs; `None` for a pool that must leave the host alone.
    pub fn run_directory(&self) -> Option<&Path> {
        let default = self.boots_machines().then_some(Path::new(net::RUN_DIR));
        self.spec.run_directory.as_deref().or(default)
    }

    pub fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    pub fn group(&self) -> &str {
        &self.group
    }

    pub fn max_size(&self) -> u32 {
        self.max_size
    }

    /// What machines need; `None` where the pool boots nothing.
    pub fn machines(&self) -> Option<&Machines> {
        match &self.backing {
            Backing::Machines(machines) => Some(machines),
            #[cfg(feature = "test-vmm")]
            Backing::Nothing { .. } => None,
        }
    }

    /// Where generations lie; `None` where machines need none.
    pub fn store(&self) -> Option<&Store> {
        match &self.backing {
            Backing::Machines(machines) => Some(&machines.store),
            #[cfg(feature = "test-vmm")]
            Backing::Nothing { store, .. } => store.as_ref().map(|(store, _agent)| &**store),
        }
    }

    /// What becomes the guest's agent.
    pub fn agent(&self) -> Option<Arc<File>> {
        match &self.backing {
            Backing::Machines(machines) => Some(Arc::clone(&machines.agent)),
            #[cfg(feature = "test-vmm")]
            Backing::Nothing { store, .. } => {
                store.as_ref().map(|(_store, agent)| Arc::clone(agent))
            }
        }
    }

    /// Whether there is anything to watch over.
    pub fn boots_machines(&self) -> bool {
        self.machines().is_some()
    }

    /// Puts flushed rules back and closes slots that nobody wanted for a while.
    pub async fn look_after_network(&self) {
        let Some(machines) = self.machines() else {
            return;
        };
        let mut net = machines.net.lock().await;
        let Some(net) = net.as_mut() else { return };
        match net.ensure_rules().await {
            Ok(false) => {}
            Ok(true) => tracing::warn!(
                "our nftables tables were removed by somebody and are back; hint: avoid `flush ruleset` in /etc/nftables.conf"
            ),
            Err(e) => tracing::error!("nftables: {}", chain(&e)),
        }
        if let Err(e) = net.retire_idle(Instant::now()).await {
            tracing::warn!("close idle slots: {}", chain(&e));
        }
    }

    /// Gives back what is left: rules, idle slots, locks.
    pub async fn close(&self) {
        let Some(machines) = self.machines() else {
            return;
        };
        let net = machines.net.lock().await.take();
        if let Some(net) = net {
            for problem in net.close().await {
                tracing::warn!("close the network: {}", chain(&problem));
            }
        }
    }
}

impl Machines {
    /// Counts a machine's memory for as long as the answer lives; a warning with numbers where
    /// more is promised than `memory_overcommit` allows.
    pub fn promise(&self, memory_mib: u32, total_mib: u64, overcommit: f64) -> Promise<'_> {
        let mib = u64::from(memory_mib);
        let promised = self.promised_mib.fetch_add(mib, Ordering::Relaxed) + mib;
        #[expect(clippy::cast_precision_loss, reason = "MiB counts are far below 2^53")]
        let too_much = promised as f64 > total_mib as f64 * overcommit;
        if too_much && total_mib > 0 {
            tracing::warn!(
                promised_mib = promised,
                host_mib = total_mib,
                overcommit,
                "machines are promised more memory than memory_overcommit allows; hint: a smaller vm_memory_mb or max_instances"
            );
        }
        Promise {
            counter: &self.promised_mib,
            mib,
        }
    }

    /// Takes a worker's slot back, with nothing of its machine left to the next one.
    pub async fn release(&self, slot: Slot) {
        let address = slot.guest_address();
        match tokio::task::spawn_blocking(move || forget_connections(address)).await {
            Ok(Ok(_count)) => {}
            Ok(Err(e)) => tracing::warn!("forget connections of {address}: {e}"),
            Err(e) => tracing::warn!("forget connections of {address}: {e}"),
        }
        if let Some(net) = self.net.lock().await.as_mut() {
            net.release(slot, Instant::now());
        }
    }

    /// What a machine should ask for names.
    pub fn dns(&self) -> Vec<Ipv4Addr> {
        self.uplink.dns.clone()
    }
}

/// Memory promised to one machine; given back when dropped.
#[derive(Debug)]
pub struct Promise<'a> {
    counter: &'a AtomicU64,
    mib: u64,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.mib, Ordering::Relaxed);
    }
}

/// Where deltas of workers' disks are made.
pub fn delta_dir(spec: &PoolSpec) -> PathBuf {
    spec.disk_directory.clone()
}

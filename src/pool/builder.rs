//! Obtains a generation: finds it, or builds it in a prebuild VM and proves it by a worker.
//!
//! ```text
//!  key ─> sealed and tested? ──yes──────────────────────────────────────> current
//!           │ no: whose turn is it (one builder a host)
//!           v
//!  plan (raw disk, kernel, seed) ─> fleetingd0 runs ─> powered off ─> sealed ─> smoke test ─┘
//! ```
//!
//! One task at a time; it gives up at once when the pool closes, and a crash leaves nothing but
//! a temporary folder that the next build removes.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::host::{Host, Machines, chain};
use super::machine::{self, MachineError};
use super::spec::{FixedCredential, PoolSpec};
use super::view::MachineView;
use super::vm::{Vm, VmStartError};
use crate::agent;
use crate::image::{
    self, BuildInputs, BuildLock, BuildPlan, BuildProgress, Generation, GenerationKey, ImageError,
    LocalImage, SeedNet, SourceError, SourceProgress,
};
use crate::net::{NetError, Slot, SlotRole};
use crate::vmm::{self, DiskSource, DiskSpec, KernelSource, NetSpec, VmEnd, VmSpec};

/// The prebuild's name, and that of its console file.
const PREBUILD: &str = "fleetingd0";
/// What the smoke test's machine is called.
const SMOKE: &str = "fleetingd-smoke";
/// Memory of a prebuild, whatever workers have: apt and unpacking want room.
const PREBUILD_MIN_MIB: u32 = 1024;
const CMDLINE: &str = "console=hvc0 clocksource=kvm-clock reboot=a panic=-1 random.trust_cpu=on rw";
/// How often a wait is told to the log.
const TELL: Duration = Duration::from_secs(30);
const QUEUE_POLL: Duration = Duration::from_secs(1);
/// Console lines that a failed build shows.
const CONSOLE_TAIL_BYTES: usize = 4096;

/// A generation that workers start from.
#[derive(Debug)]
pub struct Current {
    pub generation: Generation,
    /// Its disk, opened once and shared by all workers.
    pub base: Arc<File>,
}

/// Why there is no generation.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the pool is closing")]
    Closing,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("no slot for the prebuild")]
    Slot(#[source] NetError),
    #[error("cannot start the prebuild")]
    Start(#[source] VmStartError),
    #[error("the prebuild ended by itself: {end}; hint: its console is {console}")]
    Ended { end: VmEnd, console: String },
    #[error(
        "the prebuild was not done after {seconds} s; hint: raise image_build_timeout, its console is {console}"
    )]
    Deadline { seconds: u64, console: String },
    #[error("cannot open the generation's disk")]
    OpenDisk(#[source] std::io::Error),
    #[error("no worker came up from the new generation")]
    Smoke(#[source] MachineError),
    #[error("a build task failed")]
    Task(#[source] tokio::task::JoinError),
}

/// Finds or makes the generation of the pool's configuration; `None` where the pool boots nothing.
pub async fn obtain(
    host: &Arc<Host>,
    mut closing: watch::Receiver<bool>,
) -> Result<Option<Current>, BuildError> {
    let Some(machines) = host.machines() else {
        return Ok(None);
    };
    let spec = host.spec();
    let image = local_image(spec, machines, &mut closing).await?;
    let inputs = Arc::new(inputs(spec, machines, &image)?);
    let key = {
        let (host, inputs) = (Arc::clone(host), Arc::clone(&inputs));
        blocking(move || {
            let machines = host.machines().ok_or(BuildError::Closing)?;
            Ok(inputs.key(&machines.store)?)
        })
        .await?
    };
    let generation = match machines.store.find(&key)? {
        Some(generation) => generation,
        None => {
            let lock = turn(machines, &mut closing).await?;
            // Whoever had the turn before may have built just this.
            match machines.store.find(&key)? {
                Some(generation) => generation,
                None => build(host, machines, lock, &inputs, &mut closing).await?,
            }
        }
    };
    let base = generation.open_disk()?;
    let mut current = Current {
        generation,
        base: Arc::new(base),
    };
    if !current.generation.tested {
        smoke_test(spec, machines, &current, &mut closing).await?;
        machines.store.mark_tested(&current.generation)?;
        current.generation.tested = true;
    }
    tracing::info!(generation = %current.generation.key, "image is ready");
    for warning in &current.generation.warnings {
        tracing::warn!("prebuild: {warning}");
    }
    let (host, key) = (Arc::clone(host), current.generation.key.clone());
    tokio::task::spawn_blocking(move || tidy(&host, &key));
    Ok(Some(current))
}

/// Removes generations that nobody uses, unless somebody builds just now: then the next one does.
fn tidy(host: &Host, key: &GenerationKey) {
    let Some(machines) = host.machines() else {
        return;
    };
    let removed = match machines.store.try_build_lock() {
        Ok(Some(lock)) => machines.store.collect_garbage(&lock, key),
        Ok(None) => return,
        Err(e) => Err(e),
    };
    match removed {
        Ok(names) if names.is_empty() => {}
        Ok(names) => tracing::info!("removed what no machine uses: {}", names.join(", ")),
        Err(e) => tracing::warn!("tidy the image store: {}", chain(&e)),
    }
}

/// Puts a plan's progress into the log: each stage once, and a long one every few seconds.
#[derive(Default)]
struct ProgressTeller {
    last: std::cell::Cell<Option<Instant>>,
}

impl ProgressTeller {
    fn tell(&self, progress: BuildProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        match progress {
            BuildProgress::Converting {
                done_bytes,
                total_bytes,
            } => {
                let due = self.last.get().is_none_or(|at| at.elapsed() >= EVERY);
                if due || done_bytes == total_bytes {
                    self.last.set(Some(Instant::now()));
                    let (done, total) = (done_bytes >> 20, total_bytes >> 20);
                    tracing::info!("image: {done} of {total} MiB converted");
                }
            }
            BuildProgress::Extracting => tracing::info!("image: reading kernel and initrd"),
            BuildProgress::Seeding => tracing::info!("image: writing the seed volume"),
        }
    }
}

/// The vendor's image as a verified local file.
async fn local_image(
    spec: &PoolSpec,
    machines: &Machines,
    closing: &mut watch::Receiver<bool>,
) -> Result<LocalImage, BuildError> {
    let teller = DownloadTeller::default();
    let tell = |progress| teller.tell(progress);
    let image = tokio::select! {
        image = image::obtain(&spec.image, &machines.store, &tell) => image?,
        () = machine::asked(closing) => return Err(BuildError::Closing),
    };
    if let Some(reason) = &image.outdated {
        tracing::warn!("going on with the last verified image: {}", chain(reason));
    }
    Ok(image)
}

/// Puts a download's progress into the log: each stage once, and a long one every few seconds.
#[derive(Default)]
struct DownloadTeller {
    last: std::sync::Mutex<Option<Instant>>,
}

impl DownloadTeller {
    fn tell(&self, progress: SourceProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        match progress {
            SourceProgress::Looking => tracing::info!("image: asking what there is"),
            SourceProgress::Verifying => tracing::info!("image: verifying"),
            SourceProgress::Downloading {
                done_bytes,
                total_bytes,
            } => {
                let Ok(mut last) = self.last.lock() else {
                    return;
                };
                if last.is_some_and(|at| at.elapsed() < EVERY) {
                    return;
                }
                *last = Some(Instant::now());
                let done = done_bytes >> 20;
                match total_bytes {
                    Some(total) => {
                        tracing::info!("image: {done} of {} MiB downloaded", total >> 20);
                    }
                    None => tracing::info!("image: {done} MiB downloaded"),
                }
            }
        }
    }
}

fn inputs(
    spec: &PoolSpec,
    machines: &Machines,
    image: &LocalImage,
) -> Result<BuildInputs, BuildError> {
    let password = match &spec.login.fixed {
        Some(FixedCredential::Password(password)) => Some(password.clone()),
        _ => None,
    };
    Ok(BuildInputs {
        image: image.path.clone(),
        disk_gib: spec.disk_gib,
        username: spec.login.username.clone(),
        password,
        extra_commands: spec.extra_commands.clone(),
        on_command_error: spec.on_command_error,
        runner: spec.runner.clone(),
        agent: Arc::clone(&machines.agent),
        agent_protocol: agent::PROTOCOL,
    })
}

/// Waits for this process's turn to build.
async fn turn(
    machines: &Machines,
    closing: &mut watch::Receiver<bool>,
) -> Result<BuildLock, BuildError> {
    let mut told: Option<Instant> = None;
    loop {
        if let Some(lock) = machines.store.try_build_lock()? {
            return Ok(lock);
        }
        if told.is_none_or(|at| at.elapsed() > TELL) {
            tracing::info!(
                "another process of this host builds an image; waiting for its turn to end"
            );
            told = Some(Instant::now());
        }
        pause(QUEUE_POLL, closing).await?;
    }
}

async fn pause(time: Duration, closing: &mut watch::Receiver<bool>) -> Result<(), BuildError> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = machine::asked(closing) => Err(BuildError::Closing),
    }
}

async fn build(
    host: &Arc<Host>,
    machines: &Machines,
    lock: BuildLock,
    inputs: &Arc<BuildInputs>,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    let slot = build_slot(machines, closing).await?;
    let built = build_in(host, machines, lock, inputs, &slot, closing).await;
    // Its TAP and numbers are free for other builders again.
    if let Some(net) = machines.net.lock().await.as_mut()
        && let Err(e) = net.retire(slot).await
    {
        tracing::warn!("close the prebuild's slot: {}", chain(&e));
    }
    built
}

/// Slot 0 belongs to whoever builds, also where two processes have stores of their own.
async fn build_slot(
    machines: &Machines,
    closing: &mut watch::Receiver<bool>,
) -> Result<Slot, BuildError> {
    let mut told: Option<Instant> = None;
    loop {
        let acquired = match machines.net.lock().await.as_mut() {
            Some(net) => net.acquire(SlotRole::Build).await,
            None => return Err(BuildError::Closing),
        };
        match acquired {
            Ok(slot) => return Ok(slot),
            Err(NetError::BuildSlotTaken) => {}
            Err(e) => return Err(BuildError::Slot(e)),
        }
        if told.is_none_or(|at| at.elapsed() > TELL) {
            tracing::info!("another process of this host uses fleetingd0; waiting for it");
            told = Some(Instant::now());
        }
        pause(QUEUE_POLL, closing).await?;
    }
}

async fn build_in(
    host: &Arc<Host>,
    machines: &Machines,
    lock: BuildLock,
    inputs: &Arc<BuildInputs>,
    slot: &Slot,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    let net = SeedNet {
        address: slot.guest_address(),
        prefix_len: slot.prefix_len(),
        gateway: slot.host_address(),
        mac: slot.guest_mac(),
        mtu: machines.uplink.mtu,
        dns: machines.dns(),
    };
    let (lock, plan) = {
        let (host, inputs) = (Arc::clone(host), Arc::clone(inputs));
        blocking(move || {
            let machines = host.machines().ok_or(BuildError::Closing)?;
            let teller = ProgressTeller::default();
            let tell = |progress| teller.tell(progress);
            let plan = machines.store.plan(&lock, &inputs, &net, &tell)?;
            Ok((lock, plan))
        })
        .await?
    };
    run_prebuild(host.spec(), machines, &plan, slot, closing).await?;
    let host = Arc::clone(host);
    blocking(move || {
        let machines = host.machines().ok_or(BuildError::Closing)?;
        let unpack =
            |bzimage: &[u8]| vmm::boot::decompress_kernel(bzimage).map_err(std::io::Error::other);
        Ok(machines.store.seal(&lock, plan, &unpack)?)
    })
    .await
}

async fn run_prebuild(
    spec: &PoolSpec,
    machines: &Machines,
    plan: &BuildPlan,
    slot: &Slot,
    closing: &mut watch::Receiver<bool>,
) -> Result<(), BuildError> {
    let console = machines.store.console_path(PREBUILD).display().to_string();
    let vm_spec = prebuild_spec(spec, machines, plan, slot)?;
    let vm = Vm::start(vm_spec).await.map_err(BuildError::Start)?;
    let began = Instant::now();
    let end = loop {
        tokio::select! {
            end = vm.ended() => break Ok(end),
            () = machine::asked(closing) => break Err(BuildError::Closing),
            () = tokio::time::sleep_until((began + spec.build_timeout).into()) => {
                break Err(BuildError::Deadline {
                    seconds: spec.build_timeout.as_secs(),
                    console: console.clone(),
                });
            }
            () = tokio::time::sleep(TELL) => {
                let line = last_line(&vm.console_tail(512));
                tracing::info!(seconds = began.elapsed().as_secs(), "prebuild is running: {line}");
            }
        }
    };
    let tail = vm.console_tail(CONSOLE_TAIL_BYTES);
    vm.kill().await;
    let failure = match end {
        Ok(VmEnd::PowerOff) => {
            tracing::info!(
                seconds = began.elapsed().as_secs(),
                "prebuild has powered off"
            );
            return Ok(());
        }
        Ok(end) => BuildError::Ended { end, console },
        Err(error) => error,
    };
    if !matches!(failure, BuildError::Closing) {
        tracing::error!("last console lines of the prebuild:\n{}", tail.trim_end());
    }
    Err(failure)
}

/// The last line with something on it, without what a terminal would swallow.
fn last_line(tail: &str) -> String {
    let line = tail
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn prebuild_spec(
    spec: &PoolSpec,
    machines: &Machines,
    plan: &BuildPlan,
    slot: &Slot,
) -> Result<VmSpec, BuildError> {
    let open = |path: &std::path::Path, write: bool| {
        File::options()
            .read(true)
            .write(write)
            .open(path)
            .map(Arc::new)
            .map_err(BuildError::OpenDisk)
    };
    Ok(VmSpec {
        name: format!("vm{}", slot.number()),
        vcpus: spec.shape.vcpus,
        memory_mib: spec.shape.memory_mib.max(PREBUILD_MIN_MIB),
        kernel: KernelSource::Path(plan.kernel.clone()),
        initrd: plan.initrd.clone(),
        cmdline: format!("{CMDLINE} root={}", plan.root),
        disks: vec![
            DiskSpec {
                source: DiskSource::Direct(open(&plan.disk, true)?),
                serial: "root".to_owned(),
                durable: true,
            },
            DiskSpec {
                source: DiskSource::ReadOnly(open(&plan.seed, false)?),
                serial: "seed".to_owned(),
                durable: false,
            },
        ],
        net: Some(NetSpec {
            tap: slot.tap().map_err(BuildError::OpenDisk)?,
            mac: slot.guest_mac(),
            mtu: machines.uplink.mtu,
            link_up: true,
            vhost: true,
        }),
        console: Some(machines.store.create_console(PREBUILD)?),
        agent_channel: false,
    })
}

/// A worker must come up from the generation before anybody depends on it.
async fn smoke_test(
    spec: &PoolSpec,
    machines: &Machines,
    current: &Current,
    closing: &mut watch::Receiver<bool>,
) -> Result<(), BuildError> {
    tracing::info!(generation = %current.generation.key, "starting a machine to test the image");
    let (stop, mut stopped) = watch::channel(false);
    let stop = Arc::new(stop);
    let mut came_up = false;
    let ready = {
        let (stop, came_up) = (Arc::clone(&stop), &mut came_up);
        move |_info| {
            *came_up = true;
            stop.send_replace(true);
        }
    };
    let within = spec.boot_timeout;
    let view = MachineView::default();
    let start = machine::Start {
        id: SMOKE,
        within,
        view: &view,
    };
    let served = machine::serve(spec, machines, current, start, &mut stopped, ready);
    let result = {
        let mut served = std::pin::pin!(served);
        tokio::select! {
            result = &mut served => result,
            () = machine::asked(closing) => {
                stop.send_replace(true);
                // Let it give back what it holds.
                served.await
            }
        }
    };
    match result {
        _ if came_up => Ok(()),
        Err(MachineError::Stopped) | Ok(()) => Err(BuildError::Closing),
        Err(error) => Err(BuildError::Smoke(error)),
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(BuildError::Task)?
}

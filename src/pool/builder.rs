//! Builds a generation in a prebuild VM and proves it by a worker.
//!
//! ```text
//!  plan (raw disk, kernel, seed) ─> fleetingd0 runs ─> powered off ─> sealed     a worker came up
//! ```
//!
//! Each step gives up at once when the pool closes, and a crash leaves nothing but a temporary
//! folder that a later build removes. When to build, and what to do with the result, is
//! [`super::refresh`]'s.

use std::cell::Cell;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::host::{Host, Machines};
use super::machine::{self, MachineError};
use super::spec::{FixedCredential, PoolSpec};
use super::status::ImageReport;
use super::view::MachineView;
use super::vm::{Vm, VmStartError};
use crate::agent;
use crate::chain::chain;
use crate::image::registry::RegistryError;
use crate::image::{
    BuildInputs, BuildLock, BuildPlan, BuildProgress, Generation, ImageError, SeedNet, SourceError,
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
    #[error("no newer image could be had, the last verified one goes on")]
    Outdated(#[source] SourceError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
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
    #[error("cannot show the prebuild's console")]
    Console(#[source] std::io::Error),
    #[error("cannot open the generation's disk")]
    OpenDisk(#[source] std::io::Error),
    #[error("no worker came up from the new generation")]
    Smoke(#[source] MachineError),
    #[error("machines of {generation} have another login or agent than this configuration")]
    OtherLogin { generation: String },
    #[error("a build task failed")]
    Task(#[source] tokio::task::JoinError),
}

/// Puts a plan's progress into the log: each stage once, and a long one every few seconds.
struct ProgressTeller<'a> {
    report: &'a ImageReport,
    last: Cell<Option<Instant>>,
}

impl ProgressTeller<'_> {
    fn tell(&self, progress: BuildProgress) {
        const EVERY: Duration = Duration::from_secs(5);
        match progress {
            BuildProgress::Converting {
                done_bytes,
                total_bytes,
            } => {
                if self.last.get().is_none() {
                    self.report.enter("converting");
                }
                let due = self.last.get().is_none_or(|at| at.elapsed() >= EVERY);
                if due || done_bytes == total_bytes {
                    self.last.set(Some(Instant::now()));
                    let (done, total) = (done_bytes >> 20, total_bytes >> 20);
                    self.report.detail(format!("{done} of {total} MiB"));
                    tracing::info!("image: {done} of {total} MiB converted");
                }
            }
            BuildProgress::Extracting => {
                self.report.enter("extracting");
                tracing::info!("image: reading kernel and initrd");
            }
            BuildProgress::Seeding => {
                self.report.enter("seeding");
                tracing::info!("image: writing the seed volume");
            }
        }
    }
}

/// What the configuration asks for, before its image is a local file; `None` where machines need
/// none.
pub fn inputs(host: &Host) -> Option<BuildInputs> {
    let (spec, agent) = (host.spec(), host.agent()?);
    let password = match &spec.login.fixed {
        Some(FixedCredential::Password(password)) => Some(password.clone()),
        _ => None,
    };
    Some(BuildInputs {
        setting: spec.image.image.to_string(),
        image: PathBuf::new(),
        disk_gib: spec.disk_gib,
        username: spec.login.username.clone(),
        password,
        extra_commands: spec.extra_commands.clone(),
        on_command_error: spec.on_command_error,
        runner: spec.runner.clone(),
        agent,
        agent_protocol: agent::PROTOCOL,
    })
}

/// Waits for this process's turn to build.
pub async fn turn(
    host: &Host,
    closing: &mut watch::Receiver<bool>,
) -> Result<BuildLock, BuildError> {
    let store = host.store().ok_or(BuildError::Closing)?;
    let mut told: Option<Instant> = None;
    loop {
        if let Some(lock) = store.try_build_lock()? {
            return Ok(lock);
        }
        if told.is_none() {
            host.image.enter("waiting for its turn");
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

/// Builds a generation; nobody has come up from it yet.
pub async fn build(
    host: &Arc<Host>,
    lock: BuildLock,
    inputs: &Arc<BuildInputs>,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    host.counters.image("built");
    let Some(machines) = host.machines() else {
        #[cfg(feature = "test-vmm")]
        return super::fake::build(host, &lock, inputs);
        #[cfg(not(feature = "test-vmm"))]
        return Err(BuildError::Closing);
    };
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
            let teller = ProgressTeller {
                report: &host.image,
                last: Cell::default(),
            };
            let tell = |progress| teller.tell(progress);
            let plan = machines.store.plan(&lock, &inputs, &net, &tell)?;
            Ok((lock, plan))
        })
        .await?
    };
    host.image.enter("prebuild");
    run_prebuild(host, machines, &plan, slot, closing).await?;
    host.image.enter("sealing");
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
    host: &Host,
    machines: &Machines,
    plan: &BuildPlan,
    slot: &Slot,
    closing: &mut watch::Receiver<bool>,
) -> Result<(), BuildError> {
    let spec = host.spec();
    let console = machines.store.console_path(PREBUILD).display().to_string();
    let mut vm_spec = prebuild_spec(spec, machines, plan, slot)?;
    let onlooker = host.onlooker.as_deref();
    if let (Some(onlooker), Some(log)) = (onlooker, vm_spec.console.take()) {
        vm_spec.console = Some(onlooker.console(log).map_err(BuildError::Console)?);
    }
    let vm = Vm::start(vm_spec).await.map_err(BuildError::Start)?;
    if let Some(onlooker) = onlooker {
        onlooker.started(&vm.handle());
    }
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
                host.image.detail(line.clone());
                tracing::info!(seconds = began.elapsed().as_secs(), "prebuild is running: {line}");
            }
        }
    };
    let tail = vm.console_tail(CONSOLE_TAIL_BYTES);
    vm.kill().await;
    if let Some(onlooker) = onlooker {
        onlooker.ended();
    }
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
        golden: false,
    })
}

/// A worker must come up from the generation before anybody depends on it.
pub async fn smoke_test(
    host: &Host,
    current: &Current,
    closing: &mut watch::Receiver<bool>,
) -> Result<(), BuildError> {
    let Some(machines) = host.machines() else {
        #[cfg(feature = "test-vmm")]
        return super::fake::smoke_test(host);
        #[cfg(not(feature = "test-vmm"))]
        return Err(BuildError::Closing);
    };
    let spec = host.spec();
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
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(BuildError::Task)?
}

//! One machine's task: takes what it needs of the host in order, and gives all of it back.
//!
//! ```text
//!  slot ─> keys ─> VM ─> hello ─> identify ─> link up ─> ready ─> SSH login ─> Running ─> ended
//! ```
//!
//! It ends in one of three ways: asked to stop, the VM ended by itself, or the start failed. In
//! each the VM is gone and the slot is back before the function returns.

use std::fs::File;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::builder::Current;
use super::counters::COLD;
use super::host::{Host, Machines, delta_dir};
use super::keys::{self, KeyError, KeyPair};
use super::limits::{self, LimitSources};
use super::spec::{ConnectInfo, FixedCredential, PoolSpec};
use super::ssh::{Credential, SshError, SshSession, SshTarget};
use super::view::MachineView;
use super::vm::{Vm, VmStartError};
use crate::agent::{AgentError, AgentLink, Identity};
use crate::chain::chain;
use crate::image::ImageError;
use crate::net::{NetError, Slot, SlotRole};
use crate::vmm::{DiskSource, DiskSpec, KernelSource, NetSpec, VmEnd, VmSpec};

/// Kernel command line of workers: quiet, as every byte of an early console is an exit; a panic
/// resets at once, and the console tells it from a reboot.
const CMDLINE: &str = "console=hvc0 quiet clocksource=kvm-clock reboot=a panic=-1 \
     random.trust_cpu=on systemd.show_status=false cloud-init=disabled rw";
const SSH_PORT: u16 = 22;
/// Lines of a failed machine's console that go to the log.
const CONSOLE_TAIL_BYTES: usize = 2048;
/// Consoles of workers that stay for a look afterwards.
const KEPT_CONSOLES: usize = 100;
/// Between two tries to log in: sshd has shown its banner, so the first one works as a rule.
const LOGIN_PAUSE: Duration = Duration::from_millis(50);

/// Why a machine did not come up.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("no slot")]
    Slot(#[source] NetError),
    #[error("the pool is closing")]
    Closing,
    #[error("no keys")]
    Keys(#[source] KeyError),
    #[error("cannot use the generation's disk")]
    Disk(#[source] std::io::Error),
    #[error("cannot keep the console")]
    Console(#[source] ImageError),
    #[error("cannot start the VM")]
    Start(#[source] VmStartError),
    #[error("no agent channel")]
    NoChannel(#[source] std::io::Error),
    #[error("agent")]
    Agent(#[source] AgentError),
    #[error("cannot raise the link")]
    Link,
    #[error("not reachable")]
    Ssh(#[source] SshError),
    #[error("a command over SSH ended with {status:?}")]
    Command { status: Option<u32> },
    #[error("{end}")]
    Ended { end: VmEnd },
    #[error("not up after {seconds} s, while {phase}")]
    Deadline { seconds: u64, phase: &'static str },
    #[error("stopped")]
    Stopped,
}

impl MachineError {
    /// The reason in one word, for counters.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Slot(_) => "slot",
            Self::Closing | Self::Stopped => "stopped",
            Self::Keys(_) => "keys",
            Self::Disk(_) => "disk",
            Self::Console(_) => "console",
            Self::Start(_) => "vm_start",
            Self::NoChannel(_) | Self::Agent(_) => "agent",
            Self::Link => "link",
            Self::Ssh(_) | Self::Command { .. } => "ssh",
            Self::Deadline { .. } => "deadline",
            Self::Ended { end } => match end {
                VmEnd::PowerOff => "power_off",
                VmEnd::Reboot => "reboot",
                VmEnd::TripleFault => "triple_fault",
                VmEnd::Panic { .. } => "panic",
                VmEnd::Killed => "killed",
                VmEnd::Internal { .. } => "kvm",
                VmEnd::HostFault { .. } => "host_fault",
            },
        }
    }
}

/// One start: whose, how long it may take, and where it shows itself.
#[derive(Debug, Clone, Copy)]
pub struct Start<'a> {
    pub id: &'a str,
    pub within: Duration,
    pub view: &'a MachineView,
}

/// Runs a machine to its end; returns when everything it held is released. `ready` is called
/// once, when it answers over SSH with what `ConnectInfo` says.
pub async fn run(
    host: &Host,
    current: Option<&Current>,
    start: Start<'_>,
    mut stop: watch::Receiver<bool>,
    ready: impl FnOnce(ConnectInfo) + Send,
) {
    let id = start.id;
    let mut came_up = false;
    let ready = |info| {
        came_up = true;
        host.counters.boot(COLD, &start.view.times());
        ready(info);
    };
    let result = match (host.machines(), current) {
        (Some(machines), Some(current)) => {
            serve(host.spec(), machines, current, start, &mut stop, ready).await
        }
        #[cfg(feature = "test-vmm")]
        (None, _) => fake(host.spec(), start, &mut stop, ready).await,
        _ => Err(MachineError::Closing),
    };
    match (&result, came_up) {
        (Err(error), true) => host.counters.end(error.reason()),
        // Taken back before it was there: no failure.
        (Ok(()) | Err(MachineError::Stopped), false) => {}
        (Err(error), false) => host.counters.failure(error.reason()),
        (Ok(()), true) => host.counters.end("stopped"),
    }
    match result {
        Ok(()) | Err(MachineError::Stopped) => {
            tracing::info!(instance = %id, "machine is gone");
        }
        Err(MachineError::Ended { end }) => tracing::warn!(instance = %id, "machine ended: {end}"),
        Err(error) => tracing::warn!(instance = %id, "machine failed: {}", chain(&error)),
    }
}

/// One machine from its slot to its end.
pub async fn serve(
    spec: &PoolSpec,
    machines: &Machines,
    current: &Current,
    start: Start<'_>,
    stop: &mut watch::Receiver<bool>,
    ready: impl FnOnce(ConnectInfo) + Send,
) -> Result<(), MachineError> {
    let Start { id, within, view } = start;
    let slot = match machines.net.lock().await.as_mut() {
        Some(net) => net
            .acquire(SlotRole::Worker)
            .await
            .map_err(MachineError::Slot)?,
        None => return Err(MachineError::Closing),
    };
    let started = Instant::now();
    let host_mib = limits::meminfo_mib(&LimitSources::default().proc, "MemTotal:").unwrap_or(0);
    let promise = machines.promise(spec.shape.memory_mib, host_mib, spec.memory_overcommit);
    view.enter("vm");
    view.has_address(slot.guest_address());
    let result = match start_vm(spec, machines, current, id, &slot).await {
        Err(error) => Err(error),
        Ok(vm) => {
            view.has_vm(vm.handle());
            let up = tokio::select! {
                up = bring_up(spec, machines, &vm, id, &slot, view) => up,
                end = vm.ended() => Err(MachineError::Ended { end }),
                () = asked(stop) => Err(MachineError::Stopped),
                () = tokio::time::sleep(within) => Err(MachineError::Deadline {
                    seconds: within.as_secs(),
                    phase: doing(view.phase()),
                }),
            };
            let result = match up {
                Ok((info, link)) => {
                    view.enter("running");
                    tracing::info!(instance = %id, ms = millis(started), address = %info.address, "machine is running");
                    ready(info);
                    let end = tokio::select! {
                        end = vm.ended() => Err(MachineError::Ended { end }),
                        () = asked(stop) => Err(MachineError::Stopped),
                    };
                    drop(link);
                    end
                }
                Err(error) => {
                    log_console(id, &error, &vm);
                    Err(error)
                }
            };
            match (result, vm.kill().await) {
                // Its channel closes before its end is known: the end says more than that.
                (Err(MachineError::Agent(_) | MachineError::Ssh(_) | MachineError::Link), end)
                    if !matches!(end, VmEnd::Killed) =>
                {
                    Err(MachineError::Ended { end })
                }
                (result, _killed) => result,
            }
        }
    };
    drop(promise);
    view.enter("release");
    machines.release(slot).await;
    result
}

/// A phase as a sentence has it.
fn doing(phase: &str) -> &'static str {
    match phase {
        "hello" => "waiting for its agent's hello",
        "identify" => "applying its identity",
        "sshd" => "waiting for its link and sshd",
        "login" => "logging in over SSH",
        _ => "starting",
    }
}

/// Returns when a stop is asked for, or nobody is left who could.
pub async fn asked(stop: &mut watch::Receiver<bool>) {
    let _nobody_left = stop.wait_for(|stop| *stop).await;
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn log_console(id: &str, error: &MachineError, vm: &Vm) {
    if matches!(error, MachineError::Stopped) {
        return;
    }
    let tail = vm.console_tail(CONSOLE_TAIL_BYTES);
    if !tail.trim().is_empty() {
        tracing::warn!(instance = %id, "last console lines:\n{}", tail.trim_end());
    }
}

async fn start_vm(
    spec: &PoolSpec,
    machines: &Machines,
    current: &Current,
    id: &str,
    slot: &Slot,
) -> Result<Vm, MachineError> {
    let console = match spec.keep_consoles {
        true => Some(console_file(machines, id)?),
        false => None,
    };
    let generation = &current.generation;
    let vm_spec = VmSpec {
        name: format!("vm{}", slot.number()),
        vcpus: spec.shape.vcpus,
        memory_mib: spec.shape.memory_mib,
        kernel: KernelSource::Path(generation.kernel.clone()),
        initrd: generation.initrd.clone(),
        cmdline: format!("{CMDLINE} root={}", generation.root),
        disks: vec![DiskSpec {
            source: DiskSource::Overlay {
                base: Arc::clone(&current.base),
                delta_dir: delta_dir(spec),
            },
            serial: "root".to_owned(),
            durable: false,
        }],
        net: Some(NetSpec {
            tap: slot.tap().map_err(MachineError::Disk)?,
            mac: slot.guest_mac(),
            mtu: machines.uplink.mtu,
            link_up: false,
            vhost: true,
        }),
        console,
        agent_channel: true,
        golden: false,
    };
    Vm::start(vm_spec).await.map_err(MachineError::Start)
}

fn console_file(machines: &Machines, id: &str) -> Result<File, MachineError> {
    let store = &machines.store;
    let group = id.rsplit_once('-').map_or(id, |(group, _digits)| group);
    if let Err(e) = store.prune_consoles(group, KEPT_CONSOLES) {
        tracing::warn!("tidy old consoles: {}", chain(&e));
    }
    store.create_console(id).map_err(MachineError::Console)
}

/// From hello to a login with the credentials of ConnectInfo. The link is returned because the
/// guest sees its channel close when it is dropped.
async fn bring_up(
    spec: &PoolSpec,
    machines: &Machines,
    vm: &Vm,
    id: &str,
    slot: &Slot,
    view: &MachineView,
) -> Result<(ConnectInfo, AgentLink), MachineError> {
    let host_key = KeyPair::random(spec.ssh_key_type).map_err(MachineError::Keys)?;
    let (login, authorized_key, info) = credentials(spec, machines, slot)?;
    let mut link = vm.agent().map_err(MachineError::NoChannel)?;
    view.enter("hello");
    link.hello().await.map_err(MachineError::Agent)?;
    view.enter("identify");
    let identity = identity(spec, machines, slot, id, &host_key, authorized_key);
    link.identify(identity).await.map_err(MachineError::Agent)?;
    vm.set_link(true)
        .await
        .map_err(|_gone| MachineError::Link)?;
    view.enter("sshd");
    let ready = link.ready().await.map_err(MachineError::Agent)?;
    tracing::debug!(instance = %id, uptime_ms = ready.uptime_ms, phases = ?ready.phases_ms, "agent is ready");
    view.enter("login");
    let target = SshTarget {
        address: SocketAddr::from((info.address, SSH_PORT)),
        username: info.username.clone(),
        credential: login,
        host_key: Some(host_key.public_line.clone()),
    };
    prove_login(&target).await?;
    Ok((info, link))
}

/// One real login and command. A refused connection is tried again: sshd may be starting still.
async fn prove_login(target: &SshTarget) -> Result<(), MachineError> {
    let mut session = loop {
        match SshSession::open(target).await {
            Ok(session) => break session,
            Err(SshError::Session { .. }) => tokio::time::sleep(LOGIN_PAUSE).await,
            Err(error) => return Err(MachineError::Ssh(error)),
        }
    };
    let output = session.run("true").await.map_err(MachineError::Ssh)?;
    session.close().await;
    match output.status {
        Some(0) => Ok(()),
        status => Err(MachineError::Command { status }),
    }
}

fn credentials(
    spec: &PoolSpec,
    machines: &Machines,
    slot: &Slot,
) -> Result<(Credential, Option<String>, ConnectInfo), MachineError> {
    let mut info = ConnectInfo {
        address: slot.guest_address(),
        username: spec.login.username.clone(),
        key: None,
        password: None,
    };
    if let Some(FixedCredential::Password(password)) = &spec.login.fixed {
        info.password = Some(password.clone());
        return Ok((Credential::Password(password.clone()), None, info));
    }
    let key = match &machines.fixed_key {
        Some(key) => key.clone(),
        None => KeyPair::random(spec.ssh_key_type).map_err(MachineError::Keys)?,
    };
    info.key = Some(match &spec.login.fixed {
        Some(FixedCredential::Key(pem)) => pem.clone(),
        _ => key.private_pem.clone(),
    });
    Ok((Credential::Key(key.private), Some(key.public_line), info))
}

fn identity(
    spec: &PoolSpec,
    machines: &Machines,
    slot: &Slot,
    id: &str,
    host_key: &KeyPair,
    authorized_key: Option<String>,
) -> Identity {
    let wall_clock_ns = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_nanos()).ok())
        .unwrap_or(0);
    Identity {
        address: slot.guest_address(),
        prefix_len: slot.prefix_len(),
        gateway: slot.host_address(),
        gateway_mac: slot.host_mac(),
        mac: slot.guest_mac(),
        mtu: machines.uplink.mtu,
        dns: machines.dns(),
        hostname: id.to_owned(),
        machine_id: keys::machine_id(),
        username: spec.login.username.clone(),
        authorized_key,
        ssh_host_key: host_key.private_pem.clone(),
        ssh_host_key_name: spec.ssh_key_type.host_key_name().to_owned(),
        entropy: keys::entropy(),
        wall_clock_ns,
        units: Vec::new(),
    }
}

/// A machine that is none: Running after a pause, until it is asked to go.
#[cfg(feature = "test-vmm")]
async fn fake(
    spec: &PoolSpec,
    start: Start<'_>,
    stop: &mut watch::Receiver<bool>,
    ready: impl FnOnce(ConnectInfo),
) -> Result<(), MachineError> {
    let super::VmmKind::Fake { boot } = spec.vmm else {
        return Err(MachineError::Closing);
    };
    start.view.enter("vm");
    tokio::select! {
        () = tokio::time::sleep(boot) => {}
        () = asked(stop) => return Err(MachineError::Stopped),
    }
    let key = KeyPair::random(spec.ssh_key_type).map_err(MachineError::Keys)?;
    // TEST-NET-1: nobody is there (RFC 5737).
    let address = std::net::Ipv4Addr::new(192, 0, 2, 1);
    start.view.has_address(address);
    start.view.enter("running");
    ready(ConnectInfo {
        address,
        username: spec.login.username.clone(),
        key: Some(key.private_pem),
        password: None,
    });
    asked(stop).await;
    Err(MachineError::Stopped)
}

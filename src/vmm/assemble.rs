//! The devices of a VM: made from its spec, put into their slots, wired to interrupts and workers.
//!
//! Slots are fixed by kind, so that a guest's network card has the same name however many disks
//! there are: net 1, console 2, balloon 3, entropy 4, disks from 5.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use kvm_ioctls::VmFd;

use super::delta;
use super::error::StartError;
use super::irq::IrqRouter;
use super::layout;
use super::pci::{Bus, DriverReady, VirtioFunction};
use super::platform::{Events, Platform};
use super::spec::{AGENT_PORT, BootPhase, DiskSource, DiskSpec, NetSpec, VmEnd};
use super::timeline::Timeline;
use super::vcpu::Ending;
use crate::chain::chain;
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, BlockSpec, Disk, Golden, Overlay};
use crate::devices::console::{Console, ConsoleConfig, ConsoleSink};
use crate::devices::entropy::Entropy;
use crate::devices::net::{Net, NetConfig};
use crate::devices::transport::Transport;
use crate::devices::uart::Uart;
use crate::devices::worker::{OnHostFault, Worker};
use crate::devices::{GuestMemory, HostFault, VirtioDevice, WorkerThread};

const NET_SLOT: u8 = 1;
const CONSOLE_SLOT: u8 = 2;
const BALLOON_SLOT: u8 = 3;
const ENTROPY_SLOT: u8 = 4;
const FIRST_DISK_SLOT: u8 = 5;
/// A bus has 32 slots.
pub(super) const MAX_DISKS: usize = 27;
/// A balloon counts pages of 4 KiB (virtio 1.2, 5.5.6).
const PAGES_PER_MIB: u32 = 256;

/// What devices are wired to.
pub(super) struct Wiring<'a> {
    pub name: &'a str,
    pub vm: &'a Arc<VmFd>,
    pub memory: &'a GuestMemory,
    pub ending: &'a Arc<Ending>,
    pub timeline: &'a Arc<Timeline>,
    pub sink: &'a ConsoleSink,
}

/// What the devices are made from.
pub(super) struct Parts {
    pub memory_mib: u32,
    pub net: Option<NetSpec>,
    pub agent_channel: bool,
    /// Each with the layer of a snapshot that it lies on.
    pub disks: Vec<(DiskSpec, Option<Golden>)>,
}

/// The assembled machine.
pub(super) struct Assembled {
    pub platform: Arc<Platform>,
    pub irqs: Arc<IrqRouter>,
    /// Of each disk in order.
    pub disks: Vec<DiskFile>,
    pub balloon_mib: BalloonMeter,
    /// The host's end of the agent channel.
    pub agent: Option<UnixStream>,
    pub agent_opened: Arc<OnceLock<Instant>>,
}

/// Reads how much the balloon holds.
pub(super) type BalloonMeter = Box<dyn Fn() -> u32 + Send>;

/// Where a disk's changes go.
pub(super) enum DiskFile {
    InPlace,
    Nowhere,
    Delta(File),
}

impl DiskFile {
    pub(super) fn delta(&self) -> Option<&File> {
        match self {
            Self::Delta(file) => Some(file),
            Self::InPlace | Self::Nowhere => None,
        }
    }
}

/// Bytes that the deltas take on storage.
pub(super) fn delta_bytes(disks: &[DiskFile]) -> u64 {
    let deltas = disks.iter().filter_map(DiskFile::delta);
    let blocks = deltas.filter_map(|delta| delta.metadata().ok());
    blocks.map(|meta| meta.blocks().saturating_mul(512)).sum()
}

/// What a worker or a device calls when the host failed it.
fn on_fault(ending: &Arc<Ending>) -> OnHostFault {
    let ending = Arc::clone(ending);
    Arc::new(move |fault: HostFault| {
        let reason = chain(&fault);
        ending.record(VmEnd::HostFault { reason });
    })
}

/// Builds a VM's devices; nothing runs yet.
pub(super) fn assemble(parts: Parts, wiring: &Wiring<'_>) -> Result<Assembled, StartError> {
    let irqs = IrqRouter::new(Arc::clone(wiring.vm))?;
    let mut builder = Builder {
        wiring,
        irqs: Arc::clone(&irqs),
        on_fault: on_fault(wiring.ending),
        bus: Bus::new(),
        devices_worker: None,
        block_worker: None,
    };
    if let Some(net) = parts.net {
        builder.insert(NET_SLOT, net_device(net)?)?;
    }
    let (agent, device_end) = agent_channel(parts.agent_channel)?;
    let agent_opened = Arc::new(OnceLock::new());
    let console = Console::new(ConsoleConfig {
        sink: wiring.sink.clone(),
        agent: device_end,
        agent_port_name: AGENT_PORT.to_owned(),
        agent_opened: Arc::clone(&agent_opened),
        columns: 0,
        rows: 0,
    });
    let console = console.map_err(device_error("the console"))?;
    builder.insert(CONSOLE_SLOT, Box::new(console))?;
    let balloon = Balloon::new();
    let stats = balloon.stats();
    builder.insert(BALLOON_SLOT, Box::new(balloon))?;
    builder.insert(ENTROPY_SLOT, Box::new(Entropy::new()))?;
    let mut disks = Vec::new();
    for (slot, (disk, golden)) in (FIRST_DISK_SLOT..).zip(parts.disks) {
        let name = format!("{}/disk{}", wiring.name, slot - FIRST_DISK_SLOT);
        let (block, file) = block_device(disk, golden, name)?;
        builder.insert(slot, block)?;
        disks.push(file);
    }
    let uart = Uart::new(wiring.sink.clone(), irqs.pin(layout::COM1_IRQ)?);
    let platform = Platform {
        pci: builder.bus,
        uart: Mutex::new(uart),
        events: Events::new(irqs.pin(layout::GED_IRQ)?),
        ram: layout::ram_ranges(u64::from(parts.memory_mib) << 20),
    };
    Ok(Assembled {
        platform: Arc::new(platform),
        irqs,
        disks,
        balloon_mib: Box::new(move || stats.actual_pages() / PAGES_PER_MIB),
        agent,
        agent_opened,
    })
}

struct Builder<'a> {
    wiring: &'a Wiring<'a>,
    irqs: Arc<IrqRouter>,
    on_fault: OnHostFault,
    bus: Bus,
    devices_worker: Option<Arc<Worker>>,
    block_worker: Option<Arc<Worker>>,
}

impl Builder<'_> {
    /// Puts a device into its slot, with the worker it belongs to.
    fn insert(&mut self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), StartError> {
        let queues = device.queue_sizes().len();
        let kind = device.kind();
        let worker = self.worker(device.thread())?;
        let memory = self.wiring.memory.clone();
        let transport = Transport::new(device, worker, memory, Arc::clone(&self.on_fault));
        let timeline = Arc::clone(self.wiring.timeline);
        let ready: DriverReady = Arc::new(move |_kind| timeline.mark(BootPhase::FirstDriver));
        let vm = self.wiring.vm;
        let function = VirtioFunction::new(slot, transport, queues, vm, &self.irqs, ready)
            .map_err(|source| StartError::Function { kind, source })?;
        Ok(self.bus.insert(function)?)
    }

    /// The worker of a thread, started with its first device.
    fn worker(&mut self, thread: WorkerThread) -> Result<Arc<Worker>, StartError> {
        let (place, suffix) = match thread {
            WorkerThread::Devices => (&mut self.devices_worker, "dev"),
            WorkerThread::Block => (&mut self.block_worker, "blk"),
        };
        if let Some(worker) = place {
            return Ok(Arc::clone(worker));
        }
        let name = format!("{}/{suffix}", self.wiring.name);
        let worker = Worker::spawn(&name, Arc::clone(&self.on_fault))
            .map_err(|source| StartError::Thread { name, source })?;
        Ok(Arc::clone(place.insert(Arc::new(worker))))
    }
}

fn device_error(what: impl Into<String>) -> impl FnOnce(HostFault) -> StartError {
    let what = what.into();
    move |source| StartError::Device { what, source }
}

fn net_device(spec: NetSpec) -> Result<Box<dyn VirtioDevice>, StartError> {
    let net = Net::new(NetConfig {
        tap: spec.tap,
        mac: spec.mac,
        mtu: spec.mtu,
        link_up: spec.link_up,
        vhost: spec.vhost,
    });
    Ok(Box::new(net.map_err(device_error("the network card"))?))
}

fn agent_channel(wanted: bool) -> Result<(Option<UnixStream>, Option<UnixStream>), StartError> {
    if !wanted {
        return Ok((None, None));
    }
    let (host, device) = UnixStream::pair().map_err(StartError::vm("make the agent channel"))?;
    Ok((Some(host), Some(device)))
}

fn block_device(
    spec: DiskSpec,
    golden: Option<Golden>,
    name: String,
) -> Result<(Box<dyn VirtioDevice>, DiskFile), StartError> {
    let (disk, file) = match spec.source {
        DiskSource::Direct(file) => (Disk::Direct(file), DiskFile::InPlace),
        DiskSource::ReadOnly(file) => (Disk::ReadOnly(file), DiskFile::Nowhere),
        DiskSource::Overlay { base, delta_dir } => {
            let delta_error = |source| StartError::Delta {
                dir: delta_dir.clone(),
                source,
            };
            let delta = delta::create(&delta_dir).map_err(delta_error)?;
            let file = DiskFile::Delta(delta.try_clone().map_err(delta_error)?);
            let overlay = Overlay::new(base, golden, delta).map_err(delta_error)?;
            (Disk::Overlay(overlay), file)
        }
    };
    let what = format!("the disk {name}");
    let block = Block::new(BlockSpec {
        disk,
        serial: spec.serial,
        durable: spec.durable,
        name,
    });
    Ok((Box::new(block.map_err(device_error(what))?), file))
}

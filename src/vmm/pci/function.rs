//! One virtio device on the bus (virtio 1.2, 4.1): its configuration space, its BAR, and what
//! the transport needs of a bus.
//!
//! Everything a guest can reach of a function lies behind one lock, taken by vCPU exits and by
//! the VM's supervisor: a register access must be answered within the exit, so a channel will not
//! do. Queue kicks do not come here: KVM turns writes of the notify region into events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::config::{BAR0, COMMAND, COMMAND_MEMORY, Config, Header};
use super::msix::{self, Msix};
use crate::devices::transport::{Transport, Wiring};
use crate::devices::{DeviceCommand, DeviceKind, HostFault, Interrupt};
use crate::vmm::irq::{IrqError, IrqRouter};
use crate::vmm::layout;

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device ids of modern virtio devices start here (virtio 1.2, 4.1.2).
const VIRTIO_DEVICE_BASE: u16 = 0x1040;
/// Capability id "vendor specific" and the types below it (virtio 1.2, 4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_WINDOW: u8 = 5;
/// Distance of the queues' notify registers.
const NOTIFY_STRIDE: u32 = 4;
/// Offsets within the window capability (virtio 1.2, 4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;
/// Interrupt line: a scratch byte for software.
const INTERRUPT_LINE: u16 = 0x3c;

/// What lies where in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Region {
    Common,
    Isr,
    Device,
    Notify,
    Table,
    Pending,
}

/// Offset, length, region.
const REGIONS: [(u32, u32, Region); 6] = [
    (0x0000, 0x0038, Region::Common),
    (0x1000, 0x0004, Region::Isr),
    (0x2000, 0x1000, Region::Device),
    (0x3000, 0x1000, Region::Notify),
    (0x8000, 0x2000, Region::Table),
    (0xc000, 0x1000, Region::Pending),
];

const fn start_of(region: usize) -> u32 {
    #[expect(clippy::indexing_slicing, reason = "evaluated when compiling")]
    REGIONS[region].0
}
const NOTIFY_START: u32 = start_of(3);
const TABLE_START: u32 = start_of(4);
const PENDING_START: u32 = start_of(5);

/// Called when a driver has reached DRIVER_OK.
pub type DriverReady = Arc<dyn Fn(DeviceKind) + Send + Sync>;

/// A function could not be wired up.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    #[error("cannot make an event descriptor")]
    EventFd(#[source] std::io::Error),
    #[error("cannot wire a queue's notifications")]
    IoEvent(#[source] kvm_ioctls::Error),
    #[error(transparent)]
    Interrupt(#[from] IrqError),
}

/// A virtio device in a slot.
pub struct VirtioFunction {
    slot: u8,
    kind: DeviceKind,
    kicks: Vec<Arc<EventFd>>,
    inner: Mutex<Inner>,
    driver_ready: DriverReady,
}

struct Inner {
    config: Config,
    /// Offsets of the capabilities that writes act on.
    msix_at: u16,
    window_at: u16,
    msix: Msix,
    transport: Transport,
}

/// The bus as the transport sees it.
struct Wires<'a> {
    kicks: &'a [Arc<EventFd>],
    msix: &'a Msix,
}

impl Wiring for Wires<'_> {
    fn kick(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.kicks.get(usize::from(queue)).cloned()
    }

    fn interrupt(&self, vector: u16) -> Interrupt {
        self.msix.interrupt(vector)
    }

    fn vectors(&self) -> u16 {
        self.msix.len()
    }
}

impl VirtioFunction {
    /// Wires a device up in `slot`: an event for each of its `queues`, a vector for each and one
    /// for its configuration.
    pub fn new(
        slot: u8,
        transport: Transport,
        queues: usize,
        vm: &VmFd,
        irqs: &Arc<IrqRouter>,
        driver_ready: DriverReady,
    ) -> Result<Arc<Self>, FunctionError> {
        let bar = bar_of(slot);
        let mut kicks = Vec::new();
        let mut address = bar + u64::from(NOTIFY_START);
        for _queue in 0..queues {
            let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(FunctionError::EventFd)?;
            vm.register_ioevent(&kick, &IoEventAddress::Mmio(address), NoDatamatch)
                .map_err(FunctionError::IoEvent)?;
            kicks.push(Arc::new(kick));
            address += u64::from(NOTIFY_STRIDE);
        }
        let lines: Result<Vec<_>, _> = (0..=queues).map(|_vector| irqs.message_line()).collect();
        let msix = Msix::new(lines?);
        let kind = transport.kind();
        let (config, msix_at, window_at) = configuration(kind, bar, msix.len());
        Ok(Arc::new(Self {
            slot,
            kind,
            kicks,
            inner: Mutex::new(Inner {
                config,
                msix_at,
                window_at,
                msix,
                transport,
            }),
            driver_ready,
        }))
    }

    pub fn slot(&self) -> u8 {
        self.slot
    }

    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in between has ended this VM; what is left is only read and released.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of configuration space.
    pub fn read_config(&self, register: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        if touches(register, data.len(), inner.window_at + WINDOW_DATA, 4)
            && let Some((offset, len)) = inner.window()
        {
            // virtio 1.2, 4.1.4.9.1: the read of the window is the read of what it shows.
            let mut bytes = [0; 4];
            if let Some(shown) = bytes.get_mut(..len) {
                inner.read_bar(offset, shown);
            }
            let at = usize::from(inner.window_at + WINDOW_DATA);
            inner.config.put(at, &bytes);
        }
        inner.config.read(register, data);
    }

    /// A write of configuration space.
    pub fn write_config(&self, register: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(register, data);
        let len = data.len();
        if touches(register, len, BAR0, 4) {
            // All ones ask for the size; anything else finds the BAR where it always is.
            let sizing = register == BAR0 && data == [0xff; 4];
            let bar = if sizing {
                !(layout::BAR_SIZE - 1)
            } else {
                bar_of(self.slot)
            };
            inner.config.put(usize::from(BAR0), &low(bar));
        }
        let control_at = inner.msix_at + 2;
        if touches(register, len, control_at, 2) {
            let control = u16::from_le_bytes(inner.config.get(control_at));
            inner.msix.set_control(control);
        }
        if touches(register, len, inner.window_at + WINDOW_DATA, 4)
            && let Some((offset, len)) = inner.window()
        {
            let bytes: [u8; 4] = inner.config.get(inner.window_at + WINDOW_DATA);
            if let Some(shown) = bytes.get(..len) {
                self.write_region(&mut inner, offset, shown);
            }
        }
    }

    /// A read of the BAR.
    pub fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        if inner.decodes() {
            inner.read_bar(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write of the BAR.
    pub fn write_bar(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        if inner.decodes() {
            self.write_region(&mut inner, offset, data);
        }
    }

    fn write_region(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let Some((region, at)) = find(offset) else {
            return;
        };
        match region {
            Region::Common => {
                let ran = inner.transport.is_running();
                let wires = Wires {
                    kicks: &self.kicks,
                    msix: &inner.msix,
                };
                inner.transport.write(at, data, &wires);
                if !ran && inner.transport.is_running() {
                    (self.driver_ready)(self.kind);
                }
            }
            Region::Device => {
                if let Ok(at) = usize::try_from(at) {
                    inner.transport.config().write_by_driver(at, data);
                }
            }
            Region::Notify => {
                // Only what comes through the window: KVM keeps the others.
                let queue = usize::try_from(at / u64::from(NOTIFY_STRIDE));
                if let Some(kick) = queue.ok().and_then(|queue| self.kicks.get(queue)) {
                    let _saturated = kick.write(1);
                }
            }
            Region::Table => inner.msix.write_table(at, data),
            Region::Isr | Region::Pending => {}
        }
    }

    /// Drains the device and takes it back, for a pause.
    pub fn pause(&self) {
        self.lock().transport.pause();
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&self) {
        let inner = &mut *self.lock();
        let wires = Wires {
            kicks: &self.kicks,
            msix: &inner.msix,
        };
        inner.transport.resume(&wires);
    }

    /// Takes the device back for good: afterwards it touches no guest memory.
    pub fn stop(&self) {
        self.lock().transport.reset();
    }

    /// A request of the host to the device.
    pub fn command(&self, command: DeviceCommand) -> Result<(), HostFault> {
        self.lock().transport.command(command)
    }

    /// How often the guest broke the contract with this device.
    pub fn guest_faults(&self) -> u64 {
        self.lock().transport.guest_faults()
    }
}

impl Inner {
    fn decodes(&self) -> bool {
        let [command] = self.config.get(COMMAND);
        command & COMMAND_MEMORY != 0
    }

    /// What the window shows: offset in the BAR and length, if the guest set both right.
    fn window(&self) -> Option<(u64, usize)> {
        let [bar] = self.config.get(self.window_at + WINDOW_BAR);
        let offset = u32::from_le_bytes(self.config.get(self.window_at + WINDOW_OFFSET));
        let length = u32::from_le_bytes(self.config.get(self.window_at + WINDOW_LENGTH));
        let possible = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && bar == 0;
        possible.then_some((u64::from(offset), usize::try_from(length).ok()?))
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((region, at)) = find(offset) else {
            data.fill(0xff);
            return;
        };
        match region {
            Region::Common => self.transport.read(at, data),
            Region::Device => {
                if let Ok(at) = usize::try_from(at) {
                    self.transport.config().read(at, data);
                }
            }
            // Without INTx there is nothing to tell apart (virtio 1.2, 4.1.4.5.1).
            Region::Isr | Region::Notify => {}
            Region::Table => self.msix.read_table(at, data),
            Region::Pending => self.msix.read_pending(at, data),
        }
    }
}

/// The region at `offset` and the offset within it.
fn find(offset: u64) -> Option<(Region, u64)> {
    REGIONS.iter().find_map(|(start, len, region)| {
        let within = offset.checked_sub(u64::from(*start))?;
        (within < u64::from(*len)).then_some((*region, within))
    })
}

/// Whether an access of `len` bytes at `at` touches `bytes` at `register`.
fn touches(at: u16, len: usize, register: u16, bytes: u32) -> bool {
    let (at, register) = (u64::from(at), u64::from(register));
    at < register + u64::from(bytes) && register < at.saturating_add(len as u64)
}

fn bar_of(slot: u8) -> u64 {
    layout::BAR_WINDOW + u64::from(slot) * layout::BAR_SIZE
}

/// The lower half of an address as bytes.
fn low(address: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = address.to_le_bytes();
    [a, b, c, d]
}

/// Class, subclass and interface: what `lspci` calls the device.
fn class_of(kind: DeviceKind) -> u32 {
    match kind {
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block => 0x01_8000,
        DeviceKind::Console => 0x07_8000,
        DeviceKind::Entropy => 0x10_0000,
        DeviceKind::Balloon => 0x05_8000,
    }
}

/// Configuration space of a device, and where its MSI-X and window capabilities are.
fn configuration(kind: DeviceKind, bar: u64, vectors: u16) -> (Config, u16, u16) {
    let device = VIRTIO_DEVICE_BASE + kind as u16;
    let mut config = Config::new(&Header {
        vendor: VIRTIO_VENDOR,
        device,
        revision: 1,
        class: class_of(kind),
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    });
    // Memory, bus master, INTx disable.
    config.allow(COMMAND, &[0b110, 0b100]);
    config.allow(INTERRUPT_LINE, &[0xff]);
    config.put(usize::from(BAR0), &low(bar));
    for (kind, region) in [
        (TYPE_COMMON, Region::Common),
        (TYPE_ISR, Region::Isr),
        (TYPE_DEVICE, Region::Device),
        (TYPE_NOTIFY, Region::Notify),
    ] {
        config.add_capability(CAPABILITY_VENDOR, &capability(kind, region));
    }
    let window_at = config.add_capability(CAPABILITY_VENDOR, &window());
    config.allow(window_at + WINDOW_BAR, &[0xff]);
    config.allow(window_at + WINDOW_OFFSET, &[0xff; 12]);
    let mut body = vectors.saturating_sub(1).to_le_bytes().to_vec();
    body.extend(TABLE_START.to_le_bytes());
    body.extend(PENDING_START.to_le_bytes());
    let msix_at = config.add_capability(msix::CAPABILITY, &body);
    let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK;
    config.allow(msix_at + 2, &control.to_le_bytes());
    (config, msix_at, window_at)
}

/// A virtio capability's bytes behind id and next pointer.
fn capability(kind: u8, region: Region) -> Vec<u8> {
    let place = REGIONS.iter().find(|(_, _, r)| *r == region);
    let (offset, length) = place.map_or((0, 0), |(offset, length, _)| (*offset, *length));
    let notify = kind == TYPE_NOTIFY;
    let total = if notify { 20 } else { 16 };
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    if notify {
        body.extend(NOTIFY_STRIDE.to_le_bytes());
    }
    body
}

/// The window capability: nothing selected, four bytes of data.
fn window() -> Vec<u8> {
    let mut body = vec![20, TYPE_WINDOW];
    body.resize(18, 0);
    body
}

//! One virtio device on the bus (virtio 1.2, 4.1): its configuration space, its BAR, and what
//! the transport needs of a bus.
//!
//! Everything a guest can reach of a function lies behind one lock, taken by vCPU exits and by
//! the VM's supervisor: a register access must be answered within the exit, so a channel will not
//! do. Queue kicks do not come here: KVM turns writes of the notify region into events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::face::{self, Face, NOTIFY_START, NOTIFY_STRIDE, Region};
use super::msix::{Msix, MsixState};
use crate::devices::transport::{Transport, TransportState, Wiring};
use crate::devices::{DeviceCommand, DeviceKind, DeviceState, HostFault, Interrupt};
use crate::vmm::irq::{IrqError, IrqRouter};
use crate::vmm::layout;

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

/// A function as a snapshot stores it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FunctionState {
    pub slot: u8,
    pub kind: DeviceKind,
    config: Vec<u8>,
    msix: MsixState,
    transport: TransportState,
    pub device: DeviceState,
}

impl FunctionState {
    /// Offers the state to a transport without a bus.
    #[cfg(any(test, fuzzing))]
    pub fn offer(self, transport: &mut Transport) -> Result<(), HostFault> {
        transport.restore(self.transport, self.device)
    }
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
    face: Face,
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
        let face = Face::new(kind, bar, msix.len());
        Ok(Arc::new(Self {
            slot,
            kind,
            kicks,
            inner: Mutex::new(Inner {
                face,
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
        if let Some((offset, len)) = inner.face.window(register, data.len()) {
            // virtio 1.2, 4.1.4.9.1: the read of the window is the read of what it shows.
            let mut bytes = [0; 4];
            if let Some(shown) = bytes.get_mut(..len) {
                inner.read_bar(offset, shown);
            }
            inner.face.set_window_data(bytes);
        }
        inner.face.read(register, data);
    }

    /// A write of configuration space.
    pub fn write_config(&self, register: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.face.write(register, data);
        if let Some(control) = inner.face.msix_control(register, data.len()) {
            inner.msix.set_control(control);
        }
        if let Some((offset, len)) = inner.face.window(register, data.len()) {
            let bytes = inner.face.window_data();
            if let Some(shown) = bytes.get(..len) {
                self.write_region(&mut inner, offset, shown);
            }
        }
    }

    /// A read of the BAR.
    pub fn read_bar(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        if inner.face.decodes() {
            inner.read_bar(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A write of the BAR.
    pub fn write_bar(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        if inner.face.decodes() {
            self.write_region(&mut inner, offset, data);
        }
    }

    fn write_region(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let Some((region, at)) = face::find(offset) else {
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

    /// Everything of a paused or resting device. Right only while its vectors are unwired.
    pub fn save(&self) -> Result<FunctionState, HostFault> {
        let inner = self.lock();
        let (transport, device) = inner.transport.save()?;
        Ok(FunctionState {
            slot: self.slot,
            kind: self.kind,
            config: inner.face.save(),
            msix: inner.msix.save(),
            transport,
            device,
        })
    }

    /// Takes a saved state over; [`Self::resume`] then starts the device if it ran.
    pub fn restore(&self, state: FunctionState) -> Result<(), HostFault> {
        let inner = &mut *self.lock();
        inner.transport.restore(state.transport, state.device)?;
        let control = inner.face.restore(&state.config);
        if !control.is_some_and(|control| inner.msix.restore(state.msix, control)) {
            return Err(HostFault::msg("saved registers are of another function"));
        }
        Ok(())
    }

    /// Unwires the interrupts; when this returns, what was signalled has been injected.
    pub fn unwire(&self) -> Result<(), IrqError> {
        self.lock().msix.unwire()
    }

    /// Undoes [`Self::unwire`].
    pub fn wire(&self) {
        self.lock().msix.wire();
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
    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((region, at)) = face::find(offset) else {
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

fn bar_of(slot: u8) -> u64 {
    layout::BAR_WINDOW + u64::from(slot) * layout::BAR_SIZE
}

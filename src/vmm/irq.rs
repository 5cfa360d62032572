//! Interrupts into a VM: one GSI for each MSI-X vector, and the few IOAPIC pins of the platform.
//!
//! A line is an event descriptor. While its vector is unmasked and has a message, KVM injects
//! what is signalled (irqfd); while it is masked the descriptor is unwired and a signal stays in
//! its counter, to be delivered when it is wired again. The routing table is one for the VM and
//! KVM takes it only as a whole, so it lies behind a short lock that vCPU exits take: an unmask
//! must be in force when the exit returns, which a channel would not give.
//!
//! While a snapshot is taken everything is unwired: KVM then has injected what was signalled, and
//! what is signalled later waits in the counters.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use crate::devices::Interrupt;

/// A global system interrupt: an IOAPIC pin or a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gsi(u32);

/// Where a message-signalled interrupt goes, as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// KVM refused an interrupt.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}")]
pub struct IrqError {
    act: &'static str,
    #[source]
    source: io::Error,
}

impl IrqError {
    fn kvm(act: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self {
            act,
            source: source.into(),
        }
    }
}

/// The routing table of one VM.
pub struct IrqRouter {
    vm: Arc<VmFd>,
    /// The message of each GSI from [`layout::FIRST_MSI_GSI`] on.
    messages: Mutex<Vec<Option<MsiMessage>>>,
    /// The IOAPIC's pins in use, and their event descriptors.
    pins: Mutex<Vec<(u32, Arc<EventFd>)>>,
}

impl IrqRouter {
    /// The table with the IOAPIC's pins only. The VM must have its interrupt controllers.
    pub fn new(vm: Arc<VmFd>) -> Result<Arc<Self>, IrqError> {
        let router = Self {
            vm,
            messages: Mutex::new(Vec::new()),
            pins: Mutex::new(Vec::new()),
        };
        router.write(&[])?;
        Ok(Arc::new(router))
    }

    /// An edge-triggered line to an IOAPIC pin.
    pub fn pin(&self, pin: u32) -> Result<Interrupt, IrqError> {
        let event = Arc::new(event_fd()?);
        self.wire_pin(pin, &event)?;
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.push((pin, Arc::clone(&event)));
        Ok(Interrupt::new(event))
    }

    fn wire_pin(&self, pin: u32, event: &EventFd) -> Result<(), IrqError> {
        let wired = self.vm.register_irqfd(event, pin);
        wired.map_err(IrqError::kvm("wire an interrupt pin"))
    }

    /// Unwires all pins; when this returns, what was signalled has been injected.
    pub fn unwire_pins(&self) -> Result<(), IrqError> {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.iter().try_for_each(|(pin, event)| {
            let unwired = self.vm.unregister_irqfd(event, *pin);
            unwired.map_err(IrqError::kvm("unwire an interrupt pin"))
        })
    }

    /// Undoes [`Self::unwire_pins`].
    pub fn wire_pins(&self) -> Result<(), IrqError> {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.iter()
            .try_for_each(|(pin, event)| self.wire_pin(*pin, event))
    }

    /// A message-signalled line, masked.
    pub fn message_line(self: &Arc<Self>) -> Result<Line, IrqError> {
        let event = Arc::new(event_fd()?);
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        messages.push(None);
        drop(messages);
        Ok(Line {
            router: Arc::clone(self),
            gsi: Gsi(layout::FIRST_MSI_GSI.saturating_add(index)),
            event,
            wired: None,
            complained: false,
        })
    }

    /// Routes `gsi` to `message`.
    fn route(&self, gsi: Gsi, message: MsiMessage) -> Result<(), IrqError> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::try_from(gsi.0.saturating_sub(layout::FIRST_MSI_GSI));
        let Some(slot) = index.ok().and_then(|index| messages.get_mut(index)) else {
            return Ok(());
        };
        if *slot == Some(message) {
            return Ok(());
        }
        let old = slot.replace(message);
        let written = self.write(&messages);
        if written.is_err()
            && let Some(slot) = index.ok().and_then(|index| messages.get_mut(index))
        {
            *slot = old;
        }
        written
    }

    fn write(&self, messages: &[Option<MsiMessage>]) -> Result<(), IrqError> {
        let pins = (0..layout::FIRST_MSI_GSI).map(pin_entry);
        let routed = (layout::FIRST_MSI_GSI..).zip(messages);
        let routed = routed.filter_map(|(gsi, message)| Some(message_entry(gsi, (*message)?)));
        let entries: Vec<kvm_irq_routing_entry> = pins.chain(routed).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_too_many| IrqError {
            act: "hold so many interrupt routes",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(IrqError::kvm("set the interrupt routes"))
    }
}

impl std::fmt::Debug for IrqRouter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqRouter").finish_non_exhaustive()
    }
}

fn pin_entry(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip {
        irqchip: KVM_IRQCHIP_IOAPIC,
        pin,
    };
    entry
}

fn message_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    entry
}

fn event_fd() -> Result<EventFd, IrqError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|source| IrqError {
        act: "make an event descriptor",
        source,
    })
}

/// The line of one MSI-X vector.
#[derive(Debug)]
pub struct Line {
    router: Arc<IrqRouter>,
    gsi: Gsi,
    event: Arc<EventFd>,
    /// The message it is wired with; `None` while masked.
    wired: Option<MsiMessage>,
    /// A refused message was logged: the guest can repeat it at will.
    complained: bool,
}

impl Line {
    /// What a device signals.
    pub fn interrupt(&self) -> Interrupt {
        Interrupt::new(Arc::clone(&self.event))
    }

    /// Unmasks the vector with this message, or masks it. What KVM refuses, which only a guest's
    /// nonsense is, changes nothing.
    pub fn set(&mut self, message: Option<MsiMessage>) {
        if message == self.wired {
            return;
        }
        if let Err(error) = self.rewire(message)
            && !self.complained
        {
            self.complained = true;
            tracing::warn!(gsi = self.gsi.0, "vector stays as it was: {error}");
        }
    }

    /// Unwires the line until it is next set; when this returns, what was signalled has been
    /// injected.
    pub fn unwire(&mut self) -> Result<(), IrqError> {
        self.rewire(None)
    }

    fn rewire(&mut self, message: Option<MsiMessage>) -> Result<(), IrqError> {
        let vm = &self.router.vm;
        match (self.wired, message) {
            (Some(_), None) => vm
                .unregister_irqfd(&self.event, self.gsi.0)
                .map_err(IrqError::kvm("unwire an interrupt"))?,
            // The new route of a wired line takes effect at once.
            (Some(_), Some(message)) => self.router.route(self.gsi, message)?,
            (None, Some(message)) => {
                self.router.route(self.gsi, message)?;
                vm.register_irqfd(&self.event, self.gsi.0)
                    .map_err(IrqError::kvm("wire an interrupt"))?;
            }
            (None, None) => {}
        }
        self.wired = message;
        Ok(())
    }

    /// Whether a signal waits for the vector to be unmasked (the MSI-X pending bit).
    pub fn is_pending(&self) -> bool {
        if self.wired.is_some() {
            return false;
        }
        // Nobody else takes from an unwired counter, so looking is taking and putting back.
        let Ok(count) = self.event.read() else {
            return false;
        };
        let _saturated = self.event.write(count);
        true
    }
}

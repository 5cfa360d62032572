//! Everything of a machine but its memory and the bytes of its disks.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::vcpu::VcpuState;
use crate::devices::block::BlockState;
use crate::devices::uart::UartState;
use crate::devices::{DeviceKind, DeviceState};
use crate::vmm::pci::FunctionState;

/// vCPUs, slots and memory of a machine, at most.
const MAX_VCPUS: usize = 64;
const MAX_FUNCTIONS: usize = 31;
const MAX_MEMORY_MIB: u32 = 16 << 20;

/// A machine as a snapshot stores it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    pub(in crate::vmm) memory_mib: u32,
    pub(in crate::vmm) typed_on_uart: bool,
    pub(in crate::vmm) agent_channel: bool,
    pub(in crate::vmm) vcpus: Vec<VcpuState>,
    pub(in crate::vmm) chips: ChipsState,
    /// By slot.
    pub(in crate::vmm) functions: Vec<FunctionState>,
    pub(in crate::vmm) uart: UartState,
    /// What the generic event device has not told yet.
    pub(in crate::vmm) events: u8,
    pub(in crate::vmm) pci_address: u32,
}

impl MachineState {
    /// vCPUs of the machine.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Its memory.
    pub fn memory_mib(&self) -> u32 {
        self.memory_mib
    }

    /// Whether it has a network card.
    pub fn has_net(&self) -> bool {
        let mut functions = self.functions.iter();
        functions.any(|function| function.kind == DeviceKind::Net)
    }

    /// Its disks in order; those with changes of their own have a map.
    pub fn disks(&self) -> impl Iterator<Item = &BlockState> {
        self.functions
            .iter()
            .filter_map(|function| match &function.device {
                DeviceState::Block(disk) => Some(disk),
                _ => None,
            })
    }

    /// The first thing in it that cannot be: sizes and counts that a restore builds on. Each
    /// device checks its own state besides.
    pub(super) fn impossibility(&self) -> Option<&'static str> {
        let slots = self.functions.iter().map(|function| function.slot);
        let mut following = slots.clone().skip(1);
        if !(1..=MAX_VCPUS).contains(&self.vcpus.len()) {
            Some("number of vCPUs")
        } else if !(64..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            Some("size of memory")
        } else if self.functions.len() > MAX_FUNCTIONS {
            Some("number of devices")
        } else if slots.into_iter().any(|slot| {
            let next = following.next();
            slot == 0 || slot > 31 || next.is_some_and(|next| next <= slot)
        }) {
            Some("order of devices")
        } else if !self.vcpus.iter().all(VcpuState::is_possible) {
            Some("size of a vCPU's state")
        } else {
            None
        }
    }
}

/// What KVM holds for the machine as a whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChipsState {
    /// As it stood when the machine was paused.
    pub(in crate::vmm) clock: kvm_clock_data,
    pics: [kvm_irqchip; 2],
    ioapic: kvm_irqchip,
}

impl ChipsState {
    /// Reads the interrupt controllers, whose lines must be unwired.
    pub fn save(vm: &VmFd, clock: kvm_clock_data) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            clock,
            pics: [
                chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
                chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
            ],
            ioapic: chip(vm, KVM_IRQCHIP_IOAPIC)?,
        })
    }

    /// Writes clock and interrupt controllers, after the vCPUs and before anything is wired.
    pub fn restore(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        set_clock(vm, &self.clock)?;
        let [master, slave] = &self.pics;
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, master),
            (KVM_IRQCHIP_PIC_SLAVE, slave),
            (KVM_IRQCHIP_IOAPIC, &self.ioapic),
        ];
        chips
            .into_iter()
            .try_for_each(|(chip_id, chip)| vm.set_irqchip(&kvm_irqchip { chip_id, ..*chip }))
    }
}

fn chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, kvm_ioctls::Error> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..kvm_irqchip::default()
    };
    vm.get_irqchip(&mut chip)?;
    Ok(chip)
}

/// Sets the guest's clock to where it stood: monotonic time does not know that it was paused.
/// Legal only while no vCPU runs.
pub fn set_clock(vm: &VmFd, clock: &kvm_clock_data) -> Result<(), kvm_ioctls::Error> {
    vm.set_clock(&kvm_clock_data {
        clock: clock.clock,
        // Without KVM_CLOCK_REALTIME: KVM would add the time that has passed since.
        ..kvm_clock_data::default()
    })
}

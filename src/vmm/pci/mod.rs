//! PCI, kept small: one bus, a host bridge at slot 0, virtio functions behind it, each with one
//! fixed memory BAR.
//!
//! Configuration space is reached by ports 0xCF8/0xCFC and by the ECAM window. There are no
//! bridges, no hotplug, no INTx, and a BAR stays where it is: sizing is answered, moving is not.
//! What does not exist reads as all ones and ignores writes. Called by vCPU threads; each
//! function has a lock of its own.

mod config;
mod face;
mod function;
mod msix;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub use function::{DriverReady, FunctionError, FunctionState, VirtioFunction};

use super::layout;
use config::{Config, Header};

/// Slots of a bus.
const SLOTS: usize = 32;
/// Bytes of configuration space of one function in the ECAM window.
const ECAM_FUNCTION: u64 = 0x1000;
/// CONFIG_ADDRESS: enable, bus, device, function, register (PCI 3.0, 3.2.2.3.2).
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Offset of CONFIG_DATA from CONFIG_ADDRESS.
const DATA_PORT: u16 = 4;

/// Red Hat's generic PCIe host: an identity that no kernel has quirks for.
const HOST_BRIDGE: Header = Header {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// The bus.
pub struct Bus {
    /// CONFIG_ADDRESS, one for the machine as in hardware.
    address: AtomicU32,
    bridge: Config,
    slots: [Option<Arc<VirtioFunction>>; SLOTS],
}

/// There is no slot of that number left.
#[derive(Debug, thiserror::Error)]
#[error("no PCI slot {slot}")]
pub struct NoSlot {
    slot: u8,
}

impl Bus {
    /// A bus with nothing but its host bridge.
    pub fn new() -> Self {
        Self {
            address: AtomicU32::new(0),
            bridge: Config::new(&HOST_BRIDGE),
            slots: [const { None }; SLOTS],
        }
    }

    /// Puts a function into the slot it was made for.
    pub fn insert(&mut self, function: Arc<VirtioFunction>) -> Result<(), NoSlot> {
        let slot = function.slot();
        match self.slots.get_mut(usize::from(slot)) {
            Some(place) if slot != 0 && place.is_none() => {
                *place = Some(function);
                Ok(())
            }
            _ => Err(NoSlot { slot }),
        }
    }

    /// All functions, by slot.
    pub fn functions(&self) -> impl DoubleEndedIterator<Item = &Arc<VirtioFunction>> {
        self.slots.iter().flatten()
    }

    /// CONFIG_ADDRESS, for a snapshot.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Takes over a saved CONFIG_ADDRESS.
    pub fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// A read of the configuration ports; `offset` counts from CONFIG_ADDRESS.
    pub fn read_port(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= DATA_PORT {
            if let Some((slot, register)) = self.selected(offset, data.len()) {
                self.read_config(slot, register, data);
            }
        } else if offset == 0 && data.len() == 4 {
            let address = self.address.load(Ordering::Relaxed).to_le_bytes();
            data.copy_from_slice(&address);
        }
    }

    /// A write of the configuration ports.
    pub fn write_port(&self, offset: u16, data: &[u8]) {
        if offset >= DATA_PORT {
            if let Some((slot, register)) = self.selected(offset, data.len()) {
                self.write_config(slot, register, data);
            }
        } else if offset == 0
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            // Only a whole dword is CONFIG_ADDRESS; narrower accesses are other registers.
            let address = u32::from_le_bytes(bytes);
            self.address.store(address, Ordering::Relaxed);
        }
    }

    /// What CONFIG_ADDRESS names, if it names something and the access stays within its dword.
    fn selected(&self, offset: u16, len: usize) -> Option<(usize, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let byte = offset.checked_sub(DATA_PORT)?;
        let fits = usize::from(byte).checked_add(len)? <= 4;
        let bus_and_function = (address >> 16 & 0xff) | (address >> 8 & 7);
        if address & ADDRESS_ENABLE == 0 || bus_and_function != 0 || !fits {
            return None;
        }
        let slot = usize::try_from(address >> 11 & 0x1f).ok()?;
        let register = u16::try_from(address & 0xfc).ok()?;
        Some((slot, register + byte))
    }

    /// A read of the ECAM window; `offset` counts from its start.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, register)) = ecam(offset, data.len()) {
            self.read_config(slot, register, data);
        }
    }

    /// A write of the ECAM window.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = ecam(offset, data.len()) {
            self.write_config(slot, register, data);
        }
    }

    fn read_config(&self, slot: usize, register: u16, data: &mut [u8]) {
        if slot == 0 {
            self.bridge.read(register, data);
        } else if let Some(function) = self.slots.get(slot).and_then(Option::as_ref) {
            function.read_config(register, data);
        }
    }

    fn write_config(&self, slot: usize, register: u16, data: &[u8]) {
        // Nothing of the bridge can be written.
        if let Some(function) = self.slots.get(slot).and_then(Option::as_ref) {
            function.write_config(register, data);
        }
    }

    /// A read of the BAR window; `offset` counts from its start.
    pub fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = self.at(offset) {
            function.read_bar(offset % layout::BAR_SIZE, data);
        }
    }

    /// A write of the BAR window.
    pub fn write_bar(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.at(offset) {
            function.write_bar(offset % layout::BAR_SIZE, data);
        }
    }

    fn at(&self, offset: u64) -> Option<&Arc<VirtioFunction>> {
        let slot = usize::try_from(offset / layout::BAR_SIZE).ok()?;
        self.slots.get(slot)?.as_ref()
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

/// Slot and register of an ECAM offset: function 0 of bus 0 only, and within one function.
fn ecam(offset: u64, len: usize) -> Option<(usize, u16)> {
    let register = offset % ECAM_FUNCTION;
    let end = register.checked_add(u64::try_from(len).ok()?)?;
    let device_function = offset / ECAM_FUNCTION;
    let slot = usize::try_from(device_function / 8).ok()?;
    let exists = device_function.is_multiple_of(8) && slot < SLOTS && end <= ECAM_FUNCTION;
    exists.then_some((slot, u16::try_from(register).ok()?))
}

#[cfg(test)]
#[path = "pci_test.rs"]
mod tests;

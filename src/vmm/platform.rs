//! The machine's port and memory-mapped I/O: which device an access reaches.
//!
//! Called by vCPU threads within an exit. What nothing answers reads as all ones and ignores
//! writes. KVM hands string I/O over as one run of bytes: devices a byte wide take it byte by
//! byte, and the PCI ports, whose registers are wider, take only what can be one access.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, Ordering};

use super::layout;
use super::pci::Bus;
use super::spec::VmEnd;
use crate::devices::Interrupt;
use crate::devices::uart::Uart;

/// What answers at a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Port {
    Uart,
    /// Sleep control and status and reset, one byte for all.
    Sleep,
    Events,
    PciConfig,
    /// The reset control of PC chipsets, inside the range of the PCI ports.
    ResetControl,
    /// The keyboard controller's command port: nothing but its reset command.
    KeyboardReset,
}

/// First port, number of ports; the first entry that fits counts.
const PORTS: [(u16, u16, Port); 6] = [
    (layout::COM1, 8, Port::Uart),
    (layout::SLEEP_PORT, 1, Port::Sleep),
    (layout::GED_PORT, 1, Port::Events),
    (0xcf9, 1, Port::ResetControl),
    (layout::PCI_CONFIG_PORT, 8, Port::PciConfig),
    (0x64, 1, Port::KeyboardReset),
];
/// Reset control: reset the processor.
const RESET_CPU: u8 = 1 << 2;
/// Keyboard controller: pulse the reset line.
const PULSE_RESET: u8 = 0xfe;

/// The generic event device: what happened since the guest last asked.
#[derive(Debug)]
pub struct Events {
    happened: AtomicU8,
    interrupt: Interrupt,
}

impl Events {
    pub fn new(interrupt: Interrupt) -> Self {
        Self {
            happened: AtomicU8::new(0),
            interrupt,
        }
    }

    /// What the guest has not asked for yet, for a snapshot.
    pub fn pending(&self) -> u8 {
        self.happened.load(Ordering::Acquire)
    }

    /// Reports `event`, one of the layout's GED bits.
    pub fn raise(&self, event: u8) {
        self.happened.fetch_or(event, Ordering::Release);
        self.interrupt.signal();
    }
}

/// Everything a guest reaches by an exit.
pub struct Platform {
    pub pci: Bus,
    /// The lock is held for one register access; the supervisor takes it for typed bytes.
    pub uart: Mutex<Uart>,
    pub events: Events,
    /// RAM as start and length: an access to it that comes here is one that the host lost.
    pub ram: Vec<(u64, u64)>,
}

impl Platform {
    /// IN.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some((port, offset)) = find(port) else {
            return;
        };
        match port {
            Port::PciConfig => self.pci.read_port(offset, data),
            Port::Uart => {
                let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    *byte = low(offset).map_or(0xff, |offset| uart.read(offset));
                }
            }
            Port::Events => {
                for byte in data {
                    *byte = self.events.happened.swap(0, Ordering::AcqRel);
                }
            }
            Port::Sleep => data.fill(0),
            Port::ResetControl | Port::KeyboardReset => {}
        }
    }

    /// OUT; the end of the VM if the guest asked for it.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<VmEnd> {
        let (port, offset) = find(port)?;
        match port {
            Port::PciConfig => self.pci.write_port(offset, data),
            Port::Uart => {
                let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
                for byte in data {
                    if let Some(offset) = low(offset) {
                        uart.write(offset, *byte);
                    }
                }
            }
            Port::Sleep => return data.iter().find_map(|byte| sleep(*byte)),
            Port::ResetControl => {
                let reset = data.iter().any(|byte| byte & RESET_CPU != 0);
                return reset.then_some(VmEnd::Reboot);
            }
            Port::KeyboardReset => {
                return data.contains(&PULSE_RESET).then_some(VmEnd::Reboot);
            }
            Port::Events => {}
        }
        None
    }

    /// A load from where KVM sees no RAM.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> Option<VmEnd> {
        match window(address) {
            Some((Window::Bars, offset)) => self.pci.read_bar(offset, data),
            Some((Window::Ecam, offset)) => self.pci.read_ecam(offset, data),
            None => {
                data.fill(0xff);
                return self.lost(address);
            }
        }
        None
    }

    /// A store to where KVM sees no RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> Option<VmEnd> {
        match window(address) {
            Some((Window::Bars, offset)) => self.pci.write_bar(offset, data),
            Some((Window::Ecam, offset)) => self.pci.write_ecam(offset, data),
            None => return self.lost(address),
        }
        None
    }

    /// KVM takes RAM that it can't reach for a device's.
    fn lost(&self, address: u64) -> Option<VmEnd> {
        let mut ram = self.ram.iter();
        ram.any(|(start, bytes)| address.checked_sub(*start).is_some_and(|at| at < *bytes))
            .then(|| VmEnd::HostFault {
                reason: format!("guest memory at {address:#x} was lost"),
            })
    }
}

/// A write of the sleep port (ACPI 6.5, 4.8.3.6 and 4.8.3.7).
fn sleep(value: u8) -> Option<VmEnd> {
    match value {
        layout::S5_VALUE => Some(VmEnd::PowerOff),
        layout::RESET_VALUE => Some(VmEnd::Reboot),
        _ => None,
    }
}

fn find(port: u16) -> Option<(Port, u16)> {
    PORTS.iter().find_map(|(first, count, device)| {
        let offset = port.checked_sub(*first)?;
        (offset < *count).then_some((*device, offset))
    })
}

fn low(offset: u16) -> Option<u8> {
    u8::try_from(offset).ok()
}

enum Window {
    Bars,
    Ecam,
}

/// The window around an address, and the offset in it.
fn window(address: u64) -> Option<(Window, u64)> {
    let within = |start, size| address.checked_sub(start).filter(|offset| *offset < size);
    if let Some(offset) = within(layout::BAR_WINDOW, layout::BAR_WINDOW_SIZE) {
        return Some((Window::Bars, offset));
    }
    let offset = within(layout::ECAM, layout::ECAM_SIZE)?;
    Some((Window::Ecam, offset))
}

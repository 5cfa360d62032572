//! What a virtio function looks like (virtio 1.2, 4.1): the regions of its BAR, and the
//! capabilities by which a driver finds them.

use super::config::{BAR0, COMMAND, COMMAND_MEMORY, Config, Header};
use super::msix;
use crate::devices::DeviceKind;
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
pub const NOTIFY_STRIDE: u32 = 4;
/// Offsets within the window capability (virtio 1.2, 4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;
/// Interrupt line: a scratch byte for software.
const INTERRUPT_LINE: u16 = 0x3c;

/// What lies where in the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
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
/// Where the notify registers begin.
pub const NOTIFY_START: u32 = start_of(3);
const TABLE_START: u32 = start_of(4);
const PENDING_START: u32 = start_of(5);

/// The region at `offset` and the offset within it.
pub fn find(offset: u64) -> Option<(Region, u64)> {
    REGIONS.iter().find_map(|(start, len, region)| {
        let within = offset.checked_sub(u64::from(*start))?;
        (within < u64::from(*len)).then_some((*region, within))
    })
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

/// A function's configuration space, and what its writes mean.
pub struct Face {
    config: Config,
    bar: u64,
    /// Offsets of the capabilities that writes act on.
    msix_at: u16,
    window_at: u16,
}

impl Face {
    /// Configuration space of a device whose BAR is at `bar`.
    pub fn new(kind: DeviceKind, bar: u64, vectors: u16) -> Self {
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
        Self {
            config,
            bar,
            msix_at,
            window_at,
        }
    }

    /// Configuration space, for a snapshot.
    pub fn save(&self) -> Vec<u8> {
        self.config.bytes().to_vec()
    }

    /// Takes over what a driver could have written of a saved space, and MSI-X message control
    /// with it; `None` if that is the space of another function.
    pub fn restore(&mut self, saved: &[u8]) -> Option<u16> {
        let fresh = self.config.clone();
        self.config.write(0, saved);
        let bar = usize::from(BAR0)..usize::from(BAR0) + 4;
        let sized = saved.get(bar) == Some(low(!(layout::BAR_SIZE - 1)).as_slice());
        if sized {
            self.write(BAR0, &[0xff; 4]);
        }
        if self.config.bytes() != saved {
            self.config = fresh;
            return None;
        }
        Some(u16::from_le_bytes(self.config.get(self.msix_at + 2)))
    }

    pub fn read(&self, register: u16, data: &mut [u8]) {
        self.config.read(register, data);
    }

    /// A write by the guest. What it sets off beyond this space is told by the other methods.
    pub fn write(&mut self, register: u16, data: &[u8]) {
        self.config.write(register, data);
        if touches(register, data.len(), BAR0, 4) {
            // All ones ask for the size; anything else finds the BAR where it always is.
            let sizing = register == BAR0 && data == [0xff; 4];
            let value = if sizing {
                !(layout::BAR_SIZE - 1)
            } else {
                self.bar
            };
            self.config.put(usize::from(BAR0), &low(value));
        }
    }

    /// Whether the function answers in its BAR.
    pub fn decodes(&self) -> bool {
        let [command] = self.config.get(COMMAND);
        command & COMMAND_MEMORY != 0
    }

    /// MSI-X message control, if an access of `len` bytes at `register` touches it.
    pub fn msix_control(&self, register: u16, len: usize) -> Option<u16> {
        let at = self.msix_at + 2;
        touches(register, len, at, 2).then(|| u16::from_le_bytes(self.config.get(at)))
    }

    /// What the window shows, offset in the BAR and length, if an access of `len` bytes at
    /// `register` touches its data and the guest has set it to something possible.
    pub fn window(&self, register: u16, len: usize) -> Option<(u64, usize)> {
        if !touches(register, len, self.window_at + WINDOW_DATA, 4) {
            return None;
        }
        let [bar] = self.config.get(self.window_at + WINDOW_BAR);
        let offset = u32::from_le_bytes(self.config.get(self.window_at + WINDOW_OFFSET));
        let length = u32::from_le_bytes(self.config.get(self.window_at + WINDOW_LENGTH));
        let possible = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && bar == 0;
        possible.then_some((u64::from(offset), usize::try_from(length).ok()?))
    }

    /// The bytes in the window.
    pub fn window_data(&self) -> [u8; 4] {
        self.config.get(self.window_at + WINDOW_DATA)
    }

    /// Puts bytes into the window.
    pub fn set_window_data(&mut self, bytes: [u8; 4]) {
        let at = usize::from(self.window_at + WINDOW_DATA);
        self.config.put(at, &bytes);
    }
}

/// Whether an access of `len` bytes at `at` touches `bytes` at `register`.
fn touches(at: u16, len: usize, register: u16, bytes: u32) -> bool {
    let (at, register) = (u64::from(at), u64::from(register));
    at < register + u64::from(bytes) && register < at.saturating_add(len as u64)
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

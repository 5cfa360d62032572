//! A function's configuration space (PCI 3.0, 6.1): bytes, and which bits of them can be written.
//!
//! What a write sets off is the function's business.

/// Bytes of configuration space that exist; the extended part is empty and reads as zero.
const SIZE: usize = 256;
const CAPABILITIES: u16 = 0x40;
const POINTER: usize = 0x34;
/// Status register: there is a capability list.
const STATUS_HAS_CAPABILITIES: u8 = 1 << 4;

/// Registers of a type 0 header that are set once: offset and width.
mod header {
    pub const VENDOR: usize = 0x00;
    pub const DEVICE: usize = 0x02;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const CLASS: usize = 0x09;
    pub const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub const SUBSYSTEM: usize = 0x2e;
}

/// Command register.
pub const COMMAND: u16 = 0x04;
/// Command: the function answers in its BARs.
pub const COMMAND_MEMORY: u8 = 1 << 1;
/// The first BAR; the others do not exist.
pub const BAR0: u16 = 0x10;

/// Who a function is.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The bytes and the mask of writable bits.
#[derive(Debug, Clone)]
pub struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes.
    next: u16,
    /// Where the offset of the next capability is to be written.
    link: usize,
}

impl Config {
    /// A type 0 header without BARs and capabilities.
    pub fn new(header: &Header) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next: CAPABILITIES,
            link: POINTER,
        };
        let class = header.class.to_le_bytes();
        config.put(header::VENDOR, &header.vendor.to_le_bytes());
        config.put(header::DEVICE, &header.device.to_le_bytes());
        config.put(header::REVISION, &[header.revision]);
        config.put(header::CLASS, class.get(..3).unwrap_or_default());
        config.put(
            header::SUBSYSTEM_VENDOR,
            &header.subsystem_vendor.to_le_bytes(),
        );
        config.put(header::SUBSYSTEM, &header.subsystem.to_le_bytes());
        config
    }

    /// Appends a capability: its bytes after id and next pointer. Returns its offset, 0 if the
    /// space is full, which only a bug can cause.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let at = self.next;
        let start = usize::from(at);
        let end = start + 2 + body.len();
        let Ok(pointer) = u8::try_from(at) else {
            return 0;
        };
        if end > SIZE {
            return 0;
        }
        self.put(self.link, &[pointer]);
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        if let Some(status) = self.bytes.get_mut(header::STATUS) {
            *status |= STATUS_HAS_CAPABILITIES;
        }
        self.link = start + 1;
        self.next = u16::try_from(end.next_multiple_of(4)).unwrap_or(u16::MAX);
        at
    }

    /// Lets the guest write the bits of `mask` at `offset`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (slot, bits) in self.writable.iter_mut().skip(usize::from(offset)).zip(mask) {
            *slot |= *bits;
        }
    }

    /// Sets bytes, whatever the mask says.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(offset).zip(data) {
            *slot = *byte;
        }
    }

    /// The bytes at `offset`; zero beyond the end.
    pub fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// All of it, for a snapshot.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A read by the guest.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A write by the guest: bits that are not writable keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let targets = self.bytes.iter_mut().zip(&self.writable);
        for ((slot, mask), byte) in targets.skip(usize::from(offset)).zip(data) {
            *slot = (*slot & !mask) | (*byte & mask);
        }
    }
}

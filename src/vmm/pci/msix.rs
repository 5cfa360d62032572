//! MSI-X (PCI 3.0, 6.8.2): the table and pending bits of one function, and its vectors' lines.
//!
//! A vector is live if the function has MSI-X enabled and neither the function nor the vector is
//! masked; otherwise its signals wait in its line. State is plain numbers; `refresh` makes the
//! lines follow it.

use serde::{Deserialize, Serialize};

use crate::devices::Interrupt;
use crate::vmm::irq::{IrqError, Line, MsiMessage};

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Message control: enable, mask the whole function.
pub const CONTROL_ENABLE: u16 = 1 << 15;
pub const CONTROL_MASK: u16 = 1 << 14;
const ENTRY_BYTES: u64 = 16;
const VECTOR_MASKED: u32 = 1;

/// One entry of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address_low: u32,
    address_high: u32,
    data: u32,
    control: u32,
}

impl Entry {
    /// Masked, as after reset.
    const RESET: Self = Self {
        address_low: 0,
        address_high: 0,
        data: 0,
        control: VECTOR_MASKED,
    };

    fn message(&self) -> MsiMessage {
        MsiMessage {
            address: u64::from(self.address_low) | (u64::from(self.address_high) << 32),
            data: self.data,
        }
    }
}

/// The registers, as a snapshot stores them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Stored with the configuration space, where the guest sees it.
    #[serde(skip)]
    control: u16,
    entries: Vec<Entry>,
}

/// The vectors of one function: registers, and a line for each entry.
#[derive(Debug)]
pub struct Msix {
    state: MsixState,
    lines: Vec<Line>,
}

impl Msix {
    /// All masked and disabled. At most 2048 lines.
    pub fn new(lines: Vec<Line>) -> Self {
        let entries = vec![Entry::RESET; lines.len()];
        let state = MsixState {
            control: 0,
            entries,
        };
        Self { state, lines }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        u16::try_from(self.lines.len()).unwrap_or(u16::MAX)
    }

    /// The line of a vector; one that does not exist goes nowhere.
    pub fn interrupt(&self, vector: u16) -> Interrupt {
        let line = self.lines.get(usize::from(vector));
        line.map_or_else(Interrupt::none, Line::interrupt)
    }

    /// The guest wrote message control.
    pub fn set_control(&mut self, control: u16) {
        self.state.control = control & (CONTROL_ENABLE | CONTROL_MASK);
        for index in 0..self.lines.len() {
            self.refresh(index);
        }
    }

    /// A read of the table. Only whole dwords and pairs of them exist.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        if !is_aligned(offset, data.len()) {
            data.fill(0xff);
            return;
        }
        for (at, bytes) in (offset..).step_by(4).zip(data.chunks_mut(4)) {
            let value = self.dword(at).unwrap_or(u32::MAX);
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn dword(&self, offset: u64) -> Option<u32> {
        let entry = self.state.entries.get(index(offset)?)?;
        Some(match offset % ENTRY_BYTES {
            0 => entry.address_low,
            4 => entry.address_high,
            8 => entry.data,
            _ => entry.control,
        })
    }

    /// A write of the table; takes effect before it returns.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !is_aligned(offset, data.len()) {
            return;
        }
        for (at, bytes) in (offset..).step_by(4).zip(data.chunks(4)) {
            let (Ok(bytes), Some(index)) = (<[u8; 4]>::try_from(bytes), index(at)) else {
                return;
            };
            let value = u32::from_le_bytes(bytes);
            let Some(entry) = self.state.entries.get_mut(index) else {
                return;
            };
            match at % ENTRY_BYTES {
                0 => entry.address_low = value & !3,
                4 => entry.address_high = value,
                8 => entry.data = value,
                _ => entry.control = value & VECTOR_MASKED,
            }
            self.refresh(index);
        }
    }

    /// A read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            for (bit, line) in self.lines.iter().skip(first).take(8).enumerate() {
                *byte |= u8::from(line.is_pending()) << bit;
            }
        }
    }

    /// The registers. Signals that wait for a mask to go are not in them: after a restore every
    /// vector is signalled once, which a driver must expect at any time.
    pub fn save(&self) -> MsixState {
        self.state.clone()
    }

    /// Takes saved registers over and signals every vector; `control` is message control. False if they are of another number of
    /// vectors.
    pub fn restore(&mut self, state: MsixState, control: u16) -> bool {
        if state.entries.len() != self.lines.len() {
            return false;
        }
        self.state.entries = state.entries;
        for entry in &mut self.state.entries {
            entry.address_low &= !3;
            entry.control &= VECTOR_MASKED;
        }
        self.set_control(control);
        for line in &self.lines {
            line.interrupt().signal();
        }
        true
    }

    /// Unwires all vectors; when this returns, what was signalled has been injected.
    pub fn unwire(&mut self) -> Result<(), IrqError> {
        self.lines.iter_mut().try_for_each(Line::unwire)
    }

    /// Undoes [`Self::unwire`].
    pub fn wire(&mut self) {
        for index in 0..self.lines.len() {
            self.refresh(index);
        }
    }

    fn refresh(&mut self, index: usize) {
        let live = self.state.control & (CONTROL_ENABLE | CONTROL_MASK) == CONTROL_ENABLE;
        let entry = self.state.entries.get(index);
        if let (Some(entry), Some(line)) = (entry, self.lines.get_mut(index)) {
            let live = live && entry.control & VECTOR_MASKED == 0;
            line.set(live.then(|| entry.message()));
        }
    }
}

fn index(offset: u64) -> Option<usize> {
    usize::try_from(offset / ENTRY_BYTES).ok()
}

fn is_aligned(offset: u64, len: usize) -> bool {
    matches!((len, offset % 8), (4, 0 | 4) | (8, 0))
}

//! Where things are in a guest's physical address space and port space: constants only.
//!
//! ```text
//!  0                 RAM, up to 3 GiB (boot structures in the first MiB)
//!  0xC000_0000       hole
//!  0xD000_0000       BAR0 of each PCI slot, 64 KiB apart
//!  0xE000_0000       ECAM of bus 0
//!  0xFEC0_0000       IOAPIC            0xFEE0_0000  LAPIC
//!  0xFFFB_C000       KVM's identity map page, then its TSS pages
//!  0x1_0000_0000     RAM above the hole
//! ```

/// RAM below the hole ends here at the latest.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// RAM beyond [`LOW_RAM_END`] goes on here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

pub const GDT: u64 = 0x500;
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MEMORY_MAP: u64 = 0x6800;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK: u64 = 0x8ff0;
pub const PAGE_TABLES: u64 = 0x9000;
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line, its end included.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory: the EBDA and video hole begin.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The 16 bytes of the VM generation ID, in ACPI-reserved memory.
pub const VM_GENERATION_ID: u64 = 0xd_f000;
/// ACPI tables, up to 1 MiB.
pub const ACPI_START: u64 = 0xe_0000;
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

pub const BAR_WINDOW: u64 = 0xD000_0000;
pub const BAR_WINDOW_SIZE: u64 = 0x1000_0000;
/// Distance and size of the slots' BARs.
pub const BAR_SIZE: u64 = 0x1_0000;
pub const ECAM: u64 = 0xE000_0000;
pub const ECAM_SIZE: u64 = 0x10_0000;
pub const IOAPIC: u32 = 0xFEC0_0000;
pub const LAPIC: u32 = 0xFEE0_0000;
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
pub const KVM_TSS: usize = 0xFFFB_D000;

pub const COM1: u16 = 0x3f8;
pub const COM1_IRQ: u32 = 4;
/// Sleep and reset register of hardware-reduced ACPI: one byte.
pub const SLEEP_PORT: u16 = 0x600;
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP 5, SLP_EN (ACPI 6.5, 4.8.3.7).
pub const S5_VALUE: u8 = (5 << 2) | (1 << 5);
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Interrupt of the generic event device: power button and generation change.
pub const GED_IRQ: u32 = 9;
/// What happened, read by the GED's method: one byte, cleared by the read.
pub const GED_PORT: u16 = 0x610;
pub const GED_POWER_BUTTON: u8 = 1;
pub const GED_GENERATION: u8 = 2;
/// GSIs below are IOAPIC pins, above are message-signalled.
pub const FIRST_MSI_GSI: u32 = 24;

/// RAM ranges for `bytes` of memory: start and length.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    match bytes.checked_sub(LOW_RAM_END) {
        None | Some(0) => vec![(0, bytes)],
        Some(high) => vec![(0, LOW_RAM_END), (HIGH_RAM_START, high)],
    }
}

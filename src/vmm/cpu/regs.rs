//! Registers and tables of the 64-bit entry (Linux x86 boot protocol, "64-bit boot protocol").

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::devices::GuestMemory;
use crate::vmm::boot::Entry;
use crate::vmm::layout;

const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, write-back by default.
const MTRR_WRITE_BACK: u64 = 0xc06;
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast strings.
const MISC_FAST_STRING: u64 = 1;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Null, null, 64-bit code, data, task.
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// Present, writable; and "this entry is a large page".
const TABLE: u64 = 3;
const LARGE: u64 = 0x83;

/// GDT and an identity map of the first 4 GiB by large pages.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let mut at = layout::GDT;
    for entry in GDT {
        memory.write_obj(entry, GuestAddress(at))?;
        at += 8;
    }
    let level3 = layout::PAGE_TABLES + 0x1000;
    let level2 = level3 + 0x1000;
    memory.write_obj(level3 | TABLE, GuestAddress(layout::PAGE_TABLES))?;
    for gib in 0..4 {
        let table = level2 + gib * 0x1000;
        memory.write_obj(table | TABLE, GuestAddress(level3 + gib * 8))?;
        for page in 0..512 {
            let address = gib * GIB + page * LARGE_PAGE;
            memory.write_obj(address | LARGE, GuestAddress(table + page * 8))?;
        }
    }
    Ok(())
}

pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let wanted = [
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
        entry(MSR_MISC_ENABLE, MISC_FAST_STRING),
    ];
    for msr in wanted {
        let msrs =
            Msrs::from_entries(&[msr]).map_err(|_too_many| kvm_ioctls::Error::new(libc::E2BIG))?;
        if vcpu.set_msrs(&msrs)? != 1 {
            return Err(kvm_ioctls::Error::new(libc::EIO));
        }
    }
    Ok(())
}

pub fn set_registers(vcpu: &VcpuFd, entry: &Entry) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_regs(&kvm_regs {
        // Bit 1 is always set; interrupts are off.
        rflags: 2,
        rip: entry.rip,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: entry.zero_page,
        ..kvm_regs::default()
    })
}

pub fn set_segments(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = segment(CODE_SELECTOR, 0xb, 1);
    let data = segment(DATA_SELECTOR, 0x3, 0);
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        s: 0,
        ..segment(TASK_SELECTOR, 0xb, 0)
    };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs)
}

/// A flat segment of a selector; `long` is the L bit, and D is its opposite.
fn segment(selector: u16, kind: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..kvm_segment::default()
    }
}

pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..kvm_fpu::default()
    })
}

/// LINT0 takes external interrupts, LINT1 the NMI (Intel SDM 3A, 11.5.1).
pub fn set_lapic(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXTERNAL: u32 = 7;
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTERNAL), (LVT_LINT1, MODE_NMI)] {
        let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
            continue;
        };
        let mut value = 0_u32;
        for byte in bytes.iter().rev() {
            value = (value << 8) | u32::from(byte.to_ne_bytes()[0]);
        }
        value = (value & !0x700) | (mode << 8);
        for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *byte = libc::c_char::from_ne_bytes([new]);
        }
    }
    vcpu.set_lapic(&lapic)
}

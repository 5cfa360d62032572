//! A vCPU's registers before its first instruction: CPUID, MSRs, segments, paging, LAPIC.
//!
//! The boot processor starts in long mode at the kernel's 64-bit entry; the others wait for
//! the guest's INIT and SIPI, which the in-kernel interrupt controller handles.

mod cpuid;
mod regs;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd};

use super::boot::Entry;

/// A register could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {what} of vcpu {vcpu}")]
pub struct CpuError {
    vcpu: u8,
    what: &'static str,
    #[source]
    source: kvm_ioctls::Error,
}

/// The CPUID leaves that this host's KVM can give a guest.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// What a vCPU is told about its processor.
pub use cpuid::filter;

/// Gives vCPU `index` of `count` its CPUID: first of all, as newer kernels check MSRs against it.
pub fn set_cpuid(vcpu: &VcpuFd, index: u8, count: u8, supported: &CpuId) -> Result<(), CpuError> {
    let fail = |source| CpuError {
        vcpu: index,
        what: "CPUID",
        source,
    };
    let cpuid = filter(supported, index, count)
        .map_err(|_full| fail(kvm_ioctls::Error::new(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(fail)
}

/// Writes GDT and page tables, once for a VM.
pub use regs::write_tables;

/// Prepares vCPU `index` of `count`; the first one starts at `entry`.
pub fn configure(
    vcpu: &VcpuFd,
    index: u8,
    count: u8,
    supported: &CpuId,
    entry: &Entry,
) -> Result<(), CpuError> {
    let fail = |what| {
        move |source| CpuError {
            vcpu: index,
            what,
            source,
        }
    };
    set_cpuid(vcpu, index, count, supported)?;
    regs::set_msrs(vcpu).map_err(fail("MSRs"))?;
    if index == 0 {
        regs::set_registers(vcpu, entry).map_err(fail("registers"))?;
        regs::set_segments(vcpu).map_err(fail("segments"))?;
        regs::set_fpu(vcpu).map_err(fail("the FPU"))?;
    }
    regs::set_lapic(vcpu).map_err(fail("the LAPIC"))
}

//! The host's KVM: whether it is there, new enough, and able to run stock kernels.

use std::fs;
use std::io;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::boot::Entry;
use super::cpu;
use super::layout;
use super::memory::{MemoryError, VmMemory};

const DEVICE: &str = "/dev/kvm";

/// What we can't do without.
const CAPABILITIES: [(Cap, &str); 8] = [
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "in-kernel interrupt controllers"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::SetTssAddr, "TSS address"),
    (Cap::SetIdentityMapAddr, "identity map address"),
    (Cap::ImmediateExit, "immediate exit"),
];

/// Why KVM can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmProblem {
    #[error("there is no {DEVICE}; hint: {hint}")]
    Missing { hint: &'static str },
    #[error("no permission to open {DEVICE}; hint: run as root, or add this user to the group kvm")]
    Denied,
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    #[error("{DEVICE} speaks version {found}, not {KVM_API_VERSION}; hint: a newer kernel")]
    Version { found: i32 },
    #[error("this kernel's KVM lacks {what}; hint: Linux 5.10 or newer")]
    Capability { what: &'static str },
    #[error("cannot {act} to try KVM out")]
    Probe {
        act: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot map memory to try KVM out")]
    ProbeMemory(#[from] MemoryError),
    #[error(
        "this KVM cannot run stock kernels ({what}); hint: hardware virtualisation (VT-x or AMD-V), which this machine does not pass on"
    )]
    StockKernels { what: String },
}

/// Opens KVM and checks that it has what every VM needs; takes microseconds.
pub fn open() -> Result<Kvm, KvmProblem> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmProblem::Missing {
            hint: missing_hint(),
        },
        libc::EACCES | libc::EPERM => KvmProblem::Denied,
        _ => KvmProblem::Open(error.into()),
    })?;
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(KvmProblem::Version { found });
    }
    for (capability, what) in CAPABILITIES {
        if !kvm.check_extension(capability) {
            return Err(KvmProblem::Capability { what });
        }
    }
    Ok(kvm)
}

/// Which module to load, or that the processor offers nothing.
fn missing_hint() -> &'static str {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |wanted: &str| {
        let flags = cpus.lines().find(|line| line.starts_with("flags"));
        flags.is_some_and(|line| line.split_whitespace().any(|flag| flag == wanted))
    };
    if has("vmx") {
        "modprobe kvm_intel"
    } else if has("svm") {
        "modprobe kvm_amd"
    } else {
        "this processor offers no virtualisation: enable it in the firmware, or nested virtualisation on the machine around this one"
    }
}

/// Opens KVM, then has a tiny guest execute what every stock kernel needs and incomplete KVMs
/// lack: CMPXCHG16B and XRSTOR64. Takes milliseconds.
pub fn check_kvm() -> Result<(), KvmProblem> {
    let kvm = open()?;
    let memory = VmMemory::anonymous(64)?;
    let (_vm, mut vcpu) = probe_vm(&kvm, &memory)?;
    match vcpu.run() {
        Ok(VcpuExit::IoOut(PROBE_PORT, [PROBE_VALUE])) => Ok(()),
        Ok(VcpuExit::InternalError) => Err(KvmProblem::StockKernels {
            what: "it does not know their instructions".to_owned(),
        }),
        Ok(exit) => Err(KvmProblem::StockKernels {
            what: format!("a probe ended with {exit:?}"),
        }),
        Err(error) => Err(KvmProblem::StockKernels {
            what: format!("a probe could not run: {error}"),
        }),
    }
}

const PROBE_PORT: u16 = 0x80;
const PROBE_VALUE: u8 = 0x2a;
const PROBE_CODE_AT: u64 = layout::HIGH_MEMORY_START;
/// Enables SSE and XSAVE in CR4, restores an initial state, exchanges 16 bytes, and says so.
const PROBE_CODE: &[u8] = &[
    0x0f,
    0x20,
    0xe0, // mov rax, cr4
    0x0d,
    0x00,
    0x06,
    0x04,
    0x00, // or eax, OSFXSR | OSXMMEXCPT | OSXSAVE
    0x0f,
    0x22,
    0xe0, // mov cr4, rax
    0xbf,
    0x00,
    0x00,
    0x20,
    0x00, // mov edi, 2 MiB
    0x31,
    0xc9, // xor ecx, ecx
    0x0f,
    0x01,
    0xd0, // xgetbv
    0x48,
    0x0f,
    0xae,
    0x2f, // xrstor64 [rdi]
    0xf0,
    0x48,
    0x0f,
    0xc7,
    0x0f, // lock cmpxchg16b [rdi]
    0xb0,
    PROBE_VALUE, // mov al, 42
    0xe6,
    0x80, // out 0x80, al
    0xf4, // hlt
];

fn probe_vm(kvm: &Kvm, memory: &VmMemory) -> Result<(VmFd, VcpuFd), KvmProblem> {
    let fail = |act| {
        move |error: kvm_ioctls::Error| KvmProblem::Probe {
            act,
            source: error.into(),
        }
    };
    let other = |act, error: String| KvmProblem::Probe {
        act,
        source: io::Error::other(error),
    };
    let vm = create_vm(kvm).map_err(fail("create a VM"))?;
    map_memory(&vm, memory).map_err(fail("give it memory"))?;
    let guest = memory.guest();
    cpu::write_tables(guest).map_err(|e| other("write tables", e.to_string()))?;
    guest
        .write_slice(PROBE_CODE, GuestAddress(PROBE_CODE_AT))
        .map_err(|e| other("write code", e.to_string()))?;
    let vcpu = vm.create_vcpu(0).map_err(fail("create a vCPU"))?;
    let supported = cpu::supported(kvm).map_err(fail("read CPUID"))?;
    let entry = Entry {
        rip: PROBE_CODE_AT,
        zero_page: 0,
    };
    cpu::configure(&vcpu, 0, 1, &supported, &entry)
        .map_err(|e| other("set registers", format!("{e:?}")))?;
    Ok((vm, vcpu))
}

/// A VM with its addresses and interrupt controllers, before memory and vCPUs. No PIT.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    let vm = loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)?;
    vm.set_tss_address(layout::KVM_TSS)?;
    vm.create_irq_chip()?;
    Ok(vm)
}

/// Gives a VM its memory slots. The memory must outlive the VM.
#[expect(unsafe_code, reason = "KVM is handed host addresses")]
pub fn map_memory(vm: &VmFd, memory: &VmMemory) -> Result<(), kvm_ioctls::Error> {
    for (slot, range) in (0..).zip(memory.ranges()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: range.guest,
            memory_size: range.bytes,
            userspace_addr: range.host,
            flags: 0,
        };
        // SAFETY: the range is mapped and VmMemory keeps it; whoever owns both drops the VM first.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_says_yes_or_names_what_is_missing() {
        match check_kvm() {
            Ok(()) => {}
            Err(KvmProblem::StockKernels { what }) => assert!(!what.is_empty()),
            Err(other) => panic!("{other}"),
        }
    }
}

//! Starting a VM: everything is prepared on the caller's thread, then handed to the supervisor.
//!
//! ```text
//!  memory <- kernel, tables     KVM machine <- memory slots     devices     vCPUs
//!      └────────────────────────────┴──────────────────────────────┴──────────┴──> supervise
//! ```
//!
//! Whatever fails on the way is released by the drop of what was made so far.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::assemble::{self, Wiring};
use super::boot::{self, Entry, LoadSpec};
use super::delta::fill_random;
use super::error::StartError;
use super::gate::{Gate, Wanted};
use super::handle::{HandleShared, Outcome, VmHandle};
use super::memory::VmMemory;
use super::spec::{BootPhase, VmEnd, VmSpec};
use super::supervisor::{self, Machine};
use super::timeline::Timeline;
use super::vcpu::{Ending, Shared};
use super::{acpi, cpu, kick, kvm, layout};
use crate::devices::console::ConsoleSink;

const MAX_VCPUS: u8 = 64;
/// Thread names have 15 bytes: this, and `/vcpu63`.
const MAX_NAME: usize = 8;

/// Called on the VM's own thread after everything of it is released.
pub type OnEnd = Box<dyn FnOnce(VmEnd) + Send>;

/// Starts a VM; blocks for as long as reading the kernel takes. `on_end` is called once, on the
/// VM's own thread, after threads are joined, memory is unmapped and files are closed; it is not
/// called where this fails.
pub fn start(spec: VmSpec, on_end: OnEnd) -> Result<VmHandle, StartError> {
    let timeline = Timeline::start();
    validate(&spec)?;
    let memory = VmMemory::anonymous(spec.memory_mib)?;
    start_in(memory, spec, timeline, on_end)
}

/// Starts a VM in `memory`.
fn start_in(
    memory: VmMemory,
    mut spec: VmSpec,
    timeline: Timeline,
    on_end: OnEnd,
) -> Result<VmHandle, StartError> {
    let timeline = Arc::new(timeline);
    let kvm = kvm::open()?;
    check_vcpus(&kvm, spec.vcpus)?;
    kick::install().map_err(StartError::vm("install the signal of vCPUs"))?;
    let entry = load(&spec, &memory)?;
    timeline.mark(BootPhase::Loaded);
    let vm = kvm::create_vm(&kvm).map_err(StartError::vm("create a KVM machine"))?;
    let vm = Arc::new(vm);
    kvm::map_memory(&vm, &memory).map_err(StartError::vm("give KVM the guest's memory"))?;
    let sink = ConsoleSink::new(spec.console.take());
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(StartError::vm("make an event descriptor"))?;
    let ending = Arc::new(Ending::new(wake));
    let name = spec.name.clone();
    let wiring = Wiring {
        name: &name,
        vm: &vm,
        memory: memory.guest(),
        ending: &ending,
        timeline: &timeline,
        sink: &sink,
    };
    let assembled = assemble::assemble(&mut spec, &wiring)?;
    let vcpus = create_vcpus(&kvm, &vm, spec.vcpus, &entry)?;
    let (requests, inbox) = channel();
    let handle = HandleShared {
        requests,
        ending: Arc::clone(&ending),
        outcome: Arc::new(Outcome::default()),
        timeline: Arc::clone(&timeline),
        sink: sink.clone(),
        agent: Mutex::new(assembled.agent),
        agent_opened: assembled.agent_opened,
    };
    let shared = Shared {
        platform: assembled.platform,
        gate: Arc::new(Gate::new(Wanted::Paused)),
        ending,
        timeline,
    };
    let meters = (assembled.deltas, assembled.balloon_mib);
    let typed_on_uart = console_is_serial(&spec.cmdline);
    let mut machine = Machine::new(shared, meters, sink, typed_on_uart, (vm, memory));
    machine.spawn(&spec.name, vcpus)?;
    supervisor::spawn(
        &spec.name,
        machine,
        inbox,
        Arc::clone(&handle.outcome),
        on_end,
    )?;
    Ok(VmHandle {
        shared: Arc::new(handle),
    })
}

fn validate(spec: &VmSpec) -> Result<(), StartError> {
    let printable = spec.name.bytes().all(|byte| byte.is_ascii_graphic());
    if spec.name.is_empty() || spec.name.len() > MAX_NAME || !printable {
        return Err(StartError::Name {
            name: spec.name.clone(),
        });
    }
    if spec.disks.len() > assemble::MAX_DISKS {
        return Err(StartError::TooManyDisks {
            asked: spec.disks.len(),
            max: assemble::MAX_DISKS,
        });
    }
    let host = rustix::system::sysinfo();
    let host_mib = host.totalram.saturating_mul(u64::from(host.mem_unit)) >> 20;
    let asked_mib = u64::from(spec.memory_mib);
    if asked_mib > host_mib {
        return Err(StartError::MemoryTooLarge {
            asked_mib,
            host_mib,
        });
    }
    Ok(())
}

fn check_vcpus(kvm: &Kvm, asked: u8) -> Result<(), StartError> {
    let max = u8::try_from(kvm.get_max_vcpus()).map_or(MAX_VCPUS, |max| max.min(MAX_VCPUS));
    if asked == 0 || asked > max {
        return Err(StartError::Vcpus { asked, max });
    }
    Ok(())
}

/// Kernel, ACPI tables, GDT, page tables and a fresh generation ID.
fn load(spec: &VmSpec, memory: &VmMemory) -> Result<Entry, StartError> {
    let guest = memory.guest();
    let rsdp = acpi::write(guest, spec.vcpus)?;
    let entry = boot::load(
        guest,
        &LoadSpec {
            kernel: &spec.kernel,
            initrd: spec.initrd.as_deref(),
            cmdline: &spec.cmdline,
            rsdp,
        },
    )?;
    cpu::write_tables(guest).map_err(|_outside| boot::LoadError::Memory)?;
    let mut generation = [0; 16];
    fill_random(&mut generation).map_err(StartError::vm("make a generation ID"))?;
    guest
        .write_slice(&generation, GuestAddress(layout::VM_GENERATION_ID))
        .map_err(|_outside| boot::LoadError::Memory)?;
    Ok(entry)
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8, entry: &Entry) -> Result<Vec<VcpuFd>, StartError> {
    let supported = cpu::supported(kvm).map_err(StartError::vm("read what CPUID offers"))?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm
            .create_vcpu(u64::from(index))
            .map_err(StartError::vm("create a vCPU"))?;
        cpu::configure(&vcpu, index, count, &supported, entry)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Whether the guest's `/dev/console`, its last `console=`, is the serial port.
fn console_is_serial(cmdline: &str) -> bool {
    let mut words = cmdline.split_whitespace().rev();
    let last = words.find_map(|word| word.strip_prefix("console="));
    last.is_some_and(|device| device.starts_with("ttyS"))
}

#[cfg(test)]
#[path = "vm_test.rs"]
mod tests;

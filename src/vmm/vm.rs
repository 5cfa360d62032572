//! Starting a VM: everything is prepared on the caller's thread, then handed to the supervisor.
//!
//! ```text
//!  memory <- kernel, tables     KVM machine <- memory slots     devices     vCPUs
//!      └────────────────────────────┴──────────────────────────────┴──────────┴──> supervise
//! ```
//!
//! Whatever fails on the way is released by the drop of what was made so far.

use std::fs::File;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::assemble::{self, Assembled, Parts, Wiring};
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
    let memory = if spec.golden {
        VmMemory::golden(spec.memory_mib)?
    } else {
        VmMemory::anonymous(spec.memory_mib)?
    };
    start_in(memory, spec, timeline, on_end)
}

/// Starts a VM in `memory`.
fn start_in(
    memory: VmMemory,
    mut spec: VmSpec,
    timeline: Timeline,
    on_end: OnEnd,
) -> Result<VmHandle, StartError> {
    let kvm = kvm::open()?;
    check_vcpus(&kvm, spec.vcpus)?;
    let entry = load(&spec, &memory)?;
    timeline.mark(BootPhase::Loaded);
    let frame = Frame::new(&kvm, memory, timeline, spec.console.take())?;
    frame.map_memory()?;
    let disks = std::mem::take(&mut spec.disks).into_iter();
    let parts = Parts {
        memory_mib: spec.memory_mib,
        net: spec.net.take(),
        agent_channel: spec.agent_channel,
        disks: disks.map(|disk| (disk, None)).collect(),
    };
    let assembled = frame.assemble(&spec.name, parts)?;
    let vcpus = create_vcpus(&kvm, &frame.vm, spec.vcpus, &entry)?;
    let launch = Launch {
        name: &spec.name,
        vcpus,
        assembled,
        typed_on_uart: console_is_serial(&spec.cmdline),
        agent_channel: spec.agent_channel,
        paused: None,
    };
    frame.launch(launch, on_end)
}

/// What every VM is built around, booted or restored. The KVM machine goes before its memory.
pub(super) struct Frame {
    pub(super) vm: Arc<VmFd>,
    memory: VmMemory,
    ending: Arc<Ending>,
    timeline: Arc<Timeline>,
    sink: ConsoleSink,
}

/// A machine that is ready to be handed to its threads.
pub(super) struct Launch<'a> {
    pub(super) name: &'a str,
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) assembled: Assembled,
    pub(super) typed_on_uart: bool,
    pub(super) agent_channel: bool,
    /// It waits to be resumed, and this is when its clock stopped.
    pub(super) paused: Option<kvm_clock_data>,
}

impl Frame {
    /// A KVM machine with its interrupt controllers; it does not know its memory yet.
    pub(super) fn new(
        kvm: &Kvm,
        memory: VmMemory,
        timeline: Timeline,
        console: Option<File>,
    ) -> Result<Self, StartError> {
        kick::install().map_err(StartError::vm("install the signal of vCPUs"))?;
        let vm = kvm::create_vm(kvm).map_err(StartError::vm("create a KVM machine"))?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(StartError::vm("make an event descriptor"))?;
        Ok(Self {
            vm: Arc::new(vm),
            memory,
            ending: Arc::new(Ending::new(wake)),
            timeline: Arc::new(timeline),
            sink: ConsoleSink::new(console),
        })
    }

    pub(super) fn map_memory(&self) -> Result<(), StartError> {
        let mapped = kvm::map_memory(&self.vm, &self.memory);
        mapped.map_err(StartError::vm("give KVM the guest's memory"))
    }

    pub(super) fn assemble(&self, name: &str, parts: Parts) -> Result<Assembled, StartError> {
        let wiring = Wiring {
            name,
            vm: &self.vm,
            memory: self.memory.guest(),
            ending: &self.ending,
            timeline: &self.timeline,
            sink: &self.sink,
        };
        assemble::assemble(parts, &wiring)
    }

    /// Puts a fresh generation ID into memory.
    pub(super) fn new_generation(&self) -> Result<(), StartError> {
        write_generation(&self.memory)
    }

    /// Starts the VM's threads.
    pub(super) fn launch(self, launch: Launch<'_>, on_end: OnEnd) -> Result<VmHandle, StartError> {
        let (requests, inbox) = channel();
        let assembled = launch.assembled;
        let handle = HandleShared {
            requests,
            ending: Arc::clone(&self.ending),
            outcome: Arc::new(Outcome::default()),
            timeline: Arc::clone(&self.timeline),
            sink: self.sink.clone(),
            agent: Mutex::new(assembled.agent),
            agent_opened: assembled.agent_opened,
        };
        let shared = Shared {
            platform: assembled.platform,
            gate: Arc::new(Gate::new(Wanted::Paused)),
            ending: self.ending,
            timeline: self.timeline,
        };
        let mut machine = Machine {
            vcpus: Vec::new(),
            shared,
            irqs: assembled.irqs,
            disks: assembled.disks,
            balloon_mib: assembled.balloon_mib,
            sink: self.sink,
            typed_on_uart: launch.typed_on_uart,
            agent_channel: launch.agent_channel,
            paused: launch.paused,
            frozen: false,
            vm: self.vm,
            memory: self.memory,
        };
        machine.spawn(launch.name, launch.vcpus)?;
        let outcome = Arc::clone(&handle.outcome);
        supervisor::spawn(launch.name, machine, inbox, outcome, on_end)?;
        Ok(VmHandle {
            shared: Arc::new(handle),
        })
    }
}

/// What a booted and a restored machine must both keep to.
pub(super) fn validate_outside(name: &str, disks: usize) -> Result<(), StartError> {
    let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
    if name.is_empty() || name.len() > MAX_NAME || !printable {
        return Err(StartError::Name {
            name: name.to_owned(),
        });
    }
    if disks > assemble::MAX_DISKS {
        return Err(StartError::TooManyDisks {
            asked: disks,
            max: assemble::MAX_DISKS,
        });
    }
    Ok(())
}

fn validate(spec: &VmSpec) -> Result<(), StartError> {
    validate_outside(&spec.name, spec.disks.len())?;
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

pub(super) fn check_vcpus(kvm: &Kvm, asked: u8) -> Result<(), StartError> {
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
    write_generation(memory)?;
    Ok(entry)
}

fn write_generation(memory: &VmMemory) -> Result<(), StartError> {
    let mut generation = [0; 16];
    fill_random(&mut generation).map_err(StartError::vm("make a generation ID"))?;
    let at = GuestAddress(layout::VM_GENERATION_ID);
    memory
        .guest()
        .write_slice(&generation, at)
        .map_err(|_outside| boot::LoadError::Memory.into())
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

//! A vCPU's thread: KVM_RUN and the exits it causes.
//!
//! Owns its vCPU. Leaves when the guest ended the machine, when KVM could not go on, or when the
//! gate says so; whatever ended it is recorded once for the VM, the first cause counts. A panic
//! here is caught at the thread's root and is a host fault of this VM.
#![expect(
    unsafe_code,
    reason = "kvm_run is a union that the exit reason tells apart"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use super::gate::Gate;
use super::kick::Kickable;
use super::platform::Platform;
use super::spec::{BootPhase, VmEnd};
use super::timeline::Timeline;

/// How a VM ends: the first cause, and the event that wakes its supervisor.
#[derive(Debug)]
pub struct Ending {
    first: Mutex<Option<VmEnd>>,
    wake: EventFd,
}

impl Ending {
    pub fn new(wake: EventFd) -> Self {
        Self {
            first: Mutex::new(None),
            wake,
        }
    }

    /// Records a cause and wakes the supervisor; never blocks.
    pub fn record(&self, end: VmEnd) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(end);
        drop(first);
        self.wake();
    }

    /// The first cause.
    pub fn recorded(&self) -> Option<VmEnd> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.clone()
    }

    /// Wakes the supervisor; never blocks.
    pub fn wake(&self) {
        let _saturated = self.wake.write(1);
    }

    pub fn wake_event(&self) -> &EventFd {
        &self.wake
    }
}

/// What all vCPUs of a VM share.
#[derive(Clone)]
pub struct Shared {
    pub platform: Arc<Platform>,
    pub gate: Arc<Gate>,
    pub ending: Arc<Ending>,
    pub timeline: Arc<Timeline>,
}

/// Starts the thread of vCPU `index`.
pub fn spawn(
    vm: &str,
    index: u8,
    mut vcpu: VcpuFd,
    shared: Shared,
) -> std::io::Result<JoinHandle<()>> {
    let name = format!("{vm}/vcpu{index}");
    std::thread::Builder::new().name(name).spawn(move || {
        let ended = catch_unwind(AssertUnwindSafe(|| run(&mut vcpu, index, &shared)));
        let end = ended.unwrap_or_else(|_panic| {
            Some(VmEnd::HostFault {
                reason: format!("vcpu thread {index} panicked"),
            })
        });
        if let Some(end) = end {
            shared.ending.record(end);
        }
        shared.gate.leave();
    })
}

/// Runs until something ends the VM, or `None` when asked to leave.
fn run(vcpu: &mut VcpuFd, index: u8, shared: &Shared) -> Option<VmEnd> {
    let mut kickable = Kickable::new(vcpu);
    if !wait_at_gate(&mut kickable, index, &shared.gate) {
        return None;
    }
    if index == 0 {
        shared.timeline.mark(BootPhase::FirstRun);
    }
    let platform = &shared.platform;
    loop {
        let end = match kickable.vcpu().run() {
            Ok(VcpuExit::MmioWrite(address, data)) => platform.write_memory(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => platform.read_memory(address, data),
            Ok(VcpuExit::IoOut(port, data)) => platform.write_port(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                platform.read_port(port, data);
                None
            }
            Ok(VcpuExit::Intr) => None,
            Ok(VcpuExit::Shutdown) => Some(VmEnd::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Some(VmEnd::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Some(VmEnd::Reboot),
            Ok(VcpuExit::InternalError) => Some(internal_error(kickable.vcpu(), index)),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Some(VmEnd::HostFault {
                reason: format!("guest memory at {gpa:#x} cannot be accessed"),
            }),
            Ok(other) => {
                let detail = format!("vcpu {index}: unexpected exit {other:?}");
                Some(VmEnd::Internal {
                    suberror: 0,
                    detail,
                })
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    // Only here, where no I/O of the vCPU is half done, may it park.
                    kickable.acknowledge();
                    if !wait_at_gate(&mut kickable, index, &shared.gate) {
                        return None;
                    }
                    None
                }
                libc::EAGAIN => None,
                _ => Some(VmEnd::HostFault {
                    reason: format!("vcpu {index} cannot run: {error}"),
                }),
            },
        };
        if end.is_some() {
            return end;
        }
    }
}

/// Waits for as long as the gate is closed; false if the vCPU must leave.
fn wait_at_gate(kickable: &mut Kickable<'_>, index: u8, gate: &Gate) -> bool {
    let passed = gate.pass(index, kickable.vcpu());
    // The guest's clock may have stood still meanwhile: this says that it was no lock-up. A guest
    // without kvm-clock cannot be told.
    let _no_clock = kickable.vcpu().kvmclock_ctrl();
    passed
}

/// KVM's sub-code, where the vCPU stood, and the instruction it could not emulate.
fn internal_error(vcpu: &mut VcpuFd, index: u8) -> VmEnd {
    // SAFETY: KVM_EXIT_INTERNAL_ERROR fills this member, and any bits are valid integers.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let mut detail = format!("vcpu {index}");
    if let Ok(regs) = vcpu.get_regs() {
        detail.push_str(&format!(" at rip {:#x}", regs.rip));
    }
    // Data of an emulation error: flags, then a size and up to 15 bytes of instruction.
    let [flags, first, second, ..] = internal.data;
    let has_bytes = internal.suberror == KVM_INTERNAL_ERROR_EMULATION
        && internal.ndata >= 3
        && flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    if has_bytes {
        let mut bytes = first.to_le_bytes().into_iter().chain(second.to_le_bytes());
        let size = usize::from(bytes.next().unwrap_or(0));
        let text: Vec<String> = bytes.take(size).map(|b| format!("{b:02x}")).collect();
        detail.push_str(&format!(", instruction {}", text.join(" ")));
    }
    VmEnd::Internal {
        suberror: internal.suberror,
        detail,
    }
}

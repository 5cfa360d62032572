//! The thread that owns a running VM, `<name>`: it serves the handles' requests, notices what no
//! exit tells (lost memory, a kernel that died in silence), and releases everything at the end.
//!
//! ```text
//!  running ──(first recorded end)──> vCPUs joined ──> devices back ──> VM, memory ──> on_end
//! ```

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::assemble::{BalloonMeter, DiskFile, delta_bytes};
use super::error::StartError;
use super::gate::Wanted;
use super::handle::{Outcome, Request, VmStats};
use super::irq::IrqRouter;
use super::kick;
use super::layout;
use super::memory::VmMemory;
use super::snapshot::set_clock;
use super::spec::{BootPhase, VmEnd};
use super::vcpu::{self, Shared};
use super::vm::OnEnd;
use crate::chain::chain;
use crate::devices::console::ConsoleSink;
use crate::devices::{DeviceCommand, DeviceKind};

/// How often to look whether the guest's kernel has died in silence, in ms.
const TICK_MS: i32 = 1000;
/// What a dead kernel gets to reboot by itself.
const PANIC_GRACE: Duration = Duration::from_secs(2);
/// The last thing that Linux prints where it does not reboot after a panic.
const PANIC_IS_FINAL: &str = "---[ end Kernel panic";
/// How much of the console a panic's end carries.
const TAIL_BYTES: usize = 4096;
/// How long to wait for vCPUs before looking whether the VM ended meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_millis(10);

/// All of a running VM. Its drop releases it in order: vCPUs, devices, then the fields in the
/// order they stand here.
pub(super) struct Machine {
    pub(super) vcpus: Vec<JoinHandle<()>>,
    pub(super) shared: Shared,
    pub(super) irqs: Arc<IrqRouter>,
    pub(super) disks: Vec<DiskFile>,
    pub(super) balloon_mib: BalloonMeter,
    pub(super) sink: ConsoleSink,
    /// Typed bytes go to the serial port instead of hvc0.
    pub(super) typed_on_uart: bool,
    pub(super) agent_channel: bool,
    /// Since when the guest's clock stands still.
    pub(super) paused: Option<kvm_clock_data>,
    /// A snapshot has its memory: it never runs again.
    pub(super) frozen: bool,
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: VmMemory,
}

impl Machine {
    /// Starts the vCPUs' threads; they wait at the gate.
    pub(super) fn spawn(&mut self, name: &str, vcpus: Vec<VcpuFd>) -> Result<(), StartError> {
        for (index, vcpu) in (0..).zip(vcpus) {
            let thread = vcpu::spawn(name, index, vcpu, self.shared.clone());
            let thread = thread.map_err(|source| StartError::Thread {
                name: format!("{name}/vcpu{index}"),
                source,
            })?;
            self.vcpus.push(thread);
        }
        Ok(())
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(kick::kick);
    }

    /// Serves until something ends the VM.
    fn serve(&mut self, inbox: &Receiver<Request>) -> std::io::Result<VmEnd> {
        let epoll = Epoll::new()?;
        let lost_memory = self.memory.host_fault();
        let wake = self.shared.ending.wake_event().as_raw_fd();
        for fd in [wake, lost_memory.event().as_raw_fd()] {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        if self.paused.is_none() {
            self.shared.gate.set(Wanted::Running);
        }
        let mut panicked_since = None;
        loop {
            if lost_memory.is_raised() {
                self.shared.ending.record(memory_was_lost());
            }
            // Cleared first: what is recorded or sent from here on wakes again.
            let _empty = self.shared.ending.wake_event().read();
            while let Ok(request) = inbox.try_recv() {
                self.handle(request);
            }
            if let Some(end) = self.shared.ending.recorded() {
                return Ok(end);
            }
            if self.is_dead() {
                let since = *panicked_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= PANIC_GRACE {
                    self.shared.ending.record(VmEnd::Panic {
                        tail: self.sink.tail(TAIL_BYTES),
                    });
                }
            }
            match epoll.wait(TICK_MS, &mut [EpollEvent::default(); 2]) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(error);
                }
                _ => {}
            }
        }
    }

    /// Whether the guest's kernel panicked and will not reboot.
    fn is_dead(&self) -> bool {
        self.sink.panicked() && self.sink.tail(TAIL_BYTES).contains(PANIC_IS_FINAL)
    }

    fn handle(&mut self, request: Request) {
        match request {
            Request::Device(kind, command, reply) => {
                self.command(kind, command);
                // Who asked may have gone.
                let _gone = reply.send(());
            }
            Request::PowerButton(reply) => {
                let events = &self.shared.platform.events;
                events.raise(layout::GED_POWER_BUTTON);
                let _gone = reply.send(());
            }
            Request::Pause(reply) => {
                if self.pause() {
                    let _gone = reply.send(());
                }
            }
            Request::Resume(reply) => {
                if self.resume() {
                    let _gone = reply.send(());
                }
            }
            Request::Save(directory, reply) => {
                let _gone = reply.send(self.save(&directory));
            }
            Request::Freeze(reply) => {
                let _gone = reply.send(self.freeze());
            }
            Request::Stats(reply) => {
                let _gone = reply.send(self.stats());
            }
            Request::ConsoleInput(bytes) => self.type_in(bytes),
            Request::ConsoleSize { columns, rows } => {
                let command = DeviceCommand::ConsoleSize { columns, rows };
                self.command(DeviceKind::Console, command);
            }
        }
    }

    fn command(&self, kind: DeviceKind, command: DeviceCommand) {
        let mut functions = self.shared.platform.pci.functions();
        let Some(function) = functions.find(|function| function.kind() == kind) else {
            return;
        };
        if let Err(fault) = function.command(command) {
            let reason = chain(&fault);
            self.shared.ending.record(VmEnd::HostFault { reason });
        }
    }

    fn type_in(&self, bytes: Vec<u8>) {
        if self.typed_on_uart {
            let uart = self.shared.platform.uart.lock();
            uart.unwrap_or_else(PoisonError::into_inner).input(&bytes);
        } else {
            self.command(DeviceKind::Console, DeviceCommand::ConsoleInput(bytes));
        }
    }

    /// Parks the vCPUs, then takes the devices back; false if the VM ended meanwhile.
    fn pause(&mut self) -> bool {
        if self.paused.is_some() {
            return true;
        }
        self.shared.gate.set(Wanted::Paused);
        self.kick();
        if !self.wait_parked() {
            return false;
        }
        // Nothing runs that could see the clock move between this and the resume.
        match self.vm.get_clock() {
            Ok(clock) => self.paused = Some(clock),
            Err(error) => return self.fail("read the clock", error),
        }
        for function in self.shared.platform.pci.functions() {
            function.pause();
        }
        true
    }

    /// Whether all vCPUs are out of KVM_RUN; waits for it unless the VM has ended.
    pub(super) fn wait_parked(&self) -> bool {
        while !self.shared.gate.wait_out(self.vcpus.len(), PATIENCE) {
            if self.shared.ending.recorded().is_some() {
                return false;
            }
        }
        true
    }

    /// Lets the vCPUs go on; false if they may not.
    fn resume(&mut self) -> bool {
        let Some(clock) = self.paused else {
            return true;
        };
        if self.frozen {
            return false;
        }
        for function in self.shared.platform.pci.functions().rev() {
            function.resume();
        }
        if let Err(error) = set_clock(&self.vm, &clock) {
            return self.fail("set the clock", error);
        }
        self.paused = None;
        self.shared.gate.set(Wanted::Running);
        true
    }

    /// Ends the VM for a call that KVM refused; always false.
    fn fail(&self, act: &str, error: kvm_ioctls::Error) -> bool {
        let reason = format!("cannot {act}: {error}");
        self.shared.ending.record(VmEnd::HostFault { reason });
        false
    }

    fn stats(&self) -> VmStats {
        let functions = self.shared.platform.pci.functions();
        VmStats {
            resident_bytes: self.memory.resident_bytes(),
            balloon_mib: (self.balloon_mib)(),
            disk_delta_bytes: delta_bytes(&self.disks),
            guest_faults: functions.map(|function| function.guest_faults()).sum(),
        }
    }

    /// Ends everything that runs: vCPUs first, then devices. Idempotent.
    fn stop(&mut self) {
        self.shared.gate.set(Wanted::Stopped);
        self.kick();
        for thread in self.vcpus.drain(..) {
            // Its panic was caught at its root.
            let _caught = thread.join();
        }
        for function in self.shared.platform.pci.functions().rev() {
            function.stop();
        }
    }

    /// What the end is called, now that everything has stopped: what the guest did after the host
    /// had lost a page of its memory, and before that was noticed, says nothing.
    fn name_end(&self, end: VmEnd) -> VmEnd {
        if self.memory.host_fault().is_raised() && end != VmEnd::Killed {
            return memory_was_lost();
        }
        let by_kernel = matches!(end, VmEnd::Reboot | VmEnd::TripleFault);
        if by_kernel && self.sink.panicked() {
            return VmEnd::Panic {
                tail: self.sink.tail(TAIL_BYTES),
            };
        }
        end
    }
}

fn memory_was_lost() -> VmEnd {
    VmEnd::HostFault {
        reason: "a page of the machine's memory was lost (SIGBUS)".to_owned(),
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Hands the machine to its supervisor.
pub(super) fn spawn(
    name: &str,
    mut machine: Machine,
    inbox: Receiver<Request>,
    outcome: Arc<Outcome>,
    on_end: OnEnd,
) -> Result<(), StartError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let vm = name.to_owned();
    let spawned = thread.spawn(move || {
        let served = catch_unwind(AssertUnwindSafe(|| machine.serve(&inbox)));
        // Requests that come too late are told so at once.
        drop(inbox);
        let end = match served {
            Ok(Ok(end)) => end,
            Ok(Err(error)) => VmEnd::HostFault {
                reason: format!("cannot wait for events: {error}"),
            },
            Err(_panic) => VmEnd::HostFault {
                reason: "supervisor panicked".to_owned(),
            },
        };
        machine.shared.timeline.mark(BootPhase::Ended);
        let released = catch_unwind(AssertUnwindSafe(move || {
            machine.stop();
            let end = machine.name_end(end);
            drop(machine);
            end
        }));
        let end = released.unwrap_or_else(|_panic| VmEnd::HostFault {
            reason: "release panicked".to_owned(),
        });
        tracing::debug!(vm, "ended: {end}");
        outcome.set(end.clone());
        on_end(end);
    });
    match spawned {
        Ok(_detached) => Ok(()),
        Err(source) => Err(StartError::Thread {
            name: name.to_owned(),
            source,
        }),
    }
}

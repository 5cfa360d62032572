//! Saving a paused VM, on its supervisor's thread.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use kvm_bindings::kvm_clock_data;

use super::assemble::DiskFile;
use super::error::VmGone;
use super::kvm;
use super::snapshot::{
    self, ChipsState, Directory, HostKey, HostKeyError, MachineState, SaveError, Snapshot,
    VcpuState,
};
use super::supervisor::{Machine, PATIENCE};
use crate::devices::block::BlockState;

/// What a golden machine leaves behind; whole once the machine has ended.
pub(super) struct Draft {
    state: MachineState,
    memory: Arc<File>,
    deltas: Vec<Option<File>>,
}

impl Draft {
    /// The snapshot. The machine must have been released.
    pub(super) fn freeze(self) -> Result<Snapshot, SaveError> {
        Snapshot::freeze(self.state, &self.memory, self.deltas).map_err(SaveError::Memory)
    }
}

impl Machine {
    /// Saves everything to a directory.
    pub(super) fn save(&self, path: &Path) -> Result<(), SaveError> {
        let host = HostKey::of_this_host()?;
        let state = self.capture()?;
        let directory = Directory::create(path)?;
        directory.write_memory(|to| snapshot::write_memory(&self.memory, to))?;
        if self.memory.host_fault().is_raised() {
            return Err(VmGone.into());
        }
        for (index, disk) in self.disks.iter().enumerate() {
            if let Some(delta) = disk.delta() {
                directory.write_disk(index, delta)?;
            }
        }
        Ok(directory.write_state(&state, &host)?)
    }

    /// Saves the state and keeps the VM from running ever again: its memory and deltas are the
    /// snapshot's.
    pub(super) fn freeze(&mut self) -> Result<Draft, SaveError> {
        let memory = self.memory.golden_file().ok_or(SaveError::NotGolden)?;
        let memory = Arc::clone(memory);
        let deltas: Result<Vec<_>, _> = self
            .disks
            .iter()
            .map(|disk| disk.delta().map(File::try_clone).transpose())
            .collect();
        let draft = Draft {
            state: self.capture()?,
            memory,
            deltas: deltas.map_err(SaveError::Memory)?,
        };
        self.frozen = true;
        Ok(draft)
    }

    /// The state of a paused VM. Right as long as it stays paused.
    fn capture(&self) -> Result<MachineState, SaveError> {
        let clock = self.paused.ok_or(SaveError::NotPaused)?;
        if !self.wait_parked() {
            return Err(VmGone.into());
        }
        let in_place = |disk: &DiskFile| matches!(disk, DiskFile::InPlace);
        if let Some(index) = self.disks.iter().position(in_place) {
            return Err(SaveError::DiskInPlace { index });
        }
        let captured = self.unwire().and_then(|()| self.read_state(clock));
        // Whatever failed: the VM goes on as it was.
        self.wire()?;
        captured
    }

    /// Nothing is on its way into the interrupt controllers once this is done.
    fn unwire(&self) -> Result<(), SaveError> {
        for function in self.shared.platform.pci.functions() {
            function.unwire()?;
        }
        Ok(self.irqs.unwire_pins()?)
    }

    fn wire(&self) -> Result<(), SaveError> {
        for function in self.shared.platform.pci.functions() {
            function.wire();
        }
        Ok(self.irqs.wire_pins()?)
    }

    fn read_state(&self, clock: kvm_clock_data) -> Result<MachineState, SaveError> {
        let platform = &self.shared.platform;
        let functions: Result<Vec<_>, _> = platform.pci.functions().map(|f| f.save()).collect();
        let uart = platform.uart.lock();
        let uart = uart.unwrap_or_else(std::sync::PoisonError::into_inner);
        let ranges = self.memory.ranges();
        let bytes: u64 = ranges.iter().map(|range| range.bytes).sum();
        let state = MachineState {
            memory_mib: u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
            typed_on_uart: self.typed_on_uart,
            agent_channel: self.agent_channel,
            functions: functions.map_err(SaveError::Device)?,
            uart: uart.save(),
            events: platform.events.pending(),
            pci_address: platform.pci.address(),
            vcpus: self.save_vcpus()?,
            chips: ChipsState::save(&self.vm, clock)?,
        };
        let of_a_clone = |disk: &BlockState| disk.map().is_some_and(|map| map.frozen().is_err());
        if state.disks().any(of_a_clone) {
            return Err(SaveError::Clone);
        }
        Ok(state)
    }

    /// Has each vCPU's thread read its vCPU.
    fn save_vcpus(&self) -> Result<Vec<VcpuState>, SaveError> {
        let kvm = kvm::open().map_err(HostKeyError::Kvm)?;
        let msrs = snapshot::wanted_msrs(&kvm)?;
        let xsave = snapshot::xsave_bytes(&self.vm);
        let (sender, saved) = channel();
        let gate = &self.shared.gate;
        gate.send(
            self.vcpus.len(),
            Arc::new(move |index, vcpu| {
                // Nobody waits any more only if the VM has ended.
                let _gone = sender.send((index, VcpuState::save(vcpu, xsave, &msrs)));
            }),
        );
        while !gate.wait_done(PATIENCE) {
            if self.shared.ending.recorded().is_some() {
                return Err(VmGone.into());
            }
        }
        let mut states: Vec<_> = saved.try_iter().collect();
        states.sort_by_key(|(index, _)| *index);
        let states: Result<Vec<_>, _> = states.into_iter().map(|(_, state)| state).collect();
        Ok(states?)
    }
}

//! Starting a VM from a snapshot: as `vm.rs` does it from a kernel, with the state of everything
//! put back on the way.
//!
//! The VM is left paused. Until it is resumed no device touches its memory, so it can wait for as
//! long as its owner likes.

use kvm_ioctls::{Kvm, VcpuFd};

use super::assemble::{Assembled, Parts};
use super::error::StartError;
use super::handle::VmHandle;
use super::snapshot::{MachineState, Snapshot, SnapshotError, xsave_bytes};
use super::spec::{BootPhase, DiskSource, DiskSpec, RestoreSpec};
use super::timeline::Timeline;
use super::vm::{Frame, Launch, OnEnd, check_vcpus, validate_outside};
use super::{cpu, kvm, layout};
use crate::devices::block::Golden;

/// Starts a clone of a saved machine, paused: [`VmHandle::resume`] lets it run. It has memory and
/// disks of its own, which cost what it changes, and a new generation ID, of which the guest is
/// told. `on_end` as for [`start`](super::start).
pub fn restore(
    spec: RestoreSpec,
    snapshot: &Snapshot,
    on_end: OnEnd,
) -> Result<VmHandle, StartError> {
    let timeline = Timeline::start();
    validate_outside(&spec.name, spec.disks.len())?;
    let state = snapshot.state();
    let saved = state.has_net();
    if saved != spec.net.is_some() {
        return Err(SnapshotError::Net { saved }.into());
    }
    let disks = layered(spec.disks, snapshot)?;
    let kvm = kvm::open()?;
    let count = u8::try_from(state.vcpus()).unwrap_or(u8::MAX);
    check_vcpus(&kvm, count)?;
    let memory = snapshot.clone_memory()?;
    timeline.mark(BootPhase::Loaded);
    let frame = Frame::new(&kvm, memory, timeline, spec.console)?;
    let vcpus = create_vcpus(&kvm, &frame, count)?;
    frame.map_memory()?;
    let xsave = xsave_bytes(&frame.vm);
    for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
        saved.restore(vcpu, xsave).map_err(SnapshotError::Vcpu)?;
    }
    state.chips.restore(&frame.vm).map_err(SnapshotError::Kvm)?;
    let parts = Parts {
        memory_mib: state.memory_mib(),
        net: spec.net,
        agent_channel: state.agent_channel,
        disks,
    };
    let assembled = frame.assemble(&spec.name, parts)?;
    restore_devices(state, &assembled)?;
    frame.new_generation()?;
    let events = &assembled.platform.events;
    events.raise(state.events | layout::GED_GENERATION);
    let launch = Launch {
        name: &spec.name,
        vcpus,
        assembled,
        typed_on_uart: state.typed_on_uart,
        agent_channel: state.agent_channel,
        paused: Some(state.chips.clock),
    };
    frame.launch(launch, on_end)
}

/// Each disk with the snapshot's layer below it.
fn layered(
    disks: Vec<DiskSpec>,
    snapshot: &Snapshot,
) -> Result<Vec<(DiskSpec, Option<Golden>)>, SnapshotError> {
    let (saved, given) = (snapshot.state().disks().count(), disks.len());
    if saved != given {
        return Err(SnapshotError::Disks { saved, given });
    }
    let layer = |(index, disk): (usize, DiskSpec)| {
        let golden = snapshot.golden(index);
        match (&disk.source, &golden) {
            (DiskSource::Overlay { .. }, Some(_)) | (DiskSource::ReadOnly(_), None) => {
                Ok((disk, golden))
            }
            _ => Err(SnapshotError::DiskKind { index }),
        }
    };
    disks.into_iter().enumerate().map(layer).collect()
}

fn create_vcpus(kvm: &Kvm, frame: &Frame, count: u8) -> Result<Vec<VcpuFd>, StartError> {
    let supported = cpu::supported(kvm).map_err(StartError::vm("read what CPUID offers"))?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = frame.vm.create_vcpu(u64::from(index));
        let vcpu = vcpu.map_err(StartError::vm("create a vCPU"))?;
        cpu::set_cpuid(&vcpu, index, count, &supported)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Gives each device its state, and raises every interrupt of it once: one may have been on its
/// way, and a driver must expect one at any time.
fn restore_devices(state: &MachineState, assembled: &Assembled) -> Result<(), SnapshotError> {
    let platform = &assembled.platform;
    let functions: Vec<_> = platform.pci.functions().collect();
    let slots = functions
        .iter()
        .map(|function| (function.slot(), function.kind()));
    let saved = state.functions.iter();
    if !slots.eq(saved.map(|function| (function.slot, function.kind))) {
        let problem = "saved devices are not those of this machine";
        return Err(SnapshotError::Device(crate::devices::HostFault::msg(
            problem,
        )));
    }
    for (function, saved) in functions.into_iter().zip(&state.functions) {
        let restored = function.restore(saved.clone());
        restored.map_err(SnapshotError::Device)?;
    }
    platform.pci.set_address(state.pci_address);
    let uart = platform.uart.lock();
    uart.unwrap_or_else(std::sync::PoisonError::into_inner)
        .restore(state.uart.clone())
        .map_err(SnapshotError::Device)
}

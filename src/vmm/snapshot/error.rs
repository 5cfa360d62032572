//! Why a machine could not be saved, or a snapshot not be used.

use std::io;
use std::path::PathBuf;

use super::file::StateProblem;
use super::key::HostKeyError;
use super::vcpu::VcpuStateError;
use crate::devices::HostFault;
use crate::vmm::error::VmGone;
use crate::vmm::irq::IrqError;

/// No snapshot could be made. The machine is as it was, unless it has ended.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    Gone(#[from] VmGone),
    #[error("the machine runs; hint: pause it first")]
    NotPaused,
    #[error(
        "disk {index} is written in place, so a snapshot would not know what it held; hint: a copy-on-write disk"
    )]
    DiskInPlace { index: usize },
    #[error("the machine is a clone itself; hint: save the one it was cloned from")]
    Clone,
    #[error("the machine's memory is not in a file; hint: start it as a golden one")]
    NotGolden,
    #[error("cannot save a device")]
    Device(#[source] HostFault),
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    #[error("cannot read the state of the KVM machine")]
    Kvm(#[from] kvm_ioctls::Error),
    #[error(transparent)]
    Interrupt(#[from] IrqError),
    #[error(transparent)]
    Host(#[from] HostKeyError),
    #[error("cannot keep the machine's memory")]
    Memory(#[source] io::Error),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// A snapshot on disk, or what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("cannot open the snapshot's {}; hint: a directory that a snapshot was saved to", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot write the snapshot's {}; hint: a writable directory with room for the machine's memory", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot use the snapshot's state {}", path.display())]
    State {
        path: PathBuf,
        #[source]
        source: StateProblem,
    },
    #[error(
        "the snapshot's {} is {found} bytes long instead of {wanted}; hint: make the snapshot again", path.display()
    )]
    Length {
        path: PathBuf,
        found: u64,
        wanted: u64,
    },
    #[error(transparent)]
    Host(#[from] HostKeyError),
    #[error("the snapshot has {saved} disks, the machine is given {given}")]
    Disks { saved: usize, given: usize },
    #[error(
        "disk {index} is not what the snapshot has there; hint: the same disks with the same access (read-only or copy-on-write)"
    )]
    DiskKind { index: usize },
    #[error("the snapshot {}, unlike the machine that is asked for", if *saved { "has a network card" } else { "has no network card" })]
    Net { saved: bool },
    #[error("cannot take over the state of a device; hint: make the snapshot again")]
    Device(#[source] HostFault),
    #[error("cannot take over the state of a vcpu; hint: make the snapshot again")]
    Vcpu(#[source] VcpuStateError),
    #[error("cannot take over the state of the KVM machine; hint: make the snapshot again")]
    Kvm(#[source] kvm_ioctls::Error),
}

//! Why a VM could not be started, and that it is gone.

use std::io;
use std::path::PathBuf;

use super::acpi::AcpiError;
use super::boot::LoadError;
use super::cpu::CpuError;
use super::irq::IrqError;
use super::kvm::KvmProblem;
use super::memory::MemoryError;
use super::pci::{FunctionError, NoSlot};
use super::snapshot::SnapshotError;
use crate::devices::{DeviceKind, HostFault};

/// Why `start` failed; everything it had taken is released.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("a machine has 1 to {max} vCPUs, not {asked}; hint: this host's KVM allows {max}")]
    Vcpus { asked: u8, max: u8 },
    #[error("the name {name:?} is not 1 to 8 bytes of ASCII")]
    Name { name: String },
    #[error(
        "a machine of {asked_mib} MiB is larger than this host's memory of {host_mib} MiB; hint: less memory for the machine"
    )]
    MemoryTooLarge { asked_mib: u64, host_mib: u64 },
    #[error("a machine has at most {max} disks, not {asked}")]
    TooManyDisks { asked: usize, max: usize },
    #[error(transparent)]
    Kvm(#[from] KvmProblem),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error(transparent)]
    Interrupt(#[from] IrqError),
    #[error("cannot {act}")]
    Vm {
        act: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot make a disk's delta file in {}; hint: a writable directory with room", dir.display())]
    Delta {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot set up {what}")]
    Device {
        what: String,
        #[source]
        source: HostFault,
    },
    #[error("cannot wire up the {kind:?} device")]
    Function {
        kind: DeviceKind,
        #[source]
        source: FunctionError,
    },
    #[error(transparent)]
    Slot(#[from] NoSlot),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("cannot start the thread {name}; hint: the limit of tasks (pids.max, ulimit -u)")]
    Thread {
        name: String,
        #[source]
        source: io::Error,
    },
}

impl StartError {
    /// For a failed ioctl or system call.
    pub(super) fn vm<E: Into<io::Error>>(act: &'static str) -> impl Fn(E) -> Self {
        move |source| Self::Vm {
            act,
            source: source.into(),
        }
    }
}

/// The VM has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the virtual machine has ended")]
pub struct VmGone;

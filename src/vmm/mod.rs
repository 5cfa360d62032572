//! One virtual machine: memory, vCPUs, boot protocol, ACPI, PCI, lifecycle.
//!
//! `VmSpec` in, `VmHandle` out; plain threads (`<name>/vcpuK`, `<name>/dev`, `<name>/blk`), no
//! tokio, no policy. Every end of a VM has a name ([`VmEnd`]). A paused VM can be saved, and any
//! number of clones restored from what was saved ([`snapshot`]).

pub mod acpi;
mod assemble;
pub mod boot;
pub mod cpu;
mod delta;
mod error;
mod gate;
mod handle;
mod irq;
mod kick;
mod kvm;
pub mod layout;
pub mod memory;
mod pci;
mod platform;
mod restore;
mod save;
pub mod snapshot;
pub mod spec;
mod supervisor;
#[cfg(test)]
mod testing;
mod timeline;
mod vcpu;
mod vm;

pub use error::{StartError, VmGone};
pub use handle::{VmHandle, VmStats};
pub use kvm::{KvmProblem, check_kvm};
pub use restore::restore;
pub use snapshot::{SaveError, Snapshot, SnapshotError};
pub use spec::{
    AGENT_PORT, BootPhase, DiskSource, DiskSpec, KernelSource, NetSpec, RestoreSpec, VmEnd, VmSpec,
};
pub use vm::start;

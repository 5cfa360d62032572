//! One virtual machine: memory, vCPUs, boot protocol, ACPI, PCI, lifecycle.
//!
//! `VmSpec` in, `VmHandle` out; plain threads (`<name>/vcpuK`, `<name>/dev`, `<name>/blk`), no
//! tokio, no policy. Every end of a VM has a name ([`VmEnd`]).

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod layout;
pub mod memory;
pub mod spec;

pub use spec::{BootPhase, DiskSource, DiskSpec, KernelSource, NetSpec, VmEnd, VmSpec};

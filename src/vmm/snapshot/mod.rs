//! Save and restore of a whole machine, and machines cloned from one snapshot.
//!
//! ```text
//!  pause: vCPUs parked, clock read, devices drained and back at rest
//!    └─> interrupts unwired ─> devices ─> vCPUs ─> clock, PICs, IOAPIC ─> memory ─> wired again
//!
//!  restore: VM ─> vCPUs ─> memory ─> vCPU states ─> clock, PICs, IOAPIC ─> devices, every vector
//!           signalled ─> new generation ID ─> (paused) ─> resume: devices run, clock set, vCPUs
//! ```
//!
//! Devices come before KVM's state because draining them raises interrupts, and interrupts are
//! unwired in between so that none is on its way while the controllers are read.
//!
//! A snapshot is immutable and shared: each clone maps its memory copy-on-write and has a delta of
//! its own above the snapshot's frozen one, so that it costs what it changes. Deliberately absent:
//! snapshots that travel, snapshots of clones, writing to a snapshot.

mod copy;
#[cfg(any(test, fuzzing))]
mod dissect;
mod error;
mod file;
mod key;
mod msr;
mod state;
mod store;
mod vcpu;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals};

#[cfg(any(test, fuzzing))]
pub use dissect::{decode, offer_to_devices};
pub use error::{SaveError, SnapshotError};
pub use file::{HEADER_BYTES, StateProblem, encode, read, seal};
pub use key::{HostKey, HostKeyError};
pub use state::{ChipsState, MachineState, set_clock};
pub use store::Directory;
pub use vcpu::{VcpuState, VcpuStateError, xsave_bytes};

use super::memory::{Extent, VmMemory, of_file};
use crate::devices::block::Golden;

/// MSRs that a snapshot of a machine on this host has.
pub use msr::wanted as wanted_msrs;

/// A machine at one moment: any number of clones can start from it, at the same time.
#[derive(Debug)]
pub struct Snapshot {
    state: MachineState,
    memory: Arc<File>,
    extents: Vec<Extent>,
    /// Of each disk, if it has one.
    deltas: Vec<Option<Arc<File>>>,
}

impl Snapshot {
    /// Opens a snapshot that was saved to a directory. Reads the state, and no memory.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let directory = Directory::open(path)?;
        let host = HostKey::of_this_host()?;
        let state = directory.state(&host)?;
        let memory = directory.memory(&state)?;
        let mut deltas = Vec::new();
        for (index, disk) in state.disks().enumerate() {
            let delta = disk.map().map(|_| directory.disk(index, disk.bytes()));
            deltas.push(delta.transpose()?);
        }
        Self::new(state, memory, deltas).map_err(|source| SnapshotError::Open {
            path: path.join("memory"),
            source,
        })
    }

    /// A snapshot of a golden machine that has ended: its memory and deltas, which nobody writes
    /// any more.
    pub(super) fn freeze(
        state: MachineState,
        memory: &File,
        deltas: Vec<Option<File>>,
    ) -> io::Result<Self> {
        copy::punch_zeroes(memory, u64::from(state.memory_mib()) << 20)?;
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(memory, seals)?;
        let mut frozen = Vec::new();
        for delta in deltas {
            frozen.push(match delta {
                Some(delta) => Some(Arc::new(read_only(&delta)?)),
                None => None,
            });
        }
        Self::new(state, Arc::new(read_only(memory)?), frozen)
    }

    fn new(
        state: MachineState,
        memory: Arc<File>,
        deltas: Vec<Option<Arc<File>>>,
    ) -> io::Result<Self> {
        let extents = of_file(&memory, u64::from(state.memory_mib()) << 20)?;
        Ok(Self {
            state,
            memory,
            extents,
            deltas,
        })
    }

    /// Writes the snapshot to a directory, to be opened by another process. Blocks for as long as
    /// storage takes.
    pub fn write(&self, path: &Path) -> Result<(), SnapshotError> {
        let host = HostKey::of_this_host()?;
        let directory = Directory::create(path)?;
        directory.write_memory(|to| copy::copy_sparse(&self.memory, to))?;
        for (index, delta) in self.deltas.iter().enumerate() {
            if let Some(delta) = delta {
                directory.write_disk(index, delta)?;
            }
        }
        directory.write_state(&self.state, &host)
    }

    /// What is saved besides memory and disks.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// Bytes of memory that a clone maps from the snapshot.
    pub fn mapped_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }

    /// A private view of the memory.
    pub(super) fn clone_memory(&self) -> Result<VmMemory, super::memory::MemoryError> {
        VmMemory::clone_of(self.state.memory_mib(), &self.memory, &self.extents)
    }

    /// The frozen layer of a disk; `None` for a disk that never changes.
    pub(super) fn golden(&self, disk: usize) -> Option<Golden> {
        let delta = self.deltas.get(disk)?.clone()?;
        let map = self.state.disks().nth(disk)?.map()?.clone();
        Some(Golden { delta, map })
    }
}

/// Writes the memory of a paused machine.
pub(super) fn write_memory(memory: &VmMemory, to: &File) -> io::Result<()> {
    copy::write_memory(memory, to)
}

/// The same file by a descriptor that cannot write.
fn read_only(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;

#[cfg(test)]
mod disk_test;

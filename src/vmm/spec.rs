//! What a VM is made of and how it ends: the VMM's public vocabulary.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// The agent channel's port in the guest, `/dev/virtio-ports/<name>`.
pub const AGENT_PORT: &str = "fleetingd.agent";

/// A virtual machine as it is asked for. `start` validates it once.
#[derive(Debug)]
pub struct VmSpec {
    /// Prefix of its threads and field of its log lines, such as `vm3` (at most 8 bytes).
    pub name: String,
    /// 1 to 64.
    pub vcpus: u8,
    /// At least 64.
    pub memory_mib: u32,
    pub kernel: KernelSource,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    /// In the order of their PCI slots: the first is the guest's `vda`.
    pub disks: Vec<DiskSpec>,
    pub net: Option<NetSpec>,
    /// Receives every console byte beside the in-memory ring (port 0 and the UART).
    pub console: Option<File>,
    /// Whether to offer the agent channel (console port 1).
    pub agent_channel: bool,
    /// Its memory is to become a snapshot's without being copied
    /// ([`VmHandle::freeze`](crate::vmm::VmHandle::freeze)).
    pub golden: bool,
}

/// What a clone has of its own; everything else comes from its snapshot.
#[derive(Debug)]
pub struct RestoreSpec {
    /// As for [`VmSpec`].
    pub name: String,
    /// As many as the snapshot has, in the same order: each on the same base, and an overlay
    /// where the snapshot has an overlay.
    pub disks: Vec<DiskSpec>,
    /// If the snapshot has a network card. The guest remembers the address and the state of the
    /// link that the snapshot had.
    pub net: Option<NetSpec>,
    pub console: Option<File>,
}

/// Where the kernel comes from; ELF and bzImage are told apart by their magic.
#[derive(Debug, Clone)]
pub enum KernelSource {
    Path(PathBuf),
}

/// One disk.
#[derive(Debug)]
pub struct DiskSpec {
    pub source: DiskSource,
    /// What the guest reads as the disk's serial, at most 20 bytes.
    pub serial: String,
    /// Whether the guest's FLUSH reaches the storage (prebuild) or is only acknowledged (workers).
    pub durable: bool,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone)]
pub enum DiskSource {
    /// Read and write in place.
    Direct(Arc<File>),
    /// Never written.
    ReadOnly(Arc<File>),
    /// A shared base that is never written, and a private delta made in `delta_dir`, gone with the VM.
    Overlay { base: Arc<File>, delta_dir: PathBuf },
}

/// The VM's network card.
#[derive(Debug)]
pub struct NetSpec {
    /// An opened TAP with a vnet header; offloads are set by the VMM.
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// Whether the link is up from the start.
    pub link_up: bool,
    /// Use `/dev/vhost-net` where it opens.
    pub vhost: bool,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEnd {
    /// ACPI S5.
    PowerOff,
    /// The reset register.
    Reboot,
    TripleFault,
    /// The guest's kernel said so on its console; its last lines.
    Panic {
        tail: String,
    },
    /// [`VmHandle::kill`](crate::vmm) or the end of the process.
    Killed,
    /// KVM could not go on: its sub-code and what is known.
    Internal {
        suberror: u32,
        detail: String,
    },
    /// The host failed this VM: SIGBUS, EFAULT, a panic of ours, storage that is gone.
    HostFault {
        reason: String,
    },
}

impl VmEnd {
    /// The exit code of `fleetingd boot`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 10,
            Self::TripleFault => 11,
            Self::Panic { .. } => 12,
            Self::Killed => 13,
            Self::Internal { .. } => 14,
            Self::HostFault { .. } => 15,
        }
    }
}

impl std::fmt::Display for VmEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => write!(f, "powered off"),
            Self::Reboot => write!(f, "rebooted"),
            Self::TripleFault => write!(f, "triple fault"),
            Self::Panic { tail } => {
                write!(
                    f,
                    "kernel panic: {}",
                    panic_message(tail).unwrap_or("no message")
                )
            }
            Self::Killed => write!(f, "killed"),
            Self::Internal { suberror, detail } => {
                write!(f, "kvm internal error {suberror}: {detail}")
            }
            Self::HostFault { reason } => write!(f, "host fault: {reason}"),
        }
    }
}

/// What Linux gave as the reason, out of its last lines.
fn panic_message(tail: &str) -> Option<&str> {
    const BEFORE: &str = "Kernel panic - not syncing: ";
    let (_before, message) = tail
        .lines()
        .rev()
        .find_map(|line| line.split_once(BEFORE))?;
    Some(message.trim_end_matches("]---").trim())
}

/// A point of the boot that `--timing` reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BootPhase {
    /// Guest memory mapped, kernel and initrd in it.
    Loaded,
    /// The first KVM_RUN.
    FirstRun,
    /// The first byte on the early console or hvc0.
    FirstOutput,
    /// The first virtio driver reached DRIVER_OK.
    FirstDriver,
    /// The agent opened its channel.
    AgentOpen,
    Ended,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_called_by_its_reason_and_not_by_a_frame_of_its_trace() {
        let end = |tail: &str| {
            VmEnd::Panic {
                tail: tail.to_owned(),
            }
            .to_string()
        };
        let trace =
            "[ 1.0] Kernel panic - not syncing: sysrq triggered crash\n[ 1.1]  panic+0x118/0x2f4\n";
        assert_eq!(end(trace), "kernel panic: sysrq triggered crash");
        let last = format!("{trace}---[ end Kernel panic - not syncing: Fatal exception ]---\n");
        assert_eq!(end(&last), "kernel panic: Fatal exception");
        assert_eq!(end("panic+0x118"), "kernel panic: no message");
    }
}

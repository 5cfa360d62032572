//! From the start of the VMM's process to words of the guest's first process, and to words of a
//! script that has loaded the virtio drivers and mounted a disk.

use std::path::{Path, PathBuf};

use anyhow::Context;
use fleetingd::vmm::boot::decompress_kernel;

use super::guest::{self, Guest};
use super::machine::{Machine, QEMU, Vmm};
use super::report::{Better, Budget, Row, median};

const ROUNDS: usize = 5;
const MARKER: &str = "BENCH-IS-UP";
const MEMORY_MIB: u32 = 512;
/// What the design promises of a cold boot, as a share of the peer's.
const BUDGET: Budget = Budget::Ratio(0.9);

pub fn measure(guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let bare = Machine {
        memory_mib: MEMORY_MIB,
        kernel: guest.local(&guest.kernel)?,
        initrd: guest.local(&guest.initrd)?,
        cmdline: guest::first_process(MARKER),
        disks: Vec::new(),
        tap: None,
        agent: false,
    };
    // What the guest does with its drivers is the same work everywhere: here each VMM's own part
    // shows in PCI, interrupts and the disk.
    let with_disk = Machine {
        cmdline: guest::script(&format!(
            "grep -q /tools /proc/mounts && echo {MARKER}; sleep 1000"
        )),
        disks: vec![guest.local(&guest.tools)?],
        ..bare.clone()
    };
    let unpacked = Machine {
        kernel: unpacked(&bare.kernel)?,
        ..bare.clone()
    };
    let mut rows = compare("boot to first process", &bare, &[QEMU])?;
    rows.extend(compare(
        "boot to first process, vmlinux",
        &unpacked,
        &unpacked_peers(),
    )?);
    rows.extend(compare(
        "boot to drivers and a mounted disk",
        &with_disk,
        &[QEMU],
    )?);
    Ok(rows)
}

/// One row a peer; every round starts each VMM once.
fn compare(name: &str, machine: &Machine, peers: &[Vmm]) -> anyhow::Result<Vec<Row>> {
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); peers.len()];
    for _round in 0..ROUNDS {
        ours.push(once(&Vmm::Fleetingd, machine)?);
        for (peer, times) in peers.iter().zip(&mut theirs) {
            times.push(once(peer, machine)?);
        }
    }
    let ours = median(&ours);
    let rows = peers.iter().zip(&theirs).map(|(peer, times)| {
        Row::new(name, "ms", Better::Lower)
            .value(ours)
            .peer(peer.name(), median(times))
            .budget(BUDGET)
    });
    Ok(rows.collect())
}

fn once(vmm: &Vmm, machine: &Machine) -> anyhow::Result<f64> {
    let mut running = vmm.start(machine)?;
    let up = running
        .console
        .wait_for(MARKER)
        .with_context(|| format!("{} did not boot", vmm.name()))?;
    Ok((up - running.started).as_secs_f64() * 1e3)
}

/// QEMU enters an ELF kernel by PVH; the others boot nothing else.
fn unpacked_peers() -> Vec<Vmm> {
    let mut peers = vec![QEMU];
    if let Some(dir) = std::env::var_os("FLEETINGD_PEERS").map(PathBuf::from) {
        let firecracker = dir.join("firecracker");
        let cloud_hypervisor = dir.join("cloud-hypervisor");
        if firecracker.exists() {
            peers.push(Vmm::Firecracker(firecracker));
        }
        if cloud_hypervisor.exists() {
            peers.push(Vmm::CloudHypervisor(cloud_hypervisor));
        }
    }
    peers
}

/// The kernel without its own decompressor.
fn unpacked(kernel: &Path) -> anyhow::Result<PathBuf> {
    let to = kernel.with_file_name("vmlinux");
    let image =
        std::fs::read(kernel).with_context(|| format!("cannot read {}", kernel.display()))?;
    std::fs::write(&to, decompress_kernel(&image)?)
        .with_context(|| format!("cannot write {}", to.display()))?;
    Ok(to)
}

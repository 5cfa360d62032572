//! What a VM costs beyond its guest's own memory: private pages of the process that runs it.
//!
//! A guest's memory is what children do not inherit (`dc` in smaps: MADV_DONTFORK), here and in
//! QEMU. The kernel's own share (page tables, KVM) is counted nowhere.

use anyhow::Context;

use super::guest::{self, Guest};
use super::machine::{Machine, QEMU, Running, Vmm};
use super::report::{Better, Budget, Row};

const VMS: u32 = 4;
const MARKER: &str = "BENCH-IS-IDLE";
const BUDGET_MIB: f64 = 3.0;

pub fn measure(guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let machine = Machine {
        memory_mib: 128,
        kernel: guest.local(&guest.kernel)?,
        initrd: guest.local(&guest.initrd)?,
        cmdline: guest::script(&format!("echo {MARKER}; sleep 10000")),
        disks: vec![guest.local(&guest.tools)?],
        tap: None,
        agent: false,
    };
    // The first machine brings what all of them share.
    let embedded = Vmm::Embedded { vhost: true };
    drop(idle(&embedded, &machine, 1)?);
    let before = beyond_guests("self")?;
    let running = idle(&embedded, &machine, VMS)?;
    let ours = (beyond_guests("self")? - before) / f64::from(VMS);
    drop(running);

    let running = idle(&QEMU, &machine, VMS)?;
    let mut total = 0.0;
    for machine in &running {
        let pid = machine.pid().context("a process of its own")?;
        total += beyond_guests(&pid.to_string())?;
    }
    let theirs = total / f64::from(VMS);
    Ok(vec![
        Row::new(
            "memory of an idle VM beyond its guest's",
            "MiB",
            Better::Lower,
        )
        .value(ours)
        .peer(QEMU.name(), theirs)
        .budget(Budget::Value(BUDGET_MIB)),
        Row::new("memory of the process without a VM", "MiB", Better::Lower).value(before),
    ])
}

fn idle(vmm: &Vmm, machine: &Machine, count: u32) -> anyhow::Result<Vec<Running>> {
    let mut all = Vec::new();
    for _vm in 0..count {
        let mut running = vmm.start(machine)?;
        running.console.wait_for(MARKER)?;
        all.push(running);
    }
    Ok(all)
}

/// Private MiB of a process, mappings that are a guest's memory left out.
fn beyond_guests(pid: &str) -> anyhow::Result<f64> {
    let smaps =
        std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("cannot read smaps")?;
    let (mut total_kib, mut mapping_kib) = (0.0, 0.0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:") => {
                let kib: f64 = words.next().context("no number in smaps")?.parse()?;
                mapping_kib += kib;
            }
            // The last line of a mapping.
            Some("VmFlags:") => {
                if !words.any(|flag| flag == "dc") {
                    total_kib += mapping_kib;
                }
                mapping_kib = 0.0;
            }
            _ => {}
        }
    }
    Ok(total_kib / 1024.0)
}

//! fio in the guest: our copy-on-write disk as a worker has it, beside QEMU's in two ways. Each
//! kind of access is compared with the better of the two.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::Context;

use super::guest::{self, Guest};
use super::machine::{Machine, QEMU_OVERLAY, QEMU_RAW, Vmm};
use super::report::{Better, Budget, Row, median};

const DISK_MIB: usize = 256;
const SECONDS: u32 = 8;
const ROUNDS: usize = 3;
/// A row's name, its unit, its share of the better peer, fio's options, and where fio's terse
/// line (version 3, counted from 0) has the number.
type Job = (&'static str, &'static str, f64, &'static str, usize);

const READ_KIB: usize = 6;
const READ_IOPS: usize = 7;
const WRITE_KIB: usize = 47;
const WRITE_IOPS: usize = 48;

const JOBS: [Job; 5] = [
    (
        "disk 4k random read",
        "IOPS",
        1.2,
        "--rw=randread --bs=4k --iodepth=32",
        READ_IOPS,
    ),
    (
        "disk 4k random write",
        "IOPS",
        1.2,
        "--rw=randwrite --bs=4k --iodepth=32",
        WRITE_IOPS,
    ),
    (
        "disk 1M sequential read",
        "KiB/s",
        1.2,
        "--rw=read --bs=1M --iodepth=4",
        READ_KIB,
    ),
    (
        "disk 1M sequential write",
        "KiB/s",
        1.2,
        "--rw=write --bs=1M --iodepth=4",
        WRITE_KIB,
    ),
    (
        "disk 4k write, fsync after each",
        "IOPS",
        3.0,
        "--rw=randwrite --bs=4k --fsync=1",
        WRITE_IOPS,
    ),
];

pub fn measure(guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let target = random_disk(guest, "target.raw")?;
    let machine = Machine {
        memory_mib: 512,
        kernel: guest.local(&guest.kernel)?,
        initrd: guest.local(&guest.initrd)?,
        cmdline: guest::script(&script()),
        disks: vec![target.clone(), guest.local(&guest.tools)?],
        tap: None,
        agent: false,
    };
    // It is written in place: a copy of its own.
    let raw = Machine {
        disks: vec![
            random_disk(guest, "target-raw.raw")?,
            guest.local(&guest.tools)?,
        ],
        ..machine.clone()
    };
    let qemu = |drive| Vmm::Qemu { drive, vhost: true };
    let contestants = [
        (Vmm::Embedded { vhost: true }, &machine),
        (qemu(QEMU_OVERLAY), &machine),
        (qemu(QEMU_RAW), &raw),
    ];
    let mut numbers = vec![vec![Vec::new(); JOBS.len()]; contestants.len()];
    for _round in 0..ROUNDS {
        for ((vmm, machine), numbers) in contestants.iter().zip(&mut numbers) {
            for (found, all) in once(vmm, machine)?.into_iter().zip(numbers) {
                all.push(found);
            }
        }
    }
    std::fs::remove_file(target).context("cannot remove a disk")?;
    let medians: Vec<Vec<f64>> = numbers
        .iter()
        .map(|jobs| jobs.iter().map(|found| median(found)).collect())
        .collect();
    let [ours, overlay, raw] = medians.as_slice() else {
        anyhow::bail!("three contestants, not {}", medians.len());
    };
    let mut rows = Vec::new();
    for ((job, ours), (overlay, raw)) in JOBS.iter().zip(ours).zip(overlay.iter().zip(raw)) {
        for (peer, theirs, other) in [("qemu, overlay", overlay, raw), ("qemu, raw", raw, overlay)]
        {
            let row = Row::new(job.0, job.1, Better::Higher);
            let row = row.value(*ours).peer(peer, *theirs);
            // The promise is about the better one.
            rows.push(if theirs >= other {
                row.budget(Budget::Ratio(job.2))
            } else {
                row
            });
        }
    }
    Ok(rows)
}

/// One line a job: `FIO`, and fio's own.
fn script() -> String {
    let mut text = format!(
        "f() {{ echo \"FIO $(fio --minimal --name=j --filename=/dev/vda --direct=1 --ioengine=libaio --time_based --runtime={SECONDS} $*)\"; }}\n"
    );
    for job in JOBS {
        text.push_str(&format!("f {}\n", job.3));
    }
    text
}

fn once(vmm: &Vmm, machine: &Machine) -> anyhow::Result<Vec<f64>> {
    let mut running = vmm.start(machine)?;
    running.console.wait_for("FLEETINGD-EXIT")?;
    let text = running.console.text();
    let lines: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("FIO "))
        .collect();
    let number = |(job, line): (&Job, &&str)| {
        let field = line.split(';').nth(job.4);
        field
            .and_then(|field| field.parse().ok())
            .with_context(|| format!("fio said: {line}"))
    };
    anyhow::ensure!(lines.len() == JOBS.len(), "fio said:\n{text}");
    JOBS.iter().zip(&lines).map(number).collect()
}

/// A disk without holes.
fn random_disk(guest: &Guest, name: &str) -> anyhow::Result<PathBuf> {
    let path = guest.data.join(name);
    let mut block = vec![0; 1 << 20];
    File::open("/dev/urandom")?.read_exact(&mut block)?;
    let mut disk =
        File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    for _mib in 0..DISK_MIB {
        disk.write_all(&block)?;
    }
    disk.sync_all()?;
    Ok(path)
}

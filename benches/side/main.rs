//! Machines of ours beside other VMMs' machines, in one run, and the report of all benches.
//!
//! Every pair is measured in turns, several times, and compared by its medians: a noisy or slow
//! host then hits both. Both get the same kernel, initramfs, command line, disk bytes and memory.
//! `machine` says how each VMM is asked, `report` what is promised. Needs root, a KVM that runs
//! stock kernels, and what `./dev bench` puts into the environment.
#![expect(clippy::print_stderr, reason = "says what it is doing")]

mod boot;
mod console;
mod disk;
mod guest;
mod machine;
mod memory;
mod net;
mod report;
mod speed;
mod tap;
mod worker;

use std::path::PathBuf;

use anyhow::{Context, ensure};

use guest::Guest;
use report::Row;

/// As in the program itself: memory is measured too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A part of the report: a name for `FLEETINGD_BENCH`, and what measures it.
type Part = (&'static str, fn(&Guest) -> anyhow::Result<Vec<Row>>);

const PARTS: [Part; 6] = [
    ("speed", speed::rows),
    ("boot", boot::measure),
    ("worker", worker::measure),
    ("memory", memory::measure),
    ("disk", disk::measure),
    ("net", net::measure),
];

fn main() -> anyhow::Result<()> {
    let json = std::env::args().any(|argument| argument == "--json");
    let wanted = std::env::var("FLEETINGD_BENCH").unwrap_or_default();
    let guest = Guest::from_environment()?;
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for (name, measure) in PARTS {
        if !wanted.is_empty() && wanted.split(',').all(|part| part != name) {
            continue;
        }
        eprintln!("bench: {name}");
        match measure(&guest) {
            Ok(measured) => rows.extend(measured),
            // The others are still worth having; the report says what is missing.
            Err(error) => {
                eprintln!("bench: {name} failed: {error:#}");
                rows.push(Row::failed(name));
                failed.push(name);
            }
        }
    }
    std::fs::remove_dir_all(&guest.data).context("cannot remove the disks")?;
    let path = output()?;
    let text = if json {
        report::json_lines(&rows)
    } else {
        report::table(&rows)
    };
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    ensure!(failed.is_empty(), "not measured: {}", failed.join(", "));
    Ok(())
}

/// Where the caller looks for the report: the console of the rig carries other things too.
fn output() -> anyhow::Result<PathBuf> {
    let dir = std::env::var_os("RIG_OUT").context("no RIG_OUT; hint: ./dev bench")?;
    Ok(PathBuf::from(dir).join("bench"))
}

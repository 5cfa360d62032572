//! iperf3 between guest and host over a TAP, by vhost-net and by the VMM's own path.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};

use super::guest::{self, Guest};
use super::machine::{Machine, QEMU_OVERLAY, Vmm};
use super::report::{Better, Budget, Row, median};
use super::tap::{GUEST, HOST, TAP, Tap};

const SECONDS: u32 = 8;
const ROUNDS: usize = 3;

pub fn measure(guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let _tap = Tap::create()?;
    let _server = Server::start()?;
    let machine = Machine {
        memory_mib: 512,
        kernel: guest.local(&guest.kernel)?,
        initrd: guest.local(&guest.initrd)?,
        cmdline: guest::script(&script()),
        disks: Vec::new(),
        tap: Some(TAP),
        agent: false,
    };
    let has_vhost = std::path::Path::new("/dev/vhost-net").exists();
    let mut rows = Vec::new();
    for (way, vhost) in [("vhost-net", true), ("user space", false)] {
        if vhost && !has_vhost {
            rows.push(Row::new(
                &format!("net guest to host, {way}"),
                "Mbit/s",
                Better::Higher,
            ));
            continue;
        }
        let qemu = Vmm::Qemu {
            drive: QEMU_OVERLAY,
            vhost,
        };
        let mut ours = (Vec::new(), Vec::new());
        let mut theirs = (Vec::new(), Vec::new());
        for _round in 0..ROUNDS {
            for (vmm, times) in [(&Vmm::Embedded { vhost }, &mut ours), (&qemu, &mut theirs)] {
                let (out, back) = once(vmm, &machine, vhost)?;
                times.0.push(out);
                times.1.push(back);
            }
        }
        for (direction, ours, theirs) in [
            ("guest to host", &ours.0, &theirs.0),
            ("host to guest", &ours.1, &theirs.1),
        ] {
            let mut row = Row::new(&format!("net {direction}, {way}"), "Mbit/s", Better::Higher)
                .value(median(ours))
                .peer(qemu.name(), median(theirs));
            if vhost && direction == "guest to host" {
                row = row.budget(Budget::Ratio(1.0));
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

fn script() -> String {
    let client = format!("iperf3 -f m -t {SECONDS} -c {HOST}");
    format!("ip address add {GUEST}/30 dev eth0\nip link set eth0 up\n{client}\n{client} -R\n")
}

/// Mbit/s to the host and from it.
fn once(vmm: &Vmm, machine: &Machine, vhost: bool) -> anyhow::Result<(f64, f64)> {
    let mut running = vmm.start(machine)?;
    running.console.wait_for("receiver")?;
    ensure!(
        vhost_works()? == vhost,
        "{} did not move frames in the way it was asked to",
        vmm.name()
    );
    running.console.wait_for("FLEETINGD-EXIT")?;
    let text = running.console.text();
    let received: Vec<f64> = text
        .lines()
        .filter(|line| line.contains("receiver"))
        .filter_map(|line| {
            line.split(" Mbits/sec")
                .next()?
                .split(' ')
                .next_back()?
                .parse()
                .ok()
        })
        .collect();
    match received.as_slice() {
        [out, back] => Ok((*out, *back)),
        _ => anyhow::bail!("iperf3 said:\n{text}"),
    }
}

/// Whether the kernel has a thread of vhost-net: its own one or, since 6.4, a process's.
fn vhost_works() -> anyhow::Result<bool> {
    for process in std::fs::read_dir("/proc")? {
        let Ok(threads) = std::fs::read_dir(process?.path().join("task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let name = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            if name.starts_with("vhost-") {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// An iperf3 server; gone when dropped.
struct Server(Child);

impl Server {
    fn start() -> anyhow::Result<Self> {
        let server = Command::new("iperf3")
            .args(["-s", "-B", &HOST.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Ok(Self(server.context("cannot start iperf3")?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

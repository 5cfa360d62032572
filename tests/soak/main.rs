//! A host after a thousand machines: nothing has grown.
//!
//! Each machine has a slot (TAP, rules, locks), a disk over a shared base and an agent channel, and
//! runs a few bytes of code to its power-off, so that any KVM will do. Needs root; the host's
//! network is a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(clippy::print_stderr, reason = "the figures are shown")]
#![expect(unsafe_code, reason = "unshare has no safe wrapper")]

#[path = "../tiny_kernel/mod.rs"]
mod tiny_kernel;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use fleetingd::net::{self, Net, NetSpec, Slot, SlotRole};
use fleetingd::vmm::{self, DiskSource, DiskSpec, KernelSource, VmEnd, VmSpec};
use tiny_kernel::{S5, SLEEP_PORT, elf, out};

/// Machines before the first count: pools and caches of the process fill.
const WARM_UP: u32 = 50;
const CYCLES: u32 = 1000;
/// Two counts of resident memory may differ by this without anything having been kept.
const NOISE_KIB: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Figures {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident_kib: u64,
    taps: usize,
    tables: usize,
    files: usize,
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

fn run(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn figures(data: &Path) -> Figures {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Figures {
        descriptors: count(Path::new("/proc/self/fd")),
        threads: count(Path::new("/proc/self/task")),
        mappings: fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count(),
        resident_kib: resident.unwrap(),
        taps: run("ip -br link").matches("fleetingd").count(),
        tables: run("nft list tables").lines().count(),
        files: count(data),
    }
}

/// A host with an uplink, for this thread and those it starts.
fn host_of_our_own() {
    // SAFETY: only this thread leaves its namespace, and no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
    run(
        "ip link set lo up && ip link add up0 type veth peer name sink0 && ip addr add 192.0.2.2/24 dev up0 \
         && ip link set up0 up && ip route add default via 192.0.2.1 dev up0",
    );
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
}

fn machine(slot: &Slot, kernel: &Path, base: &Arc<File>, data: &Path) -> VmEnd {
    let spec = VmSpec {
        name: "vm1".to_owned(),
        vcpus: 1,
        memory_mib: 64,
        kernel: KernelSource::Path(kernel.to_owned()),
        initrd: None,
        cmdline: String::new(),
        disks: vec![DiskSpec {
            source: DiskSource::Overlay {
                base: Arc::clone(base),
                delta_dir: data.to_owned(),
            },
            serial: "root".to_owned(),
            durable: false,
        }],
        net: Some(vmm::NetSpec {
            tap: slot.tap().unwrap(),
            mac: slot.guest_mac(),
            mtu: 1500,
            link_up: true,
            vhost: true,
        }),
        console: None,
        agent_channel: true,
        golden: false,
    };
    let (tell, ended) = channel();
    let on_end = Box::new(move |end| tell.send(end).unwrap());
    let _handle = vmm::start(spec, on_end).unwrap();
    ended.recv().unwrap()
}

#[test]
fn a_thousand_machines_leave_nothing() {
    host_of_our_own();
    let dir = tempfile::tempdir().unwrap();
    let (data, kernel) = (dir.path().join("data"), dir.path().join("kernel"));
    fs::create_dir(&data).unwrap();
    fs::write(&kernel, elf(&out(SLEEP_PORT, S5))).unwrap();
    let base = tempfile::tempfile_in(&data).unwrap();
    base.set_len(1 << 30).unwrap();
    let base = Arc::new(base);
    let spec = NetSpec {
        subnet: "172.16.120.".parse().unwrap(),
        egress_interface: None,
        dns: vec!["9.9.9.9".parse().unwrap()],
        allow_private: Vec::new(),
        allow_host: Vec::new(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut host = Net::open(spec, &dir.path().join("run")).await.unwrap();
        let mut before = None;
        let mut begun = Instant::now();
        for cycle in 0..WARM_UP + CYCLES {
            if cycle == WARM_UP {
                before = Some(figures(&data));
                begun = Instant::now();
            }
            let slot = host.acquire(SlotRole::Worker).await.unwrap();
            assert_eq!(machine(&slot, &kernel, &base, &data), VmEnd::PowerOff);
            net::forget_connections(slot.guest_address()).unwrap();
            host.release(slot, Instant::now());
        }
        let (before, after) = (before.unwrap(), figures(&data));
        eprintln!("{CYCLES} machines in {:?}", begun.elapsed());
        eprintln!("before {before:?}\nafter  {after:?}");
        let grown = after.resident_kib.saturating_sub(before.resident_kib);
        assert!(grown < NOISE_KIB, "{grown} KiB were kept");
        let same = Figures {
            resident_kib: before.resident_kib,
            mappings: before.mappings,
            ..after
        };
        assert_eq!(same, before);
        assert!(after.mappings <= before.mappings + 8, "{after:?}");
        if let Some(problem) = host.close().await.first() {
            panic!("{problem}");
        }
        assert_eq!(run("nft list tables"), "");
    });
}

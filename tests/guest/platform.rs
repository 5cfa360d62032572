//! Boot, processors, memory layout, power, and the ends of a machine beside its neighbours.

use std::io::{Read, Write};

use fleetingd::vmm::{self, BootPhase, KernelSource, VmEnd, VmSpec};

use super::tiny_kernel::{NOWHERE, elf};
use super::{boot, files};

#[test]
fn two_vcpus_and_memory_across_the_hole_from_the_vendors_kernel() {
    let Some(files) = files() else { return };
    let script = "
[ $(nproc) = 2 ] || exit 1
grep -q '100000000-13fffffff : System RAM' /proc/iomem || exit 2
exec 3<>/dev/virtio-ports/fleetingd.agent
echo hello >&3; read a <&3; [ \"$a\" = world ] || exit 3
echo PRESS
until awk '/Ged/{n=$2+$3} END{exit !n}' /proc/interrupts; do :; done
seq 1 5000
dmesg | grep -E 'ACPI.*[Ee]rror' && exit 4
echo FLEETINGD-EXIT 0
taskset 2 poweroff -f
";
    let guest = boot(files, script, |spec| {
        spec.kernel = KernelSource::Path(files.bzimage.clone());
        spec.vcpus = 2;
        spec.memory_mib = 4096;
        spec.agent_channel = true;
    });
    let mut agent = guest.handle.take_agent().unwrap();
    assert!(guest.handle.take_agent().is_none());
    agent.set_read_timeout(Some(super::PATIENCE)).unwrap();
    let mut hello = [0; 6];
    agent.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello\n");
    agent.write_all(b"world\n").unwrap();
    guest.wait_for("PRESS");
    guest.handle.power_button().unwrap();
    guest.succeed();
    // The output is complete and in order, also what came just before the end.
    let output = guest.output();
    let numbers = output.lines().filter_map(|line| line.trim().parse().ok());
    let numbers: Vec<u32> = numbers.collect();
    assert_eq!(numbers, (1..=5000).collect::<Vec<_>>());
    let phases: Vec<_> = guest.handle.timing().into_iter().map(|(p, _)| p).collect();
    for phase in [
        BootPhase::Loaded,
        BootPhase::FirstRun,
        BootPhase::FirstOutput,
        BootPhase::FirstDriver,
        BootPhase::AgentOpen,
        BootPhase::Ended,
    ] {
        assert!(phases.contains(&phase), "{phase:?} in {phases:?}");
    }
}

#[test]
fn host_and_guest_mean_the_same_agent_channel() {
    assert_eq!(vmm::AGENT_PORT, fleetingd::agent::proto::PORT_NAME);
}

#[test]
fn a_reboot_ends_the_machine() {
    let Some(files) = files() else { return };
    let guest = boot(files, "reboot -f", |_spec| {});
    assert_eq!(guest.end(), VmEnd::Reboot);
}

#[test]
fn a_panic_that_does_not_reboot_ends_the_machine() {
    let Some(files) = files() else { return };
    let guest = boot(files, "echo c >/proc/sysrq-trigger", |spec| {
        spec.cmdline = spec.cmdline.replace("panic=-1", "panic=0");
    });
    let end = guest.end();
    assert!(matches!(end, VmEnd::Panic { .. }), "{end:?}");
}

#[test]
fn a_neighbour_survives_whatever_ends_the_others() {
    let Some(files) = files() else { return };
    let count = "i=0; while :; do i=$((i+1)); echo tick $i; usleep 100000; done";
    let neighbour = boot(files, count, |_spec| {});
    neighbour.wait_for("tick 1\r");

    let panicking = boot(files, "echo c >/proc/sysrq-trigger", |_spec| {});
    let VmEnd::Panic { tail } = panicking.end() else {
        panic!("{:?}", panicking.end());
    };
    assert!(tail.contains("sysrq triggered crash"), "{tail}");

    let kernel = files.scratch.path().join("broken");
    std::fs::write(&kernel, elf(&NOWHERE)).unwrap();
    let broken = vmm::start(
        VmSpec {
            name: "broken".to_owned(),
            vcpus: 1,
            memory_mib: 64,
            kernel: KernelSource::Path(kernel),
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            net: None,
            console: None,
            agent_channel: false,
        },
        Box::new(|_end| {}),
    );
    let end = broken.unwrap().wait();
    assert!(matches!(end, VmEnd::Internal { .. }), "{end:?}");

    let ticks = neighbour.output().lines().count();
    super::until("the neighbour goes on", || {
        neighbour.output().lines().count() > ticks + 3
    });
    neighbour.handle.kill();
    assert_eq!(neighbour.end(), VmEnd::Killed);
}

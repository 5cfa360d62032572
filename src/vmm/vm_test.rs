//! Micro-guests: every end has its name, whatever the guest and the host do.

use std::time::Duration;

use super::*;
use crate::vmm::testing::{Code, run, spec, try_run};

fn end_of(code: Code) -> VmEnd {
    run(spec(&code)).end()
}

#[test]
fn a_guest_ends_itself_by_every_route() {
    assert_eq!(end_of(Code::new().power_off()), VmEnd::PowerOff);
    assert_eq!(end_of(Code::new().reset()), VmEnd::Reboot);
    assert_eq!(end_of(Code::new().out8(0xcf9, 6)), VmEnd::Reboot);
    assert_eq!(end_of(Code::new().out8(0x64, 0xfe)), VmEnd::Reboot);
    // ud2 without an IDT.
    assert_eq!(end_of(Code::new().raw(&[0x0f, 0x0b])), VmEnd::TripleFault);
}

#[test]
fn a_reset_after_a_panic_is_a_panic_with_its_last_lines() {
    let text = "Kernel panic - not syncing: out of coffee\r\n";
    let VmEnd::Panic { tail } = end_of(Code::new().print(text).reset()) else {
        panic!("not a panic");
    };
    assert!(tail.contains("out of coffee"));
}

#[test]
fn a_panic_without_a_reboot_ends_too() {
    let text = "Kernel panic - not syncing: x\n---[ end Kernel panic - not syncing: x ]---\n";
    let end = end_of(Code::new().print(text).halt());
    assert!(matches!(end, VmEnd::Panic { .. }), "{end:?}");
}

#[test]
fn a_guest_that_spins_or_sleeps_for_ever_can_be_killed() {
    for code in [Code::new().spin(), Code::new().halt()] {
        let vm = run(spec(&code.print("")));
        vm.handle.kill();
        vm.handle.kill();
        assert_eq!(vm.end(), VmEnd::Killed);
    }
}

#[test]
fn any_number_of_vcpus_and_any_size_of_memory_starts() {
    for (vcpus, memory_mib) in [(1, 64), (2, 3072), (8, 3584), (64, 8192)] {
        let mut spec = spec(&Code::new().power_off());
        spec.vcpus = vcpus;
        spec.memory_mib = memory_mib;
        assert_eq!(run(spec).end(), VmEnd::PowerOff, "{vcpus} vCPUs");
    }
}

#[test]
fn impossible_machines_are_refused_with_a_reason() {
    let machine = |vcpus, memory_mib, name: &str| {
        let mut spec = spec(&Code::new().spin());
        spec.vcpus = vcpus;
        spec.memory_mib = memory_mib;
        spec.name = name.to_owned();
        try_run(spec)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    assert!(machine(0, 64, "vm").contains("not 0"));
    assert!(machine(65, 64, "vm").contains("1 to 64"));
    assert!(machine(1, 63, "vm").contains("at least 64"));
    assert!(machine(1, u32::MAX, "vm").contains("larger than this host"));
    assert!(machine(1, 64, "a name too long").contains("8 bytes"));
}

#[test]
fn pause_stops_the_guest_and_resume_lets_it_go_on() {
    // Counts in memory for ever: inc qword [0x200000]; jmp.
    let count = Code::new()
        .print("go")
        .raw(&[0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf6]);
    let mut spec = spec(&count);
    spec.vcpus = 2;
    let vm = run(spec);
    vm.wait_for("go");
    for _round in 0..10 {
        vm.handle.pause().unwrap();
        vm.handle.pause().unwrap();
        vm.handle.resume().unwrap();
    }
    vm.handle.pause().unwrap();
    vm.handle.kill();
    assert_eq!(vm.handle.wait(), VmEnd::Killed);
    assert!(vm.handle.pause().is_err());
    assert!(vm.handle.set_link(true).is_err());
    assert_eq!(vm.handle.stats().resident_bytes, 0);
    vm.end();
}

#[test]
fn timing_names_the_phases_in_order() {
    let vm = run(spec(&Code::new().print("x").power_off()));
    vm.handle.wait();
    let phases = vm.handle.timing();
    let names: Vec<BootPhase> = phases.iter().map(|(phase, _)| *phase).collect();
    let expected = [
        BootPhase::Loaded,
        BootPhase::FirstRun,
        BootPhase::FirstOutput,
        BootPhase::Ended,
    ];
    assert_eq!(names, expected);
    assert!(phases.iter().all(|(_, at)| *at < Duration::from_secs(30)));
    vm.end();
}

//! Micro-guests: every end has its name, whatever the guest and the host do.

use std::time::Duration;

use super::*;
use crate::vmm::memory::Extent;
use crate::vmm::testing::{Code, Running, run, run_by, spec, try_run};

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

const RING: u64 = 0x20_0000;

/// Sets up the entropy device, asks for 64 bytes, waits for them and powers off.
fn ask_for_entropy() -> Code {
    entropy_into(Code::new(), RING + 0x4000)
}

/// Goes on after `code` by asking for 64 bytes of entropy at `buffer`.
fn entropy_into(code: Code, buffer: u64) -> Code {
    let bar = layout::BAR_WINDOW + 4 * layout::BAR_SIZE;
    let mut code = code.store16(layout::ECAM + (4 << 15) + 4, 6);
    for status in [0, 1, 3] {
        code = code.store8(bar + 20, status);
    }
    code = code.store32(bar + 8, 1).store32(bar + 12, 1);
    code = code.store8(bar + 20, 11).store16(bar + 24, 8);
    for (register, at) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
        let low = u32::try_from(RING + at).unwrap();
        code = code
            .store32(bar + register, low)
            .store32(bar + register + 4, 0);
    }
    code = code.store16(bar + 28, 1).store8(bar + 20, 15);
    let buffer = u32::try_from(buffer).unwrap();
    for (at, value) in [(0, buffer), (4, 0), (8, 64), (12, 2), (0x1000, 0x1_0000)] {
        code = code.store32(RING + at, value);
    }
    // mov edx, used index; cmp word [rdx], 1; jne to the compare
    code.store16(bar + 0x3000, 0)
        .raw(&[
            0xba, 0x02, 0x20, 0x20, 0x00, 0x66, 0x83, 0x3a, 0x01, 0x75, 0xfa,
        ])
        .power_off()
}

#[test]
fn a_guest_drives_a_virtio_queue_by_its_registers() {
    let vm = run(spec(&ask_for_entropy()));
    assert_eq!(vm.handle.wait(), VmEnd::PowerOff);
    let phases = vm.handle.timing();
    assert!(
        phases
            .iter()
            .any(|(phase, _)| *phase == BootPhase::FirstDriver)
    );
    vm.end();
}

#[test]
fn a_running_device_survives_pauses_at_any_moment() {
    let vm = run(spec(&ask_for_entropy()));
    while vm.handle.pause().is_ok() && vm.handle.resume().is_ok() {}
    assert_eq!(vm.end(), VmEnd::PowerOff);
}

#[test]
fn code_where_there_is_no_memory_is_an_internal_error_that_says_where() {
    // mov eax, BAR window; jmp rax
    let end = end_of(Code::new().raw(&[0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0]));
    let VmEnd::Internal { suberror, detail } = end else {
        panic!("{end:?}");
    };
    assert_ne!(suberror, 0);
    assert!(detail.contains("rip 0xd0000000"), "{detail}");
}

/// A machine whose memory is a private view of a file.
fn run_in_file(code: &Code, file: &std::fs::File) -> Running {
    file.set_len(64 << 20).unwrap();
    let whole = Extent {
        start: 0,
        bytes: 64 << 20,
    };
    let memory = VmMemory::clone_of(64, file, &[whole]).unwrap();
    run_by(spec(code), |spec, on_end| {
        start_in(memory, spec, Timeline::start(), on_end)
    })
    .unwrap()
}

/// Where memory that gets lost begins, and an address in it.
const LOST: u64 = 48 << 20;
const KEPT: u64 = 32 << 20;

/// Says that it is ready and waits for a key on the serial port.
fn wait_for_key() -> Code {
    // mov dx, LSR; in al, dx; test al, 1; jz to the in
    let wait = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    Code::new().print("ready").raw(&wait)
}

/// Runs `code` in a file that shrinks once it is ready, beside a neighbour that must not care.
fn lose_memory_under(code: &Code) -> VmEnd {
    let neighbour = run(spec(&Code::new().print("up").spin()));
    let file = tempfile::tempfile().unwrap();
    let vm = run_in_file(code, &file);
    vm.wait_for("ready");
    file.set_len(KEPT).unwrap();
    vm.handle.console_input(b"x");
    let end = vm.end();
    neighbour.wait_for("up");
    assert_eq!(neighbour.handle.end(), None);
    neighbour.handle.kill();
    assert_eq!(neighbour.end(), VmEnd::Killed);
    end
}

#[test]
fn memory_lost_under_a_device_is_a_host_fault_of_that_machine_only() {
    let end = lose_memory_under(&entropy_into(wait_for_key(), LOST));
    let VmEnd::HostFault { reason } = end else {
        panic!("{end:?}");
    };
    assert!(reason.contains("SIGBUS"), "{reason}");
}

#[test]
fn memory_lost_under_a_vcpu_ends_that_machine_only() {
    // mov eax, [LOST]
    let [a, b, c, d] = u32::try_from(LOST).unwrap().to_le_bytes();
    let code = wait_for_key().raw(&[0x8b, 0x04, 0x25, a, b, c, d]);
    let end = lose_memory_under(&code.power_off());
    assert!(matches!(end, VmEnd::HostFault { .. }), "{end:?}");
}

#[test]
fn a_thousand_register_accesses_and_string_io_of_any_length_end_well() {
    // mov ecx, 4096; mov esi, code; mov dx, port; rep outsb: and the same for insb.
    let mut code = Code::new();
    for port in [
        layout::COM1,
        layout::SLEEP_PORT + 1,
        layout::GED_PORT,
        0xcf8,
        0xcfc,
        0x9999,
    ] {
        let [low, high] = port.to_le_bytes();
        let start = [0xb9, 0, 0x10, 0, 0, 0xbe, 0, 0, 0, 1, 0x66, 0xba, low, high];
        code = code.raw(&start).raw(&[0xf3, 0x6e]);
        let start = [
            0xb9, 0, 0x10, 0, 0, 0xbf, 0, 0, 0x30, 0, 0x66, 0xba, low, high,
        ];
        code = code.raw(&start).raw(&[0xf3, 0x6c]);
    }
    assert_eq!(end_of(code.power_off()), VmEnd::PowerOff);
}

/// mov ecx, msr; mov eax, low; mov edx, high; wrmsr
fn write_msr(code: Code, msr: u32, value: u64) -> Code {
    let [low, high] = [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap());
    let code = code.raw(&[0xb9]).raw(&msr.to_le_bytes());
    let code = code.raw(&[0xb8]).raw(&low.to_le_bytes());
    code.raw(&[0xba])
        .raw(&high.to_le_bytes())
        .raw(&[0x0f, 0x30])
}

#[test]
fn an_unknown_msr_and_a_clock_page_outside_memory_hurt_the_guest_only() {
    let unknown = write_msr(Code::new(), 0x1234_5678, 1);
    assert_eq!(end_of(unknown.power_off()), VmEnd::TripleFault);
    // MSR_KVM_SYSTEM_TIME_NEW, enabled, far beyond RAM.
    let clock = write_msr(Code::new(), 0x4b56_4d01, 0x7f_ffff_f001);
    let end = end_of(clock.power_off());
    assert!(
        matches!(end, VmEnd::PowerOff | VmEnd::TripleFault),
        "{end:?}"
    );
}

/// Open descriptors and threads of this process.
fn held() -> (usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn killed_at_any_moment_everything_is_given_back() {
    let kill_after = |round: u64| {
        let vm = run(spec(&ask_for_entropy().spin()));
        std::thread::sleep(Duration::from_micros(round * 500));
        vm.handle.kill();
        let end = vm.end();
        assert!(matches!(end, VmEnd::Killed | VmEnd::PowerOff), "{end:?}");
    };
    kill_after(0);
    // Other tests run beside this one: what grows by every round would show all the same.
    let before = held();
    (0..50).for_each(kill_after);
    let after = held();
    assert!(after.0 < before.0 + 50, "descriptors: {before:?} {after:?}");
    assert!(after.1 < before.1 + 50, "threads: {before:?} {after:?}");
}

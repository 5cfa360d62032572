//! Machines saved at any moment and cloned: what they had, what they share and what they do not.

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::vmm::testing::{Code, Running, clone_of, disk_file, overlay_disk, run, spec, try_clone};
use crate::vmm::{
    DiskSource, NetSpec, RestoreSpec, SaveError, Snapshot, SnapshotError, StartError, VmEnd, layout,
};

/// Where a guest keeps what it must find again, and the page tables that lead above 4 GiB.
const LOW: u64 = 0x20_0000;
const LEVEL2: u64 = 0x30_0000;
/// The real mode code of the other processors, which count at 0x6000.
const AP_CODE: u64 = 0x7_0000;

/// Addresses at the ends of every range of a machine's RAM.
fn marks(memory_mib: u32) -> Vec<u64> {
    let ranges = layout::ram_ranges(u64::from(memory_mib) << 20);
    let mut marks = vec![LOW];
    for (start, bytes) in ranges {
        marks.extend((start > 0).then_some(start));
        marks.push(start + bytes - 4);
    }
    marks
}

/// Maps all of a large machine's RAM: three more GiB behind the first four, by 2 MiB pages.
fn map_high(mut code: Code) -> Code {
    let level3 = layout::PAGE_TABLES + 0x1000;
    for gib in 4_u64..10 {
        let table = LEVEL2 + (gib - 4) * 0x1000;
        code = code.store(level3 + gib * 8, u32::try_from(table).unwrap() | 3);
        code = code.store(level3 + gib * 8 + 4, 0);
        // mov rdi, table; mov rax, first entry; mov ecx, 512; stosq; add rax, 2 MiB; loop
        let first = (gib << 30) | 0x83;
        code = code.raw(&[0x48, 0xbf]).raw(&table.to_le_bytes());
        code = code.raw(&[0x48, 0xb8]).raw(&first.to_le_bytes());
        code = code
            .raw(&[0xb9, 0x00, 0x02, 0x00, 0x00])
            .raw(&[0x48, 0xab, 0x48, 0x05, 0x00, 0x00, 0x20, 0x00, 0xe2, 0xf6]);
    }
    code
}

/// Starts the other processors, which count for ever in 16 bits.
fn start_others(code: Code) -> Code {
    // cli; xor ax, ax; mov ds, ax; inc word [0x6000]; jmp to the inc
    let real = [
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xff, 0x06, 0x00, 0x60, 0xeb, 0xfa, 0x90,
    ];
    let mut code = code;
    for (at, word) in (AP_CODE..).step_by(4).zip(real.as_chunks::<4>().0) {
        code = code.store32(at, u32::from_le_bytes(*word));
    }
    let icr = u64::from(layout::LAPIC) + 0x300;
    // The LAPIC on; INIT and SIPI to all but itself (Intel SDM 3A, 11.6.1).
    let spurious = u64::from(layout::LAPIC) + 0xf0;
    let code = code.store32(spurious, 0x1ff).store32(icr, 0x000c_4500);
    let vector = u32::try_from(AP_CODE >> 12).unwrap();
    code.store32(icr, 0x000c_4600 | vector)
        // cmp word [0x6000], 0; je to the cmp
        .raw(&[
            0x66, 0x83, 0x3c, 0x25, 0x00, 0x60, 0x00, 0x00, 0x00, 0x74, 0xf5,
        ])
}

/// Marks its RAM, says so, waits for a key, and powers off if all marks are there; resets if not.
fn marking_guest(memory_mib: u32, vcpus: u8) -> Code {
    let mut code = Code::new();
    if u64::from(memory_mib) << 20 > layout::LOW_RAM_END {
        code = map_high(code);
    }
    for (value, mark) in (0x1000_0001..).zip(marks(memory_mib)) {
        code = code.store(mark, value);
    }
    if vcpus > 1 {
        code = start_others(code);
    }
    code = code.print("ready").key();
    for (value, mark) in (0x1000_0001..).zip(marks(memory_mib)) {
        code = code.expect(mark, value);
    }
    if vcpus > 1 {
        // The others go on counting: mov ax, [0x6000]; cmp ax, [0x6000]; je to the cmp
        code = code.raw(&[0x66, 0x8b, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00]);
        code = code.raw(&[0x66, 0x3b, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00, 0x74, 0xf6]);
    }
    code.print("same").power_off()
}

/// A golden machine that runs `code` up to where it prints "ready", paused.
fn golden(code: &Code, memory_mib: u32, vcpus: u8) -> Running {
    let mut spec = spec(code);
    spec.memory_mib = memory_mib;
    spec.vcpus = vcpus;
    spec.golden = true;
    let vm = run(spec);
    vm.wait_for("ready");
    vm.handle.pause().unwrap();
    vm
}

fn saved_to(vm: &Running, path: &Path) -> Snapshot {
    vm.handle.save(path).unwrap();
    Snapshot::open(path).unwrap()
}

fn goes_on(clone: Running) {
    clone.handle.resume().unwrap();
    clone.handle.console_input(b"x");
    let console = clone.handle.clone();
    assert_eq!(clone.end(), VmEnd::PowerOff);
    assert_eq!(console.console_tail(99), "same");
}

#[test]
fn machines_of_every_shape_go_on_where_they_were_saved() {
    for memory_mib in [1024, 3072, 3584, 8192] {
        for vcpus in [1, 2, 8] {
            let vm = golden(&marking_guest(memory_mib, vcpus), memory_mib, vcpus);
            let directory = tempfile::tempdir().unwrap();
            let stored = saved_to(&vm, directory.path());
            let frozen = vm.handle.freeze().unwrap();
            for snapshot in [&stored, &frozen, &stored, &frozen] {
                goes_on(clone_of(snapshot));
            }
            assert!(frozen.mapped_bytes() <= 40 << 20, "holes stay holes");
            assert_eq!(vm.end(), VmEnd::Killed);
        }
    }
}

/// Prints "ready", takes a key and keeps it; prints "wrote", takes another and shows the first.
fn remembering_guest() -> Code {
    let code = Code::new().store(LOW, 0x55).print("ready").key();
    // movzx eax, al; mov [LOW], eax
    let code = code.expect(LOW, 0x55).raw(&[0x0f, 0xb6, 0xc0]);
    let code = code.raw(&[0x89, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00]);
    // mov al, [LOW]; mov edx, COM1; out dx, al
    code.print("wrote")
        .key()
        .raw(&[0x8a, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00])
        .raw(&[0xba, 0xf8, 0x03, 0x00, 0x00, 0xee])
        .power_off()
}

fn typed(clone: &Running, key: &str) {
    clone.handle.console_input(key.as_bytes());
}

#[test]
fn clones_do_not_see_each_others_writes() {
    let snapshot = golden(&remembering_guest(), 64, 1).handle.freeze().unwrap();
    let clones: Vec<Running> = "abc"
        .split_terminator("")
        .skip(1)
        .map(|key| {
            // Each starts after the one before it has written.
            let clone = clone_of(&snapshot);
            clone.handle.resume().unwrap();
            typed(&clone, key);
            clone.wait_for("wrote");
            clone
        })
        .collect();
    for (clone, key) in clones.into_iter().zip("abc".chars()) {
        typed(&clone, "x");
        let console = clone.handle.clone();
        assert_eq!(clone.end(), VmEnd::PowerOff);
        assert_eq!(console.console_tail(99), format!("wrote{key}"));
    }
}

#[test]
fn each_clone_has_a_generation_of_its_own_and_is_told() {
    // mov dx, GED; in al, dx; cmp al, the bit of a new generation
    let code = Code::new().print("ready").key();
    let code = code.raw(&[0x66, 0xba, 0x10, 0x06, 0xec, 0x3c, layout::GED_GENERATION]);
    // mov ecx, 16; mov esi, the ID; mov dx, COM1; rep outsb
    let code = code
        .reset_unless_equal()
        .raw(&[0xb9, 16, 0, 0, 0, 0xbe, 0x00, 0xf0, 0x0d, 0x00])
        .raw(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
        .power_off();
    let snapshot = golden(&code, 64, 1).handle.freeze().unwrap();
    let generation = || {
        let output = tempfile::NamedTempFile::new().unwrap();
        let mut spec = RestoreSpec::new("vm1");
        spec.console = Some(output.reopen().unwrap());
        let clone = try_clone(spec, &snapshot).unwrap();
        clone.handle.resume().unwrap();
        typed(&clone, "x");
        assert_eq!(clone.end(), VmEnd::PowerOff);
        std::fs::read(output.path()).unwrap()
    };
    let ids = [generation(), generation(), generation()];
    assert!(ids.iter().all(|id| id.len() == 16 && id != &[0; 16]));
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
}

#[test]
fn output_goes_on_at_the_very_next_byte() {
    const BYTES: u32 = 20_000;
    // mov edx, COM1; xor ebx, ebx; then: mov al, bl; out dx, al; inc ebx; cmp ebx, BYTES; jne
    let code = Code::new()
        .raw(&[0xba, 0xf8, 0x03, 0x00, 0x00, 0x31, 0xdb])
        .raw(&[0x88, 0xd8, 0xee, 0xff, 0xc3, 0x81, 0xfb])
        .raw(&BYTES.to_le_bytes())
        .raw(&[0x75, 0xf3])
        .power_off();
    let expected: Vec<u8> = (0..BYTES).map(|n| n.to_le_bytes()[0]).collect();
    let output = tempfile::NamedTempFile::new().unwrap();
    let mut spec = spec(&code);
    spec.console = Some(output.reopen().unwrap());
    let vm = run(spec);
    let mut saved = Vec::new();
    while saved.len() < 5 && vm.handle.pause().is_ok() {
        let printed = std::fs::read(output.path()).unwrap().len();
        let directory = tempfile::tempdir().unwrap();
        saved.push((printed, saved_to(&vm, directory.path()), directory));
        vm.handle.resume().unwrap();
    }
    assert_eq!(vm.end(), VmEnd::PowerOff);
    assert_eq!(std::fs::read(output.path()).unwrap(), expected);
    assert!(saved.iter().any(|(printed, ..)| *printed > 0));
    for (printed, snapshot, _directory) in saved {
        let output = tempfile::NamedTempFile::new().unwrap();
        let mut spec = RestoreSpec::new("vm1");
        spec.console = Some(output.reopen().unwrap());
        let clone = try_clone(spec, &snapshot).unwrap();
        clone.handle.resume().unwrap();
        assert_eq!(clone.end(), VmEnd::PowerOff);
        assert_eq!(std::fs::read(output.path()).unwrap(), expected[printed..]);
    }
}

#[test]
fn a_timer_that_was_armed_fires_in_every_clone() {
    let lapic = u64::from(layout::LAPIC);
    // Interrupts stay off, so that the timer's request stays in the register of requests.
    let code = Code::new()
        .store32(lapic + 0xf0, 0x1ff)
        .store32(lapic + 0x320, 0x40)
        .store32(lapic + 0x3e0, 0b1011)
        .store32(lapic + 0x380, 200_000_000)
        .print("ready");
    // mov ecx, IRR of vectors 64 to 95; test byte [rcx], 1; je to the test
    let [a, b, c, d] = (layout::LAPIC + 0x220).to_le_bytes();
    let code = code
        .raw(&[0xb9, a, b, c, d, 0x8b, 0x01, 0xa8, 0x01, 0x74, 0xfa])
        .print("fired")
        .power_off();
    let vm = golden(&code, 64, 1);
    assert_eq!(vm.handle.console_tail(99), "ready", "saved before it fired");
    let snapshot = vm.handle.freeze().unwrap();
    for clone in [(); 3].map(|()| clone_of(&snapshot)) {
        clone.handle.resume().unwrap();
        let console = clone.handle.clone();
        assert_eq!(clone.end(), VmEnd::PowerOff);
        assert_eq!(console.console_tail(99), "fired");
    }
}

#[test]
fn a_hundred_clones_at_once_run_or_are_killed_at_any_moment() {
    let vm = golden(&marking_guest(64, 2), 64, 2);
    let snapshot = vm.handle.freeze().unwrap();
    std::thread::scope(|scope| {
        for _thread in 0..4 {
            scope.spawn(|| {
                let clones: Vec<Running> = (0..25).map(|_| clone_of(&snapshot)).collect();
                for (round, clone) in clones.into_iter().enumerate() {
                    match round % 4 {
                        0 => {
                            clone.handle.kill();
                            assert_eq!(clone.end(), VmEnd::Killed);
                        }
                        1 => {
                            clone.handle.resume().unwrap();
                            clone.handle.kill();
                            assert_eq!(clone.end(), VmEnd::Killed);
                        }
                        _ => goes_on(clone),
                    }
                }
            });
        }
    });
}

#[test]
fn a_clone_that_never_ran_can_be_saved_and_a_paused_machine_twice() {
    let vm = golden(&marking_guest(64, 2), 64, 2);
    let directories = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let first = saved_to(&vm, directories[0].path());
    let second = saved_to(&vm, directories[1].path());
    // Over the first, which a clone has mapped.
    let early = clone_of(&first);
    let first = saved_to(&vm, directories[0].path());
    let third = saved_to(&clone_of(&second), directories[2].path());
    let written = tempfile::tempdir().unwrap();
    vm.handle.freeze().unwrap().write(written.path()).unwrap();
    let written = Snapshot::open(written.path()).unwrap();
    goes_on(early);
    for snapshot in [&first, &second, &third, &written] {
        goes_on(clone_of(snapshot));
    }
}

#[test]
fn what_cannot_be_saved_says_why() {
    let base = disk_file();
    let mut running = spec(&Code::new().print("ready").spin());
    running.disks = vec![overlay_disk(&base)];
    let running = run(running);
    let directory = tempfile::tempdir().unwrap();
    let save = |vm: &Running| vm.handle.save(directory.path()).unwrap_err();
    assert!(matches!(save(&running), SaveError::NotPaused));
    running.handle.pause().unwrap();
    let not_golden = running.handle.freeze().unwrap_err();
    assert!(matches!(not_golden, SaveError::NotGolden));
    running.handle.save(directory.path()).unwrap();
    let snapshot = Snapshot::open(directory.path()).unwrap();

    let mut direct = spec(&Code::new().print("ready").spin());
    direct.disks = vec![overlay_disk(&base), overlay_disk(&base)];
    direct.disks[1].source = DiskSource::Direct(disk_file());
    let direct = run(direct);
    direct.handle.pause().unwrap();
    assert!(matches!(save(&direct), SaveError::DiskInPlace { index: 1 }));
    assert!(save(&direct).to_string().contains("hint:"));
    direct.handle.resume().unwrap();

    let given = |disks| {
        let mut spec = RestoreSpec::new("vm1");
        spec.disks = disks;
        match try_clone(spec, &snapshot) {
            Ok(clone) => Ok(clone),
            Err(StartError::Snapshot(error)) => Err(error),
            Err(other) => panic!("{other}"),
        }
    };
    let none = given(Vec::new()).err().unwrap();
    assert!(matches!(none, SnapshotError::Disks { saved: 1, given: 0 }));
    let mut read_only = overlay_disk(&base);
    read_only.source = DiskSource::ReadOnly(Arc::clone(&base));
    let kind = given(vec![read_only]).err().unwrap();
    assert!(matches!(kind, SnapshotError::DiskKind { index: 0 }));
    let larger = tempfile::tempfile().unwrap();
    larger.set_len(1 << 30).unwrap();
    let mut other = RestoreSpec::new("vm1");
    other.disks = vec![overlay_disk(&Arc::new(larger))];
    assert!(
        try_clone(other, &snapshot).is_err(),
        "a disk of another size"
    );
}

#[test]
fn a_directory_that_is_no_whole_snapshot_says_what_is_wrong() {
    let base = disk_file();
    let mut spec = spec(&Code::new().print("ready").spin());
    spec.disks = vec![overlay_disk(&base)];
    let vm = run(spec);
    vm.wait_for("ready");
    vm.handle.pause().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for damage in ["memory", "disk0", "state"] {
        saved_to(&vm, directory.path());
        File::options()
            .write(true)
            .open(at(damage))
            .unwrap()
            .set_len(4096)
            .unwrap();
        let short = Snapshot::open(directory.path()).unwrap_err();
        let named = match &short {
            SnapshotError::Length { path, .. } | SnapshotError::State { path, .. } => path,
            other => panic!("{other}"),
        };
        assert_eq!(named, &at(damage));
        saved_to(&vm, directory.path());
        std::fs::rename(at(damage), at("elsewhere")).unwrap();
        symlink(at("elsewhere"), at(damage)).unwrap();
        let link = Snapshot::open(directory.path()).unwrap_err();
        assert!(matches!(link, SnapshotError::Open { .. }), "{link}");
        std::fs::remove_file(at(damage)).unwrap();
        let absent = Snapshot::open(directory.path()).unwrap_err();
        assert!(absent.to_string().contains("hint:"), "{absent}");
    }
    let inside = directory.path().join("absent/deeper");
    let nowhere = vm.handle.save(&inside).unwrap_err();
    assert!(matches!(
        nowhere,
        SaveError::Snapshot(SnapshotError::Write { .. })
    ));
    vm.handle.resume().unwrap();
}

/// The clock's structure (Linux, asm/pvclock-abi.h), which the guest has at 0x21_0000, and eight
/// bytes of TSC behind it.
const READING: usize = 40;
/// PVCLOCK_GUEST_STOPPED: what looks like a lock-up was a pause.
const STOPPED: u8 = 1 << 1;

/// Shows its clock for each key.
fn clock_guest() -> Code {
    // mov ecx, MSR_KVM_SYSTEM_TIME_NEW; mov eax, 0x21_0001; xor edx, edx; wrmsr
    let code = Code::new().raw(&[0xb9, 0x01, 0x4d, 0x56, 0x4b, 0xb8, 0x01, 0x00, 0x21, 0x00]);
    let code = code.raw(&[0x31, 0xd2, 0x0f, 0x30]);
    let again = code.0.len();
    // rdtsc; mov [0x21_0020], eax; mov [0x21_0024], edx
    let code = code
        .key()
        .raw(&[0x0f, 0x31, 0x89, 0x04, 0x25, 0x20, 0x00, 0x21, 0x00]);
    let code = code.raw(&[0x89, 0x14, 0x25, 0x24, 0x00, 0x21, 0x00]);
    // mov ecx, 40; mov esi, 0x21_0000; mov dx, COM1; rep outsb; jmp again
    let code = code.raw(&[0xb9, 40, 0, 0, 0, 0xbe, 0x00, 0x00, 0x21, 0x00]);
    let code = code.raw(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e, 0xe9]);
    let distance = i32::try_from(code.0.len() + 4 - again).unwrap();
    code.raw(&(-distance).to_le_bytes())
}

/// What the guest's clock shows, and whether it was told that it was stopped.
fn time_of(vm: &Running, output: &Path) -> (Duration, bool) {
    let before = std::fs::read(output).unwrap().len();
    typed(vm, "x");
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut bytes = Vec::new();
    while bytes.len() < before + READING {
        assert!(Instant::now() < deadline, "the clock is never shown");
        bytes = std::fs::read(output).unwrap();
    }
    let reading = &bytes[before..];
    let number = |at: usize| u64::from_le_bytes(reading[at..at + 8].try_into().unwrap());
    let (stamp, system, tsc) = (number(8), number(16), number(32));
    let multiplier = number(24) & 0xffff_ffff;
    let shift = i8::from_le_bytes([reading[28]]);
    let ticks = u128::from(tsc.saturating_sub(stamp));
    let ticks = match u32::try_from(shift) {
        Ok(left) => ticks << left,
        Err(_negative) => ticks >> shift.unsigned_abs(),
    };
    let passed = u64::try_from((ticks * u128::from(multiplier)) >> 32).unwrap();
    (
        Duration::from_nanos(system + passed),
        reading[29] & STOPPED != 0,
    )
}

#[test]
fn the_guests_clock_stands_still_while_it_is_paused_or_saved() {
    let parked = Duration::from_millis(700);
    let output = tempfile::NamedTempFile::new().unwrap();
    let mut spec = spec(&clock_guest());
    spec.golden = true;
    spec.console = Some(output.reopen().unwrap());
    let vm = run(spec);
    let start = Instant::now();
    let (first, stopped) = time_of(&vm, output.path());
    assert!(!stopped, "it has run from the start");
    vm.handle.pause().unwrap();
    std::thread::sleep(parked);
    vm.handle.resume().unwrap();
    let (second, stopped) = time_of(&vm, output.path());
    assert!(stopped, "told of the pause");
    assert!(second > first && second - first < start.elapsed() - parked);
    vm.handle.pause().unwrap();
    let snapshot = vm.handle.freeze().unwrap();
    for _clone in 0..2 {
        let output = tempfile::NamedTempFile::new().unwrap();
        let mut spec = RestoreSpec::new("vm1");
        spec.console = Some(output.reopen().unwrap());
        let clone = try_clone(spec, &snapshot).unwrap();
        std::thread::sleep(parked);
        let start = Instant::now();
        clone.handle.resume().unwrap();
        let (third, _told_before) = time_of(&clone, output.path());
        assert!(third > second, "{third:?} {second:?}");
        // What passed of the golden machine's time before it was paused is little.
        assert!(third - second < start.elapsed() + parked / 2);
        clone.handle.kill();
        clone.end();
    }
}

/// A card whose TAP nobody drives.
fn card(mac: u8) -> NetSpec {
    let (tap, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    NetSpec {
        tap: tap.into(),
        mac: [2, 0, 0, 0, 0, mac],
        mtu: 1500,
        link_up: false,
        vhost: false,
    }
}

#[test]
fn a_clones_network_card_is_its_own() {
    let bar = layout::BAR_WINDOW + layout::BAR_SIZE;
    let code = Code::new().store16(layout::ECAM + (1 << 15) + 4, 6);
    // mov ecx, the last byte of the address; mov al, [rcx]; mov edx, COM1; out dx, al
    let last = u32::try_from(bar + 0x2005).unwrap().to_le_bytes();
    let code = code.print("ready").key().raw(&[0xb9]).raw(&last);
    let code = code.raw(&[0x8a, 0x01, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xee]);
    let mut spec = spec(&code.power_off());
    spec.golden = true;
    spec.net = Some(card(b'g'));
    let vm = run(spec);
    vm.wait_for("ready");
    vm.handle.pause().unwrap();
    let snapshot = vm.handle.freeze().unwrap();
    for (mac, shown) in [(b'a', "a"), (b'b', "b")] {
        let mut spec = RestoreSpec::new("vm1");
        spec.net = Some(card(mac));
        let clone = try_clone(spec, &snapshot).unwrap();
        clone.handle.resume().unwrap();
        typed(&clone, "x");
        let console = clone.handle.clone();
        assert_eq!(clone.end(), VmEnd::PowerOff);
        assert_eq!(console.console_tail(9), shown);
    }
    let without = try_clone(RestoreSpec::new("vm1"), &snapshot).err().unwrap();
    let expected = SnapshotError::Net { saved: true };
    assert_eq!(without.to_string(), expected.to_string());
}

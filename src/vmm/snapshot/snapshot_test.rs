//! Machines saved at any moment and cloned: what they had, what they share and what they do not.

use std::path::Path;

use crate::vmm::testing::{Code, Running, clone_of, run, spec};
use crate::vmm::{SaveError, Snapshot, VmEnd, layout};

/// Where a guest keeps what it must find again, and the page tables that lead above 4 GiB.
const LOW: u64 = 0x20_0000;
const LEVEL2: u64 = 0x30_0000;
/// The real mode code of the other processors, and what they count in.
const AP_CODE: u64 = 0x7_0000;
const AP_COUNT: u64 = 0x6000;

/// mov edx, LSR; in al, dx; test al, 1; jz to the in; then mov dl, DATA; in al, dx
const READ_KEY: [u8; 15] = [
    0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xb2, 0xf8, 0xec, 0x90, 0x90,
];

/// movabs rcx, address; mov dword [rcx], value
fn store(code: Code, address: u64, value: u32) -> Code {
    code.raw(&[0x48, 0xb9])
        .raw(&address.to_le_bytes())
        .raw(&[0xc7, 0x01])
        .raw(&value.to_le_bytes())
}

/// movabs rcx, address; cmp dword [rcx], value; je over a reset
fn expect(code: Code, address: u64, value: u32) -> Code {
    let reset = Code::new().reset().halt().0;
    code.raw(&[0x48, 0xb9])
        .raw(&address.to_le_bytes())
        .raw(&[0x81, 0x39])
        .raw(&value.to_le_bytes())
        .raw(&[0x74, u8::try_from(reset.len()).unwrap()])
        .raw(&reset)
}

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
        code = store(code, level3 + gib * 8, u32::try_from(table).unwrap() | 3);
        code = store(code, level3 + gib * 8 + 4, 0);
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
    // cli; xor ax, ax; mov ds, ax; inc word [AP_COUNT]; jmp to the inc
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
        // cmp word [AP_COUNT], 0; je to the cmp
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
        code = store(code, mark, value);
    }
    if vcpus > 1 {
        code = start_others(code);
    }
    code = code.print("ready").raw(&READ_KEY);
    for (value, mark) in (0x1000_0001..).zip(marks(memory_mib)) {
        code = expect(code, mark, value);
    }
    if vcpus > 1 {
        // The others go on counting: mov ax, [AP_COUNT]; cmp ax, [AP_COUNT]; je to the cmp
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

//! A guest that drives its disk for all it is worth while it is saved.

use std::fs::File;
use std::sync::Arc;

use super::Snapshot;
use crate::vmm::testing::{Code, Running, disk_file, overlay_disk, run, spec, try_clone};
use crate::vmm::{RestoreSpec, SaveError, VmEnd, VmSpec, layout};

fn with_disk(code: &Code, base: &Arc<File>) -> VmSpec {
    let mut spec = spec(code);
    spec.disks = vec![overlay_disk(base)];
    spec
}

fn clone_with_disk(snapshot: &Snapshot, base: &Arc<File>) -> Running {
    let mut spec = RestoreSpec::new("vm1");
    spec.disks = vec![overlay_disk(base)];
    try_clone(spec, snapshot).unwrap()
}

/// A clone that runs to its end by itself.
fn ends_well(clone: Running) {
    clone.handle.resume().unwrap();
    assert_eq!(clone.end(), VmEnd::PowerOff);
}

#[test]
fn a_disk_saved_while_it_is_written_loses_nothing_and_repeats_nothing() {
    let base = disk_file();
    let vm = run(with_disk(&disk_guest(), &base));
    vm.wait_for("go");
    let mut saved = Vec::new();
    while saved.len() < 6 && vm.handle.pause().is_ok() {
        let directory = tempfile::tempdir().unwrap();
        vm.handle.save(directory.path()).unwrap();
        vm.handle.resume().unwrap();
        saved.push(directory);
    }
    assert_eq!(vm.end(), VmEnd::PowerOff, "the machine itself goes on");
    assert!(saved.len() >= 3, "saved {} times", saved.len());
    for directory in &saved {
        let snapshot = Snapshot::open(directory.path()).unwrap();
        // Two at once, each on a delta of its own.
        let clones = [(); 2].map(|()| clone_with_disk(&snapshot, &base));
        clones.into_iter().for_each(ends_well);
    }
    assert_eq!(base.metadata().unwrap().len(), 65 * 4096);
}

/// Values that the disk's guest writes, four at a time, each into the block of its number.
const WRITES: u32 = 4096;
const BLOCKS: u32 = 64;
const RING: u64 = 0x20_0000;
/// Offsets of the guest's things from [`RING`].
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x1_0000;
/// Entry and bytes of one request's header, status and data.
const STRIDE: [u64; 3] = [0x40, 0x40, 0x1000];

fn low(address: u64) -> [u8; 4] {
    u32::try_from(address).unwrap().to_le_bytes()
}

/// Writes every value once into its block, checks after each round that all answers came exactly
/// once, and at the end that each block holds its last value. Powers off if so, and resets if not.
fn disk_guest() -> Code {
    let bar = layout::BAR_WINDOW + 5 * layout::BAR_SIZE;
    let mut code = disk_driver(bar);
    for head in 0..4_u64 {
        code = disk_request(code, head, 1);
    }
    code = code.print("go");
    // mov ebx, 4
    code = code.raw(&[0xbb, 4, 0, 0, 0]);
    let round = code.0.len();
    for head in 0..4_u8 {
        let header = low(RING + HEADERS + u64::from(head) * STRIDE[0] + 8);
        let data = low(RING + DATA + u64::from(head) * STRIDE[2]);
        // lea ecx, [rbx + head]; mov [data], ecx; and ecx, 63; shl ecx, 3; mov [sector], ecx
        code = code.raw(&[0x8d, 0x4b, head, 0x89, 0x0c, 0x25]).raw(&data);
        code = code.raw(&[0x83, 0xe1, 63, 0xc1, 0xe1, 3, 0x89, 0x0c, 0x25]);
        code = code.raw(&header);
    }
    code = wait_for_answers(code, bar);
    for head in 0..4 {
        code = expect_status(code, head);
    }
    // add ebx, 4; cmp ebx, WRITES; jbe round
    code = code
        .raw(&[0x83, 0xc3, 4, 0x81, 0xfb])
        .raw(&WRITES.to_le_bytes());
    code = jump_back(code, &[0x0f, 0x86], round);
    // Reads everything back: mov ebx, what was made available.
    code = code.raw(&[0xbb]).raw(&WRITES.to_le_bytes());
    for first in (0..BLOCKS).step_by(4) {
        for head in 0..4_u64 {
            code = disk_request(code, head, 3);
            let sector = (first + u32::try_from(head).unwrap()) * 8;
            let header = RING + HEADERS + head * STRIDE[0];
            code = code.store32(header, 0).store32(header + 8, sector);
        }
        code = wait_for_answers(code.raw(&[0x83, 0xc3, 4]), bar);
        for head in 0..4_u64 {
            let block = first + u32::try_from(head).unwrap();
            // The last round wrote WRITES to WRITES + 3, the one before what lies below.
            let last = if block < 4 { WRITES } else { WRITES - BLOCKS };
            code = expect_status(code, head);
            code = code.expect(RING + DATA + head * STRIDE[2], last + block);
        }
    }
    code.power_off()
}

/// Brings the disk up to DRIVER_OK with a queue of 16 whose available ring names four chains.
fn disk_driver(bar: u64) -> Code {
    let mut code = Code::new().store16(layout::ECAM + (5 << 15) + 4, 6);
    for status in [0, 1, 3] {
        code = code.store8(bar + 20, status);
    }
    code = code.store32(bar + 8, 1).store32(bar + 12, 1);
    code = code.store8(bar + 20, 11).store16(bar + 24, 16);
    for (register, at) in [(32, 0), (40, AVAILABLE), (48, USED)] {
        code = code
            .store32(bar + register, u32::try_from(RING + at).unwrap())
            .store32(bar + register + 4, 0);
    }
    for slot in 0..16_u64 {
        let head = u16::try_from(slot % 4 * 3).unwrap();
        code = code.store16(RING + AVAILABLE + 4 + slot * 2, head);
    }
    code.store16(bar + 28, 1).store8(bar + 20, 15)
}

/// A chain of header, data and status; `flags` of the data: 1 if the device reads it, 3 if not.
fn disk_request(code: Code, head: u64, flags: u32) -> Code {
    let at = |offset: u64, stride: usize| u32::try_from(RING + offset + head * STRIDE[stride]);
    let next = |index: u64| u32::try_from(head * 3 + index).unwrap() << 16;
    let [header, status, data] = [(HEADERS, 0), (STATUS, 1), (DATA, 2)];
    let chain = [
        (at(header.0, header.1).unwrap(), 16, 1 | next(1)),
        (at(data.0, data.1).unwrap(), 4096, flags | next(2)),
        (at(status.0, status.1).unwrap(), 1, 2),
    ];
    let mut code = code.store32(RING + HEADERS + head * STRIDE[0], 1);
    for (index, (address, len, flags)) in (head * 3..).zip(chain) {
        let entry = RING + index * 16;
        code = code.store32(entry, address).store32(entry + 4, 0);
        code = code.store32(entry + 8, len).store32(entry + 12, flags);
    }
    code
}

/// Makes requests available up to the index in EBX, kicks, and waits until the used index is there
/// too: one that is ahead of it, or more than four behind, resets.
fn wait_for_answers(mut code: Code, bar: u64) -> Code {
    for head in 0..4 {
        code = code.store8(RING + STATUS + head * STRIDE[1], 0xff);
    }
    // mov [available index], bx; then the notify register: mov edx, at; xor eax, eax; mov [rdx], ax
    code = code
        .raw(&[0x66, 0x89, 0x1c, 0x25])
        .raw(&low(RING + AVAILABLE + 2));
    code = code.raw(&[0xba]).raw(&low(bar + 0x3000));
    code = code.raw(&[0x31, 0xc0, 0x66, 0x89, 0x02]);
    let poll = code.0.len();
    // mov ecx, ebx; sub cx, [used index]; je done
    let reset = Code::new().reset().halt().0;
    code = code
        .raw(&[0x89, 0xd9, 0x66, 0x2b, 0x0c, 0x25])
        .raw(&low(RING + USED + 2));
    let past = u8::try_from(4 + 6 + reset.len()).unwrap();
    code = code.raw(&[0x74, past]);
    // cmp cx, 4; jbe poll; reset
    code = code.raw(&[0x66, 0x83, 0xf9, 4]);
    jump_back(code, &[0x0f, 0x86], poll).raw(&reset)
}

/// cmp byte [status], 0; je over a reset
fn expect_status(code: Code, head: u64) -> Code {
    code.raw(&[0x80, 0x3c, 0x25])
        .raw(&low(RING + STATUS + head * STRIDE[1]))
        .raw(&[0])
        .reset_unless_equal()
}

/// A jump with a 32-bit distance back to a place in the code.
fn jump_back(code: Code, opcode: &[u8], to: usize) -> Code {
    let code = code.raw(opcode);
    let distance = i32::try_from(code.0.len() + 4 - to).unwrap();
    code.raw(&(-distance).to_le_bytes())
}

/// Writes a block before it is saved; then shows what is there, writes a key, and shows that.
fn remembering_guest() -> Code {
    let bar = layout::BAR_WINDOW + 5 * layout::BAR_SIZE;
    let mut code = disk_driver(bar);
    for head in 0..4 {
        code = disk_request(code, head, 1);
        let block = u32::try_from(head).unwrap() * 8;
        code = code.store32(RING + HEADERS + head * STRIDE[0] + 8, block);
    }
    // The first of four blocks is the one that matters.
    code = code.store32(RING + DATA, u32::from(b'-'));
    code = wait_for_answers(code.raw(&[0xbb, 4, 0, 0, 0]), bar);
    code = code.print("ready").key();
    // movzx eax, al; mov r8d, eax
    code = code.raw(&[0x0f, 0xb6, 0xc0, 0x41, 0x89, 0xc0]);
    code = shows_block(code, bar, 8);
    // mov [data], r8d
    code = disk_request(code, 0, 1).raw(&[0x44, 0x89, 0x04, 0x25]);
    code = code.raw(&low(RING + DATA)).raw(&[0xbb, 12, 0, 0, 0]);
    code = wait_for_answers(code, bar).print("wrote").key();
    shows_block(code, bar, 16).power_off()
}

/// Reads the first block and prints its first byte; `available` counts requests so far.
fn shows_block(code: Code, bar: u64, available: u8) -> Code {
    let code = disk_request(code, 0, 3)
        .store32(RING + HEADERS, 0)
        .store32(RING + DATA, 0)
        .raw(&[0xbb, available, 0, 0, 0]);
    // mov al, [data]; mov edx, COM1; out dx, al
    wait_for_answers(code, bar)
        .raw(&[0x8a, 0x04, 0x25])
        .raw(&low(RING + DATA))
        .raw(&[0xba, 0xf8, 0x03, 0x00, 0x00, 0xee])
}

/// A golden machine on `base` that waits for a key.
fn frozen_guest(base: &Arc<File>) -> Snapshot {
    let mut spec = with_disk(&remembering_guest(), base);
    spec.golden = true;
    let vm = run(spec);
    vm.wait_for("ready");
    vm.handle.pause().unwrap();
    vm.handle.freeze().unwrap()
}

#[test]
fn clones_do_not_see_each_others_blocks() {
    let base = disk_file();
    let snapshot = frozen_guest(&base);
    let clones: Vec<Running> = ["a", "b", "c"]
        .into_iter()
        .map(|key| {
            let clone = clone_with_disk(&snapshot, &base);
            clone.handle.resume().unwrap();
            clone.handle.console_input(key.as_bytes());
            clone.wait_for("wrote");
            clone
        })
        .collect();
    for (clone, key) in clones.into_iter().zip(["a", "b", "c"]) {
        assert!(clone.handle.stats().disk_delta_bytes >= 4096);
        clone.handle.console_input(b"x");
        let console = clone.handle.clone();
        assert_eq!(clone.end(), VmEnd::PowerOff);
        assert_eq!(console.console_tail(99), format!("-wrote{key}"));
    }
}

#[test]
fn a_clone_with_a_disk_is_not_saved_itself() {
    let base = disk_file();
    let snapshot = frozen_guest(&base);
    let clone = clone_with_disk(&snapshot, &base);
    let directory = tempfile::tempdir().unwrap();
    let refused = clone.handle.save(directory.path()).unwrap_err();
    assert!(matches!(refused, SaveError::Clone), "{refused}");
}

//! Machines saved at any moment and cloned: what they had, what they share and what they do not.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::vmm::snapshot::{self, HostKey, StateProblem};
use crate::vmm::testing::{Code, Running, clone_of, run, spec, try_clone};
use crate::vmm::{DiskSource, DiskSpec, RestoreSpec, Snapshot, VmEnd, VmSpec, layout};

/// Where a guest keeps what it must find again, and the page tables that lead above 4 GiB.
const LOW: u64 = 0x20_0000;
const LEVEL2: u64 = 0x30_0000;
/// The real mode code of the other processors, which count at 0x6000.
const AP_CODE: u64 = 0x7_0000;

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

/// The file of a state of a machine with every device but a network card.
fn state_file(directory: &Path) -> Vec<u8> {
    let mut spec = spec(&Code::new().print("ready").spin());
    spec.agent_channel = true;
    spec.disks = vec![overlay_disk(&disk_file())];
    let vm = run(spec);
    vm.wait_for("ready");
    vm.handle.pause().unwrap();
    vm.handle.save(directory).unwrap();
    vm.handle.kill();
    vm.end();
    std::fs::read(directory.join("state")).unwrap()
}

fn problem(bytes: &[u8]) -> Option<StateProblem> {
    let host = HostKey::of_this_host().unwrap();
    snapshot::read(&mut &*bytes, bytes.len() as u64, &host).err()
}

#[test]
fn no_byte_of_a_state_file_can_change_and_none_be_missing() {
    let directory = tempfile::tempdir().unwrap();
    let file = state_file(directory.path());
    assert!(problem(&file).is_none());
    let header = snapshot::HEADER_BYTES;
    let places = (0..header).chain((header..file.len()).step_by(97));
    for place in places {
        let mut damaged = file.clone();
        damaged[place] ^= 0x40;
        let named = problem(&damaged).unwrap();
        let expected = match place {
            0..8 => matches!(named, StateProblem::Magic),
            8..12 => matches!(named, StateProblem::Version { .. }),
            16..24 => matches!(
                named,
                StateProblem::TooLarge { .. } | StateProblem::Length { .. }
            ),
            _ => matches!(named, StateProblem::Checksum),
        };
        assert!(expected, "byte {place}: {named:?}");
        let cut = problem(&file[..place]).unwrap();
        assert!(matches!(cut, StateProblem::Length { .. }), "{cut:?}");
    }
    let longer = [file.as_slice(), &[0]].concat();
    assert!(matches!(
        problem(&longer),
        Some(StateProblem::Length { .. })
    ));
    let other = snapshot::seal(&file[header..], &HostKey::from_bytes([7; 32]));
    assert!(matches!(problem(&other), Some(StateProblem::OtherHost)));
    let trailing = [&file[header..], &[0]].concat();
    let trailing = snapshot::seal(&trailing, &HostKey::of_this_host().unwrap());
    assert!(matches!(
        problem(&trailing),
        Some(StateProblem::Trailing { bytes: 1 })
    ));
}

#[test]
fn a_state_of_any_lengths_is_refused_or_taken_and_costs_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let file = state_file(directory.path());
    let payload = &file[snapshot::HEADER_BYTES..];
    snapshot::offer_to_devices(snapshot::decode(payload).unwrap()).unwrap();
    // The largest number of an encoded length.
    let huge = [[0xff; 9].as_slice(), &[1]].concat();
    let state = snapshot::decode(payload).unwrap();
    let devices = postcard::to_allocvec(&state.functions).unwrap().len();
    let (mut refused, mut offered) = (0, 0);
    largest_allocation::forget();
    for place in 0..payload.len() {
        let (start, end) = (&payload[..place], &payload[place + 1..]);
        let changes: [&[u8]; 3] = [&[0x7f], &[0xff, 0xff, 0x03], &huge];
        for change in changes {
            match snapshot::decode(&[start, change, end].concat()) {
                Err(_named) => refused += 1,
                // What comes before the devices is vCPUs, where any value goes.
                Ok(state) if place % 5 == 0 && place + devices >= payload.len() => {
                    offered += 1;
                    let _refused = snapshot::offer_to_devices(state);
                }
                Ok(_) => {}
            }
        }
    }
    assert!(
        refused > payload.len() / 2,
        "{refused} of {}",
        payload.len()
    );
    assert!(offered > 100, "{offered}");
    assert!(largest_allocation::bytes() < 1 << 20);
}

/// The largest allocation of each thread.
mod largest_allocation {
    #![expect(unsafe_code, reason = "an allocator has no safe form")]

    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static LARGEST: Cell<usize> = const { Cell::new(0) };
    }

    pub fn forget() {
        LARGEST.set(0);
    }

    pub fn bytes() -> usize {
        LARGEST.get()
    }

    struct Watched;

    #[global_allocator]
    static WATCHED: Watched = Watched;

    // SAFETY: everything is the system's allocator's; the note beside it allocates nothing.
    unsafe impl GlobalAlloc for Watched {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // A thread at its end has no such variable any more.
            let _ending = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
            // SAFETY: the caller's contract is the same.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            // SAFETY: the caller's contract is the same, and every block is the system's.
            unsafe { System.dealloc(block, layout) }
        }
    }
}

/// A disk of 64 blocks of 4 KiB and a bit more.
fn disk_file() -> Arc<File> {
    let base = tempfile::tempfile().unwrap();
    base.set_len(65 * 4096).unwrap();
    Arc::new(base)
}

fn overlay_disk(base: &Arc<File>) -> DiskSpec {
    DiskSpec {
        source: DiskSource::Overlay {
            base: Arc::clone(base),
            delta_dir: std::env::temp_dir(),
        },
        serial: String::new(),
        durable: false,
    }
}

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
            code = expect(code, RING + DATA + head * STRIDE[2], last + block);
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
    let reset = Code::new().reset().halt().0;
    code.raw(&[0x80, 0x3c, 0x25])
        .raw(&low(RING + STATUS + head * STRIDE[1]))
        .raw(&[0, 0x74, u8::try_from(reset.len()).unwrap()])
        .raw(&reset)
}

/// A jump with a 32-bit distance back to a place in the code.
fn jump_back(code: Code, opcode: &[u8], to: usize) -> Code {
    let code = code.raw(opcode);
    let distance = i32::try_from(code.0.len() + 4 - to).unwrap();
    code.raw(&(-distance).to_le_bytes())
}

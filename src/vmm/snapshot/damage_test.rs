//! State files that are cut, changed or foreign: each is refused by name, and no length in one
//! costs memory.

use std::path::Path;

use super::*;
use crate::vmm::snapshot;
use crate::vmm::testing::{Code, disk_file, overlay_disk, run, spec};

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
    read(&mut &*bytes, bytes.len() as u64, &host).err()
}

#[test]
fn a_decoded_state_encodes_to_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let file = state_file(directory.path());
    let host = HostKey::of_this_host().unwrap();
    let state = read(&mut file.as_slice(), file.len() as u64, &host).unwrap();
    assert_eq!(encode(&state, &host).unwrap(), file);
}

/// What fuzzing has found or begins with; `fuzz/README.md` says how they are made.
#[test]
fn the_corpus_of_the_fuzzer_is_survived() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/snapshot_state");
    let mut decoded = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let file = std::fs::read(entry.unwrap().path()).unwrap();
        let _refused_elsewhere = problem(&file);
        let payload = file.get(HEADER_BYTES..).unwrap_or_default();
        if let Ok(state) = snapshot::decode(payload) {
            decoded += 1;
            let _refused = snapshot::offer_to_devices(state);
        }
    }
    assert!(decoded > 0, "the seeds no longer fit the format");
}

#[test]
fn no_byte_of_a_state_file_can_change_and_none_be_missing() {
    let directory = tempfile::tempdir().unwrap();
    let file = state_file(directory.path());
    assert!(problem(&file).is_none());
    let header = HEADER_BYTES;
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
    let other = seal(&file[header..], &HostKey::from_bytes([7; 32]));
    assert!(matches!(problem(&other), Some(StateProblem::OtherHost)));
    let trailing = [&file[header..], &[0]].concat();
    let trailing = seal(&trailing, &HostKey::of_this_host().unwrap());
    assert!(matches!(
        problem(&trailing),
        Some(StateProblem::Trailing { bytes: 1 })
    ));
}

#[test]
fn a_state_of_any_lengths_is_refused_or_taken_and_costs_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let file = state_file(directory.path());
    let payload = &file[HEADER_BYTES..];
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

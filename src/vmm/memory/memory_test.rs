//! Memory of every origin: where it lies, what it costs, and who sees whose writes.

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

use super::extents::MAX_EXTENTS;
use super::*;

#[test]
fn memory_lies_below_and_above_the_hole() {
    for (mib, regions) in [(64, 1), (1024, 1), (3072, 1), (3584, 2), (8192, 2)] {
        let memory = VmMemory::anonymous(mib).unwrap();
        assert_eq!(memory.guest().num_regions(), regions, "{mib}");
        let bytes: u64 = memory.guest().iter().map(GuestMemoryRegion::len).sum();
        assert_eq!(bytes, u64::from(mib) << 20);
        let last = memory.guest().last_addr();
        memory.guest().write_obj(7_u8, last).unwrap();
        assert!(memory.resident_bytes() <= 2 << 20);
    }
    assert!(matches!(
        VmMemory::anonymous(63),
        Err(MemoryError::Size { .. })
    ));
}

#[test]
fn a_backing_file_that_shrinks_costs_that_memory_only() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let whole = Extent {
        start: 0,
        bytes: 64 << 20,
    };
    let broken = VmMemory::clone_of(64, &file, &[whole]).unwrap();
    let neighbour = VmMemory::anonymous(64).unwrap();
    broken.guest().write_obj(1_u8, GuestAddress(0)).unwrap();
    file.set_len(4096).unwrap();
    let read: u8 = broken.guest().read_obj(GuestAddress(1 << 20)).unwrap();
    assert_eq!(read, 0);
    assert!(broken.host_fault().is_raised());
    assert_eq!(broken.host_fault().event().read().unwrap(), 1);
    assert!(!neighbour.host_fault().is_raised());
}

#[test]
fn ranges_are_given_back() {
    for _cycle in 0..2 * MAX_RANGES {
        VmMemory::anonymous(64).unwrap();
    }
}

/// A memory file of `mib` with a page of `at + 1` at every place.
fn islands(mib: u64, places: impl Iterator<Item = u64>) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(mib << 20).unwrap();
    for place in places {
        let bytes = u64::to_le_bytes(place + 1);
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, place).unwrap();
    }
    file
}

#[test]
fn a_clone_sees_all_of_its_file_through_few_mappings_and_keeps_its_writes() {
    let mib = 3584;
    // Growing gaps, over the hole below 4 GiB as well.
    let places: Vec<u64> = (1..200).map(|n| (n * n * 80_000) & !0xfff).collect();
    let file = islands(mib, places.iter().copied());
    let extents = of_file(&file, mib << 20).unwrap();
    assert!(extents.len() <= MAX_EXTENTS);
    assert!(extents.windows(2).all(|pair| pair[0].end() < pair[1].start));
    let mib = u32::try_from(mib).unwrap();
    let clones = [(); 2].map(|()| VmMemory::clone_of(mib, &file, &extents).unwrap());
    let at = |place: u64| {
        let high = place.checked_sub(layout::LOW_RAM_END);
        GuestAddress(high.map_or(place, |high| layout::HIGH_RAM_START + high))
    };
    for place in &places {
        for clone in &clones {
            let seen: u64 = clone.guest().read_obj(at(*place)).unwrap();
            assert_eq!(seen, place + 1);
        }
        clones[0].guest().write_obj(7_u64, at(*place)).unwrap();
        let other: u64 = clones[1].guest().read_obj(at(*place)).unwrap();
        assert_eq!(other, place + 1);
    }
    assert_eq!(
        data_ranges(&file, 0, u64::from(mib) << 20).unwrap().len(),
        places.len()
    );
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let range = clones[0].ranges()[0];
    let starts = maps
        .lines()
        .filter_map(|line| u64::from_str_radix(line.split_once('-')?.0, 16).ok());
    let within = |start: &u64| (range.host..range.host + range.bytes).contains(start);
    assert!(starts.filter(within).count() <= 128);
}

#[test]
fn near_extents_are_joined_and_far_ones_stay_apart() {
    let mib = 1 << 20;
    // Thirty pairs six MiB apart, two hundred MiB between them: five gaps too many.
    let pairs = (0..33_u64).flat_map(|n| [n * 200 * mib, n * 200 * mib + 6 * mib]);
    let file = islands(8192, pairs);
    let extents = of_file(&file, 8192 << 20).unwrap();
    assert_eq!(extents.len(), MAX_EXTENTS);
    let long = extents.iter().filter(|extent| extent.bytes == 8 * mib);
    assert_eq!(
        long.count(),
        4,
        "the nearest ones were joined, no more than needed"
    );
}

#[test]
fn what_was_touched_is_known_of_every_origin() {
    let page = 4096;
    for memory in [
        VmMemory::anonymous(3584).unwrap(),
        VmMemory::golden(3584).unwrap(),
    ] {
        assert!(
            memory
                .golden_file()
                .is_none_or(|file| file.metadata().unwrap().len() == 3584 << 20)
        );
        for range in memory.ranges() {
            for place in [0, 5 * page, range.bytes - page] {
                let at = GuestAddress(range.guest + place);
                memory.guest().write_obj(1_u8, at).unwrap();
            }
            let touched = memory.touched(&range).unwrap();
            let covers = |place: u64| {
                touched
                    .iter()
                    .any(|e| e.start <= place && place + page <= e.end())
            };
            assert!(covers(0) && covers(5 * page) && covers(range.bytes - page));
            let bytes: u64 = touched.iter().map(|extent| extent.bytes).sum();
            assert!(bytes <= 8 << 20, "{bytes}");
        }
    }
}

//! Memory of every origin: where it lies, what it costs, and who sees whose writes.

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

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

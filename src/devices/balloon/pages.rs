//! Giving guest pages back to the host.
//!
//! What a driver names is only ever a hint which of its own pages it can do without: numbers
//! outside RAM mean nothing, duplicates and pages in use hurt that guest alone. PAGE_POISON is
//! never offered, so that the bytes of such a page are undefined to the driver. MADV_DONTNEED is
//! right over private mappings: anonymous pages read as zero afterwards, those of a snapshot as
//! the snapshot has them. A shared mapping is the memory file itself, where only MADV_REMOVE gives
//! anything back.
#![expect(unsafe_code, reason = "madvise has no safe form")]

use std::ops::Range;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::devices::GuestMemory;

/// A balloon page, whatever the guest's own page size (virtio 1.2, 5.5.6).
pub(super) const PAGE_BYTES: u64 = 4096;

/// Sorts page numbers and joins them to ranges of guest addresses.
pub(super) fn ranges(pages: &mut Vec<u32>) -> impl Iterator<Item = Range<u64>> {
    pages.sort_unstable();
    pages.dedup();
    pages
        .chunk_by(|a, b| a.checked_add(1) == Some(*b))
        .filter_map(|run| {
            let start = u64::from(*run.first()?) * PAGE_BYTES;
            Some(start..start + run.len() as u64 * PAGE_BYTES)
        })
}

/// The whole pages within a range; empty if there is none.
pub(super) fn whole_pages(range: Range<u64>) -> Range<u64> {
    let end = range.end - range.end % PAGE_BYTES;
    let start = range.start.checked_next_multiple_of(PAGE_BYTES);
    start.unwrap_or(end)..end
}

/// Gives the pages of `range` that are RAM back to the host; returns how many bytes that were.
/// `range` consists of whole pages.
pub(super) fn give_back(memory: &GuestMemory, range: &Range<u64>) -> u64 {
    let mut given = 0;
    for region in memory.iter() {
        let first = region.start_addr().raw_value();
        let start = range.start.max(first);
        let end = range.end.min(first.saturating_add(region.len()));
        let Some(bytes) = end.checked_sub(start).filter(|bytes| *bytes > 0) else {
            continue;
        };
        let (Ok(host), Ok(len)) = (
            memory.get_host_address(GuestAddress(start)),
            usize::try_from(bytes),
        ) else {
            continue;
        };
        let advice = match region.flags() & libc::MAP_SHARED {
            0 => libc::MADV_DONTNEED,
            _ => libc::MADV_REMOVE,
        };
        // SAFETY: `len` bytes from `host` on lie within one region that `memory` keeps mapped,
        // and guest memory is never borrowed as a Rust reference: pages that turn to other bytes
        // are what every reader of it expects.
        let done = unsafe { libc::madvise(host.cast(), len, advice) };
        if done == 0 {
            given += bytes;
        }
    }
    given
}

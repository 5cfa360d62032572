//! Which parts of a memory hold something: of a file by its holes, of anonymous memory by the
//! process's page map.
//!
//! A clone maps its snapshot's extents one by one, so their number is bounded: near ones are
//! joined, smallest gap first, until they fit.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Extents of one clone: with the anonymous memory between them, and one that the hole below 4 GiB
/// cuts in two, at most 128 mappings.
pub const MAX_EXTENTS: usize = 62;
/// Extents begin and end on multiples of this, so that huge pages stay possible.
const EXTENT_ALIGNMENT: u64 = 2 << 20;
const PAGE: u64 = 4096;
/// An entry of /proc/self/pagemap: the page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const PAGEMAP_ENTRY: usize = 8;

/// A part of a memory or of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub start: u64,
    pub bytes: u64,
}

impl Extent {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }

    /// What both have in common.
    pub fn within(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let bytes = self.end().min(other.end()).checked_sub(start)?;
        (bytes > 0).then_some(Self { start, bytes })
    }
}

/// The extents of a memory file of `bytes` that a clone maps.
pub fn of_file(file: &File, bytes: u64) -> io::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    for data in data_ranges(file, 0, bytes)? {
        let start = data.start - data.start % EXTENT_ALIGNMENT;
        let end = data.end().next_multiple_of(EXTENT_ALIGNMENT).min(bytes);
        match extents.last_mut() {
            Some(last) if last.end() >= start => last.bytes = end.max(last.end()) - last.start,
            _ => extents.push(Extent {
                start,
                bytes: end - start,
            }),
        }
    }
    Ok(join(extents))
}

/// Joins extents over the smallest gaps until there are few enough.
fn join(extents: Vec<Extent>) -> Vec<Extent> {
    let Some(excess) = extents.len().checked_sub(MAX_EXTENTS).filter(|n| *n > 0) else {
        return extents;
    };
    let pairs = extents.iter().zip(extents.iter().skip(1));
    let mut gaps: Vec<u64> = pairs
        .map(|(a, b)| b.start.saturating_sub(a.end()))
        .collect();
    gaps.sort_unstable();
    // Gaps of the limit's size are closed from the front, as many as needed.
    let limit = gaps.get(excess - 1).copied().unwrap_or(u64::MAX);
    let mut of_limit = gaps
        .iter()
        .take(excess)
        .filter(|gap| **gap == limit)
        .count();
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents {
        if let Some(last) = joined.last_mut() {
            let gap = extent.start.saturating_sub(last.end());
            if gap < limit || (gap == limit && of_limit > 0) {
                of_limit -= usize::from(gap == limit);
                last.bytes = extent.end() - last.start;
                continue;
            }
        }
        joined.push(extent);
    }
    joined
}

/// Where `file` has data in `[start, start + bytes)`, as offsets from `start`; whole pages. A file
/// system that knows no holes has data everywhere. Moves the file's position.
pub fn data_ranges(file: &File, start: u64, bytes: u64) -> io::Result<Vec<Extent>> {
    let end = start.saturating_add(bytes);
    let mut found = Vec::new();
    let mut at = start;
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data))?.min(end);
        let first = data - data % PAGE;
        let last = hole.next_multiple_of(PAGE).min(end);
        found.push(Extent {
            start: first.max(start) - start,
            bytes: last - first.max(start),
        });
        at = last.max(at + PAGE);
    }
    Ok(found)
}

/// Where anonymous memory of this process at `host` was touched, as offsets from there.
pub fn populated(host: u64, bytes: u64) -> io::Result<Vec<Extent>> {
    let map = File::open("/proc/self/pagemap")?;
    let mut found: Vec<Extent> = Vec::new();
    let mut entries = vec![0_u8; PAGEMAP_ENTRY * 8192];
    let mut page = 0;
    while page < bytes.div_ceil(PAGE) {
        let offset = (host / PAGE + page) * PAGEMAP_ENTRY as u64;
        let read = map.read_at(&mut entries, offset)?;
        let (chunks, _rest) = entries.get(..read).unwrap_or_default().as_chunks();
        if chunks.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for entry in chunks {
            if page >= bytes.div_ceil(PAGE) {
                break;
            }
            if u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                let start = page * PAGE;
                match found.last_mut() {
                    Some(last) if last.end() == start => last.bytes += PAGE,
                    _ => found.push(Extent { start, bytes: PAGE }),
                }
            }
            page += 1;
        }
    }
    Ok(found)
}

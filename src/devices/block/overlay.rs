//! A private view of a shared disk: base <- golden delta <- own delta.
//!
//! All three files use the disk's own offsets; the own delta is sparse and unnamed, so a crash
//! leaves nothing. The map says per granule where the bytes are and changes only after they have
//! landed: a failed write leaves what was there before. Deliberately absent: any format. Nothing
//! that a guest writes is ever interpreted.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::disk::{self, GuestBytes, Piece, SECTOR};
use super::map::{GRANULE, GRANULE_BYTES, OverlayMap, Place};

/// The disk of a snapshot, frozen: shared read-only by its clones.
#[derive(Debug, Clone)]
pub struct Golden {
    pub delta: Arc<File>,
    pub map: OverlayMap,
}

/// A base that is never written, and what has changed since.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<File>,
    base_bytes: u64,
    golden: Option<Arc<File>>,
    delta: File,
    bytes: u64,
    map: OverlayMap,
    /// The delta's file system can make holes.
    can_punch: bool,
}

impl Overlay {
    /// An overlay on `base`, or on the snapshot `golden` that was taken above that base.
    ///
    /// The disk is as long as the longest of its files; what the base lacks reads as zero. `delta` is an empty file that nobody else writes (`O_TMPFILE`). Reads no data.
    pub fn new(base: Arc<File>, golden: Option<Golden>, delta: File) -> io::Result<Self> {
        let base_bytes = disk::file_bytes(&base)?;
        let mut bytes = base_bytes.max(disk::file_bytes(&delta)?);
        if let Some(golden) = &golden {
            bytes = bytes.max(disk::file_bytes(&golden.delta)?);
        }
        bytes -= bytes % SECTOR;
        delta.set_len(bytes)?;
        let mut map = OverlayMap::new(bytes);
        if let Some(golden) = &golden {
            check_shape(&golden.map, &map)?;
            map = golden.map.frozen().map_err(invalid)?;
        }
        Ok(Self {
            base,
            base_bytes,
            golden: golden.map(|golden| golden.delta),
            delta,
            bytes,
            map,
            can_punch: true,
        })
    }

    /// Size of the disk, whole sectors.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file that holds this disk's own bytes.
    pub fn delta(&self) -> &File {
        &self.delta
    }

    /// Space that the own delta takes on the host.
    pub fn delta_bytes(&self) -> u64 {
        // st_blocks counts 512 bytes, whatever the file system's block is.
        self.delta.metadata().map_or(0, |m| m.blocks() * SECTOR)
    }

    /// Where each granule is, for a snapshot. Right only while nothing is in flight.
    pub fn save_map(&self) -> OverlayMap {
        self.map.clone()
    }

    /// Takes a saved map over. A clone's must be the one its golden delta came with, and changes
    /// nothing; else the delta is the one that was saved, and the map is its map.
    pub fn restore_map(&mut self, saved: OverlayMap) -> io::Result<()> {
        check_shape(&saved, &self.map)?;
        let frozen = saved.frozen().map_err(invalid)?;
        if self.golden.is_none() {
            // A delta without its bytes would read as zeroes where the guest has written.
            if saved.needs_delta() && self.delta_bytes() == 0 {
                return Err(invalid(
                    "saved disk map needs the delta that was saved with it",
                ));
            }
            self.map = saved;
            return Ok(());
        }
        if frozen == self.map {
            Ok(())
        } else {
            Err(invalid("saved disk map is not that of the golden delta"))
        }
    }

    pub(super) fn plan_read(&self, offset: u64, len: u64, pieces: &mut Vec<Piece>) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let granule = at / GRANULE;
            let (place, count) = self.map.run(granule, (end - 1) / GRANULE - granule + 1);
            let mut stop = end.min((granule + count) * GRANULE);
            let fd = match place {
                Place::Base if at >= self.base_bytes => None,
                Place::Base => {
                    stop = stop.min(self.base_bytes);
                    Some(self.base.as_raw_fd())
                }
                // A map in hand says golden only where there is a golden delta.
                Place::Golden => self.golden.as_ref().map(AsRawFd::as_raw_fd),
                Place::Delta => Some(self.delta.as_raw_fd()),
                Place::Zero => None,
            };
            pieces.push(Piece {
                fd,
                offset: at,
                len: stop - at,
            });
            at = stop;
        }
    }

    pub(super) fn write(&mut self, source: &GuestBytes<'_>, offset: u64) -> io::Result<()> {
        let len = source.bytes();
        if self.fits_in_place(offset, len) {
            source.write(&self.delta, 0, offset, len)?;
            let whole = self.whole_granules(offset, offset + len);
            self.map.set(whole, Place::Delta);
            return Ok(());
        }
        self.write_by_granules(source, offset)
    }

    /// Whether a write can go to the delta as it is: its first and last granule are covered
    /// whole or are in the delta already.
    fn fits_in_place(&self, offset: u64, len: u64) -> bool {
        let end = offset + len;
        let (first, last) = (offset / GRANULE, end.saturating_sub(1) / GRANULE);
        let whole = |granule| offset <= granule * GRANULE && end >= self.granule_end(granule);
        [first, last]
            .into_iter()
            .all(|granule| whole(granule) || self.map.place(granule) == Place::Delta)
    }

    /// The parts of granules at both ends by themselves, each copied up where it must be.
    fn write_by_granules(&mut self, source: &GuestBytes<'_>, offset: u64) -> io::Result<()> {
        let end = offset + source.bytes();
        let mut at = offset;
        while at < end {
            let whole = self.whole_granules(at, end);
            let middle = whole.start * GRANULE;
            let stop = if at == middle && !whole.is_empty() {
                let stop = end.min(whole.end * GRANULE);
                source.write(&self.delta, at - offset, at, stop - at)?;
                self.map.set(whole, Place::Delta);
                stop
            } else {
                let stop = end.min(self.granule_end(at / GRANULE));
                self.change_part(at, stop - at, |part| source.copy_to(at - offset, part))?;
                stop
            };
            at = stop;
        }
        Ok(())
    }

    pub(super) fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let whole = self.whole_granules(at, end);
            if at == whole.start * GRANULE && !whole.is_empty() {
                let stop = end.min(whole.end * GRANULE);
                // The map alone makes it read as zero; the hole only saves space.
                if self.can_punch {
                    self.can_punch = disk::punch(&self.delta, at, stop - at)?;
                }
                self.map.set(whole, Place::Zero);
                at = stop;
                continue;
            }
            let stop = end.min(self.granule_end(at / GRANULE));
            if self.reads_zero(at / GRANULE) {
                at = stop;
                continue;
            }
            self.change_part(at, stop - at, |part| {
                part.fill(0);
                Ok(())
            })?;
            at = stop;
        }
        Ok(())
    }

    /// Changes a part of one granule; copies the rest up first where it is not in the delta.
    fn change_part(
        &mut self,
        at: u64,
        len: u64,
        change: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let granule = at / GRANULE;
        let start = granule * GRANULE;
        let in_delta = self.map.place(granule) == Place::Delta;
        let (from, to) = if in_delta {
            (at, at + len)
        } else {
            (start, self.granule_end(granule))
        };
        let mut bytes = [0; GRANULE_BYTES];
        let bytes = range_mut(&mut bytes, 0, to - from)?;
        if !in_delta {
            self.read(granule, bytes)?;
        }
        change(range_mut(bytes, at - from, len)?)?;
        self.delta.write_all_at(bytes, from)?;
        self.map.set(granule..granule + 1, Place::Delta);
        Ok(())
    }

    /// Reads one granule, which is not in the delta, to its end.
    fn read(&self, granule: u64, bytes: &mut [u8]) -> io::Result<()> {
        let start = granule * GRANULE;
        match (self.map.place(granule), &self.golden) {
            (Place::Golden, Some(golden)) => golden.read_exact_at(bytes, start),
            (Place::Base, _) if start < self.base_bytes => {
                let there = (bytes.len() as u64).min(self.base_bytes - start);
                self.base.read_exact_at(range_mut(bytes, 0, there)?, start)
            }
            _ => Ok(()),
        }
    }

    fn reads_zero(&self, granule: u64) -> bool {
        match self.map.place(granule) {
            Place::Zero => true,
            Place::Base => granule * GRANULE >= self.base_bytes,
            Place::Golden | Place::Delta => false,
        }
    }

    /// Where a granule ends: the last one may be short.
    fn granule_end(&self, granule: u64) -> u64 {
        ((granule + 1) * GRANULE).min(self.bytes)
    }

    /// The granules that lie in `[start, end)` as a whole.
    fn whole_granules(&self, start: u64, end: u64) -> std::ops::Range<u64> {
        let first = start.div_ceil(GRANULE);
        let last = if end >= self.bytes {
            self.map.granules()
        } else {
            end / GRANULE
        };
        first..last.max(first)
    }
}

fn range_mut(bytes: &mut [u8], start: u64, len: u64) -> io::Result<&mut [u8]> {
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    bytes
        .get_mut(start..start.saturating_add(len))
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn check_shape(saved: &OverlayMap, own: &OverlayMap) -> io::Result<()> {
    if saved.granules() == own.granules() {
        Ok(())
    } else {
        Err(invalid("saved disk map is of a disk of another size"))
    }
}

fn invalid(problem: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
#[path = "overlay_test.rs"]
mod tests;

//! Block requests (virtio 1.2, 5.2.6): bytes of a chain to a checked request, and nothing else.
//!
//! No file and no thread in here. A chain's framing is not assumed (virtio 1.2, 2.7.4.3): the
//! header is the first 16 readable bytes and the status the last writable one, wherever the
//! driver has cut its descriptors.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestAddress;

use super::disk::SECTOR;
use crate::devices::GuestMemory;
use crate::devices::fault::GuestFault;
use crate::devices::queue::{Chain, Segment, read_segments, total};

/// Bytes of type, reserved and sector.
const HEADER_BYTES: usize = 16;
/// Bytes of a range in a DISCARD or WRITE_ZEROES.
const RANGE_BYTES: usize = 16;
/// The one flag of a range: the device may give the space back.
const RANGE_UNMAP: u32 = 1;
/// Ranges in one DISCARD.
pub const MAX_DISCARD_RANGES: u32 = 16;
/// Ranges in one WRITE_ZEROES.
pub const MAX_ZERO_RANGES: u32 = 1;
/// Sectors in a range of either (64 MiB): bounds how long one request keeps the thread.
pub const MAX_RANGE_SECTORS: u32 = 131_072;
/// Length of the serial (virtio 1.2, 5.2.6).
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The byte that tells the driver how it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}

/// A range of the disk, in bytes and inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    pub offset: u64,
    pub len: u64,
}

/// What the driver wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Read(ByteRange),
    Write(ByteRange),
    Flush,
    /// Copy the serial.
    GetId,
    /// Make ranges read as zero.
    Zero {
        ranges: Vec<ByteRange>,
        unmap: bool,
    },
    /// Nothing: answer with this status.
    Refuse(Status),
}

/// A request, checked whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    pub action: Action,
    /// The guest's bytes: what is written to the disk, or where what is read goes.
    pub data: Vec<Segment>,
    /// Writable bytes before the status.
    pub room: u32,
    pub status: GuestAddress,
}

/// What of the disk a request may name.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub sectors: u64,
    pub read_only: bool,
}

impl Request {
    /// Takes a chain apart. Only a chain without room for a status is a guest fault: everything
    /// else that is wrong can be said in it.
    pub fn parse(mem: &GuestMemory, chain: Chain, limits: Limits) -> Result<Self, GuestFault> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let status = split_status(&mut writable).ok_or(GuestFault::Request {
            device: "block",
            problem: "no room for the status byte",
        })?;
        let room = u32::try_from(total(&writable)).map_err(|_beyond| GuestFault::Request {
            device: "block",
            problem: "more than 4 GiB to write",
        })?;
        let mut header = [0; HEADER_BYTES];
        let (action, data) = if read_segments(mem, &readable, 0, &mut header) {
            skip(&mut readable, HEADER_BYTES as u64);
            let (kind, sector) = split_header(&header);
            limits.action(mem, kind, sector, readable, writable)
        } else {
            (Action::Refuse(Status::IoError), Vec::new())
        };
        Ok(Self {
            head,
            action,
            data,
            room,
            status,
        })
    }

    /// How much of the writable part is written, counted from its start (virtio 1.2, 2.7.8.2).
    pub fn used_bytes(&self, status: Status) -> u32 {
        let data = match (&self.action, status) {
            (Action::Read(_), Status::Ok) => self.room,
            (Action::GetId, Status::Ok) => self.room.min(VIRTIO_BLK_ID_BYTES),
            _ => 0,
        };
        // The status lies behind the data: it counts if no gap is before it.
        if data == self.room { data + 1 } else { data }
    }

    /// The range of a read or write.
    pub fn range(&self) -> Option<ByteRange> {
        match self.action {
            Action::Read(range) | Action::Write(range) => Some(range),
            _ => None,
        }
    }
}

impl Limits {
    fn action(
        self,
        mem: &GuestMemory,
        kind: u32,
        sector: u64,
        readable: Vec<Segment>,
        writable: Vec<Segment>,
    ) -> (Action, Vec<Segment>) {
        let refuse = |status| (Action::Refuse(status), Vec::new());
        match kind {
            VIRTIO_BLK_T_IN => match self.range(sector, total(&writable)) {
                Some(range) => (Action::Read(range), writable),
                None => refuse(Status::IoError),
            },
            VIRTIO_BLK_T_OUT => match self.range(sector, total(&readable)) {
                Some(range) if !self.read_only => (Action::Write(range), readable),
                _ => refuse(Status::IoError),
            },
            VIRTIO_BLK_T_FLUSH => (Action::Flush, Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Action::GetId, writable),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let zero = kind == VIRTIO_BLK_T_WRITE_ZEROES;
                match self.zero(mem, &readable, zero) {
                    Ok(action) => (action, Vec::new()),
                    Err(status) => refuse(status),
                }
            }
            _ => refuse(Status::Unsupported),
        }
    }

    /// The ranges of a DISCARD or WRITE_ZEROES (virtio 1.2, 5.2.6.2).
    fn zero(self, mem: &GuestMemory, data: &[Segment], zero: bool) -> Result<Action, Status> {
        let max = if zero {
            MAX_ZERO_RANGES
        } else {
            MAX_DISCARD_RANGES
        };
        let bytes = total(data);
        let count = bytes / RANGE_BYTES as u64;
        let shape =
            bytes.is_multiple_of(RANGE_BYTES as u64) && count > 0 && count <= u64::from(max);
        if self.read_only || !shape {
            return Err(Status::IoError);
        }
        let mut ranges = Vec::new();
        let mut unmap = true;
        for index in 0..count {
            let mut raw = [0; RANGE_BYTES];
            if !read_segments(mem, data, index * RANGE_BYTES as u64, &mut raw) {
                return Err(Status::IoError);
            }
            let raw = u128::from_le_bytes(raw);
            let (sector, sectors, flags) = (low64(raw), low32(raw >> 64), low32(raw >> 96));
            let allowed = if zero { RANGE_UNMAP } else { 0 };
            if flags & !allowed != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            let range = self
                .range(sector, u64::from(sectors) * SECTOR)
                .ok_or(Status::IoError)?;
            unmap &= !zero || flags & RANGE_UNMAP != 0;
            ranges.push(range);
        }
        Ok(Action::Zero { ranges, unmap })
    }

    /// `len` bytes from `sector` on, if they are whole sectors and on the disk.
    fn range(self, sector: u64, len: u64) -> Option<ByteRange> {
        let end = sector.checked_add(len / SECTOR)?;
        let fits = len.is_multiple_of(SECTOR) && end <= self.sectors;
        let offset = sector.checked_mul(SECTOR)?;
        fits.then_some(ByteRange { offset, len })
    }
}

/// Takes the last byte off.
fn split_status(writable: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = writable.last_mut()?;
    // Segments are never empty, and they lie in memory.
    let before = last.len.checked_sub(1)?;
    let status = GuestAddress(last.addr.0.checked_add(u64::from(before))?);
    last.len = before;
    if before == 0 {
        writable.pop();
    }
    Some(status)
}

/// Takes `bytes` off the front.
fn skip(segments: &mut Vec<Segment>, bytes: u64) {
    let mut left = bytes;
    segments.retain_mut(|segment| {
        let take = u64::from(segment.len).min(left);
        left -= take;
        segment.addr = GuestAddress(segment.addr.0.wrapping_add(take));
        // `take` is at most the length.
        segment.len -= u32::try_from(take).unwrap_or(segment.len);
        segment.len > 0
    });
}

fn split_header(header: &[u8; HEADER_BYTES]) -> (u32, u64) {
    let raw = u128::from_le_bytes(*header);
    (low32(raw), low64(raw >> 64))
}

#[expect(clippy::cast_possible_truncation, reason = "the lower part is meant")]
fn low32(value: u128) -> u32 {
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "the lower part is meant")]
fn low64(value: u128) -> u64 {
    value as u64
}

#[cfg(test)]
#[path = "hostile_test.rs"]
mod tests;

//! Finds the partitions of a disk: the primary GPT, read with every field in doubt.
//!
//! Only the primary table is read: growing an image leaves the backup where it was, and the
//! guest's kernel looks at the primary one as well. Pure but for positioned reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::ImageError;

const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;
const ENTRY_LEN: usize = 128;
/// GPTs have 128 entries; more than this is nonsense.
const MAX_ENTRIES: u32 = 1024;
const MAX_TABLE: usize = 128 << 10;
/// Linux root (x86-64) of the discoverable partitions specification, as stored.
const TYPE_ROOT_X86_64: [u8; 16] = [
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
];

/// One partition, its bytes within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Counted from 1, as the guest's kernel does.
    pub number: u32,
    pub start: u64,
    pub len: u64,
    /// As `root=PARTUUID=` wants it.
    pub uuid: String,
    /// Whether its type says that it is the root.
    pub is_root_type: bool,
}

/// The partitions of the primary GPT in the order of their numbers.
pub fn read(disk: &File, disk_len: u64) -> Result<Vec<Partition>, ImageError> {
    let mut header = [0; SECTOR_LEN];
    disk.read_exact_at(&mut header, SECTOR)
        .map_err(|e| bad(format!("its header cannot be read: {e}")))?;
    let geometry = Geometry::parse(&header)?;
    let mut table = vec![0; geometry.table_len];
    disk.read_exact_at(&mut table, geometry.table_start)
        .map_err(|e| bad(format!("its entries cannot be read: {e}")))?;
    if crc32(&table) != geometry.table_crc {
        return Err(bad("the checksum of its entries is wrong"));
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(table.chunks_exact(ENTRY_LEN)) {
        if let Some(partition) = parse_entry(number, entry, disk_len)? {
            found.push(partition);
        }
    }
    Ok(found)
}

/// Whether the disk claims to have a GPT.
pub fn is_gpt(disk: &File) -> io::Result<bool> {
    let mut magic = [0; 8];
    match disk.read_exact_at(&mut magic, SECTOR) {
        Ok(()) => Ok(&magic == b"EFI PART"),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

struct Geometry {
    table_start: u64,
    table_len: usize,
    table_crc: u32,
}

impl Geometry {
    fn parse(header: &[u8; SECTOR_LEN]) -> Result<Self, ImageError> {
        if header.get(..8) != Some(b"EFI PART".as_slice()) {
            return Err(bad("there is no GPT"));
        }
        let header_len = usize::try_from(u32_at(header, 12)).unwrap_or(usize::MAX);
        if !(92..=SECTOR_LEN).contains(&header_len) {
            return Err(bad(format!("a header of {header_len} bytes")));
        }
        let mut zeroed = *header;
        if let Some(crc) = zeroed.get_mut(16..20) {
            crc.fill(0);
        }
        if crc32(zeroed.get(..header_len).unwrap_or_default()) != u32_at(header, 16) {
            return Err(bad("the checksum of its header is wrong"));
        }
        let (entries, entry_len) = (u32_at(header, 80), u32_at(header, 84));
        if entry_len != 128 || !(1..=MAX_ENTRIES).contains(&entries) {
            return Err(bad(format!("{entries} entries of {entry_len} bytes")));
        }
        let table_start = u64_at(header, 72)
            .checked_mul(SECTOR)
            .filter(|start| *start >= 2 * SECTOR)
            .ok_or_else(|| bad("its entries are nowhere"))?;
        let table_len = usize::try_from(entries)
            .unwrap_or(usize::MAX)
            .saturating_mul(ENTRY_LEN)
            .min(MAX_TABLE);
        Ok(Self {
            table_start,
            table_len,
            table_crc: u32_at(header, 88),
        })
    }
}

/// A used entry; `None` for an empty one.
fn parse_entry(number: u32, entry: &[u8], disk_len: u64) -> Result<Option<Partition>, ImageError> {
    let kind = entry.get(..16).unwrap_or_default();
    if kind.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    let start = first.checked_mul(SECTOR);
    let end = last
        .checked_add(1)
        .and_then(|after| after.checked_mul(SECTOR));
    let (Some(start), Some(end)) = (start, end) else {
        return Err(bad(format!("partition {number} is beyond every disk")));
    };
    if first < 2 || start >= end || end > disk_len {
        return Err(bad(format!(
            "partition {number} spans bytes {start} to {end} of a disk of {disk_len}"
        )));
    }
    Ok(Some(Partition {
        number,
        start,
        len: end - start,
        uuid: guid_text(entry.get(16..32).unwrap_or_default()),
        is_root_type: kind == TYPE_ROOT_X86_64,
    }))
}

/// A GUID's text: its first three fields are stored little-endian (UEFI 2.10, appendix A).
fn guid_text(bytes: &[u8]) -> String {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (at, index) in ORDER.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", bytes.get(*index).copied().unwrap_or(0)));
    }
    text
}

fn bad(reason: impl Into<String>) -> ImageError {
    ImageError::PartitionTable {
        reason: reason.into(),
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map(u32::from_le_bytes).unwrap_or(0)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().map(u64::from_le_bytes).unwrap_or(0)
}

#[cfg(test)]
#[path = "partitions_test.rs"]
mod tests;

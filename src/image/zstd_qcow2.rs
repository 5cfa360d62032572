//! Reads a qcow2 whose compressed clusters are zstd, which imago cannot. Blocks.
//!
//! Only what an image that stands alone needs (docs/interop/qcow2): two levels of tables, plain,
//! zero and compressed clusters. The header has been checked by `convert.rs`. Whatever the tables
//! say, a cluster costs one read, and one unpacking to its own size at most; nothing loops.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Bits 9 to 55 of an entry: where a table or cluster lies.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Of an entry that is not compressed: reads as zeroes whatever it points at.
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// An image, and the table and cluster that were used last.
pub struct ZstdQcow2<'a> {
    file: &'a File,
    cluster_bits: u32,
    len: u64,
    l1: Vec<u64>,
    l2: Option<(u64, Vec<u64>)>,
    unpacked: Option<(u64, Vec<u8>)>,
}

/// What the header says.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// 9 to 21.
    pub cluster_bits: u32,
    /// The disk's size.
    pub len: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
}

/// Where a cluster's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    Zero,
    Plain { offset: u64 },
    Packed { offset: u64, bytes: u64 },
}

impl<'a> ZstdQcow2<'a> {
    pub fn open(file: &'a File, layout: Layout) -> io::Result<Self> {
        let image = Self {
            file,
            cluster_bits: layout.cluster_bits,
            len: layout.len,
            l1: read_table(file, layout.l1_offset, u64::from(layout.l1_entries))?,
            l2: None,
            unpacked: None,
        };
        let covered = u64::from(layout.l1_entries).saturating_mul(image.l2_span());
        if covered < image.len {
            return Err(malformed("its tables end before the disk does"));
        }
        Ok(image)
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// The next stretch that may hold something else than zeroes, at or behind `at`.
    pub fn next_data(&mut self, mut at: u64) -> io::Result<Option<(u64, u64)>> {
        while at < self.len {
            let (cluster, next) = self.cluster(at)?;
            if cluster != Cluster::Zero {
                return Ok(Some((at, next.min(self.len))));
            }
            at = next;
        }
        Ok(None)
    }

    /// Fills `buffer` with the disk's bytes at `at`.
    pub fn read(&mut self, mut buffer: &mut [u8], mut at: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let (cluster, next) = self.cluster(at)?;
            let within = at & (self.cluster_len() - 1);
            let here = usize::try_from(next - at).unwrap_or(usize::MAX);
            let (piece, rest) = buffer.split_at_mut(here.min(buffer.len()));
            match cluster {
                Cluster::Zero => piece.fill(0),
                Cluster::Plain { offset } => {
                    self.file.read_exact_at(piece, add(offset, within)?)?;
                }
                Cluster::Packed { offset, bytes } => {
                    let unpacked = self.unpack(offset, bytes)?;
                    let start = usize::try_from(within).map_err(io::Error::other)?;
                    let end = start.saturating_add(piece.len());
                    let source = unpacked.get(start..end);
                    piece.copy_from_slice(source.ok_or_else(|| malformed("a short cluster"))?);
                }
            }
            buffer = rest;
            at = next;
        }
        Ok(())
    }

    fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How much of the disk a second-level table covers.
    fn l2_span(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// The cluster at `at`, and where what was said of it ends.
    fn cluster(&mut self, at: u64) -> io::Result<(Cluster, u64)> {
        let span = self.l2_span();
        let l1_index = usize::try_from(at / span).map_err(io::Error::other)?;
        let table = self.l1.get(l1_index).copied().unwrap_or(0) & OFFSET;
        if table == 0 {
            return Ok((Cluster::Zero, (at / span + 1).saturating_mul(span)));
        }
        let next = (at / self.cluster_len() + 1).saturating_mul(self.cluster_len());
        let index = usize::try_from((at % span) >> self.cluster_bits).map_err(io::Error::other)?;
        if self.l2.as_ref().is_none_or(|(offset, _)| *offset != table) {
            let entries = read_table(self.file, table, self.cluster_len() / 8)?;
            self.l2 = Some((table, entries));
        }
        let entries = self.l2.as_ref().map(|(_, entries)| entries.as_slice());
        let entry = entries.and_then(|entries| entries.get(index)).copied();
        Ok((self.decode(entry.unwrap_or(0)), next))
    }

    fn decode(&self, entry: u64) -> Cluster {
        if entry & COMPRESSED != 0 {
            // The offset has the low bits; above it stands the number of further sectors.
            let offset_bits = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << offset_bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
            let bytes = sectors * SECTOR - offset % SECTOR;
            return Cluster::Packed { offset, bytes };
        }
        match entry & OFFSET {
            0 => Cluster::Zero,
            _ if entry & ZERO != 0 => Cluster::Zero,
            offset => Cluster::Plain { offset },
        }
    }

    fn unpack(&mut self, offset: u64, bytes: u64) -> io::Result<&[u8]> {
        let known = self.unpacked.take().filter(|(known, _)| *known == offset);
        let cluster = match known {
            Some((_, cluster)) => cluster,
            None => self.unpack_new(offset, bytes)?,
        };
        Ok(&self.unpacked.insert((offset, cluster)).1)
    }

    fn unpack_new(&self, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
        let file_len = self.file.metadata()?.len();
        // The last sector may be cut off by the end of the file.
        let bytes = bytes.min(file_len.saturating_sub(offset));
        let mut packed = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut packed, offset)?;
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
            .map_err(|e| malformed(&e.to_string()))?;
        let len = usize::try_from(self.cluster_len()).map_err(io::Error::other)?;
        let mut cluster = vec![0; len];
        decoder.read_exact(&mut cluster)?;
        Ok(cluster)
    }
}

fn read_table(file: &File, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let bytes = usize::try_from(entries.saturating_mul(8)).map_err(io::Error::other)?;
    let mut table = vec![0; bytes];
    file.read_exact_at(&mut table, offset)?;
    let (entries, _rest) = table.as_chunks();
    Ok(entries.iter().copied().map(u64::from_be_bytes).collect())
}

fn add(offset: u64, within: u64) -> io::Result<u64> {
    let sum = offset.checked_add(within);
    sum.ok_or_else(|| malformed("an offset beyond every file"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("malformed qcow2: {what}"),
    )
}

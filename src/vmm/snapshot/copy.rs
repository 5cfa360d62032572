//! Bytes of a snapshot on their way to files: what is zero is left out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::memory::{VmMemory, data_ranges};

/// Bytes looked at together: a huge page.
const CHUNK: usize = 2 << 20;
const PAGE: usize = 4096;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Writes a memory to a file of its length, which is empty.
pub fn write_memory(memory: &VmMemory, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for range in memory.ranges() {
        to.set_len(range.file + range.bytes)?;
        for part in memory.touched(&range)? {
            each_chunk(part.start, part.bytes, |at, length| {
                let chunk = buffer.get_mut(..length).unwrap_or_default();
                memory
                    .guest()
                    .read_slice(chunk, GuestAddress(range.guest + at))
                    .map_err(io::Error::other)?;
                runs(chunk, false, |offset, bytes| {
                    to.write_all_at(bytes, range.file + at + offset)
                })
            })?;
        }
    }
    Ok(())
}

/// Gives back the pages of a memory file that hold nothing but zeroes.
pub fn punch_zeroes(file: &File, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for part in data_ranges(file, 0, bytes)? {
        each_chunk(part.start, part.bytes, |at, length| {
            let chunk = buffer.get_mut(..length).unwrap_or_default();
            file.read_exact_at(chunk, at)?;
            runs(chunk, true, |offset, zeroes| {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(file, flags, at + offset, zeroes.len() as u64)?)
            })
        })?;
    }
    Ok(())
}

/// Copies what `from` holds to `to`, an empty file; shares the blocks where the file system can.
pub fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut buffer = Vec::new();
    for part in data_ranges(from, 0, bytes)? {
        let (mut source, mut target) = (part.start, part.start);
        while source < part.end() {
            let left = usize::try_from(part.end() - source).unwrap_or(CHUNK);
            match copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
                Ok(moved) if moved > 0 => {}
                // Not between these two files.
                _ => {
                    buffer.resize(CHUNK, 0);
                    let chunk = buffer.get_mut(..left.min(CHUNK)).unwrap_or_default();
                    from.read_exact_at(chunk, source)?;
                    to.write_all_at(chunk, target)?;
                    source += chunk.len() as u64;
                    target = source;
                }
            }
        }
    }
    Ok(())
}

/// Calls with place and length of each chunk of a range.
fn each_chunk(
    start: u64,
    bytes: u64,
    mut call: impl FnMut(u64, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let length = usize::try_from(bytes - done).map_or(CHUNK, |left| left.min(CHUNK));
        call(start + done, length)?;
        done += length as u64;
    }
    Ok(())
}

/// Calls with each run of pages that are all zero, or are not.
fn runs(
    chunk: &[u8],
    zero: bool,
    mut call: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let is_zero = |page: &[u8]| ZEROES.get(..page.len()) == Some(page);
    let mut at = 0;
    let mut rest = chunk;
    while !rest.is_empty() {
        let pages = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero);
        let (run, after) = rest.split_at(pages.map(<[u8]>::len).sum());
        if !run.is_empty() {
            call(at, run)?;
        }
        let others = after.chunks(PAGE).take_while(|page| is_zero(page) != zero);
        let skipped: usize = others.map(<[u8]>::len).sum();
        at += (run.len() + skipped) as u64;
        rest = after.get(skipped..).unwrap_or_default();
    }
    Ok(())
}

//! The compressed kernel inside a bzImage: found by its header, unpacked with a bound.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;

use super::read_header_of;

/// No distribution's vmlinux is near this.
const MAX_UNPACKED: usize = 512 << 20;
const SECTOR: u64 = 512;
const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// Largest unpacked block of an lz4 legacy frame.
const LZ4_BLOCK: usize = 8 << 20;
/// The build appends the unpacked size to every payload but gzip's.
const SIZE_SUFFIX: usize = 4;

/// A bzImage's payload could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("not a bzImage")]
    NotABzImage,
    #[error("compression we do not know; the kernel unpacks itself")]
    Unknown,
    #[error("the compressed kernel is damaged: {0}")]
    Damaged(String),
    #[error("the compressed kernel is larger than {MAX_UNPACKED} bytes unpacked")]
    TooLarge,
}

/// The ELF vmlinux inside a bzImage given as bytes; some 100 ms of work for a distribution's.
pub fn decompress_kernel(bzimage: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let header = read_header_of(bzimage).ok_or(PayloadError::NotABzImage)?;
    let (offset, length) = location(&header).ok_or(PayloadError::NotABzImage)?;
    let start = usize::try_from(offset).map_err(|_huge| PayloadError::NotABzImage)?;
    let end = start.checked_add(length).ok_or(PayloadError::NotABzImage)?;
    let payload = bzimage
        .get(start..end)
        .ok_or_else(|| PayloadError::Damaged("shorter than its header says".to_owned()))?;
    decompress(payload)
}

/// The same from a file.
pub fn unpack(file: &mut File, header: &setup_header) -> Result<Vec<u8>, PayloadError> {
    let (offset, length) = location(header).ok_or(PayloadError::Unknown)?;
    let damaged = |e: std::io::Error| PayloadError::Damaged(e.to_string());
    file.seek(SeekFrom::Start(offset)).map_err(damaged)?;
    let mut payload = Vec::new();
    let read = file
        .take(length as u64)
        .read_to_end(&mut payload)
        .map_err(damaged)?;
    if read != length {
        return Err(PayloadError::Damaged(
            "shorter than its header says".to_owned(),
        ));
    }
    decompress(&payload)
}

/// Offset in the file and length; `None` if the header has no payload or an impossible one.
fn location(header: &setup_header) -> Option<(u64, usize)> {
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR + u64::from(header.payload_offset);
    let length = usize::try_from(header.payload_length).ok()?;
    (header.payload_offset != 0 && length > SIZE_SUFFIX && length <= MAX_UNPACKED)
        .then_some((offset, length))
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    if payload.starts_with(GZIP) {
        bounded(flate2::read::GzDecoder::new(payload))
    } else if payload.starts_with(ZSTD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(payload)
            .map_err(|e| PayloadError::Damaged(e.to_string()))?;
        bounded(decoder)
    } else if payload.starts_with(XZ) {
        unpack_xz(payload)
    } else if let Some(blocks) = payload.strip_prefix(LZ4_LEGACY) {
        unpack_lz4(blocks)
    } else {
        Err(PayloadError::Unknown)
    }
}

fn bounded(reader: impl Read) -> Result<Vec<u8>, PayloadError> {
    let mut out = Vec::new();
    reader
        .take(MAX_UNPACKED as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|e| PayloadError::Damaged(e.to_string()))?;
    if out.len() > MAX_UNPACKED {
        return Err(PayloadError::TooLarge);
    }
    Ok(out)
}

/// A writer that refuses to grow beyond the bound.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_UNPACKED {
            return Err(std::io::Error::other("too large"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn unpack_xz(payload: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let mut out = Bounded(Vec::new());
    let stream = payload
        .get(..payload.len() - SIZE_SUFFIX)
        .unwrap_or(payload);
    match lzma_rs::xz_decompress(&mut std::io::Cursor::new(stream), &mut out) {
        Ok(()) => Ok(out.0),
        // Kernels are packed with the x86 branch filter, which the decoder lacks: let the kernel
        // unpack itself.
        Err(_filter) => Err(PayloadError::Unknown),
    }
}

fn unpack_lz4(mut blocks: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let mut out = Vec::new();
    let mut buffer = vec![0; LZ4_BLOCK];
    while blocks.len() > SIZE_SUFFIX {
        let damaged = || PayloadError::Damaged("an lz4 block runs over the end".to_owned());
        let (prefix, rest) = blocks.split_first_chunk::<4>().ok_or_else(damaged)?;
        let length = usize::try_from(u32::from_le_bytes(*prefix)).map_err(|_huge| damaged())?;
        let block = rest.get(..length).ok_or_else(damaged)?;
        let unpacked = lz4_flex::block::decompress_into(block, &mut buffer)
            .map_err(|e| PayloadError::Damaged(e.to_string()))?;
        if out.len() + unpacked > MAX_UNPACKED {
            return Err(PayloadError::TooLarge);
        }
        out.extend_from_slice(buffer.get(..unpacked).ok_or_else(damaged)?);
        blocks = rest.get(length..).ok_or_else(damaged)?;
    }
    Ok(out)
}

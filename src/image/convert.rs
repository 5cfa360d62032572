//! Turns the vendor's image into a raw, sparse disk of the wanted size. Blocks.
//!
//! The format is told by the file's own magic, once, from a file that no guest has written to.
//! A qcow2 that names other files (backing, external data) is refused before anything opens them.
//! imago reads it, but for the one compression that it does not know (`zstd_qcow2.rs`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::ImageError;
use super::dir::write_sparse_at;
use super::partitions;
use super::zstd_qcow2::{Layout, ZstdQcow2};

/// Bytes read and written at once.
const PIECE: u64 = 1 << 20;
/// qcow2's incompatible features (docs/interop/qcow2, "incompatible_features").
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
/// All that were ever defined; the last are the extended entries, which no vendor uses.
const KNOWN_FEATURES: u64 = (1 << 4) - 1;
const ZSTD: u8 = 1;
/// As much of the header as we read.
const HEAD_LEN: usize = 112;
/// The first-level table of a disk far beyond any cloud image.
const MAX_L1_ENTRIES: u32 = 4 << 20;

/// Writes `image` into the empty file `disk`, which gets `disk_gib` GiB. `progress` is told
/// bytes done and bytes in all.
pub fn convert(
    path: &Path,
    image: &File,
    disk: &File,
    disk_gib: u32,
    progress: &dyn Fn(u64, u64),
) -> Result<(), ImageError> {
    let failed = |source| ImageError::Convert {
        path: path.to_owned(),
        source,
    };
    let mut source = Source::open(path, image)?;
    let disk_len = u64::from(disk_gib) << 30;
    let len = source.len();
    if len > disk_len {
        return Err(ImageError::DiskTooSmall {
            path: path.to_owned(),
            image_gib: len.div_ceil(1 << 30),
            disk_gib,
        });
    }
    disk.set_len(disk_len).map_err(failed)?;
    let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or(64 << 10)];
    let mut at = 0;
    while let Some((data, end)) = source.next_data(at, len).map_err(failed)? {
        at = data;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX);
            let piece_len = wanted.min(buffer.len());
            let piece = buffer.get_mut(..piece_len).unwrap_or_default();
            source.read(piece, at).map_err(failed)?;
            write_sparse_at(disk, piece, at).map_err(failed)?;
            at = at.saturating_add(u64::try_from(piece_len).unwrap_or(u64::MAX));
            progress(at, len);
        }
    }
    progress(len, len);
    Ok(())
}

/// An image that can be read.
enum Source<'a> {
    Raw {
        file: &'a File,
        len: u64,
    },
    Qcow2 {
        image: Box<FormatAccess<ImagoFile>>,
        runtime: tokio::runtime::Runtime,
    },
    Zstd(ZstdQcow2<'a>),
}

/// How the clusters of a qcow2 may be compressed.
enum Compression {
    Zlib,
    Zstd(Layout),
}

impl<'a> Source<'a> {
    fn open(path: &Path, file: &'a File) -> Result<Self, ImageError> {
        let open = |source| ImageError::OpenImage {
            path: path.to_owned(),
            source,
        };
        let refuse = |what: String, hint| ImageError::UnusableImage {
            path: path.to_owned(),
            what,
            hint,
        };
        let mut head = [0; HEAD_LEN];
        let len = file.metadata().map_err(open)?.len();
        if len >= 2048 {
            file.read_exact_at(&mut head, 0).map_err(open)?;
        }
        if head.starts_with(b"QFI\xfb") {
            let compression = check_qcow2(&head, len).map_err(|(what, hint)| refuse(what, hint))?;
            return match compression {
                Compression::Zlib => Self::open_qcow2(file),
                Compression::Zstd(layout) => ZstdQcow2::open(file, layout).map(Self::Zstd),
            }
            .map_err(open);
        }
        if partitions::is_gpt(file).map_err(open)? || is_ext4(file).map_err(open)? {
            return Ok(Self::Raw { file, len });
        }
        Err(refuse(
            "is neither qcow2 nor a raw disk with a GPT".to_owned(),
            "qemu-img convert -O qcow2 makes one of most formats",
        ))
    }

    fn open_qcow2(file: &File) -> io::Result<Self> {
        // imago is asynchronous; its files do their work on the calling thread, so this runtime
        // only drives the futures.
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let storage = ImagoFile::from_open_file(file.try_clone()?, StorageOpenOptions::new())?;
        let qcow2 = runtime
            .block_on(Qcow2::<ImagoFile>::builder(storage).open(DenyImplicitOpenGate::default()))?;
        Ok(Self::Qcow2 {
            image: Box::new(FormatAccess::new(qcow2)),
            runtime,
        })
    }

    fn len(&self) -> u64 {
        match self {
            Self::Raw { len, .. } => *len,
            Self::Qcow2 { image, .. } => image.size(),
            Self::Zstd(image) => image.len(),
        }
    }

    /// The next stretch that may hold something else than zeroes, at or behind `at`.
    fn next_data(&mut self, mut at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
        match self {
            Self::Raw { file, .. } => {
                use rustix::fs::SeekFrom;
                let seek = |to| rustix::fs::seek(*file, to);
                let start = match seek(SeekFrom::Data(at)) {
                    Ok(start) => start,
                    Err(rustix::io::Errno::NXIO) => return Ok(None),
                    Err(_no_holes_here) => at,
                };
                let end = seek(SeekFrom::Hole(start)).unwrap_or(len).min(len);
                Ok((start < end).then_some((start, end)))
            }
            Self::Qcow2 { image, runtime } => {
                while at < len {
                    let (mapping, mapped) = runtime.block_on(image.get_mapping(at, len - at))?;
                    if mapped == 0 {
                        return Ok(None);
                    }
                    let end = at.saturating_add(mapped).min(len);
                    if !matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. }) {
                        return Ok(Some((at, end)));
                    }
                    at = end;
                }
                Ok(None)
            }
            Self::Zstd(image) => image.next_data(at),
        }
    }

    fn read(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => file.read_exact_at(buffer, at),
            Self::Qcow2 { image, runtime } => runtime.block_on(image.read(buffer, at)),
            Self::Zstd(image) => image.read(buffer, at),
        }
    }
}

/// Refuses what we must not or cannot read, by the header alone.
fn check_qcow2(
    head: &[u8; HEAD_LEN],
    file_len: u64,
) -> Result<Compression, (String, &'static str)> {
    const FLATTEN: &str = "qemu-img convert -O qcow2 writes one file that stands alone";
    const DAMAGED: &str = "download it again";
    let u32_at = |at: usize| {
        let field = head.get(at..).and_then(|rest| rest.first_chunk());
        field.copied().map(u32::from_be_bytes).unwrap_or(0)
    };
    let u64_at = |at: usize| {
        let field = head.get(at..).and_then(|rest| rest.first_chunk());
        field.copied().map(u64::from_be_bytes).unwrap_or(0)
    };
    let version = u32_at(4);
    if !(2..=3).contains(&version) {
        return Err((format!("is qcow2 of version {version}"), FLATTEN));
    }
    if u64_at(8) != 0 {
        return Err(("has a backing file".to_owned(), FLATTEN));
    }
    if u32_at(32) != 0 {
        return Err(("is encrypted".to_owned(), FLATTEN));
    }
    let incompatible = if version == 3 { u64_at(72) } else { 0 };
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(("keeps its data in another file".to_owned(), FLATTEN));
    }
    if incompatible & CORRUPT != 0 {
        return Err(("is marked corrupt".to_owned(), DAMAGED));
    }
    if incompatible & !KNOWN_FEATURES != 0 {
        return Err((
            "needs a qcow2 feature that we do not have".to_owned(),
            FLATTEN,
        ));
    }
    let l1_entries = u32_at(36);
    let l1_end = u64_at(40).checked_add(u64::from(l1_entries) * 8);
    let l1_is_inside = l1_end.is_some_and(|end| end <= file_len);
    if !(9..=21).contains(&u32_at(20)) || l1_entries > MAX_L1_ENTRIES || !l1_is_inside {
        return Err(("has a qcow2 header that makes no sense".to_owned(), DAMAGED));
    }
    if incompatible & COMPRESSION_TYPE == 0 {
        return Ok(Compression::Zlib);
    }
    if u32_at(100) <= 104 || head.get(104) != Some(&ZSTD) {
        return Err(("is compressed in an unknown way".to_owned(), FLATTEN));
    }
    Ok(Compression::Zstd(Layout {
        cluster_bits: u32_at(20),
        len: u64_at(24),
        l1_offset: u64_at(40),
        l1_entries,
    }))
}

fn is_ext4(file: &File) -> io::Result<bool> {
    let mut magic = [0; 2];
    match file.read_exact_at(&mut magic, 1024 + 0x38) {
        Ok(()) => Ok(magic == [0x53, 0xef]),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
#[path = "convert_test.rs"]
mod tests;

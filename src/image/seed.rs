//! The seed volume: a FAT file system labelled CIDATA that cloud-init finds and our script mounts.
//!
//! Sized to its content: the agent and the guest's gitlab-runner travel on it. Blocks.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use super::ImageError;

/// Where NoCloud looks.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Two executables and some text; more is a mistake.
const MAX_LEN: u64 = 2 << 30;
/// Below this a small cluster wastes less, above it a FAT16 needs a larger one.
const SMALL: u64 = 200 << 20;
const PIECE: usize = 1 << 20;

/// A file of the volume.
#[derive(Debug)]
pub enum Content<'a> {
    Text(String),
    /// All of it, from its start; its position is left alone.
    File(&'a File),
}

impl Content<'_> {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Text(text) => Ok(u64::try_from(text.len()).unwrap_or(u64::MAX)),
            Self::File(file) => Ok(file.metadata()?.len()),
        }
    }
}

/// Makes the volume in the empty file `target`.
pub fn write(
    target: &mut File,
    path: &Path,
    files: &[(&str, Content<'_>)],
) -> Result<(), ImageError> {
    let failed = |source| ImageError::Seed {
        path: path.to_owned(),
        source,
    };
    let mut content = 0_u64;
    for (_, file) in files {
        content = content.saturating_add(file.len().map_err(failed)?);
    }
    let cluster: u32 = if content < SMALL { 4096 } else { 32768 };
    let waste = u64::from(cluster).saturating_mul(u64::try_from(files.len()).unwrap_or(u64::MAX));
    let len = content.saturating_add(waste).saturating_add(1 << 20);
    let len = len.next_multiple_of(u64::from(cluster));
    if len > MAX_LEN {
        return Err(ImageError::SeedTooLarge {
            bytes: len,
            limit: MAX_LEN,
        });
    }
    target.set_len(len).map_err(failed)?;
    fill(target, cluster, files).map_err(failed)
}

fn fill(target: &mut File, cluster: u32, files: &[(&str, Content<'_>)]) -> io::Result<()> {
    let options = FormatVolumeOptions::new()
        .volume_label(LABEL)
        .bytes_per_cluster(cluster);
    fatfs::format_volume(&mut *target, options)?;
    target.seek(SeekFrom::Start(0))?;
    let volume = FileSystem::new(&mut *target, FsOptions::new())?;
    for (name, content) in files {
        let mut file = volume.root_dir().create_file(name)?;
        match content {
            Content::Text(text) => file.write_all(text.as_bytes())?,
            Content::File(source) => io::copy(
                &mut io::BufReader::with_capacity(PIECE, FromStart::new(source)),
                &mut file,
            )
            .map(drop)?,
        }
        file.flush()?;
    }
    volume.unmount()?;
    target.sync_all()
}

/// Reads a shared descriptor from its start without moving its position.
pub(super) struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> FromStart<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at = self.at.saturating_add(u64::try_from(n).unwrap_or(0));
        Ok(n)
    }
}

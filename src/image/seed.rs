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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::run;

    #[test]
    fn the_volume_carries_its_label_and_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let large = dir.path().join("large");
        let content: Vec<u8> = (0..5_000_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&large, &content).unwrap();
        let source = File::open(&large).unwrap();
        let mut target = File::create_new(&path).unwrap();
        let files = [
            ("user-data", Content::Text("#cloud-config\n".to_owned())),
            ("a-long-name-1.service", Content::File(&source)),
        ];
        // A volume is read back through its own descriptor.
        let mut target = {
            write(&mut target, &path, &files).unwrap();
            File::open(&path).unwrap()
        };
        let blkid = run(&format!("blkid -p -o export {}", path.display()));
        assert!(blkid.contains("LABEL=CIDATA\n"), "{blkid}");
        assert!(blkid.contains("TYPE=vfat\n"), "{blkid}");
        run(&format!("fsck.fat -n {}", path.display()));

        let listing = run(&format!("mdir -b -i {} ::", path.display()));
        assert!(listing.contains("a-long-name-1.service"), "{listing}");
        let copy = dir.path().join("copy");
        run(&format!(
            "mcopy -i {} ::a-long-name-1.service {}",
            path.display(),
            copy.display()
        ));
        assert!(std::fs::read(copy).unwrap() == content);
        let mut head = [0; 3];
        target.read_exact(&mut head).unwrap();
        assert_eq!(head[0], 0xeb);
    }

    #[test]
    fn a_file_that_no_seed_should_carry_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let huge = File::create_new(dir.path().join("huge")).unwrap();
        huge.set_len(3 << 30).unwrap();
        let mut target = File::create_new(&path).unwrap();
        let error = write(&mut target, &path, &[("agent", Content::File(&huge))]).unwrap_err();
        assert!(error.to_string().contains("vm_runner_binary"), "{error}");
        assert_eq!(target.metadata().unwrap().len(), 0);
    }
}

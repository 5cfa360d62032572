//! Reads a disk's own file systems: which partition is the root, its kernel, initrd and results.
//!
//! The disk was written by a vendor or by a guest, so all of it is data: nothing is mounted,
//! links are followed inside the image only, and every size and count has a limit.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::ImageError;
use super::partitions::{self, Partition};

/// The largest kernel and the largest initrd that we take, in bytes.
const MAX_KERNEL: u64 = 512 << 20;
/// Entries of /boot that are looked at.
const MAX_BOOT_ENTRIES: usize = 4096;
/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// A disk whose root file system was found.
pub struct DiskView {
    root: Ext4,
    /// The separate /boot, where the kernels are there.
    boot: Option<Ext4>,
    /// What the kernel is told: `PARTUUID=...`, or a device where there are no partitions.
    root_argument: String,
}

impl std::fmt::Debug for DiskView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskView")
            .field("root_argument", &self.root_argument)
            .field("separate_boot", &self.boot.is_some())
            .finish()
    }
}

/// A kernel of the image and what belongs to it; paths on its file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    pub release: String,
    pub kernel: String,
    pub initrd: Option<String>,
}

impl DiskView {
    /// Finds the root, and /boot where that is a file system of its own.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path).map_err(ImageError::file("open", path))?;
        let len = file
            .metadata()
            .map_err(ImageError::file("stat", path))?
            .len();
        let file = Arc::new(file);
        if !partitions::is_gpt(&file).map_err(ImageError::file("read", path))? {
            return Self::open_bare(&file, len);
        }
        let mut file_systems = Vec::new();
        let mut found = Vec::new();
        for partition in partitions::read(&file, len)? {
            match open_ext4(&file, partition.start, partition.len) {
                Some(fs) => file_systems.push((partition, fs)),
                None => found.push(describe(&file, &partition)),
            }
        }
        let Some(at) = choose_root(&file_systems) else {
            let ext4 = file_systems.iter();
            found.extend(ext4.map(|(p, _)| format!("partition {} is ext4, but no root", p.number)));
            return Err(ImageError::NoRoot {
                found: if found.is_empty() {
                    "the table is empty".to_owned()
                } else {
                    found.join(", ")
                },
            });
        };
        let (partition, root) = file_systems.swap_remove(at);
        let boot = (!has_kernel(&root, "/boot"))
            .then(|| file_systems.into_iter().find(|(_, fs)| has_kernel(fs, "/")))
            .flatten()
            .map(|(_, fs)| fs);
        Ok(Self {
            root,
            boot,
            root_argument: format!("PARTUUID={}", partition.uuid),
        })
    }

    /// A disk that is one file system, as small test images are.
    fn open_bare(file: &Arc<File>, len: u64) -> Result<Self, ImageError> {
        match open_ext4(file, 0, len) {
            Some(root) if is_root(&root) => Ok(Self {
                root,
                boot: None,
                root_argument: "/dev/vda".to_owned(),
            }),
            _ => Err(ImageError::PartitionTable {
                reason: "there is no GPT".to_owned(),
            }),
        }
    }

    /// The value of the kernel's `root=` argument.
    pub fn root_argument(&self) -> &str {
        &self.root_argument
    }

    /// The kernel that this system's boot loader would start.
    pub fn kernel(&self) -> Result<KernelFiles, ImageError> {
        let (fs, dir) = self.boot();
        let names = list(fs, dir);
        let mut kernels: Vec<Candidate> = names
            .iter()
            .filter_map(|name| self.candidate(name, &names))
            .collect();
        kernels.sort_by(Candidate::compare);
        let unversioned = || {
            let plain = names.iter().any(|name| name == "vmlinuz");
            plain.then(|| Candidate {
                release: String::new(),
                kernel: "vmlinuz".to_owned(),
                initrd: ["initrd.img", "initrd"]
                    .into_iter()
                    .find(|initrd| names.iter().any(|name| name == initrd))
                    .map(str::to_owned),
                has_modules: false,
            })
        };
        let best = kernels.pop().or_else(unversioned);
        let best = best.ok_or_else(|| ImageError::NoKernel {
            place: match &self.boot {
                Some(_) => "the boot partition".to_owned(),
                None => "/boot of the root file system, and no other partition has one".to_owned(),
            },
        })?;
        let at = |name: String| format!("{}/{name}", dir.trim_end_matches('/'));
        Ok(KernelFiles {
            release: best.release,
            kernel: at(best.kernel),
            initrd: best.initrd.map(at),
        })
    }

    /// Copies a file of [`kernel`](Self::kernel) to `target`; returns its length.
    pub fn copy_boot_file(&self, path: &str, target: &mut File) -> Result<u64, ImageError> {
        let (fs, _) = self.boot();
        copy(fs, path, target, MAX_KERNEL)
    }

    /// The whole of a file of the root; `None` if it is not there.
    pub fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        match self.root.metadata(path) {
            Ok(meta) if meta.len() > limit => Err(ImageError::GuestFileTooLarge {
                path: path.to_owned(),
                bytes: meta.len(),
                limit,
            }),
            Ok(_) => self.root.read(path).map(Some).map_err(guest(path)),
            Err(Ext4Error::NotFound) => Ok(None),
            Err(e) => Err(guest(path)(e)),
        }
    }

    /// At most the last `limit` bytes of a file of the root; empty if it cannot be read.
    pub fn read_tail(&self, path: &str, limit: u64) -> Vec<u8> {
        let read = || -> Result<Vec<u8>, Ext4Error> {
            let mut file = self.root.open(path)?;
            file.seek_to(file.metadata().len().saturating_sub(limit))?;
            let mut tail = Vec::new();
            let mut piece = vec![0; 64 << 10];
            while u64::try_from(tail.len()).is_ok_and(|len| len < limit) {
                match file.read_bytes(&mut piece)? {
                    0 => break,
                    n => tail.extend_from_slice(piece.get(..n).unwrap_or_default()),
                }
            }
            Ok(tail)
        };
        read().unwrap_or_default()
    }

    fn boot(&self) -> (&Ext4, &str) {
        match &self.boot {
            Some(fs) => (fs, "/"),
            None => (&self.root, "/boot"),
        }
    }

    fn candidate(&self, name: &str, names: &[String]) -> Option<Candidate> {
        let release = name.strip_prefix("vmlinuz-")?;
        let left_over = [".old", ".bak", ".rpmsave", ".rpmnew"];
        let dpkg = release.contains(".dpkg-");
        if dpkg || left_over.iter().any(|end| release.ends_with(end)) || release.contains("rescue")
        {
            return None;
        }
        let initrd = [
            format!("initrd.img-{release}"),
            format!("initramfs-{release}.img"),
            format!("initrd-{release}"),
        ];
        let modules = format!("/lib/modules/{release}");
        Some(Candidate {
            release: release.to_owned(),
            kernel: name.to_owned(),
            initrd: initrd.into_iter().find(|initrd| names.contains(initrd)),
            has_modules: self.root.exists(modules.as_str()).unwrap_or(false),
        })
    }
}

#[derive(Debug)]
struct Candidate {
    release: String,
    kernel: String,
    initrd: Option<String>,
    has_modules: bool,
}

impl Candidate {
    /// The last is what to boot: a kernel that is whole before one that is half removed, then
    /// the newest, as GRUB sorts.
    fn compare(&self, other: &Self) -> Ordering {
        (self.has_modules, self.initrd.is_some())
            .cmp(&(other.has_modules, other.initrd.is_some()))
            .then_with(|| compare_versions(&self.release, &other.release))
    }
}

/// Orders versions: runs of digits as numbers, the rest as text.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        let (left, rest_a) = split_run(a);
        let (right, rest_b) = split_run(b);
        let number = |s: &str| s.starts_with(|c: char| c.is_ascii_digit());
        let order = if number(left) && number(right) {
            let (left, right) = (left.trim_start_matches('0'), right.trim_start_matches('0'));
            left.len().cmp(&right.len()).then_with(|| left.cmp(right))
        } else {
            left.cmp(right)
        };
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// The leading run of digits, or of anything else, and what follows.
fn split_run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits);
    text.split_at(end.unwrap_or(text.len()))
}

/// One partition's bytes, and none beyond them.
struct Window {
    file: Arc<File>,
    start: u64,
    len: u64,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let wanted = u64::try_from(dst.len())?;
        let inside = start_byte
            .checked_add(wanted)
            .is_some_and(|end| end <= self.len);
        let at = self.start.checked_add(start_byte);
        match at {
            Some(at) if inside => Ok(self.file.read_exact_at(dst, at)?),
            _ => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }
}

fn open_ext4(file: &Arc<File>, start: u64, len: u64) -> Option<Ext4> {
    let window = Window {
        file: Arc::clone(file),
        start,
        len,
    };
    Ext4::load(Box::new(window)).ok()
}

fn is_root(fs: &Ext4) -> bool {
    ["/etc/os-release", "/usr/lib/os-release", "/sbin/init"]
        .iter()
        .any(|path| fs.exists(*path).unwrap_or(false))
}

/// The root among the ext4 partitions: by its label, else by its type, else the first that holds
/// a system.
fn choose_root(file_systems: &[(Partition, Ext4)]) -> Option<usize> {
    let roots: Vec<usize> = (0..)
        .zip(file_systems)
        .filter(|(_, (_, fs))| is_root(fs))
        .map(|(at, _)| at)
        .collect();
    let get = |at: &usize| file_systems.get(*at);
    let labelled = |at: &&usize| {
        get(at).is_some_and(|(_, fs)| fs.label().to_str().ok() == Some("cloudimg-rootfs"))
    };
    let typed = |at: &&usize| get(at).is_some_and(|(partition, _)| partition.is_root_type);
    roots
        .iter()
        .find(labelled)
        .or_else(|| roots.iter().find(typed))
        .or_else(|| roots.first())
        .copied()
}

fn has_kernel(fs: &Ext4, dir: &str) -> bool {
    list(fs, dir)
        .iter()
        .any(|name| name == "vmlinuz" || name.starts_with("vmlinuz-"))
}

/// Names in a folder of the image; empty if it cannot be read.
fn list(fs: &Ext4, dir: &str) -> Vec<String> {
    let Ok(entries) = fs.read_dir(dir) else {
        return Vec::new();
    };
    entries
        .take(MAX_BOOT_ENTRIES)
        .map_while(Result::ok)
        .filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned))
        .collect()
}

fn copy(fs: &Ext4, path: &str, target: &mut File, limit: u64) -> Result<u64, ImageError> {
    let mut source = fs.open(path).map_err(guest(path))?;
    let len = source.metadata().len();
    if len > limit || len == 0 {
        return Err(ImageError::GuestFileTooLarge {
            path: path.to_owned(),
            bytes: len,
            limit,
        });
    }
    let mut piece = vec![0; PIECE];
    let mut done = 0_u64;
    loop {
        let n = source.read_bytes(&mut piece).map_err(guest(path))?;
        if n == 0 {
            return Ok(done);
        }
        target
            .write_all(piece.get(..n).unwrap_or_default())
            .map_err(|e| ImageError::GuestFile {
                path: path.to_owned(),
                source: e.into(),
            })?;
        done = done.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
    }
}

fn guest(path: &str) -> impl FnOnce(Ext4Error) -> ImageError {
    let path = path.to_owned();
    move |e| ImageError::GuestFile {
        path,
        source: e.into(),
    }
}

/// What a partition that is not ext4 looks like.
fn describe(file: &File, partition: &Partition) -> String {
    const SIGNATURES: [(&str, u64, &[u8]); 4] = [
        ("xfs", 0, b"XFSB"),
        ("btrfs", 0x1_0040, b"_BHRfS_M"),
        ("vfat", 0x36, b"FAT"),
        ("vfat", 0x52, b"FAT32"),
    ];
    let kind = SIGNATURES.iter().find(|(_, at, magic)| {
        let mut bytes = vec![0; magic.len()];
        let read = file.read_exact_at(&mut bytes, partition.start.saturating_add(*at));
        read.is_ok() && bytes == *magic
    });
    let kind = kind.map_or("not ext4", |(name, _, _)| name);
    format!("partition {} is {kind}", partition.number)
}

#[cfg(test)]
#[path = "extract_test.rs"]
mod tests;

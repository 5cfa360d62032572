//! Kernels out of real ext4 images, whole, odd and hostile.

use std::fs::{self, OpenOptions};
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::super::testing::{
    Entry, Link, MIB, ROOT_START, ROOT_UUID, Text, bytes_at, disk_with, ext4, plain_root,
};
use super::*;
use crate::testing::run;

fn root_with(dir: &Path, more: &[(&str, Entry<'_>)]) -> PathBuf {
    let mut entries = vec![("etc/os-release", Text("ID=test\n"))];
    for (path, entry) in more {
        entries.push((
            path,
            match entry {
                Text(text) => Text(text),
                Link(target) => Link(target),
            },
        ));
    }
    ext4(dir, "root", 16, &entries)
}

/// The view of a disk whose root holds these files and whose /boot is no partition.
fn view(files: &[(&str, Entry<'_>)]) -> (TempDir, DiskView) {
    let dir = tempfile::tempdir().unwrap();
    let root = root_with(dir.path(), files);
    let view = DiskView::open(&disk_with(dir.path(), &root, None)).unwrap();
    (dir, view)
}

fn copied(view: &DiskView, path: &str) -> Result<String, ImageError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    view.copy_boot_file(path, &mut file.reopen().unwrap())?;
    Ok(fs::read_to_string(file.path()).unwrap())
}

#[test]
fn kernel_and_initrd_come_from_boot_in_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk_with(dir.path(), &plain_root(dir.path()), None);
    let view = DiskView::open(&disk).unwrap();
    assert_eq!(view.root_argument(), format!("PARTUUID={ROOT_UUID}"));
    let files = view.kernel().unwrap();
    assert_eq!(files.release, "6.1.0-9-cloud");
    assert_eq!(copied(&view, &files.kernel).unwrap(), "kernel 9");
    assert_eq!(copied(&view, &files.initrd.unwrap()).unwrap(), "initrd 9");
}

#[test]
fn kernel_and_initrd_come_from_a_separate_boot_partition() {
    let dir = tempfile::tempdir().unwrap();
    let root = root_with(dir.path(), &[("boot/.keep", Text(""))]);
    let boot = [
        ("vmlinuz-6.8.0-45-generic", Text("kernel 45")),
        ("initrd.img-6.8.0-45-generic", Text("initrd 45")),
        ("vmlinuz", Link("vmlinuz-6.8.0-45-generic")),
    ];
    let boot = ext4(dir.path(), "BOOT", 16, &boot);
    let view = DiskView::open(&disk_with(dir.path(), &root, Some(&boot))).unwrap();
    let files = view.kernel().unwrap();
    assert_eq!(files.kernel, "/vmlinuz-6.8.0-45-generic");
    assert_eq!(copied(&view, &files.kernel).unwrap(), "kernel 45");
    assert_eq!(copied(&view, &files.initrd.unwrap()).unwrap(), "initrd 45");
}

#[test]
fn a_disk_that_is_one_file_system_is_booted_by_its_device() {
    let dir = tempfile::tempdir().unwrap();
    let view = DiskView::open(&plain_root(dir.path())).unwrap();
    assert_eq!(view.root_argument(), "/dev/vda");
    assert_eq!(view.kernel().unwrap().release, "6.1.0-9-cloud");
}

#[test]
fn the_newest_whole_kernel_is_taken() {
    let (_dir, view) = view(&[
        ("boot/vmlinuz-6.1.0-9-amd64", Text("9")),
        ("boot/initrd.img-6.1.0-9-amd64", Text("i")),
        ("lib/modules/6.1.0-9-amd64/modules.dep", Text("")),
        ("boot/vmlinuz-6.1.0-10-amd64", Text("10")),
        ("boot/initrd.img-6.1.0-10-amd64", Text("i")),
        ("lib/modules/6.1.0-10-amd64/modules.dep", Text("")),
        // Newer, but its modules are gone or it was never whole.
        ("boot/vmlinuz-6.1.0-11-amd64", Text("11")),
        ("boot/vmlinuz-6.1.0-12-amd64.dpkg-new", Text("12")),
        ("boot/vmlinuz-6.1.0-13-amd64.old", Text("13")),
    ]);
    let files = view.kernel().unwrap();
    assert_eq!(files.release, "6.1.0-10-amd64");
    assert_eq!(files.initrd.unwrap(), "/boot/initrd.img-6.1.0-10-amd64");
}

#[test]
fn a_kernel_without_a_version_is_taken_when_there_is_no_other() {
    let (_dir, view) = view(&[
        ("boot/vmlinuz", Link("/images/k")),
        ("images/k", Text("plain")),
    ]);
    let files = view.kernel().unwrap();
    assert_eq!(files.initrd, None);
    assert_eq!(copied(&view, &files.kernel).unwrap(), "plain");
}

#[test]
fn versions_sort_as_numbers() {
    let mut versions = [
        "6.8.0-100",
        "6.8.0-45",
        "6.10.1",
        "5.15.0-9",
        "6.8.0-045a",
        "6.8",
    ];
    versions.sort_by(|a, b| compare_versions(a, b));
    let sorted = [
        "5.15.0-9",
        "6.8",
        "6.8.0-45",
        "6.8.0-045a",
        "6.8.0-100",
        "6.10.1",
    ];
    assert_eq!(versions, sorted);
}

#[test]
fn links_stay_inside_the_image_and_loops_end() {
    let (_dir, view) = view(&[
        ("boot/vmlinuz-1", Link("../../../../etc/hostname")),
        ("etc/hostname", Text("of the image")),
        ("boot/initrd.img-1", Link("initrd.img-1")),
        ("etc/a", Link("b")),
        ("etc/b", Link("a")),
    ]);
    assert_eq!(copied(&view, "/boot/vmlinuz-1").unwrap(), "of the image");
    assert!(copied(&view, "/boot/initrd.img-1").is_err());
    assert!(view.read("/etc/a", 100).is_err());
    assert_eq!(view.read("/etc/none", 100).unwrap(), None);
}

#[test]
fn files_beyond_their_limit_are_refused_unread() {
    let dir = tempfile::tempdir().unwrap();
    let root = root_with(dir.path(), &[("etc/long", Text("0123456789"))]);
    // A sparse file of a terabyte costs the image nothing.
    let huge = format!("sif /etc/os-release size {}", 1_u64 << 40);
    fs::write(dir.path().join("commands"), huge).unwrap();
    let (commands, image) = (dir.path().join("commands"), root.display());
    run(&format!("debugfs -w -f {} {image}", commands.display()));
    let view = DiskView::open(&disk_with(dir.path(), &root, None)).unwrap();
    let error = view.read("/etc/long", 9).unwrap_err().to_string();
    assert!(error.contains("10 bytes"), "{error}");
    let error = copied(&view, "/etc/os-release").unwrap_err().to_string();
    assert!(error.contains(&(1_u64 << 40).to_string()), "{error}");
    assert_eq!(view.read_tail("/etc/long", 4), b"6789");
}

#[test]
fn a_root_that_is_not_ext4_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk_with(dir.path(), &plain_root(dir.path()), None);
    let disk = OpenOptions::new().write(true).open(&path).unwrap();
    disk.write_all_at(b"XFSB", ROOT_START).unwrap();
    disk.write_all_at(&[0; 2], ROOT_START + 1024 + 0x38)
        .unwrap();
    let error = DiskView::open(&path).unwrap_err().to_string();
    assert!(error.contains("partition 1 is xfs"), "{error}");
    assert!(error.contains("hint:"), "{error}");
}

#[test]
fn an_image_without_a_kernel_says_where_it_looked() {
    let (_dir, view) = view(&[("boot/grub/grub.cfg", Text(""))]);
    let error = view.kernel().unwrap_err().to_string();
    assert!(error.contains("/boot of the root"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_file_system_never_panics(at in 0..2 * MIB, noise in prop::collection::vec(any::<u8>(), 1..600)) {
        static ROOT: std::sync::OnceLock<(TempDir, PathBuf)> = std::sync::OnceLock::new();
        let (dir, root) = ROOT.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let root = plain_root(dir.path());
            (dir, root)
        });
        let copy = tempfile::NamedTempFile::new_in(dir.path()).unwrap();
        let len = fs::metadata(root).unwrap().len();
        let content = bytes_at(root, 0, usize::try_from(len).unwrap());
        copy.as_file().write_all_at(&content, 0).unwrap();
        copy.as_file().write_all_at(&noise, at).unwrap();
        if let Ok(view) = DiskView::open(copy.path())
            && let Ok(files) = view.kernel()
        {
            let _ = copied(&view, &files.kernel);
            let _ = view.read("/etc/os-release", 1 << 16);
            let _ = view.read_tail("/etc/os-release", 1 << 16);
        }
    }
}

//! Images as qemu-img makes them become the same raw disk; what names other files does not.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use tempfile::TempDir;

use super::super::testing::{MIB, disk_with, plain_root};
use super::*;
use crate::testing::run;

fn raw() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk_with(dir.path(), &plain_root(dir.path()), None);
    (dir, disk)
}

fn qcow2(dir: &TempDir, raw: &Path, options: &str) -> PathBuf {
    let path = dir.path().join("image.qcow2");
    let (from, to) = (raw.display(), path.display());
    run(&format!(
        "qemu-img convert -f raw -O qcow2 {options} {from} {to}"
    ));
    path
}

fn convert_to(dir: &TempDir, image: &Path, gib: u32) -> Result<PathBuf, ImageError> {
    let path = dir.path().join("converted.raw");
    let disk = File::create(&path).unwrap();
    let file = File::open(image).unwrap();
    convert(image, &file, &disk, gib, &|done, total| {
        assert!(done <= total);
    })?;
    Ok(path)
}

/// The same bytes, and behind them nothing but a hole.
fn assert_same(original: &Path, converted: &Path) {
    let original = fs::read(original).unwrap();
    let converted = File::open(converted).unwrap();
    let mut bytes = vec![0; original.len()];
    converted.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == original);
    let end = u64::try_from(bytes.len()).unwrap();
    let behind = rustix::fs::seek(&converted, rustix::fs::SeekFrom::Data(end));
    assert_eq!(behind, Err(rustix::io::Errno::NXIO));
}

#[test]
fn raw_plain_and_compressed_images_become_the_same_sparse_disk() {
    let (dir, raw) = raw();
    let plain = qcow2(&dir, &raw, "");
    let path = convert_to(&dir, &plain, 1).unwrap();
    assert_same(&raw, &path);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 32 * MIB, "{} blocks", meta.blocks());

    for options in [
        "-c",
        "-o compat=0.10",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=512",
        "-c -o compression_type=zstd,cluster_size=2M",
        "-o compression_type=zstd",
    ] {
        let image = qcow2(&dir, &raw, options);
        assert_same(&raw, &convert_to(&dir, &image, 1).unwrap());
    }
    assert_same(&raw, &convert_to(&dir, &raw, 1).unwrap());
}

/// Clusters of all kinds, so that a damaged table can point at anything.
fn small_qcow2(dir: &TempDir, compression: &str) -> Vec<u8> {
    let raw = dir.path().join("small.raw");
    let mut bytes = vec![0; 1 << 20];
    for (at, byte) in bytes.iter_mut().enumerate().take(400 << 10) {
        *byte = u8::try_from(at / 7 % 251).unwrap();
    }
    fs::write(&raw, &bytes).unwrap();
    let options = format!("-c -o cluster_size=4096,compression_type={compression}");
    let image = qcow2(dir, &raw, &options);
    let io = format!("qemu-io -c 'write -P 5 600k 8k' {}", image.display());
    let written = std::process::Command::new("sh").args(["-c", &io]).output();
    assert!(written.unwrap().status.success());
    fs::read(image).unwrap()
}

#[test]
fn a_file_of_both_plain_and_compressed_clusters_is_read_right() {
    for compression in ["zlib", "zstd"] {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("mixed.qcow2");
        fs::write(&image, small_qcow2(&dir, compression)).unwrap();
        let raw = dir.path().join("mixed.raw");
        let (from, to) = (image.display(), raw.display());
        run(&format!("qemu-img convert -O raw {from} {to}"));
        let disk = convert_to(&dir, &image, 1).unwrap();
        let mut bytes = vec![0; 1 << 20];
        File::open(disk)
            .unwrap()
            .read_exact_at(&mut bytes, 0)
            .unwrap();
        assert!(bytes == fs::read(raw).unwrap(), "{compression}");
    }
}

#[test]
fn tables_that_loop_or_point_anywhere_end_in_an_error_or_a_disk() {
    for compression in ["zlib", "zstd"] {
        let dir = tempfile::tempdir().unwrap();
        let good = small_qcow2(&dir, compression);
        let image = dir.path().join("hostile.qcow2");
        let u64_at = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap());
        let l1 = usize::try_from(u64_at(40)).unwrap();
        let l2 = usize::try_from(u64_at(l1) & 0x00ff_ffff_ffff_fe00).unwrap();
        let mut failures = 0;
        for place in [l1, l2, l2 + 8, l2 + 320] {
            for value in [
                u64_at(40),
                u64_at(l1),
                1 << 62,
                u64::MAX,
                u64::MAX >> 1,
                (1 << 55) | (1 << 63),
                (3 << 62) | (u64::try_from(good.len()).unwrap() - 1),
                0x0001_0000_0000_0000,
            ] {
                let mut bytes = good.clone();
                bytes[place..place + 8].copy_from_slice(&value.to_be_bytes());
                fs::write(&image, &bytes).unwrap();
                failures += u32::from(convert_to(&dir, &image, 1).is_err());
            }
        }
        assert!(failures > 10, "{compression}: {failures}");
    }
}

#[test]
fn a_compression_that_nobody_knows_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = small_qcow2(&dir, "zstd");
    bytes[104] = 9;
    let image = dir.path().join("unknown.qcow2");
    fs::write(&image, &bytes).unwrap();
    let error = convert_to(&dir, &image, 1).unwrap_err().to_string();
    assert!(
        error.contains("in an unknown way; hint: qemu-img"),
        "{error}"
    );
}

#[test]
fn an_image_larger_than_the_disk_says_what_it_needs() {
    let (dir, raw) = raw();
    let large = qcow2(&dir, &raw, "");
    run(&format!("qemu-img resize -q {} 3G", large.display()));
    let error = convert_to(&dir, &large, 2).unwrap_err().to_string();
    assert!(error.contains("needs 3 GiB"), "{error}");
    assert!(error.contains("vm_disk_size_gb to 3"), "{error}");
}

#[test]
fn an_image_that_names_other_files_is_refused() {
    let (dir, raw) = raw();
    let (base, image) = (raw.display(), dir.path().join("overlay.qcow2"));
    let to = image.display();
    run(&format!(
        "qemu-img create -q -f qcow2 -F raw -b {base} {to}"
    ));
    let error = convert_to(&dir, &image, 1).unwrap_err().to_string();
    assert!(error.contains("has a backing file"), "{error}");

    let data = dir.path().join("data");
    let data = data.display();
    run(&format!(
        "qemu-img create -q -f qcow2 -o data_file={data} {to} 8M"
    ));
    let error = convert_to(&dir, &image, 1).unwrap_err().to_string();
    assert!(error.contains("in another file"), "{error}");
}

#[test]
fn other_formats_and_nonsense_are_refused_with_a_way_out() {
    let (dir, raw) = raw();
    let image = dir.path().join("image.vmdk");
    let (from, to) = (raw.display(), image.display());
    run(&format!("qemu-img convert -f raw -O vmdk {from} {to}"));
    let error = convert_to(&dir, &image, 1).unwrap_err().to_string();
    assert!(error.contains("neither qcow2 nor"), "{error}");
    assert!(error.contains("hint: qemu-img convert"), "{error}");

    fs::write(&image, "").unwrap();
    assert!(convert_to(&dir, &image, 1).is_err());
}

#[test]
fn a_qcow2_header_that_makes_no_sense_is_refused() {
    let (dir, raw) = raw();
    let image = qcow2(&dir, &raw, "");
    let patched = |at: u64, bytes: &[u8]| {
        let copy = dir.path().join("patched.qcow2");
        fs::copy(&image, &copy).unwrap();
        let file = OpenOptions::new().write(true).open(&copy).unwrap();
        file.write_all_at(bytes, at).unwrap();
        convert_to(&dir, &copy, 1).unwrap_err().to_string()
    };
    assert!(patched(4, &9_u32.to_be_bytes()).contains("version 9"));
    assert!(patched(20, &60_u32.to_be_bytes()).contains("makes no sense"));
    assert!(patched(36, &u32::MAX.to_be_bytes()).contains("makes no sense"));
    assert!(patched(32, &1_u32.to_be_bytes()).contains("encrypted"));
    assert!(patched(72, &2_u64.to_be_bytes()).contains("corrupt"));
    assert!(patched(72, &16_u64.to_be_bytes()).contains("feature"));
    assert!(patched(72, &(1_u64 << 40).to_be_bytes()).contains("feature"));
    // The mapping table lies beyond the file, or beyond every file.
    assert!(patched(40, &(1_u64 << 50).to_be_bytes()).contains("makes no sense"));
    assert!(patched(40, &u64::MAX.to_be_bytes()).contains("makes no sense"));
}

//! GPTs as tools write them, and as an attacker would.

use std::fs::OpenOptions;

use proptest::prelude::*;

use super::super::testing::{MIB, ROOT_START, ROOT_UUID, disk_with, plain_root};
use super::*;

/// A valid disk, and what reading it after `change` says.
fn after(change: impl FnOnce(&File)) -> Result<Vec<Partition>, ImageError> {
    let dir = tempfile::tempdir().unwrap();
    let path = disk_with(dir.path(), &plain_root(dir.path()), None);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    change(&disk);
    let len = disk.metadata().unwrap().len();
    read(&disk, len)
}

/// Changes header bytes and makes the checksum right again.
fn patch_header(disk: &File, at: usize, bytes: &[u8]) {
    let mut header = [0; SECTOR_LEN];
    disk.read_exact_at(&mut header, SECTOR).unwrap();
    header[at..at + bytes.len()].copy_from_slice(bytes);
    header[16..20].fill(0);
    let crc = crc32(&header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    disk.write_all_at(&header, SECTOR).unwrap();
}

/// Changes bytes of the first entry and makes both checksums right again.
fn patch_entry(disk: &File, at: u64, bytes: &[u8]) {
    disk.write_all_at(bytes, 2 * SECTOR + at).unwrap();
    let mut table = vec![0; 128 * ENTRY_LEN];
    disk.read_exact_at(&mut table, 2 * SECTOR).unwrap();
    patch_header(disk, 88, &crc32(&table).to_le_bytes());
}

fn reason(result: Result<Vec<Partition>, ImageError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn partitions_are_told_by_number_wherever_they_lie() {
    let found = after(|_disk| {}).unwrap();
    let numbers: Vec<u32> = found.iter().map(|p| p.number).collect();
    assert_eq!(numbers, [1, 14, 15, 16]);
    assert_eq!((found[0].start, found[0].len), (ROOT_START, 20 * MIB));
    assert_eq!(found[0].uuid, ROOT_UUID);
    assert_eq!(found[3].start, 4 * MIB);
}

#[test]
fn a_header_or_table_that_was_damaged_is_refused() {
    assert!(reason(after(|d| d.write_all_at(b"X", SECTOR + 60).unwrap())).contains("header"));
    assert!(reason(after(|d| d.write_all_at(b"X", 2 * SECTOR + 60).unwrap())).contains("entries"));
    assert!(reason(after(|d| d.write_all_at(b"X", SECTOR).unwrap())).contains("no GPT"));
    assert!(reason(after(|d| d.set_len(600).unwrap())).contains("header cannot be read"));
}

#[test]
fn counts_and_sizes_that_a_hostile_header_claims_are_refused() {
    let entries = |n: u32| reason(after(|d| patch_header(d, 80, &n.to_le_bytes())));
    assert!(entries(u32::MAX).contains("entries of"));
    assert!(entries(0).contains("entries of"));
    assert!(reason(after(|d| patch_header(d, 84, &4096_u32.to_le_bytes()))).contains("of 4096"));
    assert!(reason(after(|d| patch_header(d, 72, &u64::MAX.to_le_bytes()))).contains("nowhere"));
    assert!(reason(after(|d| patch_header(d, 12, &9999_u32.to_le_bytes()))).contains("9999 bytes"));
    assert!(reason(after(|d| patch_header(d, 72, &(1_u64 << 40).to_le_bytes()))).contains("read"));
}

#[test]
fn a_partition_beyond_the_disk_or_backwards_is_refused() {
    let first_lba = |lba: u64| reason(after(|d| patch_entry(d, 32, &lba.to_le_bytes())));
    let last_lba = |lba: u64| reason(after(|d| patch_entry(d, 40, &lba.to_le_bytes())));
    assert!(last_lba(u64::MAX).contains("beyond every disk"));
    assert!(last_lba(1 << 30).contains("spans bytes"));
    assert!(last_lba(10).contains("spans bytes"));
    assert!(first_lba(0).contains("spans bytes"));
    assert!(first_lba(u64::MAX - 1).contains("beyond every disk"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_header_makes_the_reader_panic(noise in prop::collection::vec(any::<u8>(), 92..SECTOR_LEN)) {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        patch_header(&disk, 0, &noise);
        patch_header(&disk, 0, b"EFI PART");
        patch_header(&disk, 12, &92_u32.to_le_bytes());
        let _ = read(&disk, 1 << 20);
        // With sane counts the rest of the noise is reached.
        patch_header(&disk, 80, &[128, 0, 0, 0, 128, 0, 0, 0]);
        let _ = read(&disk, 1 << 20);
    }

    #[test]
    fn no_entry_makes_the_parser_panic(entry in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_entry(1, &entry, 1 << 30);
    }
}

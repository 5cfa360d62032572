//! The device as a guest's driver sees it, on both engines.
#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are small"
)]

use std::os::unix::fs::FileExt;

use super::testing::*;
use super::*;

/// Bytes that differ from sector to sector.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_add((i / 512) as u8).wrapping_mul(31) ^ (i as u8))
        .collect()
}

fn direct(bytes: &[u8]) -> Disk {
    Disk::Direct(Arc::new(file_of(bytes)))
}

#[test]
fn what_was_written_is_read_again() {
    for engine in ENGINES {
        for disk in [
            direct(&[0; 1 << 20]),
            Disk::Overlay(overlay(&[7; 1 << 20], None)),
        ] {
            let memory = ram();
            let mut guest = Guest::new(&memory, block(disk, engine));
            let bytes = pattern(20_480, 3);
            assert_eq!(guest.write(8, &bytes), OK);
            assert!(guest.interrupted());
            assert_eq!(guest.read(8, 20_480).unwrap(), bytes);
            assert_eq!(guest.flush(), OK);
        }
    }
}

#[test]
fn capacity_is_the_files_whole_sectors() {
    let device = block(direct(&[0; 5000]), EngineChoice::Plain);
    let mut capacity = [0; 8];
    device.config().read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 9);
    assert_eq!(device.config().bytes().len(), 60);
}

#[test]
fn a_write_of_a_part_keeps_the_rest_of_the_base() {
    for engine in ENGINES {
        let base = pattern(64 << 10, 9);
        let memory = ram();
        let mut guest = Guest::new(&memory, block(Disk::Overlay(overlay(&base, None)), engine));
        let new = pattern(1536, 200);
        // Sectors 7 to 9: the end of one granule and the start of the next.
        assert_eq!(guest.write(7, &new), OK);
        let mut expected = base.clone();
        expected[7 * 512..10 * 512].copy_from_slice(&new);
        assert_eq!(guest.read(0, 64 << 10).unwrap(), expected);
    }
}

#[test]
fn serial_is_given_and_cut_to_the_buffer() {
    let memory = ram();
    let mut guest = Guest::new(&memory, block(direct(&[0; 4096]), EngineChoice::Plain));
    for (room, used) in [(20, 21), (64, 20), (3, 4)] {
        let (status, len) = guest.call(8, 0, Some(Buffer::In(room)));
        assert_eq!((status, len), (OK, used), "{room}");
    }
    let head = guest.request(8, 0, Some(Buffer::In(20)));
    guest.run(1).unwrap();
    assert_eq!(
        &guest.bytes_of(head, 20),
        b"serial-0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn a_read_only_disk_refuses_every_change_whatever_was_negotiated() {
    for engine in ENGINES {
        let file = Arc::new(file_of(&pattern(8192, 1)));
        let memory = ram();
        let device = block(Disk::ReadOnly(Arc::clone(&file)), engine);
        assert_ne!(device.features() & (1 << VIRTIO_BLK_F_RO), 0);
        let mut guest = Guest::new(&memory, device);
        assert_eq!(guest.write(0, &[9; 512]), IOERR);
        assert_eq!(guest.discard(&[(0, 8, 0)]), IOERR);
        assert_eq!(guest.write_zeroes(&[(0, 8, 0)]), IOERR);
        assert_eq!(guest.flush(), OK);
        assert_eq!(guest.read(0, 8192).unwrap(), pattern(8192, 1));
        let mut now = vec![0; 8192];
        file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, pattern(8192, 1));
    }
}

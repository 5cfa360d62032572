//! Drivers that get it wrong, on purpose or not.
#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are small"
)]

use proptest::prelude::*;
use std::sync::Arc;

use super::super::testing::*;
use super::super::{Block, Disk, EngineChoice};
use super::*;
use crate::devices::{Fault, VirtioDevice};

/// 64 KiB: 128 sectors.
fn disk() -> Block {
    let disk = Disk::Overlay(overlay(&[3; 64 << 10], None));
    block(disk, EngineChoice::Auto)
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

#[test]
fn what_is_not_on_the_disk_is_an_io_error() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    let sectors = [
        128,
        127,
        129,
        1 << 32,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        u64::MAX - 1,
        u64::MAX,
    ];
    for sector in sectors {
        let read = guest.call(IN, sector, Some(Buffer::In(1024)));
        assert_eq!(read, (IOERR, 0), "{sector}");
        let bytes = Some(Buffer::Out(vec![1; 1024]));
        assert_eq!(guest.call(OUT, sector, bytes), (IOERR, 1), "{sector}");
        let range = [(sector, 2, 0)];
        assert_eq!(guest.discard(&range), IOERR, "{sector}");
        assert_eq!(guest.write_zeroes(&range), IOERR, "{sector}");
    }
    assert_eq!(guest.read(0, 64 << 10).unwrap(), [3; 64 << 10]);
}

#[test]
fn lengths_that_are_no_sectors_are_an_io_error_and_nothing_is_fine() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    for len in [1, 511, 513, 4095] {
        assert_eq!(guest.call(IN, 0, Some(Buffer::In(len))), (IOERR, 0));
        let bytes = Some(Buffer::Out(vec![1; len as usize]));
        assert_eq!(guest.call(OUT, 0, bytes), (IOERR, 1));
    }
    assert_eq!(guest.call(IN, 0, None), (OK, 1));
    assert_eq!(guest.call(OUT, 128, None), (OK, 1));
    assert_eq!(guest.call(OUT, 129, None), (IOERR, 1));
    assert_eq!(guest.read(0, 64 << 10).unwrap(), [3; 64 << 10]);
}

#[test]
fn flush_and_serial_take_any_size() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    for len in [1, 19, 20, 21, 513] {
        assert_eq!(guest.call(FLUSH, 7, Some(Buffer::Out(vec![0; len]))).0, OK);
        assert_eq!(guest.call(GET_ID, 7, Some(Buffer::In(len as u32))).0, OK);
    }
    assert_eq!(guest.call(GET_ID, 0, None), (OK, 1));
}

#[test]
fn discard_and_write_zeroes_are_checked_whole_before_anything_happens() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    let fine = (0, 8, 0);
    let over = (120, 9, 0);
    let max = MAX_DISCARD_RANGES as usize;
    assert_eq!(guest.discard(&[]), IOERR);
    assert_eq!(guest.discard(&vec![fine; max + 1]), IOERR);
    assert_eq!(guest.discard(&[fine, over]), IOERR);
    assert_eq!(guest.discard(&[fine, (0, MAX_RANGE_SECTORS + 1, 0)]), IOERR);
    assert_eq!(guest.discard(&[fine, (8, u32::MAX, 0)]), IOERR);
    assert_eq!(guest.discard(&[fine, (8, 8, 1)]), UNSUPP);
    assert_eq!(guest.write_zeroes(&[]), IOERR);
    assert_eq!(guest.write_zeroes(&[fine, fine]), IOERR);
    assert_eq!(guest.write_zeroes(&[(0, 8, 2)]), UNSUPP);
    for kind in [DISCARD, ZEROES] {
        for len in [1, 15, 17] {
            let bytes = Some(Buffer::Out(vec![0; len]));
            assert_eq!(guest.call(kind, 0, bytes), (IOERR, 1));
        }
    }
    assert_eq!(guest.read(0, 64 << 10).unwrap(), [3; 64 << 10]);
    // Overlapping, empty and as many as allowed: all fine.
    assert_eq!(guest.discard(&vec![fine; max]), OK);
    assert_eq!(guest.discard(&[(0, 16, 0), (3, 8, 0), (5, 0, 0)]), OK);
    assert_eq!(guest.write_zeroes(&[(16, 3, 1)]), OK);
    assert_eq!(guest.read(0, 19 * 512).unwrap(), [0; 19 * 512]);
    assert_eq!(guest.read(19, 512).unwrap(), [3; 512]);
}

#[test]
fn unknown_types_are_unsupported() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 255, 1 << 31, u32::MAX] {
        let answer = guest.call(kind, 0, Some(Buffer::In(512)));
        assert_eq!(answer, (UNSUPP, 0), "{kind}");
    }
}

#[test]
fn framing_is_the_drivers_choice() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    // Header in three pieces, data in odd ones, the status at the end of the data's last piece.
    guest.write_header(0, IN, 2);
    let (header, data) = (Guest::header(0).0, Guest::data(0).0);
    guest.offer(
        0,
        &[
            (header, 1, false),
            (header + 1, 0, false),
            (header + 1, 7, false),
            (header + 8, 8, false),
            (data, 100, true),
            (data + 100, 413, true),
        ],
    );
    assert_eq!(guest.run(1).unwrap()[0].len, 513);
    assert_eq!(guest.bytes_of(0, 513), [vec![3; 512], vec![OK]].concat());
}

#[test]
fn a_header_that_is_too_short_is_an_io_error() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    for len in [0, 1, 15] {
        guest.write_header(0, IN, 0);
        let status = Guest::status(0).0;
        guest.offer(0, &[(Guest::header(0).0, len, false), (status, 1, true)]);
        guest.run(1).unwrap();
        assert_eq!(guest.status_of(0), IOERR);
    }
}

#[test]
fn a_chain_without_room_for_a_status_is_a_guest_fault() {
    for tail in [(0x9000, 0, true), (0x9000, 1, false)] {
        let memory = ram();
        let mut guest = Guest::new(&memory, disk());
        guest.write_header(0, FLUSH, 0);
        guest.offer(0, &[(Guest::header(0).0, 16, false), tail]);
        let fault = guest.run(1).unwrap_err();
        assert!(matches!(fault, Fault::Guest(GuestFault::Request { .. })));
        guest.pause();
    }
}

#[test]
fn a_status_in_odd_places_hurts_the_guest_alone() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    guest.write_header(0, IN, 0);
    let (header, data) = (Guest::header(0).0, Guest::data(0).0);
    // Over the data, over the header, and in the descriptor table.
    for status in [data + 10, header + 3, TABLE + 4000] {
        guest.offer(
            0,
            &[(header, 16, false), (data, 512, true), (status, 1, true)],
        );
        assert_eq!(guest.run(1).unwrap()[0].len, 513);
        let byte: u8 = vm_memory::Bytes::read_obj(&memory, GuestAddress(status)).unwrap();
        assert_eq!(byte, OK);
    }
}

#[test]
fn broken_rings_are_guest_faults_and_the_device_still_comes_back() {
    type Break = fn(&mut Guest<'_>);
    let breaks: [Break; 6] = [
        |guest| guest.rings.avail.idx().store(300),
        |guest| guest.make_available(256),
        |guest| guest.make_available(u16::MAX),
        |guest| guest.offer(0, &[(0x1_0000, 16, true), (0x1_0000, 16, false)]),
        |guest| guest.offer(0, &[(0x1_0000, 16, false), (33 << 20, 512, true)]),
        |guest| guest.offer(0, &[(u64::MAX - 3, 16, false), (0x1_0000, 1, true)]),
    ];
    for (i, break_it) in breaks.into_iter().enumerate() {
        let memory = ram();
        let mut guest = Guest::new(&memory, disk());
        assert_eq!(guest.flush(), OK);
        break_it(&mut guest);
        assert!(matches!(guest.run(1), Err(Fault::Guest(_))), "{i}");
        guest.pause();
        guest.device.reset();
        // After its reset the driver starts anew.
        let device = std::mem::replace(&mut guest.device, disk());
        let mut guest = Guest::new(&memory, device);
        assert_eq!(guest.read(0, 512).unwrap(), [3; 512]);
    }
}

#[test]
fn what_looks_like_an_image_format_is_only_bytes() {
    let memory = ram();
    let mut guest = Guest::new(&memory, disk());
    let mut sector = vec![0; 512];
    sector[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    assert_eq!(guest.write(0, &sector), OK);
    guest.pause();
    let device = std::mem::replace(&mut guest.device, disk());
    let bytes = device.config().bytes();
    assert_eq!(bytes[..8], 128_u64.to_le_bytes());
    let mut guest = Guest::new(&memory, device);
    assert_eq!(guest.read(0, 512).unwrap(), sector);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is in the table: no panic, no endless loop, and the device comes back.
    #[test]
    fn garbage_is_survived(
        descriptors in proptest::collection::vec((0..0x3_0000_u64, 0..70_000_u32, any::<bool>()), 1..6),
        header in any::<(u8, u64)>(),
        ring in any::<bool>(),
    ) {
        let engine = if ring { EngineChoice::Ring } else { EngineChoice::Plain };
        let memory = ram();
        let disk = Disk::Direct(Arc::new(file_of(&[0; 64 << 10])));
        let mut guest = Guest::new(&memory, block(disk, engine));
        guest.write_header(0, u32::from(header.0 % 16), header.1 % 140);
        let mut chain = vec![(Guest::header(0).0, 16, false)];
        chain.extend(descriptors);
        guest.offer(0, &chain);
        guest.kick.write(1).unwrap();
        let _any = guest.turn(true);
        guest.pause();
        prop_assert!(guest.device.sources().is_empty());
    }
}

//! Headers, good and bad, against the features that allow them.

use proptest::prelude::*;

use super::*;

const ALL: u64 = (1 << VIRTIO_NET_F_CSUM)
    | (1 << VIRTIO_NET_F_HOST_TSO4)
    | (1 << VIRTIO_NET_F_HOST_TSO6)
    | (1 << VIRTIO_NET_F_HOST_ECN);

/// flags, type, hdr_len, gso_size, csum_start, csum_offset.
fn header(fields: (u8, u8, u16, u16, u16, u16)) -> [u8; HEADER_BYTES] {
    let (flags, gso, header_len, segment, start, offset) = fields;
    let mut header = [0; HEADER_BYTES];
    header[0] = flags;
    header[1] = gso;
    header[2..4].copy_from_slice(&header_len.to_le_bytes());
    header[4..6].copy_from_slice(&segment.to_le_bytes());
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8..10].copy_from_slice(&offset.to_le_bytes());
    header
}

#[test]
fn a_plain_frame_needs_no_feature() {
    assert_eq!(check(header((0, 0, 0, 0, 0, 0)), 60, 0), Ok([0; 12]));
}

#[test]
fn a_frame_is_as_long_as_ethernet_and_ip_allow() {
    let plain = header((0, 0, 0, 0, 0, 0));
    for refused in [0, 13, MAX_FRAME_BYTES + 1, u64::MAX] {
        assert_eq!(check(plain, refused, ALL), Err(Refused::Length));
    }
    for taken in [14, MAX_FRAME_BYTES] {
        assert_eq!(check(plain, taken, ALL), Ok(plain));
    }
}

#[test]
fn fields_that_nothing_asks_for_do_not_reach_the_host() {
    let mut noisy = header((0xfe, 0, 1, 2, 3, 4));
    noisy[10..].fill(0xff);
    assert_eq!(check(noisy, 60, ALL), Ok([0; 12]));
    let mut noisy = header((0xff, 0, 1, 2, 34, 16));
    noisy[10..].fill(0xff);
    let clean = header((1, 0, 0, 0, 34, 16));
    assert_eq!(check(noisy, 60, ALL), Ok(clean));
}

#[test]
fn a_checksum_lies_within_the_frame_and_was_negotiated() {
    let sum = |start, offset| header((1, 0, 0, 0, start, offset));
    assert_eq!(check(sum(34, 24), 60, ALL), Ok(sum(34, 24)));
    assert_eq!(check(sum(34, 25), 60, ALL), Err(Refused::Checksum));
    let far = sum(u16::MAX, u16::MAX);
    assert_eq!(check(far, 60, ALL), Err(Refused::Checksum));
    // Before the end of any IP header.
    assert_eq!(check(sum(33, 16), 60, ALL), Err(Refused::Checksum));
    let without = ALL & !(1 << VIRTIO_NET_F_CSUM);
    assert_eq!(check(sum(34, 16), 60, without), Err(Refused::Checksum));
}

#[test]
fn segmentation_is_known_negotiated_and_whole() {
    let tcp4 = header((1, 1, 54, 1448, 34, 16));
    assert_eq!(check(tcp4, 9000, ALL), Ok(tcp4));
    let tcp6_with_ecn = header((1, 0x84, 74, 1428, 54, 16));
    assert_eq!(check(tcp6_with_ecn, 9000, ALL), Ok(tcp6_with_ecn));
    let refused = [
        ("no segment size", header((1, 1, 54, 0, 34, 16)), ALL),
        ("no checksum flag", header((0, 1, 54, 1448, 34, 16)), ALL),
        (
            "headers longer than all",
            header((1, 1, 9001, 1448, 34, 16)),
            ALL,
        ),
        ("UDP fragmentation", header((1, 3, 42, 1448, 34, 6)), ALL),
        ("UDP segmentation", header((1, 5, 42, 1448, 34, 6)), ALL),
        ("no such type", header((1, 0x7f, 54, 1448, 34, 16)), ALL),
        ("ECN of nothing", header((1, 0x80, 54, 1448, 34, 16)), ALL),
        (
            "TSO4 not negotiated",
            tcp4,
            ALL & !(1 << VIRTIO_NET_F_HOST_TSO4),
        ),
        (
            "TSO6 not negotiated",
            tcp6_with_ecn,
            ALL & !(1 << VIRTIO_NET_F_HOST_TSO6),
        ),
        (
            "ECN not negotiated",
            tcp6_with_ecn,
            ALL & !(1 << VIRTIO_NET_F_HOST_ECN),
        ),
    ];
    for (why, header, features) in refused {
        let result = check(header, 9000, features);
        assert_eq!(result, Err(Refused::Segmentation), "{why}");
    }
}

proptest! {
    /// Whatever passes points into its frame and asks for what was negotiated only.
    #[test]
    fn no_header_passes_that_could_mislead_the_host(
        raw in any::<[u8; HEADER_BYTES]>(),
        frame_bytes in 0_u64..70_000,
        features in any::<u64>(),
    ) {
        let Ok(clean) = check(raw, frame_bytes, features) else { return Ok(()) };
        let field = |at: usize| u64::from(u16::from_le_bytes([clean[at], clean[at + 1]]));
        prop_assert!((14..=MAX_FRAME_BYTES).contains(&frame_bytes));
        prop_assert!(clean[0] <= 1 && field(10) == 0);
        if clean[0] == 1 {
            prop_assert!(features & (1 << VIRTIO_NET_F_CSUM) != 0);
            prop_assert!(field(6) + field(8) + 2 <= frame_bytes);
        }
        if clean[1] != 0 {
            prop_assert!(clean[0] == 1 && field(4) != 0 && field(2) <= frame_bytes);
        }
        prop_assert_eq!(check(clean, frame_bytes, features), Ok(clean));
    }
}

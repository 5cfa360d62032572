//! The header before each frame (virtio 1.2, 5.1.6): what a driver may ask of the host's network
//! stack, decided from a copy. No descriptor, no thread.
//!
//! What passes is rebuilt from the fields that count, so that nothing a driver left in the others
//! reaches the host. A bad header costs its frame only: a network may lose frames.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Size of `struct virtio_net_hdr_v1`, which every modern device has.
pub const HEADER_BYTES: usize = 12;
/// Where `num_buffers` is in it.
pub const NUM_BUFFERS_OFFSET: u64 = 10;
/// An Ethernet header and one VLAN tag.
const LINK_HEADER_BYTES: u64 = 14 + 4;
/// An Ethernet header alone: what the host's stack asks for at least.
const MIN_FRAME_BYTES: u64 = 14;
/// Where a sum can start: behind the link header and the shortest IP header. Linux refuses others.
const MIN_CHECKSUM_START: u64 = 14 + 20;
/// The largest frame either way: an IP packet of 64 KiB and its link header.
pub const MAX_FRAME_BYTES: u64 = 65535 + LINK_HEADER_BYTES;
/// Such a frame with its header, as a buffer.
pub const MAX_PACKET_BYTES: usize = HEADER_BYTES + 65535 + 14 + 4;

/// Why a frame is not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Shorter than header and link header, or longer than any frame.
    Length,
    /// Checksum asked for without the feature, or not of what an IP packet carries.
    Checksum,
    /// A segmentation that is unknown, not negotiated, or impossible.
    Segmentation,
}

/// Checks a header against the frame behind it and the negotiated features; returns the header to
/// hand to the TAP.
pub fn check(
    header: [u8; HEADER_BYTES],
    frame_bytes: u64,
    features: u64,
) -> Result<[u8; HEADER_BYTES], Refused> {
    if !(MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&frame_bytes) {
        return Err(Refused::Length);
    }
    let [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = header;
    let has = |feature: u32| features & (1 << feature) != 0;
    let needs_checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let mut clean = [0; HEADER_BYTES];

    if needs_checksum {
        let start = u64::from(u16::from_le_bytes([c0, c1]));
        let offset = u64::from(u16::from_le_bytes([o0, o1]));
        // The sum's two bytes lie within the frame.
        if !has(VIRTIO_NET_F_CSUM) || start < MIN_CHECKSUM_START || start + offset + 2 > frame_bytes
        {
            return Err(Refused::Checksum);
        }
        clean = [1, 0, 0, 0, 0, 0, c0, c1, o0, o1, 0, 0];
    }
    if u32::from(gso) == VIRTIO_NET_HDR_GSO_NONE {
        return Ok(clean);
    }

    let ecn = u32::from(gso) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let known = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
        _ => false,
    };
    let header_len = u64::from(u16::from_le_bytes([h0, h1]));
    let segment = u16::from_le_bytes([s0, s1]);
    // virtio 1.2, 5.1.6.2: segmentation needs the checksum flag as well. `hdr_len` is a hint and
    // only has to lie within the frame.
    if !known
        || (ecn && !has(VIRTIO_NET_F_HOST_ECN))
        || !needs_checksum
        || segment == 0
        || header_len > frame_bytes
    {
        return Err(Refused::Segmentation);
    }
    Ok([1, gso, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0])
}

/// Bytes a driver must be able to take before a frame is read for it.
pub fn receive_bytes(large_receive: bool, mtu: u16) -> u64 {
    let frame = if large_receive {
        MAX_FRAME_BYTES
    } else {
        u64::from(mtu) + LINK_HEADER_BYTES
    };
    HEADER_BYTES as u64 + frame
}

#[cfg(test)]
#[path = "frame_test.rs"]
mod tests;

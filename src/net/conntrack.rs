//! Forgets the connections of an address before another machine gets it.
//!
//! Without this, a peer of the machine before would reach the next one through an entry that
//! still says "established". Speaks ctnetlink directly (linux/netfilter/nfnetlink_conntrack.h):
//! the kernel deletes one entry at a time by its tuple, so the entries are listed first.

use std::io;
use std::net::Ipv4Addr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// `NFNL_SUBSYS_CTNETLINK << 8`, and its messages.
const CT_NEW: u16 = 0x100;
const CT_GET: u16 = 0x101;
const CT_DELETE: u16 = 0x102;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Attributes; the two upper bits of a type are flags.
const TYPE_MASK: u16 = 0x3fff;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
/// nlmsghdr and nfgenmsg.
const HEADER_BYTES: usize = 16;
const GENERIC_BYTES: usize = 4;
/// A dump comes in pieces of up to 32 KiB.
const BUFFER_BYTES: usize = 64 << 10;

/// Removes every connection from or to `address`; returns how many. Blocks for as long as the
/// kernel takes to list its table (some 50 ms for 100 000 entries).
pub fn forget(address: Ipv4Addr) -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let tuples = list(&socket, address)?;
    for tuple in &tuples {
        socket.send(&message(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, tuple), 0)?;
        match acknowledged(&socket) {
            // It timed out or was closed meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(tuples.len())
}

/// The whole tuple attributes of connections that touch `address`.
fn list(socket: &Socket, address: Ipv4Addr) -> io::Result<Vec<Vec<u8>>> {
    socket.send(&message(CT_GET, NLM_F_REQUEST | NLM_F_DUMP, &[]), 0)?;
    let mut found = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        socket.recv(&mut buffer, 0)?;
        let mut rest = buffer.as_slice();
        while let Some((kind, body, next)) = split_message(rest) {
            match kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return error_of(body).map(|()| found),
                CT_NEW => found.extend(tuple_touching(body, address)),
                _ => {}
            }
            rest = next;
        }
    }
}

fn acknowledged(socket: &Socket) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    socket.recv(&mut buffer, 0)?;
    match split_message(&buffer) {
        Some((NLMSG_ERROR, body, _next)) => error_of(body),
        _ => Err(io::Error::other("ctnetlink did not acknowledge")),
    }
}

/// An error message's number, 0 in an acknowledgement.
fn error_of(body: &[u8]) -> io::Result<()> {
    let number = body
        .first_chunk()
        .map_or(-libc::EPROTO, |bytes| i32::from_ne_bytes(*bytes));
    match number {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(-number)),
    }
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let len = HEADER_BYTES + GENERIC_BYTES + attributes.len();
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(u32::try_from(len).unwrap_or(0).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port: one request at a time on a socket of its own.
    bytes.extend([0; 8]);
    // Family, version 0, resource 0.
    bytes.extend([u8::try_from(libc::AF_INET).unwrap_or(2), 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// The first message's kind and body, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER_BYTES..len)?;
    let next = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, next))
}

/// One attribute of a message.
struct Attribute<'a> {
    kind: u16,
    /// With its header.
    whole: &'a [u8],
    value: &'a [u8],
}

impl<'a> Attribute<'a> {
    /// The first one, and what follows it.
    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let first = Self {
            kind: u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & TYPE_MASK,
            whole: bytes.get(..len)?,
            value: bytes.get(4..len)?,
        };
        let next = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((first, next))
    }

    /// The first one of a kind.
    fn find(mut bytes: &'a [u8], kind: u16) -> Option<Self> {
        while let Some((first, next)) = Self::split(bytes) {
            if first.kind == kind {
                return Some(first);
            }
            bytes = next;
        }
        None
    }
}

fn tuple_touching(body: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let tuple = Attribute::find(body.get(GENERIC_BYTES..)?, CTA_TUPLE_ORIG)?;
    let ip = Attribute::find(tuple.value, CTA_TUPLE_IP)?;
    let octets = address.octets();
    let touches = [CTA_IP_V4_SRC, CTA_IP_V4_DST]
        .into_iter()
        .any(|end| Attribute::find(ip.value, end).is_some_and(|ip| ip.value == octets));
    touches.then(|| tuple.whole.to_vec())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::testing::{in_network_namespace, run};

    #[test]
    fn connections_of_one_address_are_forgotten_and_others_kept() {
        in_network_namespace(|| {
            run("ip addr add 172.16.120.6/32 dev lo");
            run("ip addr add 172.16.120.60/32 dev lo");
            // Connections are tracked as soon as a rule asks for their state.
            run("nft add table inet t");
            run("nft add chain inet t c { type filter hook output priority 0; }");
            run("nft add rule inet t c ct state new accept");
            for from in ["172.16.120.6:4000", "172.16.120.60:4000", "127.0.0.1:4000"] {
                let socket = UdpSocket::bind(from).unwrap();
                socket.send_to(b"x", "127.0.0.1:9").unwrap();
            }
            let socket = UdpSocket::bind("127.0.0.1:4001").unwrap();
            socket.send_to(b"x", "172.16.120.6:9").unwrap();
            let address = Ipv4Addr::new(172, 16, 120, 6);
            assert_eq!(forget(address).unwrap(), 2, "one from it, one to it");
            assert_eq!(forget(address).unwrap(), 0);
            assert_eq!(forget(Ipv4Addr::new(172, 16, 120, 60)).unwrap(), 1);
        });
    }

    #[test]
    fn messages_cut_anywhere_are_no_messages() {
        let whole = message(CT_GET, NLM_F_REQUEST, &[8, 0, 1, 0, 1, 2, 3, 4]);
        for cut in 0..whole.len() {
            assert!(split_message(&whole[..cut]).is_none());
        }
        assert!(split_message(&whole).is_some());
        assert!(tuple_touching(&[0; 3], Ipv4Addr::LOCALHOST).is_none());
    }
}

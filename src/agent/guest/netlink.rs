//! The machine's one network card, by rtnetlink: address, route, neighbour, and its link's state.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, State};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use super::GuestError;
use crate::agent::proto::Identity;

/// How long the card may take to appear, and its link to come up.
const WAIT: Duration = Duration::from_secs(60);
/// The main routing table, `RT_TABLE_MAIN`.
const MAIN_TABLE: u8 = 254;

/// The card that belongs to us.
#[derive(Debug)]
pub struct Interface {
    index: u32,
    name: String,
}

/// The Ethernet card with this MAC, or the only one there is: a clone still carries the MAC of
/// the machine it was made from. Waits for its driver.
pub fn find_interface(mac: [u8; 6]) -> Result<Interface, GuestError> {
    let started = Instant::now();
    loop {
        let cards = ethernet_cards().map_err(GuestError::act("list network cards"))?;
        let ours = cards.iter().position(|card| card.mac == mac);
        let chosen = ours.or_else(|| (cards.len() == 1).then_some(0));
        if let Some(card) = chosen.and_then(|at| cards.into_iter().nth(at)) {
            return Ok(card.interface);
        }
        if started.elapsed() > WAIT {
            return Err(GuestError::Timeout {
                act: "waiting for the network card".to_owned(),
                seconds: WAIT.as_secs(),
            });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Gives the card its identity and raises it; the link itself is raised by the host.
pub fn configure(interface: &Interface, identity: &Identity) -> Result<(), GuestError> {
    let act = |what: &str| GuestError::act(format!("{what} of {}", interface.name));
    let socket = connect().map_err(act("open netlink"))?;
    let index = interface.index;
    request(&socket, set_link(index, false, identity), 0).map_err(act("set the MAC and MTU"))?;
    for old in addresses_of(index).map_err(act("list addresses"))? {
        request(&socket, RouteNetlinkMessage::DelAddress(old), 0)
            .map_err(act("clear addresses"))?;
    }
    request(&socket, set_link(index, true, identity), 0).map_err(act("raise the card"))?;
    let create = NLM_F_CREATE | NLM_F_REPLACE;
    request(&socket, new_address(index, identity), create).map_err(act("set the address"))?;
    request(&socket, neighbour(index, identity), create).map_err(act("set the neighbour"))?;
    request(&socket, default_route(index, identity.gateway), create).map_err(act("set the route"))
}

/// Waits until the kernel says that the link is up (carrier seen, queue running).
pub fn wait_for_link(interface: &Interface) -> Result<(), GuestError> {
    let started = Instant::now();
    while started.elapsed() < WAIT {
        let cards = ethernet_cards().map_err(GuestError::act("read the link's state"))?;
        if cards
            .iter()
            .any(|c| c.interface.index == interface.index && c.up)
        {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Err(GuestError::Timeout {
        act: format!("waiting for the link of {}", interface.name),
        seconds: WAIT.as_secs(),
    })
}

struct Card {
    interface: Interface,
    mac: [u8; 6],
    up: bool,
}

fn ethernet_cards() -> io::Result<Vec<Card>> {
    let socket = connect()?;
    let mut cards = Vec::new();
    for answer in dump(
        &socket,
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )? {
        let RouteNetlinkMessage::NewLink(link) = answer else {
            continue;
        };
        if link.header.link_layer_type != LinkLayerType::Ether {
            continue;
        }
        let mut card = Card {
            interface: Interface {
                index: link.header.index,
                name: String::new(),
            },
            mac: [0; 6],
            up: false,
        };
        // Virtual devices (a bridge of a container engine) have a kind; a card has none.
        let mut is_virtual = false;
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => card.interface.name = name,
                LinkAttribute::Address(mac) => card.mac = mac.try_into().unwrap_or_default(),
                LinkAttribute::OperState(state) => card.up = state == State::Up,
                LinkAttribute::LinkInfo(_) => is_virtual = true,
                _ => {}
            }
        }
        if !is_virtual {
            cards.push(card);
        }
    }
    Ok(cards)
}

fn addresses_of(index: u32) -> io::Result<Vec<AddressMessage>> {
    let socket = connect()?;
    let mut query = AddressMessage::default();
    query.header.family = AddressFamily::Inet;
    let answers = dump(&socket, RouteNetlinkMessage::GetAddress(query))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(address) if address.header.index == index => {
                Some(address)
            }
            _ => None,
        })
        .collect())
}

fn set_link(index: u32, up: bool, identity: &Identity) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.change_mask = LinkFlags::Up;
    if up {
        link.header.flags = LinkFlags::Up;
    } else {
        // A MAC changes only while the card is down.
        link.attributes
            .push(LinkAttribute::Address(identity.mac.to_vec()));
        link.attributes
            .push(LinkAttribute::Mtu(u32::from(identity.mtu)));
    }
    RouteNetlinkMessage::SetLink(link)
}

fn new_address(index: u32, identity: &Identity) -> RouteNetlinkMessage {
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = identity.prefix_len;
    address.header.index = index;
    let ip = IpAddr::V4(identity.address);
    address.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    RouteNetlinkMessage::NewAddress(address)
}

fn neighbour(index: u32, identity: &Identity) -> RouteNetlinkMessage {
    let mut entry = NeighbourMessage::default();
    entry.header.family = AddressFamily::Inet;
    entry.header.ifindex = index;
    entry.header.state = NeighbourState::Permanent;
    entry.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(identity.gateway)),
        NeighbourAttribute::LinkLayerAddress(identity.gateway_mac.to_vec()),
    ];
    RouteNetlinkMessage::NewNeighbour(entry)
}

fn default_route(index: u32, gateway: Ipv4Addr) -> RouteNetlinkMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.table = MAIN_TABLE;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Universe;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)),
        RouteAttribute::Oif(index),
    ];
    RouteNetlinkMessage::NewRoute(route)
}

fn connect() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn send(socket: &Socket, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut packet = NetlinkMessage::from(message);
    packet.header.flags = NLM_F_REQUEST | flags;
    packet.header.sequence_number = 1;
    packet.finalize();
    let mut buffer = vec![0; packet.buffer_len()];
    packet.serialize(&mut buffer);
    socket.send(&buffer, 0).map(|_sent| ())
}

/// One change, acknowledged by the kernel.
fn request(socket: &Socket, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    send(socket, message, NLM_F_ACK | flags)?;
    let (bytes, _from) = socket.recv_from_full()?;
    match decode(&bytes)?.payload {
        NetlinkPayload::Error(error) => match error.code {
            None => Ok(()),
            Some(_) => Err(error.to_io()),
        },
        _ => Err(io::Error::other("netlink answered out of turn")),
    }
}

/// All answers to a dump.
fn dump(socket: &Socket, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    send(socket, message, NLM_F_DUMP)?;
    let mut answers = Vec::new();
    loop {
        let (bytes, _from) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let packet = decode(rest)?;
            let len = usize::try_from(packet.header.length).unwrap_or(0);
            match packet.payload {
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                _ => {}
            }
            // Messages are aligned to four bytes.
            rest = rest.get(len.next_multiple_of(4).max(4)..).unwrap_or(&[]);
        }
    }
}

fn decode(bytes: &[u8]) -> io::Result<NetlinkMessage<RouteNetlinkMessage>> {
    NetlinkMessage::deserialize(bytes).map_err(|e| io::Error::other(e.to_string()))
}

#[cfg(test)]
#[path = "netlink_test.rs"]
mod tests;

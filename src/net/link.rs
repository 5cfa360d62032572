//! Interfaces and routes of the host, by rtnetlink.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::spec::Subnet;
use super::{NetError, Slot, tap};

/// The host's resolvers, best first: systemd-resolved's upstreams, then the plain file.
const RESOLVER_FILES: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
const DEFAULT_MTU: u16 = 1500;

/// A connection to the kernel's routing tables.
#[derive(Debug, Clone)]
pub struct Links {
    handle: Handle,
}

impl Links {
    /// Connects; the connection runs as a task of the current runtime.
    pub fn connect() -> Result<Self, NetError> {
        let (connection, handle, _messages) =
            rtnetlink::new_connection().map_err(|source| NetError::Netlink {
                act: "connect",
                source,
            })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Addresses, MAC, MTU and neighbour of a new TAP, IPv6 off, and up.
    pub async fn configure_tap(&self, slot: &Slot, mtu: u16) -> Result<(), NetError> {
        let name = slot.name();
        for (key, value) in [
            ("ipv6/conf/{}/disable_ipv6", "1"),
            ("ipv6/conf/{}/accept_ra", "0"),
            ("ipv4/conf/{}/rp_filter", "1"),
            ("ipv4/conf/{}/send_redirects", "0"),
            ("ipv4/conf/{}/accept_redirects", "0"),
        ] {
            set_sysctl(&key.replace("{}", &name), value).map_err(|source| {
                NetError::ConfigureTap {
                    name: name.clone(),
                    what: "the sysctls",
                    source,
                }
            })?;
        }
        let index = self.index_of(&name).await?;
        let fail = |what| {
            let name = name.clone();
            move |e| NetError::ConfigureTap {
                name,
                what,
                source: to_io(e),
            }
        };
        let link = LinkUnspec::new_with_index(index)
            .address(slot.host_mac().to_vec())
            .mtu(u32::from(mtu))
            .up()
            .build();
        self.handle
            .link()
            .set(link)
            .execute()
            .await
            .map_err(fail("the MAC and MTU"))?;
        self.handle
            .address()
            .add(index, IpAddr::V4(slot.host_address()), slot.prefix_len())
            .execute()
            .await
            .map_err(fail("the address"))?;
        self.handle
            .neighbours()
            .add(index, IpAddr::V4(slot.guest_address()))
            .link_layer_address(&slot.guest_mac())
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(fail("the neighbour"))
    }

    /// The uplink and its MTU: the named interface, or that of the default route.
    pub async fn uplink(&self, named: Option<&str>) -> Result<(String, u16), NetError> {
        let links = self.links().await?;
        let index = match named {
            Some(name) => {
                return links
                    .iter()
                    .find(|link| link.name == name)
                    .map(|link| (link.name.clone(), link.mtu))
                    .ok_or_else(|| NetError::NoInterface {
                        name: name.to_owned(),
                        present: names(&links),
                    });
            }
            None => self.default_route_interface().await?,
        };
        links
            .into_iter()
            .find(|link| link.index == index)
            .map(|link| (link.name, link.mtu))
            .ok_or(NetError::NoDefaultRoute)
    }

    /// The first route of somebody else that `subnet` overlaps, as an error to show.
    pub async fn overlap(&self, subnet: &Subnet) -> Result<Option<NetError>, NetError> {
        let links = self.links().await?;
        for route in self.routes().await? {
            let Some((network, index)) = destination(&route) else {
                continue;
            };
            if network.prefix() == 0 || !network.overlaps(subnet) {
                continue;
            }
            let interface = index
                .and_then(|index| links.iter().find(|link| link.index == index))
                .map_or_else(|| "no interface".to_owned(), |link| link.name.clone());
            if !tap::is_ours(&interface) {
                return Ok(Some(NetError::SubnetOverlap {
                    subnet: *subnet,
                    route: network.to_string(),
                    interface,
                }));
            }
        }
        Ok(None)
    }

    /// Networks that the host reaches without a gateway: its LAN. Not those of our TAPs.
    pub async fn connected_networks(&self) -> Result<Vec<Subnet>, NetError> {
        let ours: Vec<u32> = self
            .links()
            .await?
            .into_iter()
            .filter(|link| tap::is_ours(&link.name))
            .map(|link| link.index)
            .collect();
        let mut networks: Vec<Subnet> = self
            .routes()
            .await?
            .iter()
            .filter(|route| route.header.scope == RouteScope::Link)
            .filter_map(destination)
            .filter(|(network, index)| {
                network.prefix() > 0 && !index.is_some_and(|index| ours.contains(&index))
            })
            .map(|(network, _index)| network)
            .collect();
        networks.dedup();
        Ok(networks)
    }

    async fn default_route_interface(&self) -> Result<u32, NetError> {
        let mut best: Option<(u32, u32)> = None;
        for route in self.routes().await? {
            let Some((network, Some(index))) = destination(&route) else {
                continue;
            };
            let metric = route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Priority(metric) => Some(*metric),
                    _ => None,
                })
                .unwrap_or(0);
            if network.prefix() == 0 && best.is_none_or(|(least, _)| metric < least) {
                best = Some((metric, index));
            }
        }
        best.map(|(_metric, index)| index)
            .ok_or(NetError::NoDefaultRoute)
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>, NetError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<RouteMessage> = self
            .handle
            .route()
            .get(all)
            .execute()
            .try_collect()
            .await
            .map_err(|e| netlink("list routes", e))?;
        // Local and broadcast entries repeat what the connected ones say.
        Ok(routes
            .into_iter()
            .filter(|route| route.header.kind == RouteType::Unicast)
            .collect())
    }

    async fn links(&self) -> Result<Vec<Link>, NetError> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|e| netlink("list interfaces", e))?;
        Ok(links.into_iter().map(Link::from).collect())
    }

    async fn index_of(&self, name: &str) -> Result<u32, NetError> {
        let links = self.links().await?;
        links
            .iter()
            .find(|link| link.name == name)
            .map(|link| link.index)
            .ok_or_else(|| NetError::NoInterface {
                name: name.to_owned(),
                present: names(&links),
            })
    }
}

struct Link {
    index: u32,
    name: String,
    mtu: u16,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mtu: DEFAULT_MTU,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                // Loopback's 65536 does not fit and never is an uplink.
                LinkAttribute::Mtu(mtu) => link.mtu = u16::try_from(mtu).unwrap_or(u16::MAX),
                _ => {}
            }
        }
        link
    }
}

fn names(links: &[Link]) -> String {
    let names: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
    names.join(", ")
}

/// A route's network and interface; `None` for what is not IPv4.
fn destination(route: &RouteMessage) -> Option<(Subnet, Option<u32>)> {
    let mut base = Ipv4Addr::UNSPECIFIED;
    let mut index = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => base = *address,
            RouteAttribute::Destination(_) => return None,
            RouteAttribute::Oif(oif) => index = Some(*oif),
            _ => {}
        }
    }
    Subnet::new(base, route.header.destination_prefix_length).map(|network| (network, index))
}

/// The resolvers of the host that a machine can reach: never a loopback stub.
pub fn host_resolvers() -> Result<Vec<Ipv4Addr>, NetError> {
    for file in RESOLVER_FILES {
        let found = fs::read_to_string(file)
            .map(|text| resolvers_in(&text))
            .unwrap_or_default();
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Err(NetError::NoResolver {
        path: Path::new("/etc/resolv.conf").to_owned(),
    })
}

fn resolvers_in(text: &str) -> Vec<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .collect()
}

fn set_sysctl(key: &str, value: &str) -> io::Result<()> {
    match fs::write(Path::new("/proc/sys/net").join(key), value) {
        // A kernel without IPv6 has nothing to switch off.
        Err(e) if e.kind() == io::ErrorKind::NotFound && key.starts_with("ipv6/") => Ok(()),
        result => result,
    }
}

fn netlink(act: &'static str, error: rtnetlink::Error) -> NetError {
    NetError::Netlink {
        act,
        source: to_io(error),
    }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stub_resolvers_are_not_handed_to_machines() {
        let text = "# x\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\nsearch a\n";
        assert_eq!(resolvers_in(text), [Ipv4Addr::new(10, 0, 0, 1)]);
    }
}

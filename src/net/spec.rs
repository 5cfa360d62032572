//! What the config says about networks, as validated values.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// An IPv4 network, /8 to /29, whose host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subnet {
    base: u32,
    prefix: u8,
}

/// Addresses of one slot: network, host, guest, broadcast.
const SLOT_ADDRESSES: u32 = 4;

impl Subnet {
    /// A network; `None` if `prefix` is outside `0..=32` or host bits are set.
    pub fn new(base: Ipv4Addr, prefix: u8) -> Option<Self> {
        let base = u32::from(base);
        (prefix <= 32 && base & !mask(prefix) == 0).then_some(Self { base, prefix })
    }

    pub fn base(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.base)
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// How many /30s it holds.
    pub fn slots(&self) -> u32 {
        match self.prefix {
            0..=30 => (u64::from(!mask(self.prefix)) + 1)
                .checked_div(u64::from(SLOT_ADDRESSES))
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(u32::MAX),
            _ => 0,
        }
    }

    /// The n-th /30's network address.
    pub fn slot_base(&self, n: u32) -> Option<Ipv4Addr> {
        (n < self.slots())
            .then(|| n.checked_mul(SLOT_ADDRESSES))
            .flatten()
            .and_then(|offset| self.base.checked_add(offset))
            .map(Ipv4Addr::from)
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        let mask = mask(self.prefix.min(other.prefix));
        self.base & mask == other.base & mask
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == self.base
    }

    /// The next larger network around it that holds at least two slots.
    pub fn widened(&self) -> Self {
        let prefix = self.prefix.min(29).saturating_sub(1);
        Self {
            base: self.base & mask(prefix),
            prefix,
        }
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix.min(32)))
        .unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    /// `a.b.c.` (a /24, the predecessor's spelling) or CIDR.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(start) = text.strip_suffix('.')
            && let Ok(base) = format!("{start}.0").parse()
        {
            return Self::new(base, 24).ok_or_else(|| format!("{text:?} is not a network"));
        }
        let (base, prefix) = text
            .split_once('/')
            .ok_or_else(|| format!("{text:?} is neither `a.b.c.` nor CIDR"))?;
        let base: Ipv4Addr = base
            .parse()
            .map_err(|_bad| format!("{base:?} is not an IPv4 address"))?;
        let prefix: u8 = prefix
            .parse()
            .ok()
            .filter(|p| *p <= 32)
            .ok_or_else(|| format!("/{prefix} is not a prefix length"))?;
        let network = Ipv4Addr::from(u32::from(base) & mask(prefix));
        Self::new(base, prefix)
            .ok_or_else(|| format!("{text} has host bits set; hint: {network}/{prefix}"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port of the host that machines may reach: `tcp/5000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowHost {
    pub protocol: Protocol,
    pub port: u16,
}

impl FromStr for AllowHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not tcp/PORT or udp/PORT");
        let (protocol, port) = text.split_once('/').ok_or_else(bad)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(bad()),
        };
        let port = port.parse().ok().filter(|p| *p != 0).ok_or_else(bad)?;
        Ok(Self { protocol, port })
    }
}

/// A private network that machines may reach: `10.0.0.0/8` or `tcp/443@10.1.2.3/32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowPrivate {
    pub network: Subnet,
    /// Only this service; everything if `None`.
    pub service: Option<AllowHost>,
}

impl FromStr for AllowPrivate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (service, network) = match text.split_once('@') {
            Some((service, network)) => (Some(service.parse()?), network),
            None => (None, text),
        };
        let network = if network.contains('/') {
            network.parse()?
        } else {
            format!("{network}/32").parse()?
        };
        Ok(Self { network, service })
    }
}

/// What a process needs of the host's network.
#[derive(Debug, Clone)]
pub struct NetSpec {
    pub subnet: Subnet,
    /// That of the default route if `None`.
    pub egress_interface: Option<String>,
    /// The host's own upstream resolvers if empty.
    pub dns: Vec<Ipv4Addr>,
    pub allow_private: Vec<AllowPrivate>,
    pub allow_host: Vec<AllowHost>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prefix_form_is_a_24_with_63_machines_and_a_build() {
        let subnet: Subnet = "172.16.120.".parse().unwrap();
        assert_eq!(subnet.to_string(), "172.16.120.0/24");
        assert_eq!(subnet.slots(), 64);
        assert_eq!(subnet.slot_base(63).unwrap().to_string(), "172.16.120.252");
        assert_eq!(subnet.slot_base(64), None);
    }

    #[test]
    fn host_bits_are_refused_with_the_network_meant() {
        let error = "172.16.120.5/24".parse::<Subnet>().unwrap_err();
        assert!(error.contains("hint: 172.16.120.0/24"), "{error}");
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "172.16.", "1.2.3.4", "1.2.3.0/33", "a/24", "1.2.3.4.5."] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
        for text in ["tcp", "tcp/0", "sctp/5", "tcp/70000", "/5"] {
            assert!(text.parse::<AllowHost>().is_err(), "{text}");
        }
        assert!("tcp/443@".parse::<AllowPrivate>().is_err());
    }

    #[test]
    fn overlap_is_symmetric_and_exact() {
        let net = |s: &str| s.parse::<Subnet>().unwrap();
        assert!(net("10.0.0.0/8").overlaps(&net("10.9.0.0/16")));
        assert!(net("10.9.0.0/16").overlaps(&net("10.0.0.0/8")));
        assert!(!net("10.9.0.0/16").overlaps(&net("10.10.0.0/16")));
        assert_eq!(net("10.0.0.252/30").slots(), 1);
        assert_eq!(net("10.0.0.0/29").slots(), 2);
    }

    #[test]
    fn a_private_service_names_its_port() {
        let allow: AllowPrivate = "tcp/443@10.1.2.3".parse().unwrap();
        assert_eq!(allow.network.to_string(), "10.1.2.3/32");
        assert_eq!(allow.service.unwrap().port, 443);
    }
}

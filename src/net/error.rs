//! What can be wrong with the host's network, each with its remedy.

use std::io;
use std::path::PathBuf;

use super::spec::Subnet;

/// A problem of the host, in the operator's words.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("cannot use {}; hint: it must be a folder of root, mode 0700, and no symbolic link", path.display())]
    RunDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot lock {}", path.display())]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "group_name {name:?} is in use by another process of this host; hint: give each [[runners]] its own group_name, or leave it out"
    )]
    GroupTaken { name: String },
    #[error("fleetingd0 is in use by another process that builds")]
    BuildSlotTaken,
    #[error("cannot open /dev/net/tun; hint: modprobe tun, and run as root")]
    OpenTun {
        #[source]
        source: io::Error,
    },
    #[error("cannot create the TAP {name}")]
    CreateTap {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot set {what} of {name}")]
    ConfigureTap {
        name: String,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("netlink failed to {act}")]
    Netlink {
        act: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "no free /30 in {subnet}: all {slots} are in use; hint: a wider vm_subnet, such as {wanted}"
    )]
    SubnetFull {
        subnet: Subnet,
        slots: u32,
        wanted: Subnet,
    },
    #[error(
        "vm_subnet {subnet} has no room for a build and a machine (a /30 each); hint: use {wanted}"
    )]
    SubnetTooSmall { subnet: Subnet, wanted: Subnet },
    #[error(
        "vm_subnet {subnet} overlaps the route {route} over {interface}; hint: choose a private range that the host does not use"
    )]
    SubnetOverlap {
        subnet: Subnet,
        route: String,
        interface: String,
    },
    #[error(
        "ip forwarding is off; hint: echo net.ipv4.ip_forward=1 > /etc/sysctl.d/60-fleetingd.conf && sysctl -p /etc/sysctl.d/60-fleetingd.conf"
    )]
    ForwardingOff,
    #[error("no default route; hint: name the uplink in egress_interface")]
    NoDefaultRoute,
    #[error("egress_interface {name:?} does not exist; hint: this host has {present}")]
    NoInterface { name: String, present: String },
    #[error(
        "no resolver in {} that a machine could reach; hint: set vm_dns = [\"9.9.9.9\"]", path.display()
    )]
    NoResolver { path: PathBuf },
    #[error("cannot run nft; hint: apt-get install nftables")]
    NftMissing {
        #[source]
        source: io::Error,
    },
    #[error("nft refused to {act}: {stderr}")]
    Nft { act: &'static str, stderr: String },
}

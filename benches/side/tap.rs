//! The host's end of a guest's card.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

pub const TAP: &str = "fltdbench";
/// Of the network for benchmarks (RFC 2544).
pub const HOST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
pub const PREFIX: u8 = 30;

/// A persistent TAP with an address, so that every VMM opens the same; gone when dropped.
pub struct Tap;

impl Tap {
    pub fn create() -> anyhow::Result<Self> {
        // One that a killed run left behind.
        let _absent = ip(&format!("link delete {TAP}"));
        ip(&format!("tuntap add {TAP} mode tap vnet_hdr"))?;
        let tap = Self;
        ip(&format!("address add {HOST}/{PREFIX} dev {TAP}"))?;
        ip(&format!("link set {TAP} up"))?;
        Ok(tap)
    }

    /// Its address, which the guest is told.
    pub fn mac(&self) -> anyhow::Result<[u8; 6]> {
        let text = std::fs::read_to_string(format!("/sys/class/net/{TAP}/address"))?;
        let bytes: Result<Vec<u8>, _> = text
            .trim()
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16))
            .collect();
        bytes?.try_into().ok().context("not six bytes")
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _gone = ip(&format!("link delete {TAP}"));
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .stderr(Stdio::null())
        .status()
        .context("cannot run ip")?;
    ensure!(status.success(), "ip {arguments}: {status}");
    Ok(())
}

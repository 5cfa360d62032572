//! nftables: one readable template, one transaction, tables of our own.
//!
//! What a TAP needs is added when its slot opens, not when a machine starts. The whole text can
//! be made again from the slots known, so a ruleset that somebody flushed is put back as it was.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::locks::RunDir;
use super::spec::{AllowHost, NetSpec, Subnet};
use super::{NetError, Slot, Uplink};

const TEMPLATE: &str = include_str!("../../templates/nftables.tpl");
/// Private, shared and special ranges (RFC 1918, 6598, 5735, 2544); not the documentation ones.
const PRIVATE: [&str; 9] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/3",
];

/// The tables of one process.
#[derive(Debug)]
pub struct Rules {
    table: String,
    base: String,
    /// What each open TAP may send, by interface name.
    taps: BTreeMap<String, Ingress>,
    /// TAPs that have a counter in dropnottap; it outlives their slots.
    counted: Vec<String>,
}

#[derive(Debug, Clone)]
struct Ingress {
    mac: [u8; 6],
    address: std::net::Ipv4Addr,
}

impl Rules {
    /// Makes the tables of process number `number`, in place of what has that name.
    pub async fn apply(
        spec: &NetSpec,
        uplink: &Uplink,
        number: u32,
        lan: Vec<Subnet>,
    ) -> Result<Self, NetError> {
        let table = format!("fleetingd_{number}");
        let rules = Self {
            base: render(spec, uplink, &table, &lan),
            table,
            taps: BTreeMap::new(),
            counted: Vec::new(),
        };
        nft("apply the rules", &rules.whole()).await?;
        Ok(rules)
    }

    /// Lets a TAP's machine send as itself, and nothing else.
    pub async fn add_slot(&mut self, slot: &Slot) -> Result<(), NetError> {
        let tap = slot.name();
        let ingress = Ingress {
            mac: slot.guest_mac(),
            address: slot.guest_address(),
        };
        let mut text = ingress_chain(&self.table, &tap, &ingress);
        let _infallible = writeln!(text, "add element inet {} taps {{ \"{tap}\" }}", self.table);
        if !self.counted.contains(&tap) {
            text.push_str(&counter(&self.table, &tap));
        }
        nft("add a machine's rules", &text).await?;
        if !self.counted.contains(&tap) {
            self.counted.push(tap.clone());
        }
        self.taps.insert(tap, ingress);
        Ok(())
    }

    /// Takes a closed TAP out of the set; its counter stays.
    pub async fn remove_slot(&mut self, slot: &Slot) -> Result<(), NetError> {
        let tap = slot.name();
        self.taps.remove(&tap);
        let table = &self.table;
        // Adding the chain first makes its deletion right also when the kernel has removed it
        // together with its device.
        let text = format!(
            "delete element inet {table} taps {{ \"{tap}\" }}\nadd chain netdev {table} {tap}\ndelete chain netdev {table} {tap}\n"
        );
        nft("remove a machine's rules", &text).await
    }

    /// Puts everything back if the tables are gone; true if they were.
    pub async fn ensure(&mut self) -> Result<bool, NetError> {
        let list = list_tables().await?;
        let line = format!("table inet {}", self.table);
        if list.lines().any(|l| l.trim() == line) {
            return Ok(false);
        }
        nft("put the rules back", &self.whole()).await?;
        Ok(true)
    }

    /// Packets dropped so far, by chain; those of the TAPs' own chains together as `ingress`, which
    /// loses what a TAP had counted when its slot closes.
    pub fn drops(&self) -> impl Future<Output = BTreeMap<String, u64>> + Send + use<> {
        let table = self.table.clone();
        async move {
            let mut text = String::new();
            for family in ["inet", "netdev"] {
                let output = Command::new("nft")
                    .args(["list", "table", family, &table])
                    .stdin(Stdio::null())
                    .output()
                    .await;
                if let Ok(output) = output {
                    text.push_str(&String::from_utf8_lossy(&output.stdout));
                }
            }
            dropped(&text)
        }
    }

    /// Removes the tables.
    pub async fn remove(&mut self) -> Result<(), NetError> {
        nft("remove the tables", &removal(&self.table)).await
    }

    fn whole(&self) -> String {
        let mut text = removal(&self.table);
        text.push_str(&self.base);
        for (tap, ingress) in &self.taps {
            text.push_str(&ingress_chain(&self.table, tap, ingress));
            let _infallible =
                writeln!(text, "add element inet {} taps {{ \"{tap}\" }}", self.table);
        }
        for tap in &self.counted {
            text.push_str(&counter(&self.table, tap));
        }
        text
    }
}

/// Adding before deleting makes deletion right whether or not the table is there.
fn removal(table: &str) -> String {
    format!(
        "add table inet {table}\ndelete table inet {table}\nadd table netdev {table}\ndelete table netdev {table}\n"
    )
}

fn render(spec: &NetSpec, uplink: &Uplink, table: &str, lan: &[Subnet]) -> String {
    let mut private: Vec<String> = PRIVATE.iter().map(|range| (*range).to_owned()).collect();
    private.extend(lan.iter().map(Subnet::to_string));
    let mut allowed = String::new();
    for resolver in &uplink.dns {
        for protocol in ["udp", "tcp"] {
            let _infallible = writeln!(
                allowed,
                "\t\tip daddr {resolver} {protocol} dport 53 jump dropnottap"
            );
        }
    }
    for allow in &spec.allow_private {
        let service = allow.service.as_ref().map(service).unwrap_or_default();
        let _infallible = writeln!(
            allowed,
            "\t\tip daddr {} {service}jump dropnottap",
            allow.network
        );
    }
    let ports: String = spec
        .allow_host
        .iter()
        .map(|allow| format!("\t\t{}accept\n", service(allow)))
        .collect();
    TEMPLATE
        .replace("{{table}}", table)
        .replace("{{private}}", &private.join(", "))
        .replace("{{allow_host}}", ports.trim())
        .replace("{{allow_private}}", allowed.trim())
        .replace("{{subnet}}", &spec.subnet.to_string())
}

fn service(allow: &AllowHost) -> String {
    format!("{} dport {} ", allow.protocol, allow.port)
}

fn counter(table: &str, tap: &str) -> String {
    format!("add rule inet {table} dropnottap iifname \"{tap}\" counter accept\n")
}

/// Anti-spoofing at the earliest hook: a machine sends IPv4 and ARP as itself; everything else
/// (IPv6 and its router advertisements, VLAN tags, other MACs) ends here, counted.
fn ingress_chain(table: &str, tap: &str, ingress: &Ingress) -> String {
    let mac: Vec<String> = ingress.mac.iter().map(|b| format!("{b:02x}")).collect();
    let mac = mac.join(":");
    let address = ingress.address;
    format!(
        "add chain netdev {table} {tap} {{ type filter hook ingress device \"{tap}\" priority -150; policy accept; }}\n\
         flush chain netdev {table} {tap}\n\
         add rule netdev {table} {tap} ether saddr {mac} ether type ip ip saddr {address} udp sport 67 counter drop\n\
         add rule netdev {table} {tap} ether saddr {mac} ether type ip ip saddr {address} accept\n\
         add rule netdev {table} {tap} ether saddr {mac} ether type arp arp saddr ether {mac} arp saddr ip {address} accept\n\
         add rule netdev {table} {tap} counter drop\n"
    )
}

/// Removes those of the listed tables whose process is gone: whose number nobody holds.
pub async fn remove_orphans(run: &RunDir, tables: &str, own: u32) -> Result<(), NetError> {
    for line in tables.lines() {
        let number = line
            .trim()
            .strip_prefix("table inet fleetingd_")
            .and_then(|n| n.parse::<u32>().ok());
        let Some(number) = number.filter(|n| *n != own) else {
            continue;
        };
        // Held while the table goes, so that no new process takes the number meanwhile.
        if let Some(_lock) = run.try_lock(&format!("table.{number}"))? {
            nft(
                "remove the tables of a process that is gone",
                &removal(&format!("fleetingd_{number}")),
            )
            .await?;
        }
    }
    Ok(())
}

/// Sums up `counter packets N bytes M drop` in a listing of our tables.
fn dropped(listing: &str) -> BTreeMap<String, u64> {
    let mut drops = BTreeMap::new();
    let mut chain = String::new();
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ") {
            let name = name.trim_end_matches(" {");
            let ours = name.starts_with("fleetingd");
            chain = if ours { "ingress" } else { name }.to_owned();
        } else if line.ends_with(" drop")
            && let Some((_match, counted)) = line.rsplit_once("counter packets ")
        {
            let packets = counted
                .split(' ')
                .next()
                .and_then(|n| n.parse::<u64>().ok());
            *drops.entry(chain.clone()).or_default() += packets.unwrap_or(0);
        }
    }
    drops
}

/// The names of all tables, one a line; also the proof that nft is there and may be used.
pub async fn list_tables() -> Result<String, NetError> {
    let output = Command::new("nft")
        .args(["list", "tables"])
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|source| NetError::NftMissing { source })?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(NetError::Nft {
            act: "list tables",
            stderr: first_lines(&output.stderr),
        })
    }
}

async fn nft(act: &'static str, text: &str) -> Result<(), NetError> {
    let run = async {
        let mut child = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(text.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = run
        .await
        .map_err(|source: io::Error| NetError::NftMissing { source })?;
    if output.status.success() {
        Ok(())
    } else {
        Err(NetError::Nft {
            act,
            stderr: first_lines(&output.stderr),
        })
    }
}

fn first_lines(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().take(4).map(str::trim).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_summed_up_by_chain_and_the_taps_together() {
        let listing = "table inet fleetingd_3 {
\tchain to_host {
\t\tct state established,related accept
\t\ttcp dport 5000 accept
\t\tcounter packets 7 bytes 420 drop
\t}
\tchain from_guest {
\t\toifname \"fleetingd*\" counter packets 2 bytes 100 drop
\t\tmeta nfproto ipv6 counter packets 1 bytes 40 drop
\t}
\tchain dropnottap {
\t\tiifname \"fleetingd1\" counter packets 99 bytes 1 accept
\t}
}
table netdev fleetingd_3 {
\tchain fleetingd1 {
\t\ttype filter hook ingress device \"fleetingd1\" priority -150; policy accept;
\t\tcounter packets 4 bytes 9 drop
\t}
\tchain fleetingd2 {
\t\tcounter packets 5 bytes 9 drop
\t}
}";
        let drops = dropped(listing);
        let expected = [("from_guest", 3), ("ingress", 9), ("to_host", 7)];
        let expected = expected.map(|(chain, packets)| (chain.to_owned(), packets));
        assert_eq!(drops, BTreeMap::from(expected));
    }
}

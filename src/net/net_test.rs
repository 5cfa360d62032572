//! The rules judged by packets: frames are written into a TAP as a guest would, and the counters
//! of the kernel say what became of them. Each test has a network namespace of its own.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Instant;

use super::*;
use crate::testing::{eventually, in_network_namespace, run};

fn spec() -> NetSpec {
    NetSpec {
        subnet: "172.16.120.".parse().unwrap(),
        egress_interface: None,
        dns: vec![Ipv4Addr::new(10, 0, 0, 53)],
        allow_private: vec!["tcp/443@10.1.0.0/16".parse().unwrap()],
        allow_host: vec!["tcp/5000".parse().unwrap()],
    }
}

/// A host with an uplink that swallows everything.
fn uplink() {
    run("ip link add up0 type veth peer name sink0");
    run("ip addr add 192.0.2.2/24 dev up0");
    run("ip link set up0 up");
    run("ip link set sink0 up");
    run("ip route add default via 192.0.2.1 dev up0");
    run("ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:09 dev up0 nud permanent");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
}

fn on_a_host<F, Fut>(body: F)
where
    F: FnOnce(std::path::PathBuf) -> Fut + Send + 'static,
    Fut: Future<Output = ()>,
{
    in_network_namespace(move || {
        uplink();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(body(dir.path().join("run")));
    });
}

async fn open(run_dir: &Path) -> Net {
    Net::open(spec(), run_dir).await.unwrap()
}

struct Packet {
    mac: [u8; 6],
    source: Ipv4Addr,
    target: Ipv4Addr,
    tcp: bool,
    port: u16,
}

impl Packet {
    fn honest(slot: &Slot, target: [u8; 4], tcp: bool, port: u16) -> Self {
        Self {
            mac: slot.guest_mac(),
            source: slot.guest_address(),
            target: Ipv4Addr::from(target),
            tcp,
            port,
        }
    }

    /// vnet header, Ethernet, IPv4, and a TCP SYN or an empty datagram.
    fn frame(&self, host_mac: [u8; 6]) -> Vec<u8> {
        let l4_len: u16 = if self.tcp { 20 } else { 8 };
        let mut ip = vec![0x45, 0];
        ip.extend((20 + l4_len).to_be_bytes());
        ip.extend([0, 1, 0, 0, 64, if self.tcp { 6 } else { 17 }, 0, 0]);
        ip.extend(self.source.octets());
        ip.extend(self.target.octets());
        let sum: u32 = ip
            .chunks(2)
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])))
            .sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut frame = vec![0; 12];
        frame.extend(host_mac);
        frame.extend(self.mac);
        frame.extend([0x08, 0x00]);
        frame.extend(ip);
        frame.extend(40_000_u16.to_be_bytes());
        frame.extend(self.port.to_be_bytes());
        if self.tcp {
            frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
        } else {
            frame.extend([0, 8, 0, 0]);
        }
        frame
    }
}

fn send(slot: &Slot, packet: &Packet) {
    let mut tap = File::from(slot.tap().unwrap());
    let frame = packet.frame(slot.host_mac());
    assert_eq!(tap.write(&frame).unwrap(), frame.len());
}

/// Packets counted by the rules of `chain` in the first process's table that contain `rule`.
fn counted(family: &str, chain: &str, rule: &str) -> u64 {
    counted_in("fleetingd_0", family, chain, rule)
}

fn counted_in(table: &str, family: &str, chain: &str, rule: &str) -> u64 {
    let text = run(&format!("nft list chain {family} {table} {chain}"));
    text.lines()
        .filter(|line| line.contains(rule))
        .filter_map(|line| line.split("counter packets ").nth(1))
        .filter_map(|rest| rest.split_whitespace().next())
        .map(|n| n.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn a_guest_reaches_the_internet_and_nothing_private() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        let out = || counted("inet", "dropnottap", &slot.name());
        send(&slot, &Packet::honest(&slot, [8, 8, 8, 8], true, 443));
        assert_eq!(out(), 1, "the internet is open");
        for private in [
            [10, 0, 0, 1],
            [192, 168, 1, 1],
            [100, 64, 0, 1],
            [192, 0, 2, 77],
        ] {
            send(&slot, &Packet::honest(&slot, private, true, 443));
        }
        assert_eq!(out(), 1, "private ranges and the LAN are closed");
        assert_eq!(counted("inet", "refuse_private", "drop"), 4);
        send(
            &slot,
            &Packet::honest(&slot, [169, 254, 169, 254], true, 80),
        );
        assert_eq!(counted("inet", "from_guest", "@metadata"), 1);
        send(&slot, &Packet::honest(&slot, [10, 1, 2, 3], true, 443));
        send(&slot, &Packet::honest(&slot, [10, 0, 0, 53], false, 53));
        assert_eq!(out(), 3, "what the config names is open");
        send(&slot, &Packet::honest(&slot, [10, 1, 2, 3], true, 22));
        send(&slot, &Packet::honest(&slot, [10, 0, 0, 53], true, 443));
        assert_eq!(out(), 3, "and only that service");
    });
}

#[test]
fn the_hosts_own_services_are_closed_but_for_named_ports() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        let host = slot.host_address().octets();
        for target in [host, [192, 0, 2, 2]] {
            send(&slot, &Packet::honest(&slot, target, true, 22));
        }
        assert_eq!(counted("inet", "to_host", "drop"), 2);
        send(&slot, &Packet::honest(&slot, host, true, 5000));
        assert_eq!(counted("inet", "to_host", "drop"), 2);
    });
}

#[test]
fn guests_cannot_reach_each_other_nor_those_of_another_process() {
    on_a_host(async |run_dir| {
        let mut one = open(&run_dir).await;
        let mut two = open(&run_dir).await;
        assert_ne!(one.number(), two.number());
        let a = one.acquire(SlotRole::Worker).await.unwrap();
        let b = one.acquire(SlotRole::Worker).await.unwrap();
        let c = two.acquire(SlotRole::Worker).await.unwrap();
        assert_ne!(a.name(), c.name());
        assert_ne!(a.guest_address(), c.guest_address());
        for other in [&b, &c] {
            send(
                &a,
                &Packet::honest(&a, other.guest_address().octets(), true, 22),
            );
        }
        // Both processes drop what goes between them; whose chain comes first is the kernel's.
        let sent = counted("inet", "from_guest", "oifname");
        let refused = counted_in("fleetingd_1", "inet", "to_guest", "drop");
        assert_eq!(sent + refused, 2);
        assert_eq!(counted("inet", "dropnottap", &a.name()), 0);
    });
}

#[test]
fn forged_sources_end_at_the_first_hook() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        let honest = || Packet::honest(&slot, [8, 8, 8, 8], true, 443);
        let mac = Packet {
            mac: [2, 0, 0, 0, 0, 1],
            ..honest()
        };
        let address = Packet {
            source: Ipv4Addr::new(172, 16, 120, 200),
            ..honest()
        };
        send(&slot, &mac);
        send(&slot, &address);
        let mut v6 = honest().frame(slot.host_mac());
        v6[24..26].copy_from_slice(&[0x86, 0xdd]);
        let mut vlan = honest().frame(slot.host_mac());
        vlan.splice(24..24, [0x81, 0x00, 0x00, 0x05]);
        let mut tap = File::from(slot.tap().unwrap());
        tap.write_all(&v6).unwrap();
        tap.write_all(&vlan).unwrap();
        let chain = slot.name();
        assert_eq!(counted("netdev", &chain, "counter"), 4);
        let mut dhcp = honest();
        dhcp.tcp = false;
        let mut frame = dhcp.frame(slot.host_mac());
        frame[12 + 14 + 20..12 + 14 + 22].copy_from_slice(&67_u16.to_be_bytes());
        tap.write_all(&frame).unwrap();
        assert_eq!(counted("netdev", &chain, "udp sport 67"), 1);
        assert_eq!(counted("inet", "dropnottap", &chain), 0);
        send(&slot, &honest());
        assert_eq!(counted("inet", "dropnottap", &chain), 1);
    });
}

#[test]
fn a_flushed_ruleset_is_put_back_whole() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        assert!(!net.ensure_rules().await.unwrap());
        run("nft flush ruleset");
        assert!(net.ensure_rules().await.unwrap());
        send(&slot, &Packet::honest(&slot, [10, 0, 0, 1], true, 443));
        send(&slot, &Packet::honest(&slot, [8, 8, 8, 8], true, 443));
        assert_eq!(counted("inet", "dropnottap", &slot.name()), 1);
    });
}

#[test]
fn a_start_removes_only_tables_whose_process_is_gone() {
    on_a_host(async |run_dir| {
        let living = open(&run_dir).await;
        run("nft add table inet fleetingd_7");
        run("nft add table netdev fleetingd_7");
        run("nft add table inet somebody_else");
        let second = open(&run_dir).await;
        let tables = run("nft list tables");
        assert!(!tables.contains("fleetingd_7"), "{tables}");
        assert!(tables.contains("inet fleetingd_0") && tables.contains("somebody_else"));
        assert_eq!((living.number(), second.number()), (0, 1));
        assert!(second.close().await.is_empty());
        assert!(!run("nft list tables").contains("fleetingd_1"));
    });
}

#[test]
fn slots_are_reused_and_given_up_after_a_minute() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        let name = slot.name();
        let now = Instant::now();
        net.release(slot, now);
        let again = net.acquire(SlotRole::Worker).await.unwrap();
        assert_eq!(again.name(), name);
        net.release(again, now);
        let later = now + std::time::Duration::from_secs(IDLE_SLOT_SECONDS + 1);
        net.retire_idle(later).await.unwrap();
        let shown = run("ip -br link");
        assert!(!shown.contains("fleetingd"), "{shown}");
        let counters = run("nft list chain inet fleetingd_0 dropnottap");
        assert!(counters.contains(&name), "counters stay: {counters}");
        let third = net.acquire(SlotRole::Worker).await.unwrap();
        assert_eq!(third.name(), name);
    });
}

#[test]
fn a_full_subnet_names_the_one_that_would_do() {
    on_a_host(async |run_dir| {
        let small = NetSpec {
            subnet: "172.16.120.0/29".parse().unwrap(),
            ..spec()
        };
        let mut net = Net::open(small, &run_dir).await.unwrap();
        assert_eq!(net.max_slots(), 1);
        let _build = net.acquire(SlotRole::Build).await.unwrap();
        let _worker = net.acquire(SlotRole::Worker).await.unwrap();
        let error = net.acquire(SlotRole::Worker).await.unwrap_err().to_string();
        assert!(error.contains("172.16.120.0/28"), "{error}");
    });
}

#[test]
fn every_problem_of_the_host_is_reported_at_once() {
    on_a_host(async |run_dir| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        let bad = NetSpec {
            subnet: "192.0.2.0/24".parse().unwrap(),
            egress_interface: Some("nope0".to_owned()),
            ..spec()
        };
        let problems = Net::open(bad, &run_dir).await.unwrap_err();
        let text: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let text = text.join("\n");
        for part in [
            "ip forwarding is off",
            "nope0",
            "up0",
            "overlaps the route 192.0.2.0/24",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    });
}

#[test]
fn a_killed_process_leaves_no_tap_and_no_lock() {
    on_a_host(async |run_dir| {
        let mut net = open(&run_dir).await;
        let slot = net.acquire(SlotRole::Worker).await.unwrap();
        let name = slot.name();
        drop(slot);
        drop(net);
        // A child that another test starts just now holds copies of our descriptors until its
        // exec; a killed process has no such children.
        eventually("the TAP is gone", || !run("ip -br link").contains(&name));
        let mut next = open(&run_dir).await;
        assert_eq!(next.number(), 0);
        assert_eq!(next.acquire(SlotRole::Worker).await.unwrap().name(), name);
    });
}

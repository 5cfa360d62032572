//! Against the real kernel, in a network namespace of the test's own thread.

use super::*;
use crate::testing::{in_network_namespace, run};

fn identity() -> Identity {
    Identity {
        address: Ipv4Addr::new(172, 16, 120, 6),
        prefix_len: 30,
        gateway: Ipv4Addr::new(172, 16, 120, 5),
        gateway_mac: [2, 0, 0, 0, 0, 1],
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1400,
        dns: vec![],
        hostname: String::new(),
        machine_id: String::new(),
        username: String::new(),
        authorized_key: None,
        ssh_host_key: String::new(),
        ssh_host_key_name: String::new(),
        entropy: vec![],
        wall_clock_ns: 0,
        units: vec![],
    }
}

fn veth() -> Interface {
    run("ip link add g0 type veth peer name h0");
    let shown = run("ip -o link show g0");
    let index = shown.split(':').next().unwrap().trim().parse().unwrap();
    Interface {
        index,
        name: "g0".to_owned(),
    }
}

#[test]
fn identity_replaces_whatever_the_card_had() {
    in_network_namespace(|| {
        let card = veth();
        run("ip addr add 10.9.9.9/24 dev g0");
        configure(&card, &identity()).unwrap();
        configure(&card, &identity()).unwrap();
        let address = run("ip -4 addr show g0");
        assert!(
            address.contains("172.16.120.6/30") && !address.contains("10.9.9.9"),
            "{address}"
        );
        assert!(address.contains("mtu 1400"), "{address}");
        assert!(run("ip link show g0").contains("02:00:00:00:00:02"));
        assert!(run("ip route").contains("default via 172.16.120.5 dev g0"));
        let neighbour = run("ip neigh show dev g0");
        assert!(
            neighbour.contains("172.16.120.5 lladdr 02:00:00:00:00:01 PERMANENT"),
            "{neighbour}"
        );
    });
}

#[test]
fn addresses_of_other_cards_are_left_alone() {
    in_network_namespace(|| {
        let card = veth();
        run("ip addr add 10.8.8.8/24 dev h0");
        configure(&card, &identity()).unwrap();
        assert!(run("ip -4 addr show h0").contains("10.8.8.8/24"));
    });
}

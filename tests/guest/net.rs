//! The network card on both back ends: bytes arrive whole both ways, offloads are agreed on.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use fleetingd::net::open_tap;
use fleetingd::vmm::NetSpec;

use super::{boot, files, sha256};

const BYTES: usize = 8 << 20;
/// CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF (virtio 1.2, 5.1.3).
const OFFLOADS: [usize; 7] = [0, 1, 7, 8, 11, 12, 15];

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}: needs root");
}

/// Bytes per second from the guest and to it.
fn both_ways(number: u8, vhost: bool) -> Option<(f64, f64)> {
    let files = files()?;
    let tap = format!("gt{number}");
    let device = open_tap(&tap).unwrap();
    ip(&format!("address add 10.77.{number}.1/24 dev {tap}"));
    ip(&format!("link set {tap} up"));
    let host = format!("10.77.{number}.1");
    let script = format!(
        "
ip link set eth0 up; ip addr add 10.77.{number}.2/24 dev eth0
dd if=/dev/urandom of=/tmp/u bs=1M count=8 2>/dev/null
echo UP $(sha256sum </tmp/u | cut -c1-64)
nc {host} 5001 </tmp/u || exit 1
nc {host} 5002 </dev/null >/tmp/d || exit 2
echo DOWN $(sha256sum </tmp/d | cut -c1-64)
echo FEATURES $(cat /sys/class/net/eth0/device/features)
echo LOWER; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do :; done
echo RAISE; while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do :; done
"
    );
    let up = TcpListener::bind((host.as_str(), 5001)).unwrap();
    let down = TcpListener::bind((host.as_str(), 5002)).unwrap();
    let guest = boot(files, &script, |spec| {
        spec.net = Some(NetSpec {
            tap: device.into(),
            mac: [0x52, 0x54, 0, 0, 0, number],
            mtu: 1500,
            link_up: true,
            vhost,
        });
    });
    guest.wait_for("UP ");
    let mut received = Vec::new();
    let (mut stream, _) = up.accept().unwrap();
    let start = Instant::now();
    stream.read_to_end(&mut received).unwrap();
    let from_guest = start.elapsed();
    drop(stream);
    assert_eq!(received.len(), BYTES);
    assert_eq!(guest.value("UP "), sha256(&received));

    let (mut stream, _) = down.accept().unwrap();
    let start = Instant::now();
    stream.write_all(&received).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    // The guest closes once it has all.
    stream.read_to_end(&mut Vec::new()).unwrap();
    let to_guest = start.elapsed();
    guest.wait_for("LOWER");
    assert_eq!(guest.value("DOWN "), sha256(&received));
    guest.handle.set_link(false).unwrap();
    guest.wait_for("RAISE");
    guest.handle.set_link(true).unwrap();
    guest.succeed();

    let features = guest.value("FEATURES ");
    for bit in OFFLOADS {
        assert_eq!(
            features.as_bytes()[bit],
            b'1',
            "feature {bit} of {features}"
        );
    }
    let speed = |took: std::time::Duration| 8.0 / took.as_secs_f64();
    Some((speed(from_guest), speed(to_guest)))
}

#[test]
fn tcp_is_whole_both_ways_on_both_back_ends() {
    let Some(user) = both_ways(1, false) else {
        return;
    };
    let mut out = std::io::stderr();
    writeln!(
        out,
        "user space: {:.1} MiB/s from the guest, {:.1} to it",
        user.0, user.1
    )
    .unwrap();
    if !Path::new("/dev/vhost-net").exists() {
        writeln!(out, "SKIP: vhost-net: no /dev/vhost-net here").unwrap();
        return;
    }
    let Some(vhost) = both_ways(2, true) else {
        return;
    };
    let ratio = (vhost.0 / user.0, vhost.1 / user.1);
    writeln!(
        out,
        "vhost-net: {:.1} MiB/s from the guest, {:.1} to it; {:.2} and {:.2} times user space",
        vhost.0, vhost.1, ratio.0, ratio.1
    )
    .unwrap();
}

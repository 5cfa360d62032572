//! The conversation about ports, without a queue.

use super::*;

fn owed(ports: &mut Ports) -> Vec<(usize, ToDriver)> {
    let mut all = Vec::new();
    while let Some((port, message)) = ports.next() {
        ports.told(port, message);
        all.push((port, message));
    }
    all
}

const READY: FromDriver = FromDriver::DeviceReady { ready: true };

fn port_ready(port: u32) -> FromDriver {
    FromDriver::PortReady { port, ready: true }
}

#[test]
fn a_driver_learns_of_the_ports_then_of_what_they_are() {
    let mut ports = Ports::new(&[true, true]);
    assert_eq!(owed(&mut ports), []);
    ports.hear(READY);
    assert_eq!(owed(&mut ports), [(0, ToDriver::Add), (1, ToDriver::Add)]);
    ports.hear(port_ready(0));
    assert_eq!(
        owed(&mut ports),
        [
            (0, ToDriver::Console),
            (0, ToDriver::Resize),
            (0, ToDriver::Open(true))
        ]
    );
    ports.hear(port_ready(1));
    assert_eq!(
        owed(&mut ports),
        [(1, ToDriver::Name), (1, ToDriver::Open(true))]
    );
}

#[test]
fn what_is_owed_does_not_grow_with_how_often_it_is_asked_for() {
    let mut ports = Ports::new(&[true, true]);
    for _ in 0..10_000 {
        ports.hear(READY);
        ports.hear(port_ready(0));
        ports.hear(port_ready(1));
        ports.resized();
    }
    assert_eq!(owed(&mut ports).len(), 7);
}

#[test]
fn ports_that_do_not_exist_are_ignored() {
    let mut ports = Ports::new(&[true, true]);
    for port in [2, 3, 0x7fff_ffff, u32::MAX] {
        ports.hear(port_ready(port));
        ports.hear(FromDriver::PortOpen { port, open: true });
    }
    ports.hear(FromDriver::Unknown { event: 0xffff });
    assert_eq!(owed(&mut ports), []);
    assert!(!ports.guest_open(0) && !ports.guest_open(1));
}

#[test]
fn a_port_the_driver_could_not_add_gets_no_messages() {
    let mut ports = Ports::new(&[true]);
    ports.hear(READY);
    owed(&mut ports);
    ports.hear(FromDriver::PortReady {
        port: 0,
        ready: false,
    });
    ports.resized();
    assert_eq!(owed(&mut ports), []);
}

#[test]
fn only_the_last_state_of_the_hosts_end_is_told() {
    let mut ports = Ports::new(&[true, true]);
    ports.hear(port_ready(1));
    owed(&mut ports);
    ports.get_mut(AGENT).unwrap().host_open = false;
    ports.get_mut(AGENT).unwrap().host_open = true;
    assert_eq!(owed(&mut ports), []);
    ports.get_mut(AGENT).unwrap().host_open = false;
    assert_eq!(owed(&mut ports), [(1, ToDriver::Open(false))]);
}

#[test]
fn a_clone_whose_host_end_differs_is_told_so() {
    let mut ports = Ports::new(&[true, false]);
    ports.hear(port_ready(1));
    owed(&mut ports);
    let saved = ports.save();
    let mut clone = Ports::new(&[true, true]);
    assert!(clone.restore(saved));
    assert_eq!(owed(&mut clone), [(1, ToDriver::Open(true))]);
}

#[test]
fn states_of_another_number_of_ports_are_refused() {
    let saved = Ports::new(&[true]).save();
    assert!(!Ports::new(&[true, true]).restore(saved));
}

#[test]
fn messages_have_the_bytes_of_the_standard() {
    use super::super::control::Size;
    let size = Size {
        columns: 0x0150,
        rows: 0x18,
    };
    let bytes = |message: ToDriver| message.bytes(1, "name", size);
    assert_eq!(bytes(ToDriver::Add), [1, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(bytes(ToDriver::Console), [1, 0, 0, 0, 4, 0, 1, 0]);
    assert_eq!(
        bytes(ToDriver::Resize),
        [1, 0, 0, 0, 5, 0, 0, 0, 0x50, 1, 0x18, 0]
    );
    assert_eq!(bytes(ToDriver::Open(true)), [1, 0, 0, 0, 6, 0, 1, 0]);
    assert_eq!(bytes(ToDriver::Open(false)), [1, 0, 0, 0, 6, 0, 0, 0]);
    assert_eq!(bytes(ToDriver::Name), *b"\x01\0\0\0\x07\0\x01\0name");
    assert_eq!(
        FromDriver::parse([1, 0, 0, 0, 6, 0, 1, 0]),
        FromDriver::PortOpen {
            port: 1,
            open: true
        }
    );
    assert_eq!(FromDriver::parse([0, 0, 0, 0, 0, 0, 1, 0]), READY);
}

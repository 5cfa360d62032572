//! A guest played over a socket pair: honest, hostile, silent.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;

use super::*;

fn identity() -> Identity {
    Identity {
        address: Ipv4Addr::new(172, 16, 120, 6),
        prefix_len: 30,
        gateway: Ipv4Addr::new(172, 16, 120, 5),
        gateway_mac: [2, 0, 0, 0, 0, 1],
        mac: [2, 0, 0, 0, 0, 2],
        mtu: 1500,
        dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
        hostname: "fleetingd0-aaaaaaaaaa".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        username: "ubuntu".into(),
        authorized_key: Some("ssh-ed25519 AAAA".into()),
        ssh_host_key: "key".into(),
        ssh_host_key_name: "ssh_host_ed25519_key".into(),
        entropy: vec![7; 64],
        wall_clock_ns: 1,
        units: vec![],
    }
}

fn say(guest: &mut UnixStream, message: &ToHost) {
    let body = serde_json::to_vec(message).unwrap();
    guest.write_all(&proto::frame(&body).unwrap()).unwrap();
}

fn hear(guest: &mut UnixStream) -> ToGuest {
    let mut prefix = [0; 4];
    guest.read_exact(&mut prefix).unwrap();
    let mut body = vec![0; proto::body_len(prefix).unwrap()];
    guest.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn pair() -> (AgentLink, UnixStream) {
    let (host, guest) = UnixStream::pair().unwrap();
    (AgentLink::new(host).unwrap(), guest)
}

#[tokio::test]
async fn an_honest_guest_comes_up_and_takes_the_time() {
    let (mut link, mut guest) = pair();
    let player = std::thread::spawn(move || {
        say(&mut guest, &ToHost::Hello { protocol: PROTOCOL });
        let identify = hear(&mut guest);
        say(&mut guest, &ToHost::Applied);
        say(&mut guest, &ToHost::Ready(Ready::default()));
        (identify, hear(&mut guest))
    });
    link.hello().await.unwrap();
    link.identify(identity()).await.unwrap();
    assert_eq!(link.ready().await.unwrap(), Ready::default());
    link.set_clock(42).await.unwrap();
    let (identify, clock) = player.join().unwrap();
    assert_eq!(identify, ToGuest::Identify(Box::new(identity())));
    assert_eq!(clock, ToGuest::SetClock { wall_clock_ns: 42 });
}

#[tokio::test]
async fn another_protocol_is_refused_with_a_hint() {
    let (mut link, mut guest) = pair();
    say(&mut guest, &ToHost::Hello { protocol: 99 });
    let error = link.hello().await.unwrap_err().to_string();
    assert!(
        error.contains("protocol 99") && error.contains("hint:"),
        "{error}"
    );
}

#[tokio::test]
async fn a_length_beyond_the_limit_is_refused_without_reading_on() {
    let (mut link, mut guest) = pair();
    guest.write_all(&u32::MAX.to_le_bytes()).unwrap();
    assert!(matches!(link.hello().await, Err(AgentError::TooLong)));
}

#[tokio::test]
async fn garbage_order_and_silence_each_have_a_name() {
    let (mut link, mut guest) = pair();
    guest
        .write_all(&proto::frame(b"\xff\xfe{").unwrap())
        .unwrap();
    assert!(matches!(link.hello().await, Err(AgentError::Malformed(_))));
    say(&mut guest, &ToHost::Applied);
    assert!(matches!(
        link.hello().await,
        Err(AgentError::OutOfOrder { .. })
    ));
    drop(guest);
    assert!(matches!(link.hello().await, Err(AgentError::Closed { .. })));
}

#[tokio::test]
async fn a_guests_reason_cannot_forge_a_log_line() {
    let (mut link, mut guest) = pair();
    let reason = format!("no\n{}", "x".repeat(4096));
    say(&mut guest, &ToHost::Failed { reason });
    let AgentError::Failed { reason } = link.hello().await.unwrap_err() else {
        panic!("expected a failure");
    };
    assert!(reason.starts_with("no x") && reason.chars().count() == MAX_REASON_CHARS);
}

//! The world beyond the host: a network namespace behind a veth pair, with addresses of every kind
//! that matters and services on them.
//!
//! ```text
//!  machine ── TAP ── host ── e2e0 203.0.113.1 ── 203.0.113.2 e2e1 ── lo: WORLD, PRIVATE, METADATA
//! ```
//!
//! The host reaches these addresses by a gateway, as it does the internet; the outside answers to
//! whatever source it sees, so a frame that should not have come would be answered.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::host;

/// The outside's name.
pub const NAMESPACE: &str = "e2e-outside";
/// The host's interface towards it.
pub const LINK: &str = "e2e0";
/// The host's address on it, which masquerading gives to machines.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// A public address (TEST-NET-2: nobody else has it).
pub const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// Private and shared ranges, one address of each.
pub const PRIVATE: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 213, 77, 10),
    Ipv4Addr::new(192, 168, 213, 10),
    Ipv4Addr::new(172, 31, 213, 10),
    Ipv4Addr::new(100, 64, 213, 10),
];
/// Where clouds answer questions about the machine that asks.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Services of the outside.
pub const PORT: u16 = 4080;
pub const OTHER_PORT: u16 = 4083;
pub const METADATA_PORT: u16 = 80;
/// Services of the host.
pub const HOST_PORT: u16 = 4081;
pub const OTHER_HOST_PORT: u16 = 4082;
/// Every name has this one's address: [`WORLD`].
pub const NAME: &str = "machines.e2e.test";

/// How long a connection that works may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The outside, gone when dropped.
pub struct Outside {
    /// Connections that services accepted, of the outside and of the host.
    pub accepted: Accepted,
}

/// Whom a service accepted and under which address of its own.
#[derive(Clone, Default)]
pub struct Accepted(Arc<Mutex<Vec<(SocketAddr, SocketAddr)>>>);

impl Accepted {
    fn list(&self) -> MutexGuard<'_, Vec<(SocketAddr, SocketAddr)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was until now.
    pub fn clear(&self) {
        self.list().clear();
    }

    /// Who connected to this service.
    pub fn by(&self, service: SocketAddr) -> Vec<IpAddr> {
        let list = self.list();
        let peers = list.iter().filter(|(local, _peer)| *local == service);
        peers.map(|(_local, peer)| peer.ip()).collect()
    }
}

impl Outside {
    pub fn make() -> anyhow::Result<Self> {
        remove();
        let outside = Self {
            accepted: Accepted::default(),
        };
        for line in [
            format!("ip netns add {NAMESPACE}"),
            format!("ip link add {LINK} type veth peer name e2e1 netns {NAMESPACE}"),
            format!("ip address add {NEAR} peer {FAR}/32 dev {LINK}"),
            format!("ip link set {LINK} up"),
            format!("ip -n {NAMESPACE} link set lo up"),
            format!("ip -n {NAMESPACE} address add {FAR} peer {NEAR}/32 dev e2e1"),
            format!("ip -n {NAMESPACE} link set e2e1 up"),
            format!("ip -n {NAMESPACE} route add default via {NEAR}"),
        ] {
            host::run(&line)?;
        }
        for address in PRIVATE.iter().chain([&WORLD, &METADATA]) {
            host::run(&format!(
                "ip -n {NAMESPACE} address add {address}/32 dev lo"
            ))?;
            host::run(&format!("ip route add {address}/32 via {FAR}"))?;
        }
        for port in [PORT, OTHER_PORT, METADATA_PORT] {
            outside.serve(inside(NAMESPACE, move || listen(port))?);
        }
        for port in [HOST_PORT, OTHER_HOST_PORT] {
            outside.serve(listen(port)?);
        }
        let [resolver, ..] = PRIVATE;
        let names = inside(NAMESPACE, move || UdpSocket::bind((resolver, 53)))?;
        thread::spawn(move || answer_names(&names));
        Ok(outside)
    }

    /// Accepts for as long as this process lives and writes down whom; greets and echoes.
    fn serve(&self, listener: TcpListener) {
        let accepted = self.accepted.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) {
                    accepted.list().push((local, peer));
                }
                thread::spawn(move || greet_and_echo(stream));
            }
        });
    }

    /// Fails unless the host itself reaches these services: then a machine that does not was kept
    /// from it.
    pub fn answers(&self, services: &[SocketAddr]) -> anyhow::Result<()> {
        for service in services {
            greeted(service).with_context(|| format!("the host itself cannot reach {service}"))?;
        }
        Ok(())
    }

    /// Whether somebody outside can connect to an address of ours.
    pub fn reaches(&self, service: SocketAddr) -> anyhow::Result<bool> {
        match inside(NAMESPACE, move || {
            TcpStream::connect_timeout(&service, CONNECT)
        }) {
            Ok(_stream) => Ok(true),
            Err(e) => {
                let kept_away = [io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable];
                ensure!(kept_away.contains(&e.kind()), "{service} from outside: {e}");
                Ok(false)
            }
        }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        remove();
    }
}

fn remove() {
    // Sockets of ours may keep the namespace, so the link goes by itself.
    for line in [
        format!("ip link delete {LINK}"),
        format!("ip netns delete {NAMESPACE}"),
    ] {
        // It may not be there.
        let _absent = host::run(&line);
    }
}

fn greet_and_echo(mut stream: TcpStream) -> io::Result<u64> {
    stream.write_all(b"hello\n")?;
    io::copy(&mut stream.try_clone()?, &mut stream)
}

/// Connects and waits for the first byte: then the service has written down who came.
fn greeted(service: &SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(service, CONNECT)?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.read_exact(&mut [0])
}

fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
}

/// Runs `act` on a thread that has moved into a named network namespace; sockets stay there.
pub fn inside<T: Send + 'static>(
    namespace: &str,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let file = File::open(format!("/run/netns/{namespace}"))?;
    let thread = thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        act()
    });
    thread
        .join()
        .unwrap_or_else(|_panic| Err(io::Error::other("the thread panicked")))
}

/// Every name is [`WORLD`], in IPv4 only (RFC 1035, 4.1).
fn answer_names(socket: &UdpSocket) {
    const A: u16 = 1;
    let mut query = [0; 512];
    while let Ok((len, client)) = socket.recv_from(&mut query) {
        let Some(question) = query.get(12..len) else {
            continue;
        };
        let Some(name_len) = question.iter().position(|byte| *byte == 0) else {
            continue;
        };
        let Some(question) = question.get(..name_len + 5) else {
            continue;
        };
        let wants_a = question.get(name_len + 1..name_len + 3) == Some(&A.to_be_bytes());
        let mut answer = query.get(..2).unwrap_or_default().to_vec();
        // An answer, recursion available, no error; one question, no or one answer.
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(wants_a), 0, 0, 0, 0]);
        answer.extend(question);
        if wants_a {
            // The question's name, A, IN, a minute, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(WORLD.octets());
        }
        // A client that is gone asks again.
        let _gone = socket.send_to(&answer, client);
    }
}

//! The messages of the agent channel: JSON behind a four-byte little-endian length.
//!
//! Both ends are ours, but the guest is an attacker: the host reads at most [`MAX_MESSAGE`] bytes
//! a message and treats every field as data.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Counts incompatible changes of the messages; part of a generation's key, because the agent
/// inside an image must speak the number of the program outside.
pub const PROTOCOL: u32 = 1;

/// Whether this program can talk to an agent of that protocol, in an image of another version.
pub fn speaks(protocol: u32) -> bool {
    protocol == PROTOCOL
}

/// Longest message either side accepts, in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// The virtio-console port's name in the guest (`/dev/virtio-ports/<name>`).
pub const PORT_NAME: &str = "fleetingd.agent";

/// What the host tells the guest about itself. Nothing here depends on the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    /// The host's end of the link, for a permanent neighbour entry.
    pub gateway_mac: [u8; 6],
    pub mac: [u8; 6],
    pub mtu: u16,
    pub dns: Vec<Ipv4Addr>,
    pub hostname: String,
    /// 32 lower-case hexadecimal digits.
    pub machine_id: String,
    /// The login that `authorized_key` opens.
    pub username: String,
    /// One line in authorized_keys format; none with a static password.
    pub authorized_key: Option<String>,
    /// OpenSSH private key file of the machine, made by the host.
    pub ssh_host_key: String,
    /// Its file name under /etc/ssh, such as `ssh_host_ed25519_key`.
    pub ssh_host_key_name: String,
    /// Fresh host randomness, at least 32 bytes, credited to the guest kernel's pool.
    pub entropy: Vec<u8>,
    /// CLOCK_REALTIME of the host, in nanoseconds since the epoch.
    pub wall_clock_ns: i64,
    /// systemd units that must be active before `ready`, beside sshd.
    pub units: Vec<String>,
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    Identify(Box<Identity>),
    /// Step CLOCK_REALTIME to this many nanoseconds since the epoch.
    SetClock {
        wall_clock_ns: i64,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToHost {
    /// The agent runs and waits for its identity.
    Hello {
        protocol: u32,
    },
    /// Identity is in place; the link may come up.
    Applied,
    Ready(Ready),
    /// The identity could not be applied; the machine is of no use.
    Failed {
        reason: String,
    },
}

/// The machine answers on its address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Milliseconds since the agent got its identity, by phase.
    pub phases_ms: BTreeMap<String, u64>,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
}

/// The length prefix of `body`, if it is within bounds.
pub fn frame(body: &[u8]) -> Option<Vec<u8>> {
    if body.len() > MAX_MESSAGE {
        return None;
    }
    let len = u32::try_from(body.len()).ok()?;
    let mut framed = Vec::with_capacity(body.len() + 4);
    framed.extend_from_slice(&len.to_le_bytes());
    framed.extend_from_slice(body);
    Some(framed)
}

/// The body's length that a prefix announces, if it is within bounds.
pub fn body_len(prefix: [u8; 4]) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(prefix))
        .ok()
        .filter(|len| *len <= MAX_MESSAGE)
}

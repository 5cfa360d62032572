//! The network device (virtio 1.2, 5.1): one receive and one transmit queue on a TAP.
//!
//! Runs on `vmN/dev` and owns the TAP, the queues and the link. Frames move by one of two paths
//! that look the same to a driver: in user space (`rx`, `tx`), or in the kernel (`vhost`)
//! where it has vhost-net. While the link is down the user-space path is in charge, and it
//! discards what either side sends.
//!
//! ```text
//!             link up, vhost-net there
//!  user space ────────────────────────> kernel
//!             <────────────────────────
//!             link down, or deactivated: positions come back
//! ```
//!
//! No control queue, no multiqueue, no address filter: the host's rules on the TAP are the filter.
//! UDP segmentation is not offered, because what a host offers must not depend on its kernel.

mod active;
pub mod counters;
pub mod frame;
mod rx;
mod tap;
mod tx;
mod vhost;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, GuestFault, HostFault,
    Progress, Source, VirtioDevice, WorkerThread,
};
use active::{Active, signal};
use counters::{Counters, NetCounts};
use tap::Tap;

/// Buffers of a queue: six frames of 64 KiB in buffers of a page's third.
const QUEUE_SIZES: [u16; 2] = [256, 256];
const FEATURES: u64 = (1 << VIRTIO_NET_F_CSUM)
    | (1 << VIRTIO_NET_F_GUEST_CSUM)
    | (1 << VIRTIO_NET_F_GUEST_TSO4)
    | (1 << VIRTIO_NET_F_GUEST_TSO6)
    | (1 << VIRTIO_NET_F_GUEST_ECN)
    | (1 << VIRTIO_NET_F_HOST_TSO4)
    | (1 << VIRTIO_NET_F_HOST_TSO6)
    | (1 << VIRTIO_NET_F_HOST_ECN)
    | (1 << VIRTIO_NET_F_MRG_RXBUF)
    | (1 << VIRTIO_NET_F_MAC)
    | (1 << VIRTIO_NET_F_MTU)
    | (1 << VIRTIO_NET_F_STATUS);
/// Offsets in the configuration space (virtio 1.2, 5.1.4).
const CONFIG_STATUS: usize = 6;
/// The smallest MTU a device may offer (virtio 1.2, 5.1.4.1).
const MIN_MTU: u16 = 68;
/// Frames that may wait in a TAP nobody reads: its queue holds 1000.
const MAX_STALE_FRAMES: u32 = 4096;

/// What wakes the device.
const RX_KICK: u32 = Token::RxKick as u32;
const TX_KICK: u32 = Token::TxKick as u32;
const TAP: u32 = Token::Tap as u32;
const VHOST_ERROR: u32 = Token::VhostError as u32;
const PATH_CHANGED: u32 = Token::PathChanged as u32;

#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Token {
    RxKick,
    TxKick,
    Tap,
    /// The kernel cannot follow a ring.
    VhostError,
    /// Other descriptors are to be polled now.
    PathChanged,
}

/// What a NIC is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The TAP: opened non-blocking with a vnet header of 12 bytes.
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub link_up: bool,
    /// Let the kernel move frames where it can.
    pub vhost: bool,
}

/// What a snapshot keeps of it. Offloads are not part of it: they follow from the negotiated
/// features at each activation. Neither is the MAC: a clone has that of its own slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetState {
    link_up: bool,
    counts: NetCounts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    Down,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    mtu: u16,
    link: Link,
    use_vhost: bool,
    config: Arc<ConfigSpace>,
    counters: Arc<Counters>,
    /// The configuration changed while nobody could be told.
    config_changed: bool,
    path_changed: EventFd,
    /// Signalled by the kernel. Kept here, as the worker's loop must not see a descriptor close
    /// while it polls it.
    vhost_error: EventFd,
    active: Option<Active>,
}

impl Net {
    pub fn new(config: NetConfig) -> Result<Self, HostFault> {
        if config.mtu < MIN_MTU {
            return Err(HostFault::msg(format!(
                "an MTU of {} is too small",
                config.mtu
            )));
        }
        let event_fd = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|e| HostFault::new("make an event descriptor", e))
        };
        let link = if config.link_up { Link::Up } else { Link::Down };
        // mac, status, max_virtqueue_pairs (one), mtu; the driver writes none of it.
        let mut space = config.mac.to_vec();
        space.extend(link.status().to_le_bytes());
        space.extend(1_u16.to_le_bytes());
        space.extend(config.mtu.to_le_bytes());
        Ok(Self {
            tap: Tap::new(config.tap),
            mtu: config.mtu,
            link,
            use_vhost: config.vhost && vhost::is_available(),
            config: Arc::new(ConfigSpace::new(space, 0..0)),
            counters: Arc::default(),
            config_changed: false,
            path_changed: event_fd()?,
            vhost_error: event_fd()?,
            active: None,
        })
    }

    /// Whether frames are moved by the kernel once driver and link are up.
    pub fn uses_vhost(&self) -> bool {
        self.use_vhost
    }

    /// Counts of the user-space path.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    fn set_link(&mut self, link: Link) -> Result<(), HostFault> {
        if self.link == link {
            return Ok(());
        }
        if link == Link::Up {
            // Frames that came before the link did are not for this driver.
            let (frames, _empty) = self.tap.discard(MAX_STALE_FRAMES)?;
            self.counters.rx_dropped.add(u64::from(frames));
        }
        self.link = link;
        self.config
            .write_by_device(CONFIG_STATUS, &link.status().to_le_bytes());
        let Some(active) = &mut self.active else {
            self.config_changed = true;
            return Ok(());
        };
        match link {
            Link::Up if self.use_vhost => active.start_vhost(&self.tap, &self.vhost_error),
            Link::Up => {}
            Link::Down => active.stop_vhost(),
        }
        active.kick_queues();
        signal(&self.path_changed);
        active.config_interrupt.signal();
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        self.tap.set_offload(activation.features)?;
        let mut active = Active::new(activation, self.mtu);
        // What the kernel said about the last driver's rings.
        let _empty = self.vhost_error.read();
        if self.use_vhost && self.link == Link::Up {
            active.start_vhost(&self.tap, &self.vhost_error);
        }
        active.kick_queues();
        if std::mem::take(&mut self.config_changed) {
            active.config_interrupt.signal();
        }
        self.active = Some(active);
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let own = [
            (&self.path_changed, PATH_CHANGED),
            (&self.vhost_error, VHOST_ERROR),
        ];
        let mut sources = active.sources(&self.tap);
        sources.extend(own.map(|(fd, token)| Source {
            fd: fd.as_raw_fd(),
            events: EventSet::IN,
            token,
        }));
        sources
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::Done);
        };
        match token {
            TAP => active.receive(&self.tap, self.link, &self.counters)?,
            RX_KICK => {
                active.consume_kick(Token::RxKick);
                active.receive(&self.tap, self.link, &self.counters)?;
            }
            TX_KICK => {
                active.consume_kick(Token::TxKick);
                active.transmit(&self.tap, self.link, &self.counters)?;
            }
            VHOST_ERROR => {
                active.stop_vhost();
                return Err(GuestFault::Request {
                    device: "net",
                    problem: "vhost-net cannot follow a ring",
                }
                .into());
            }
            PATH_CHANGED => {
                let _empty = self.path_changed.read();
                return Ok(Progress::SourcesChanged);
            }
            _ => {}
        }
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<QueueState>> {
        match self.active.take() {
            Some(active) => active.stop(),
            None => vec![None; QUEUE_SIZES.len()],
        }
    }

    fn reset(&mut self) {
        self.config_changed = false;
        // Frames cut for the last driver's features are not for the next one. A TAP that fails
        // here says so at the next activation.
        let _failed = self.tap.discard(MAX_STALE_FRAMES);
    }

    fn command(&mut self, command: DeviceCommand) -> Result<(), HostFault> {
        match command {
            DeviceCommand::SetLink(true) => self.set_link(Link::Up),
            DeviceCommand::SetLink(false) => self.set_link(Link::Down),
            _ => Ok(()),
        }
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Net(NetState {
            link_up: self.link == Link::Up,
            counts: self.counters.now(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        let DeviceState::Net(state) = state else {
            return Err(HostFault::msg("saved state is not a network device's"));
        };
        self.link = if state.link_up { Link::Up } else { Link::Down };
        self.config
            .write_by_device(CONFIG_STATUS, &self.link.status().to_le_bytes());
        self.counters.restore(state.counts);
        Ok(())
    }
}

impl Link {
    fn status(self) -> u16 {
        match self {
            Self::Up => u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1),
            Self::Down => 0,
        }
    }
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;

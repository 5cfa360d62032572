//! The network device (virtio 1.2, 5.1): one receive and one transmit queue on a TAP.
//!
//! Runs on `vmN/dev` and owns the TAP, the queues and the link. Frames move by one of two paths
//! that look the same to a driver: in user space ([`rx`], [`tx`]), or in the kernel ([`vhost`])
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
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, GuestFault,
    GuestMemory, HostFault, Interrupt, Progress, RunningQueue, Source, VirtioDevice, WorkerThread,
};
use counters::{Counters, NetCounts};
use rx::Rx;
use tap::Tap;
use tx::Tx;
use vhost::Vhost;

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
    active: Option<Active>,
}

/// The device between activation and deactivation.
#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    features: u64,
    rx: Option<Rx>,
    tx: Option<Tx>,
    config_interrupt: Interrupt,
    /// The kernel has the rings.
    vhost: Option<Vhost>,
}

impl Net {
    pub fn new(config: NetConfig) -> Result<Self, HostFault> {
        if config.mtu < MIN_MTU {
            return Err(HostFault::msg(format!(
                "an MTU of {} is too small",
                config.mtu
            )));
        }
        let path_changed = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| HostFault::new("make an event descriptor", e))?;
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
            path_changed,
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
            Link::Up if self.use_vhost => active.start_vhost(&self.tap),
            Link::Up => {}
            Link::Down => active.stop_vhost(),
        }
        active.kick_queues();
        signal(&self.path_changed);
        active.config_interrupt.signal();
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Fault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if active.vhost.is_some() {
            return Ok(());
        }
        match (&mut active.rx, self.link) {
            (Some(rx), Link::Up) => rx.receive(&active.memory, &self.tap, &self.counters),
            (rx, _) => {
                let (frames, empty) = self.tap.discard(Budget::FRAMES)?;
                self.counters.rx_dropped.add(u64::from(frames));
                if let (false, Some(rx)) = (empty, rx) {
                    kick_again(&rx.queue);
                }
                Ok(())
            }
        }
    }

    fn transmit(&mut self) -> Result<(), Fault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        match &mut active.tx {
            Some(tx) if active.vhost.is_none() => {
                tx.transmit(&active.memory, &self.tap, self.link, &self.counters)
            }
            _ => Ok(()),
        }
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
        let mut queues = activation.queues.into_iter();
        let mut next = || queues.next().flatten();
        let features = activation.features;
        let mut active = Active {
            memory: activation.memory,
            features,
            rx: next().map(|queue| Rx::new(queue, features, self.mtu)),
            tx: next().map(|queue| Tx::new(queue, features)),
            config_interrupt: activation.config_interrupt,
            vhost: None,
        };
        if self.use_vhost && self.link == Link::Up {
            active.start_vhost(&self.tap);
        }
        // What the driver made available before will not be kicked again.
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
        let level = |fd, token| Source {
            fd,
            events: EventSet::IN,
            token,
        };
        let mut sources = vec![level(self.path_changed.as_raw_fd(), PATH_CHANGED)];
        if let Some(vhost) = &active.vhost {
            sources.push(level(vhost.error_fd(), VHOST_ERROR));
            return sources;
        }
        // By edge: frames that cannot be taken now must not wake the loop again and again.
        sources.push(Source {
            fd: self.tap.fd(),
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token: TAP,
        });
        sources.extend(
            active
                .rx
                .iter()
                .map(|rx| level(rx.queue.kick_fd(), RX_KICK)),
        );
        sources.extend(
            active
                .tx
                .iter()
                .map(|tx| level(tx.queue.kick_fd(), TX_KICK)),
        );
        sources
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        match token {
            TAP => self.receive()?,
            RX_KICK => {
                self.active.iter().for_each(Active::consume_rx_kick);
                self.receive()?;
            }
            TX_KICK => {
                self.active.iter().for_each(Active::consume_tx_kick);
                self.transmit()?;
            }
            VHOST_ERROR => {
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
        let Some(mut active) = self.active.take() else {
            return vec![None; QUEUE_SIZES.len()];
        };
        active.stop_vhost();
        if let Some(rx) = &mut active.rx {
            rx.release();
        }
        vec![
            active.rx.map(|rx| rx.queue.state()),
            active.tx.map(|tx| tx.queue.state()),
        ]
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

impl Active {
    /// Hands the rings to the kernel; where it will not have them, they stay here.
    fn start_vhost(&mut self, tap: &Tap) {
        if let Some(rx) = &mut self.rx {
            rx.release();
        }
        let rings = [
            self.rx.as_ref().map(|rx| &rx.queue),
            self.tx.as_ref().map(|tx| &tx.queue),
        ];
        let failed = match Vhost::prepare(&self.memory, self.features, rings) {
            Ok(vhost) => {
                let ran = vhost.run(tap.file());
                self.vhost = Some(vhost);
                ran
            }
            Err(e) => Err(e),
        };
        if let Err(e) = failed {
            tracing::warn!("vhost-net does not take a queue, going on in user space: {e}");
            self.stop_vhost();
        }
    }

    /// Takes the rings back from the kernel, if it has them.
    fn stop_vhost(&mut self) {
        let Some(vhost) = self.vhost.take() else {
            return;
        };
        let [rx, tx] = vhost.stop();
        let queues = [
            (rx, self.rx.as_mut().map(|rx| &mut rx.queue)),
            (tx, self.tx.as_mut().map(|tx| &mut tx.queue)),
        ];
        for (position, queue) in queues {
            if let (Some(next_avail), Some(queue)) = (position, queue) {
                // The kernel returns all it takes, so both agree unless the guest wrote there.
                let next_used = queue.used_index(&self.memory).unwrap_or(next_avail);
                queue.set_positions(next_avail, next_used);
            }
        }
    }

    fn kick_queues(&self) {
        self.rx.iter().for_each(|rx| kick_again(&rx.queue));
        self.tx.iter().for_each(|tx| kick_again(&tx.queue));
    }

    // A kick that vhost waits for must stay where it is.

    fn consume_rx_kick(&self) {
        if let (Some(rx), None) = (&self.rx, &self.vhost) {
            rx.queue.consume_kick();
        }
    }

    fn consume_tx_kick(&self) {
        if let (Some(tx), None) = (&self.tx, &self.vhost) {
            tx.queue.consume_kick();
        }
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

/// How much one wake-up may do before the other devices of the loop get their turn.
#[derive(Debug)]
struct Budget {
    frames: u32,
    bytes: u64,
}

impl Budget {
    const FRAMES: u32 = 256;
    const BYTES: u64 = 1 << 20;

    fn spend(&mut self, bytes: u64) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_spent(&self) -> bool {
        self.frames == 0 || self.bytes == 0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            frames: Self::FRAMES,
            bytes: Self::BYTES,
        }
    }
}

/// Wakes this queue's handler once more.
fn kick_again(queue: &RunningQueue) {
    signal(queue.kick());
}

fn signal(fd: &EventFd) {
    // EAGAIN means the counter is full: whoever waits is woken as it is.
    let _full = fd.write(1);
}

#[cfg(test)]
#[path = "net_test.rs"]
mod tests;

//! The device between activation and deactivation: its rings, and which of the two paths has them.

use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;
use super::rx::Rx;
use super::tap::Tap;
use super::tx::Tx;
use super::vhost::Vhost;
use super::{Link, Token};
use crate::devices::{Activation, Fault, GuestMemory, Interrupt, RunningQueue, Source};

/// Rings and memory, owned by the worker.
#[derive(Debug)]
pub(super) struct Active {
    memory: GuestMemory,
    features: u64,
    rx: Option<Rx>,
    tx: Option<Tx>,
    pub config_interrupt: Interrupt,
    /// The kernel has the rings.
    vhost: Option<Vhost>,
}

impl Active {
    pub fn new(activation: Activation, mtu: u16) -> Self {
        let mut queues = activation.queues.into_iter();
        let mut next = || queues.next().flatten();
        let features = activation.features;
        Self {
            memory: activation.memory,
            features,
            rx: next().map(|queue| Rx::new(queue, features, mtu)),
            tx: next().map(|queue| Tx::new(queue, features)),
            config_interrupt: activation.config_interrupt,
            vhost: None,
        }
    }

    /// What to poll besides the device's own: nothing while the kernel has the rings.
    pub fn sources(&self, tap: &Tap) -> Vec<Source> {
        let level = |fd, token: Token| Source {
            fd,
            events: EventSet::IN,
            token: token as u32,
        };
        if self.vhost.is_some() {
            return Vec::new();
        }
        // By edge: frames that cannot be taken now must not wake the loop again and again.
        let tap = Source {
            fd: tap.fd(),
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            token: Token::Tap as u32,
        };
        let rx = self.rx.iter().map(|rx| (&rx.queue, Token::RxKick));
        let tx = self.tx.iter().map(|tx| (&tx.queue, Token::TxKick));
        let kicks = rx.chain(tx);
        std::iter::once(tap)
            .chain(kicks.map(|(queue, token)| level(queue.kick_fd(), token)))
            .collect()
    }

    /// A kick arrived; one that vhost waits for stays where it is.
    pub fn consume_kick(&self, token: Token) {
        let queue = match token {
            Token::RxKick => self.rx.as_ref().map(|rx| &rx.queue),
            Token::TxKick => self.tx.as_ref().map(|tx| &tx.queue),
            _ => None,
        };
        if let (Some(queue), None) = (queue, &self.vhost) {
            queue.consume_kick();
        }
    }

    pub fn receive(&mut self, tap: &Tap, link: Link, counters: &Counters) -> Result<(), Fault> {
        if self.vhost.is_some() {
            return Ok(());
        }
        if let (Some(rx), Link::Up) = (&mut self.rx, link) {
            return rx.receive(&self.memory, tap, counters);
        }
        let (frames, empty) = tap.discard(Budget::FRAMES)?;
        counters.rx_dropped.add(u64::from(frames));
        if let (false, Some(rx)) = (empty, &self.rx) {
            kick_again(&rx.queue);
        }
        Ok(())
    }

    pub fn transmit(&mut self, tap: &Tap, link: Link, counters: &Counters) -> Result<(), Fault> {
        match &mut self.tx {
            Some(tx) if self.vhost.is_none() => tx.transmit(&self.memory, tap, link, counters),
            _ => Ok(()),
        }
    }

    /// Hands the rings to the kernel; where it will not have them, they stay here.
    pub fn start_vhost(&mut self, tap: &Tap, error: &EventFd) {
        if let Some(rx) = &mut self.rx {
            rx.release();
        }
        let rings = [
            self.rx.as_ref().map(|rx| &rx.queue),
            self.tx.as_ref().map(|tx| &tx.queue),
        ];
        let started = Vhost::prepare(&self.memory, self.features, rings, error).and_then(|vhost| {
            let ran = vhost.run(tap.file());
            self.vhost = Some(vhost);
            ran
        });
        if let Err(e) = started {
            tracing::warn!("vhost-net does not take a queue, going on in user space: {e}");
            self.stop_vhost();
        }
    }

    /// Takes the rings back from the kernel, if it has them.
    pub fn stop_vhost(&mut self) {
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

    /// Wakes whoever has the rings: what the driver made available before is not kicked again.
    pub fn kick_queues(&self) {
        self.rx.iter().for_each(|rx| kick_again(&rx.queue));
        self.tx.iter().for_each(|tx| kick_again(&tx.queue));
    }

    /// Lets go of the rings; returns where it stopped.
    pub fn stop(mut self) -> Vec<Option<QueueState>> {
        self.stop_vhost();
        if let Some(rx) = &mut self.rx {
            rx.release();
        }
        vec![
            self.rx.map(|rx| rx.queue.state()),
            self.tx.map(|tx| tx.queue.state()),
        ]
    }
}

/// How much one wake-up may do before the other devices of the loop get their turn.
#[derive(Debug)]
pub(super) struct Budget {
    frames: u32,
    bytes: u64,
}

impl Budget {
    pub const FRAMES: u32 = 256;
    const BYTES: u64 = 1 << 20;

    pub fn spend(&mut self, bytes: u64) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    pub fn is_spent(&self) -> bool {
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
pub(super) fn kick_again(queue: &RunningQueue) {
    signal(queue.kick());
}

pub(super) fn signal(fd: &EventFd) {
    // EAGAIN means the counter is full: whoever waits is woken as it is.
    let _full = fd.write(1);
}

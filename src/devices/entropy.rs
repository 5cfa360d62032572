//! The virtio entropy device (virtio 1.2, 5.4): random bytes from the host's kernel.
//!
//! Runs on the event loop and holds no state. What one request gets is capped, whatever its
//! descriptors add up to: they may overlap, and their sum may exceed the guest's memory.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::epoll::EventSet;

use super::queue::write_segments;
use super::{
    Activation, ConfigSpace, DeviceKind, DeviceState, Fault, GuestFault, GuestMemory, HostFault,
    Progress, RunningQueue, Source, VirtioDevice, WorkerThread,
};

const QUEUE_SIZE: u16 = 64;
/// Bytes for one request; the driver asks again for more (virtio 1.2, 5.4.6.2).
const MAX_BYTES: usize = 4096;
/// Requests served before other devices have their turn.
const BATCH_REQUESTS: u32 = 16;
const KICK: u32 = 0;

/// A source of randomness.
#[derive(Debug)]
pub struct Entropy {
    config: Arc<ConfigSpace>,
    running: Option<(GuestMemory, RunningQueue)>,
}

impl Default for Entropy {
    fn default() -> Self {
        Self::new()
    }
}

impl Entropy {
    pub fn new() -> Self {
        Self {
            config: Arc::new(ConfigSpace::new(Vec::new(), 0..0)),
            running: None,
        }
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        let queue = activation.queues.into_iter().next().flatten();
        self.running = queue.map(|queue| (activation.memory, queue));
        if let Some((_, queue)) = &self.running {
            kick_self(queue);
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        self.running
            .iter()
            .map(|(_, queue)| Source {
                fd: queue.kick_fd(),
                events: EventSet::IN,
                token: KICK,
            })
            .collect()
    }

    fn handle(&mut self, _token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        if let Some((memory, queue)) = &mut self.running {
            queue.consume_kick();
            serve(memory, queue)?;
        }
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<virtio_queue::QueueState>> {
        vec![self.running.take().map(|(_, queue)| queue.state())]
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Entropy)
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        match state {
            DeviceState::Entropy => Ok(()),
            _ => Err(HostFault::msg("saved state is not of an entropy device")),
        }
    }
}

/// Requests may wait that nobody will kick for.
fn kick_self(queue: &RunningQueue) {
    // A full counter is readable as it is.
    let _saturated = queue.kick().write(1);
}

fn serve(memory: &GuestMemory, queue: &mut RunningQueue) -> Result<(), Fault> {
    let mut served = 0;
    loop {
        while served < BATCH_REQUESTS {
            let Some(chain) = queue.pop(memory)? else {
                break;
            };
            served += 1;
            let wanted = usize::try_from(chain.writable_bytes()).unwrap_or(MAX_BYTES);
            let mut bytes = [0; MAX_BYTES];
            let bytes = bytes.get_mut(..wanted.min(MAX_BYTES)).unwrap_or_default();
            fill(bytes)?;
            if !write_segments(memory, &chain.writable, 0, bytes) {
                return Err(GuestFault::RingMemory.into());
            }
            // At most `MAX_BYTES`.
            let len = u32::try_from(bytes.len()).unwrap_or(0);
            queue.push(memory, chain.head, len)?;
        }
        if served >= BATCH_REQUESTS {
            kick_self(queue);
            break;
        }
        if !queue.enable_kicks(memory)? {
            break;
        }
    }
    if served > 0 {
        queue.signal(memory)?;
    }
    Ok(())
}

/// Never waits: the host's generator is seeded long before a VM runs.
fn fill(bytes: &mut [u8]) -> Result<(), HostFault> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match getrandom(rest, GetRandomFlags::NONBLOCK) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(HostFault::new("read random bytes", e.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "entropy_test.rs"]
mod tests;

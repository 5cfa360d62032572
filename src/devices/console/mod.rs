//! The virtio console device (virtio 1.2, 5.3) with two ports: hvc0, and the agent's channel.
//!
//! Runs on `vmN/dev` and buffers nothing of the guest's: hvc0's output is consumed at once,
//! because its driver spins with a lock held until it is; the agent's waits in the ring while the
//! host's end is full, and the host's waits in the socket while the guest offers no buffers.
//! What the bytes of either channel mean is not known here.
//!
//! ```text
//!  guest  tx0 ──> ConsoleSink          tx1 ──> agent socket (back-pressure: not polled while full)
//!         rx0 <── typed input, bounded rx1 <── agent socket (not polled while no buffers)
//!         control queues <──> Ports
//! ```

mod agent;
mod control;
mod output;
mod ports;
mod pump;
mod ring;
mod serve;

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, HostFault, Progress,
    RunningQueue, Source, VirtioDevice, WorkerThread,
};
use agent::Agent;
use control::Size;
use ports::{AGENT, PortState, Ports};
pub use ring::ConsoleSink;
use serve::{AGENT_SOCKET, CONTROL_RX, Interest, RX0, Running, TX1};

/// VIRTIO_CONSOLE_F_SIZE: the configuration holds the terminal's size.
const F_SIZE: u64 = 1 << 0;
/// VIRTIO_CONSOLE_F_MULTIPORT: there are control queues.
const F_MULTIPORT: u64 = 1 << 1;

/// Requests in a ring. Linux fills each receive queue with a page a request, so this is memory.
const QUEUE_SIZE: u16 = 16;
/// Typed bytes kept for a guest that does not read; more are dropped, as on a real line.
const MAX_INPUT: usize = 4096;
/// What a console is built from.
#[derive(Debug)]
pub struct ConsoleConfig {
    /// Takes what the guest prints on hvc0.
    pub sink: ConsoleSink,
    /// The device's end of the agent's channel; without it there is no second port.
    pub agent: Option<UnixStream>,
    /// The second port's name in the guest.
    pub agent_port_name: String,
    /// Set when the guest opens the second port for the first time.
    pub agent_opened: Arc<OnceLock<Instant>>,
    /// The terminal's size; 0 by 0 if there is none.
    pub columns: u16,
    pub rows: u16,
}

/// What a snapshot keeps of a console.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConsoleState {
    size: Size,
    ports: Vec<PortState>,
    input: Vec<u8>,
}

/// The device.
#[derive(Debug)]
pub struct Console {
    config: Arc<ConfigSpace>,
    queue_sizes: Vec<u16>,
    size: Size,
    sink: ConsoleSink,
    agent: Option<Agent>,
    ports: Ports,
    input: VecDeque<u8>,
    running: Option<Running>,
}

impl Console {
    /// A console at rest.
    pub fn new(config: ConsoleConfig) -> Result<Self, HostFault> {
        let agent = match config.agent {
            Some(stream) => Some(Agent::new(
                stream,
                config.agent_port_name,
                config.agent_opened,
            )?),
            None => None,
        };
        let host_open = if agent.is_some() {
            vec![true, true]
        } else {
            vec![true]
        };
        let ports = Ports::new(&host_open);
        let size = Size {
            columns: config.columns,
            rows: config.rows,
        };
        // cols, rows, max_nr_ports (virtio 1.2, 5.3.4).
        let mut space = size_bytes(size);
        space.extend(u32::try_from(ports.len()).unwrap_or(1).to_le_bytes());
        Ok(Self {
            config: Arc::new(ConfigSpace::new(space, 0..0)),
            // A pair for each port and one for control.
            queue_sizes: vec![QUEUE_SIZE; (ports.len() + 1) * 2],
            size,
            sink: config.sink,
            agent,
            ports,
            input: VecDeque::new(),
            running: None,
        })
    }

    fn resize(&mut self, size: Size) {
        if self.size == size {
            return;
        }
        self.size = size;
        self.config.write_by_device(0, &size_bytes(size));
        self.ports.resized();
        if let Some(running) = &self.running {
            if running.sized {
                running.config_interrupt.signal();
            }
            running.kick(CONTROL_RX);
        }
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        F_SIZE | F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        let running = Running {
            memory: activation.memory,
            multiport: activation.features & F_MULTIPORT != 0,
            sized: activation.features & F_SIZE != 0,
            config_interrupt: activation.config_interrupt,
            queues: activation.queues,
            watched: Interest {
                socket: EventSet::empty(),
                agent_tx: true,
            },
        };
        // After a pause or a restore requests may lie there that will not be kicked again.
        for index in 0..running.queues.len() {
            running.kick(index);
        }
        self.running = Some(running);
        if let Some(agent) = &mut self.agent {
            agent.full = false;
            agent.starved = false;
            if self.ports.guest_open(AGENT) {
                agent.note_opened();
            }
        }
        let watched = self.interest();
        if let Some(running) = &mut self.running {
            running.watched = watched;
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(running) = &self.running else {
            return Vec::new();
        };
        let Interest { socket, agent_tx } = self.interest();
        let mut sources = Vec::new();
        for (token, queue) in (0_u32..).zip(&running.queues) {
            let waits = token as usize == TX1 && !agent_tx;
            if let Some(queue) = queue.as_ref().filter(|_| !waits) {
                sources.push(Source {
                    fd: queue.kick_fd(),
                    events: EventSet::IN,
                    token,
                });
            }
        }
        if let Some(agent) = self.agent.as_ref().filter(|_| !socket.is_empty()) {
            sources.push(Source {
                fd: agent.fd(),
                events: socket,
                token: AGENT_SOCKET,
            });
        }
        sources
    }

    fn handle(&mut self, token: u32, ready: EventSet) -> Result<Progress, Fault> {
        self.serve(token, ready)?;
        self.tell()?;
        let interest = self.interest();
        let Some(running) = &mut self.running else {
            return Ok(Progress::Done);
        };
        if running.watched == interest {
            return Ok(Progress::Done);
        }
        running.watched = interest;
        Ok(Progress::SourcesChanged)
    }

    fn deactivate(&mut self) -> Vec<Option<QueueState>> {
        let queues = self.running.take().map(|r| r.queues).unwrap_or_default();
        queues
            .iter()
            .map(|q| q.as_ref().map(RunningQueue::state))
            .collect()
    }

    fn reset(&mut self) {
        self.ports.reset();
        self.input.clear();
    }

    fn command(&mut self, command: DeviceCommand) -> Result<(), HostFault> {
        match command {
            DeviceCommand::ConsoleInput(bytes) => {
                let room = MAX_INPUT.saturating_sub(self.input.len());
                self.input.extend(bytes.iter().take(room));
                if let Some(running) = &self.running {
                    running.kick(RX0);
                }
            }
            DeviceCommand::ConsoleSize { columns, rows } => self.resize(Size { columns, rows }),
            DeviceCommand::SetLink(_)
            | DeviceCommand::SetBalloonTarget(_)
            | DeviceCommand::RequestBalloonStats => {}
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Console(ConsoleState {
            size: self.size,
            ports: self.ports.save(),
            input: self.input.iter().copied().collect(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        let DeviceState::Console(state) = state else {
            return Err(HostFault::msg("saved state is not a console's"));
        };
        if state.input.len() > MAX_INPUT || !self.ports.restore(state.ports) {
            return Err(HostFault::msg("saved console does not fit this one"));
        }
        self.input = state.input.into();
        self.size = state.size;
        self.config.write_by_device(0, &size_bytes(state.size));
        Ok(())
    }
}

fn size_bytes(size: Size) -> Vec<u8> {
    [size.columns.to_le_bytes(), size.rows.to_le_bytes()].concat()
}

#[cfg(test)]
#[path = "console_test.rs"]
mod tests;

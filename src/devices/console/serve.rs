//! A console while its driver runs: its queues, and what each event makes it do.

use std::io::Read;

use vmm_sys_util::epoll::EventSet;

use super::Console;
use super::control::{CONTROL_BYTES, FromDriver};
use super::ports::{AGENT, CONSOLE};
use super::pump::{self, Stop, fault};
use crate::devices::queue::{read_segments, write_segments};
use crate::devices::{Fault, GuestMemory, Interrupt, RunningQueue};

// The queues (virtio 1.2, 5.3.2). A queue's index is the token of its kick.
pub(super) const RX0: usize = 0;
pub(super) const TX0: usize = 1;
pub(super) const CONTROL_RX: usize = 2;
pub(super) const CONTROL_TX: usize = 3;
pub(super) const RX1: usize = 4;
pub(super) const TX1: usize = 5;
/// The token of the agent's socket.
pub(super) const AGENT_SOCKET: u32 = 6;

/// Control messages heard before other devices get their turn.
const CONTROL_PER_WAKE: u32 = 64;

/// What a console has between `activate` and `deactivate`.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) memory: GuestMemory,
    pub(super) multiport: bool,
    pub(super) sized: bool,
    pub(super) config_interrupt: Interrupt,
    pub(super) queues: Vec<Option<RunningQueue>>,
    /// What the worker was told to watch.
    pub(super) watched: Interest,
}

/// The part of the sources that changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interest {
    pub(super) socket: EventSet,
    /// The agent's transmit queue is served; not while the socket is full.
    pub(super) agent_tx: bool,
}

impl Running {
    fn queue(&mut self, index: usize) -> Option<(&mut RunningQueue, &GuestMemory)> {
        let queue = self.queues.get_mut(index)?.as_mut()?;
        Some((queue, &self.memory))
    }

    /// Makes the worker serve that queue next time round.
    pub(super) fn kick(&self, index: usize) {
        if let Some(queue) = self.queues.get(index).and_then(Option::as_ref) {
            // A full counter is a pending kick as it is.
            let _pending = queue.kick().write(1);
        }
    }
}

impl Console {
    /// Whether the guest's end of a port is open. Without control messages hvc0 always is.
    pub(super) fn guest_open(&self, port: usize) -> bool {
        match &self.running {
            Some(running) if running.multiport => self.ports.guest_open(port),
            _ => port == CONSOLE,
        }
    }

    pub(super) fn interest(&self) -> Interest {
        let guest_open = self.guest_open(AGENT);
        let agent = self.agent.as_ref();
        Interest {
            socket: agent.map_or(EventSet::empty(), |a| a.interest(guest_open)),
            agent_tx: agent.is_none_or(|a| !a.full),
        }
    }

    pub(super) fn serve(&mut self, token: u32, ready: EventSet) -> Result<(), Fault> {
        if token == AGENT_SOCKET {
            // What broke shows in the next write or read.
            if !ready.difference(EventSet::IN).is_empty() {
                self.agent_output()?;
            }
            return self.agent_input();
        }
        let Ok(index) = usize::try_from(token) else {
            return Ok(());
        };
        match self.running.as_mut().and_then(|r| r.queue(index)) {
            Some((queue, _mem)) => queue.consume_kick(),
            None => return Ok(()),
        }
        match index {
            RX0 => self.console_input(),
            TX0 => self.console_output(),
            CONTROL_TX => self.hear(),
            RX1 => {
                if let Some(agent) = &mut self.agent {
                    agent.starved = false;
                }
                self.agent_input()
            }
            TX1 => self.agent_output(),
            // CONTROL_RX: what is owed is told after every event.
            _ => Ok(()),
        }
    }

    fn console_output(&mut self) -> Result<(), Fault> {
        let (Some(running), Some(port)) = (&mut self.running, self.ports.get_mut(CONSOLE)) else {
            return Ok(());
        };
        let Some((queue, mem)) = running.queue(TX0) else {
            return Ok(());
        };
        let sink = &self.sink;
        let stop = pump::transmit(queue, mem, &mut port.state.sent, &mut |bytes| {
            sink.write(bytes);
            Ok(bytes.len())
        })?;
        if stop == Stop::Again {
            running.kick(TX0);
        }
        Ok(())
    }

    fn console_input(&mut self) -> Result<(), Fault> {
        if self.input.is_empty() || !self.guest_open(CONSOLE) {
            return Ok(());
        }
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let Some((queue, mem)) = running.queue(RX0) else {
            return Ok(());
        };
        let input = &mut self.input;
        // `read` of an empty deque gives 0, which ends the pump.
        let stop = pump::receive(queue, mem, &mut |buffer| input.read(buffer))?;
        if stop == Stop::Again {
            running.kick(RX0);
        }
        Ok(())
    }

    fn agent_output(&mut self) -> Result<(), Fault> {
        let (Some(running), Some(port)) = (&mut self.running, self.ports.get_mut(AGENT)) else {
            return Ok(());
        };
        let (Some(agent), Some((queue, mem))) = (&mut self.agent, running.queue(TX1)) else {
            return Ok(());
        };
        let sent = &mut port.state.sent;
        let stop = pump::transmit(queue, mem, sent, &mut |bytes| agent.write(bytes))?;
        agent.full = stop == Stop::Blocked;
        port.host_open = agent.is_open();
        if stop == Stop::Again {
            running.kick(TX1);
        }
        Ok(())
    }

    fn agent_input(&mut self) -> Result<(), Fault> {
        if !self.guest_open(AGENT) {
            return Ok(());
        }
        let (Some(running), Some(port)) = (&mut self.running, self.ports.get_mut(AGENT)) else {
            return Ok(());
        };
        let Some(agent) = self.agent.as_mut().filter(|a| a.is_open()) else {
            return Ok(());
        };
        let Some((queue, mem)) = running.queue(RX1) else {
            agent.starved = true;
            return Ok(());
        };
        match pump::receive(queue, mem, &mut |buffer| agent.read(buffer))? {
            Stop::Empty => agent.starved = true,
            Stop::Closed => {
                agent.close();
                port.host_open = false;
                // The transmit queue need not wait any longer: its bytes go nowhere.
                agent.full = false;
                running.kick(TX1);
            }
            // The socket is still readable: the worker comes back by itself.
            Stop::Again | Stop::Blocked => {}
        }
        Ok(())
    }

    /// Takes the driver's control messages, at once: Linux spins until they are gone.
    fn hear(&mut self) -> Result<(), Fault> {
        let Some(running) = self.running.as_mut().filter(|r| r.multiport) else {
            return Ok(());
        };
        let Some((queue, mem)) = running.queue(CONTROL_TX) else {
            return Ok(());
        };
        let mut more = true;
        for _ in 0..CONTROL_PER_WAKE {
            let Some(chain) = queue.pop(mem)? else {
                more = queue.enable_kicks(mem)?;
                if more {
                    continue;
                }
                break;
            };
            let mut bytes = [0; CONTROL_BYTES];
            if !read_segments(mem, &chain.readable, 0, &mut bytes) {
                return Err(fault("control message is too short").into());
            }
            self.ports.hear(FromDriver::parse(bytes));
            queue.push(mem, chain.head, 0)?;
        }
        queue.signal(mem)?;
        if more {
            running.kick(CONTROL_TX);
        }
        if let Some(agent) = self.agent.as_ref().filter(|_| self.ports.guest_open(AGENT)) {
            agent.note_opened();
        }
        // What waited for an end to open can go now.
        self.console_input()?;
        self.agent_input()
    }

    /// Tells the driver what it is owed, as far as it offers buffers.
    pub(super) fn tell(&mut self) -> Result<(), Fault> {
        let Some(running) = self.running.as_mut().filter(|r| r.multiport) else {
            return Ok(());
        };
        let Some((queue, mem)) = running.queue(CONTROL_RX) else {
            return Ok(());
        };
        let name = self.agent.as_ref().map_or("", |a| a.name.as_str());
        let mut told = false;
        while let Some((port, message)) = self.ports.next() {
            let Some(chain) = queue.pop(mem)? else {
                if queue.enable_kicks(mem)? {
                    continue;
                }
                break;
            };
            let bytes = message.bytes(u32::try_from(port).unwrap_or(0), name, self.size);
            if !write_segments(mem, &chain.writable, 0, &bytes) {
                return Err(fault("control buffer is too small").into());
            }
            let len = u32::try_from(bytes.len()).unwrap_or(0);
            queue.push(mem, chain.head, len)?;
            self.ports.told(port, message);
            told = true;
        }
        if told {
            queue.signal(mem)?;
        }
        Ok(())
    }
}

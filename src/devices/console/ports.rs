//! What driver and device know of each other's ports. Pure: no queue, no descriptor.
//!
//! A message that the device owes the driver is a flag, not an entry of a list: however often a
//! driver asks, and however rarely it offers buffers for the answers, nothing grows.
//!
//! ```text
//!  DEVICE_READY ──> add ──> PORT_READY ──> console | name, size, open/closed ──> PORT_OPEN
//!    driver       device      driver                  device                     driver
//! ```

use serde::{Deserialize, Serialize};

use super::control::{FromDriver, ToDriver};

/// hvc0.
pub(super) const CONSOLE: usize = 0;
/// The agent's channel.
pub(super) const AGENT: usize = 1;

/// One port, as a snapshot stores it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    owes_add: bool,
    owes_kind: bool,
    owes_resize: bool,
    /// The driver has set the port up.
    ready: bool,
    /// The driver's end is open.
    guest_open: bool,
    /// What the driver was told about the host's end.
    told_open: bool,
    /// Bytes already taken of the oldest chain in the transmit queue.
    pub(super) sent: u64,
}

#[derive(Debug)]
pub(super) struct Port {
    pub(super) state: PortState,
    /// The host's end is there.
    pub(super) host_open: bool,
}

impl Port {
    fn next(&self, number: usize) -> Option<ToDriver> {
        let state = &self.state;
        if state.owes_add {
            Some(ToDriver::Add)
        } else if !state.ready {
            None
        } else if state.owes_kind {
            Some(if number == CONSOLE {
                ToDriver::Console
            } else {
                ToDriver::Name
            })
        } else if state.owes_resize {
            Some(ToDriver::Resize)
        } else {
            (state.told_open != self.host_open).then_some(ToDriver::Open(self.host_open))
        }
    }
}

/// All ports; the index is the port's number.
#[derive(Debug)]
pub(super) struct Ports(Vec<Port>);

impl Ports {
    /// Ports nobody has spoken about, with the host's ends as given.
    pub(super) fn new(host_open: &[bool]) -> Self {
        Self(
            host_open
                .iter()
                .map(|open| Port {
                    state: PortState::default(),
                    host_open: *open,
                })
                .collect(),
        )
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get_mut(&mut self, port: usize) -> Option<&mut Port> {
        self.0.get_mut(port)
    }

    pub(super) fn guest_open(&self, port: usize) -> bool {
        self.0.get(port).is_some_and(|p| p.state.guest_open)
    }

    /// A message of the driver; ports that do not exist are ignored.
    pub(super) fn hear(&mut self, message: FromDriver) {
        match message {
            FromDriver::DeviceReady { ready } => {
                for port in &mut self.0 {
                    port.state.owes_add = ready;
                }
            }
            FromDriver::PortReady { port, ready } => {
                let number = port;
                if let Some(port) = self.by_number(number) {
                    port.state.ready = ready;
                    port.state.owes_kind = ready;
                    port.state.owes_resize = ready && number == 0;
                    port.state.told_open = false;
                }
            }
            FromDriver::PortOpen { port, open } => {
                if let Some(port) = self.by_number(port) {
                    port.state.guest_open = open;
                }
            }
            FromDriver::Unknown { event } => {
                tracing::debug!(event, "unknown console control event");
            }
        }
    }

    /// The next message the driver is owed, and its port.
    pub(super) fn next(&self) -> Option<(usize, ToDriver)> {
        let mut numbered = self.0.iter().enumerate();
        numbered.find_map(|(number, port)| Some((number, port.next(number)?)))
    }

    /// The driver has got that message.
    pub(super) fn told(&mut self, number: usize, message: ToDriver) {
        let Some(Port { state, .. }) = self.0.get_mut(number) else {
            return;
        };
        match message {
            ToDriver::Add => state.owes_add = false,
            ToDriver::Console | ToDriver::Name => state.owes_kind = false,
            ToDriver::Resize => state.owes_resize = false,
            ToDriver::Open(open) => state.told_open = open,
        }
    }

    /// The terminal has a new size, of which a driver that knows the port is told.
    pub(super) fn resized(&mut self) {
        if let Some(port) = self.0.get_mut(CONSOLE) {
            port.state.owes_resize = port.state.ready;
        }
    }

    /// The driver is gone.
    pub(super) fn reset(&mut self) {
        for port in &mut self.0 {
            port.state = PortState::default();
        }
    }

    pub(super) fn save(&self) -> Vec<PortState> {
        self.0.iter().map(|p| p.state.clone()).collect()
    }

    /// Takes over saved states; false if they are of another number of ports. The host's ends
    /// stay as they are: the driver learns of a difference by a message.
    pub(super) fn restore(&mut self, states: Vec<PortState>) -> bool {
        if states.len() != self.0.len() {
            return false;
        }
        for (port, state) in self.0.iter_mut().zip(states) {
            port.state = state;
        }
        true
    }

    fn by_number(&mut self, number: u32) -> Option<&mut Port> {
        self.0.get_mut(usize::try_from(number).ok()?)
    }
}

#[cfg(test)]
#[path = "ports_test.rs"]
mod tests;

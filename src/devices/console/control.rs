//! Control messages of a multiport console (virtio 1.2, 5.3.6.2): bytes to values and back.

use serde::{Deserialize, Serialize};

/// Size of `struct virtio_console_control`.
pub(super) const CONTROL_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A terminal's size in characters; 0 by 0 is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Size {
    pub(super) columns: u16,
    pub(super) rows: u16,
}

/// What the driver says. The port is as the driver wrote it: any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromDriver {
    DeviceReady {
        ready: bool,
    },
    PortReady {
        port: u32,
        ready: bool,
    },
    PortOpen {
        port: u32,
        open: bool,
    },
    /// An event that is none of the driver's; without effect.
    Unknown {
        event: u16,
    },
}

impl FromDriver {
    pub(super) fn parse(bytes: [u8; CONTROL_BYTES]) -> Self {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let yes = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY => Self::DeviceReady { ready: yes },
            PORT_READY => Self::PortReady { port, ready: yes },
            PORT_OPEN => Self::PortOpen { port, open: yes },
            event => Self::Unknown { event },
        }
    }
}

/// What the device says of one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToDriver {
    Add,
    Console,
    Name,
    Resize,
    Open(bool),
}

impl ToDriver {
    /// The message's bytes.
    pub(super) fn bytes(self, port: u32, name: &str, size: Size) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (PORT_ADD, 1),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Resize => (RESIZE, 0),
            Self::Open(open) => (PORT_OPEN, u16::from(open)),
        };
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        match self {
            Self::Name => bytes.extend(name.as_bytes()),
            // Columns first, as in the standard; older Linux reads rows first.
            Self::Resize => {
                bytes.extend(size.columns.to_le_bytes());
                bytes.extend(size.rows.to_le_bytes());
            }
            Self::Add | Self::Console | Self::Open(_) => {}
        }
        bytes
    }
}

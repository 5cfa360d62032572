//! The agent's end of the virtio-console port: found by name, opened once, framed messages.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::GuestError;
use crate::agent::proto::{self, PORT_NAME, ToGuest, ToHost};

/// How long the kernel may take to announce the port after the agent has started.
const APPEAR: Duration = Duration::from_secs(60);

/// The open port.
#[derive(Debug)]
pub struct Port {
    file: File,
}

impl Port {
    /// Waits for the port to be announced and opens it.
    pub fn open() -> Result<Self, GuestError> {
        let started = Instant::now();
        loop {
            if let Some(path) = find() {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .map_err(GuestError::act(format!("open {}", path.display())))?;
                return Ok(Self { file });
            }
            if started.elapsed() > APPEAR {
                return Err(GuestError::Timeout {
                    act: format!("waiting for the port {PORT_NAME}"),
                    seconds: APPEAR.as_secs(),
                });
            }
            // The port is announced by an interrupt of the console device, with no event that
            // works before udev runs.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn send(&mut self, message: &ToHost) -> Result<(), GuestError> {
        let body = serde_json::to_vec(message)
            .map_err(|e| GuestError::Unusable(format!("encode a message: {e}")))?;
        let framed = proto::frame(&body)
            .ok_or_else(|| GuestError::Unusable("message too long".to_owned()))?;
        self.file
            .write_all(&framed)
            .map_err(GuestError::act("write to the agent port"))
    }

    /// The next message; `None` when the host has closed its end.
    pub fn receive(&mut self) -> Result<Option<ToGuest>, GuestError> {
        let mut prefix = [0; 4];
        match self.file.read_exact(&mut prefix) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(GuestError::act("read the agent port")(e)),
        }
        let len = proto::body_len(prefix)
            .ok_or_else(|| GuestError::Unusable("message too long".to_owned()))?;
        let mut body = vec![0; len];
        self.file
            .read_exact(&mut body)
            .map_err(GuestError::act("read the agent port"))?;
        serde_json::from_slice(&body)
            .map(Some)
            .map_err(|e| GuestError::Unusable(format!("decode a message: {e}")))
    }
}

/// The device file of our port: by its name in sysfs, for udev may not have run yet.
fn find() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            let device = PathBuf::from("/dev").join(entry.file_name());
            return device.exists().then_some(device);
        }
    }
    None
}

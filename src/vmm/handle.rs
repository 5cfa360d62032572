//! Remote control of a running VM: what the rest of the program sees of one.
//!
//! A handle is cheap to clone, keeps nothing of the VM alive, and answers after the VM has ended
//! too. Requests go to the VM's supervisor by one channel.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::error::VmGone;
use super::save::Draft;
use super::snapshot::{SaveError, Snapshot};
use super::spec::{BootPhase, VmEnd};
use super::timeline::Timeline;
use super::vcpu::Ending;
use crate::devices::console::ConsoleSink;
use crate::devices::{DeviceCommand, DeviceKind};

/// What a VM uses, at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmStats {
    /// Bytes of guest memory that are resident.
    pub resident_bytes: u64,
    /// What the balloon holds, in MiB.
    pub balloon_mib: u32,
    /// What the private deltas of its disks take on storage, in bytes.
    pub disk_delta_bytes: u64,
    /// How often the guest broke a device's contract.
    pub guest_faults: u64,
}

/// What a handle asks of the supervisor.
pub(super) enum Request {
    /// To the device of that kind, if the VM has one.
    Device(DeviceKind, DeviceCommand, Sender<()>),
    PowerButton(Sender<()>),
    Pause(Sender<()>),
    Resume(Sender<()>),
    Save(PathBuf, Sender<Result<(), SaveError>>),
    Freeze(Sender<Result<Draft, SaveError>>),
    Stats(Sender<VmStats>),
    ConsoleInput(Vec<u8>),
    ConsoleSize {
        columns: u16,
        rows: u16,
    },
}

/// How the VM ended, once all of it is released.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    end: Mutex<Option<VmEnd>>,
    released: Condvar,
}

impl Outcome {
    pub(super) fn set(&self, end: VmEnd) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.released.notify_all();
    }
}

/// Remote control of a VM.
#[derive(Clone)]
pub struct VmHandle {
    pub(super) shared: Arc<HandleShared>,
}

pub(super) struct HandleShared {
    pub requests: Sender<Request>,
    pub ending: Arc<Ending>,
    pub outcome: Arc<Outcome>,
    pub timeline: Arc<Timeline>,
    pub sink: ConsoleSink,
    pub agent: Mutex<Option<UnixStream>>,
    pub agent_opened: Arc<OnceLock<Instant>>,
}

impl VmHandle {
    /// Asks for the VM's end; never blocks, and asking again changes nothing.
    pub fn kill(&self) {
        self.shared.ending.record(VmEnd::Killed);
    }

    /// Blocks until the VM has ended and everything of it is released.
    pub fn wait(&self) -> VmEnd {
        let outcome = &self.shared.outcome;
        let mut end = outcome.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = &*end {
                return end.clone();
            }
            end = outcome
                .released
                .wait(end)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How it ended; `None` before everything of it is released.
    pub fn end(&self) -> Option<VmEnd> {
        let end = &self.shared.outcome.end;
        end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The host's end of the agent channel: to the first who asks, if there is such a channel.
    pub fn take_agent(&self) -> Option<UnixStream> {
        let agent = &self.shared.agent;
        agent.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Raises or lowers the link of the network card; blocks for microseconds.
    pub fn set_link(&self, up: bool) -> Result<(), VmGone> {
        self.device(DeviceKind::Net, DeviceCommand::SetLink(up))
    }

    /// Asks the guest to give up `mib` of its memory; blocks for microseconds, the guest follows
    /// in its own time.
    pub fn set_balloon_target(&self, mib: u32) -> Result<(), VmGone> {
        self.device(DeviceKind::Balloon, DeviceCommand::SetBalloonTarget(mib))
    }

    /// Presses the power button; the guest shuts down if it listens.
    pub fn power_button(&self) -> Result<(), VmGone> {
        self.ask(Request::PowerButton)
    }

    /// Types on the guest's console. Dropped once the VM has ended.
    pub fn console_input(&self, bytes: &[u8]) {
        let _gone = self.send(Request::ConsoleInput(bytes.to_vec()));
    }

    /// Tells the guest the size of the operator's terminal.
    pub fn console_size(&self, columns: u16, rows: u16) {
        let _gone = self.send(Request::ConsoleSize { columns, rows });
    }

    /// The last output of the guest's consoles, at most `max_bytes`; what is no UTF-8 is replaced.
    pub fn console_tail(&self, max_bytes: usize) -> String {
        self.shared.sink.tail(max_bytes)
    }

    /// When each phase of the boot was reached, since `start` was called.
    pub fn timing(&self) -> Vec<(BootPhase, Duration)> {
        let timeline = &self.shared.timeline;
        if let Some(first) = self.shared.sink.first_output() {
            timeline.mark_at(BootPhase::FirstOutput, first);
        }
        if let Some(opened) = self.shared.agent_opened.get() {
            timeline.mark_at(BootPhase::AgentOpen, *opened);
        }
        timeline.phases()
    }

    /// What it uses now; zeroes once it has ended. Walks the memory's page map: some 10 ms per
    /// 8 GiB.
    pub fn stats(&self) -> VmStats {
        self.ask(Request::Stats).unwrap_or_default()
    }

    /// Stops the vCPUs and takes all devices back to rest; returns when that is done. Pausing a
    /// paused VM changes nothing.
    pub fn pause(&self) -> Result<(), VmGone> {
        self.ask(Request::Pause)
    }

    /// Lets a paused VM go on, or a restored one begin. Its clock goes on where it stood.
    pub fn resume(&self) -> Result<(), VmGone> {
        self.ask(Request::Resume)
    }

    /// Saves a paused VM to a directory, which is made if it is not there; the VM can go on
    /// afterwards. Blocks for as long as it takes to write the memory that was touched.
    pub fn save(&self, directory: &Path) -> Result<(), SaveError> {
        self.ask(|reply| Request::Save(directory.to_owned(), reply))?
    }

    /// Ends a paused golden VM and makes a snapshot of what it leaves: memory and disks are not
    /// copied. Its end is [`VmEnd::Killed`]. Blocks until it is released.
    pub fn freeze(&self) -> Result<Snapshot, SaveError> {
        let draft = self.ask(Request::Freeze)??;
        self.kill();
        match self.wait() {
            VmEnd::Killed => draft.freeze(),
            _ => Err(VmGone.into()),
        }
    }

    fn device(&self, kind: DeviceKind, command: DeviceCommand) -> Result<(), VmGone> {
        self.ask(|reply| Request::Device(kind, command, reply))
    }

    /// Sends a request and waits for its answer, which a VM that ends never gives.
    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Result<T, VmGone> {
        let (reply, answer) = channel();
        self.send(request(reply))?;
        answer.recv().map_err(|_ended| VmGone)
    }

    fn send(&self, request: Request) -> Result<(), VmGone> {
        let sent = self.shared.requests.send(request);
        self.shared.ending.wake();
        sent.map_err(|_ended| VmGone)
    }
}

impl std::fmt::Debug for VmHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmHandle")
            .field("end", &self.end())
            .finish_non_exhaustive()
    }
}

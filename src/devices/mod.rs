//! Virtio devices (virtio 1.2) and the UART.
//!
//! A device is built at rest and held by its transport. At DRIVER_OK it is *moved* to a worker
//! thread together with its queues, and it comes back by one acknowledged call, the same for
//! reset, pause and save: whoever holds the box owns the state, and nothing else reaches it.
//! Nothing here knows KVM, paths or tokio: memory, event descriptors and files are handed in.
//!
//! ```text
//!            activate (moved to the worker)
//!  at rest ───────────────────────────────> running ── guest fault ──> needs reset
//!     ^                                        │                            │
//!     └──────── deactivate (drained) ──────────┴────────────────────────────┘
//! ```

pub mod balloon;
pub mod block;
pub mod config_space;
pub mod console;
pub mod entropy;
pub mod fault;
pub mod interrupt;
pub mod net;
pub mod queue;
#[cfg(test)]
pub mod testing;
pub mod transport;
pub mod uart;
pub mod worker;

use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

pub use config_space::ConfigSpace;
pub use fault::{Fault, GuestFault, HostFault};
pub use interrupt::Interrupt;
pub use queue::{Chain, RunningQueue};

/// Guest memory as every device sees it: volatile accessors only.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// The virtio device ids in use (virtio 1.2, 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u16)]
pub enum DeviceKind {
    Net = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
}

/// Which thread of its VM a device runs on while its driver is active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerThread {
    /// `vmN/dev`: never blocks.
    Devices,
    /// `vmN/blk`: may wait for storage.
    Block,
}

/// What a device gets at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    pub memory: GuestMemory,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// One entry for each queue of [`VirtioDevice::queue_sizes`]; `None` where the driver left it disabled.
    pub queues: Vec<Option<RunningQueue>>,
    /// Raised after the device changed its configuration space.
    pub config_interrupt: Interrupt,
}

/// A descriptor that the worker polls for a device, and the token that names it in `handle`.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    pub fd: RawFd,
    pub events: EventSet,
    pub token: u32,
}

/// What the host asks of a device, at rest or running.
#[derive(Debug)]
pub enum DeviceCommand {
    /// Net: raise or lower the link (VIRTIO_NET_S_LINK_UP and its config interrupt).
    SetLink(bool),
    /// Balloon: the size the guest should give up, in MiB.
    SetBalloonTarget(u32),
    /// Balloon: ask the driver for fresh statistics.
    RequestBalloonStats,
    /// Console: bytes typed by the operator on port 0.
    ConsoleInput(Vec<u8>),
    /// Console: the terminal's size.
    ConsoleSize { columns: u16, rows: u16 },
}

/// A virtio device, at rest or running on its worker.
///
/// The first five methods answer from constants and are legal always. `activate`, `sources`,
/// `handle` and `deactivate` are called on the worker thread, in that order; `command`, `save`
/// and `restore` are called by whoever holds the box. No method may block for longer than
/// storage takes, and only a device of [`WorkerThread::Block`] may wait for storage.
pub trait VirtioDevice: Send {
    fn kind(&self) -> DeviceKind;
    /// Device-type features offered (bits 0..23 and 50..63); the transport adds VERSION_1,
    /// EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64;
    /// The largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// The device-specific configuration space, shared with the transport.
    fn config(&self) -> &Arc<ConfigSpace>;
    fn thread(&self) -> WorkerThread;

    /// Takes memory and queues. From here until `deactivate` the device owns them.
    fn activate(&mut self, activation: Activation) -> Result<(), HostFault>;
    /// All descriptors to poll: queue kicks as well as the device's own. Asked after `activate`
    /// and again after each `handle` that returned [`Progress::SourcesChanged`]. A descriptor
    /// named here stays open until then: the worker forgets it by its number.
    fn sources(&self) -> Vec<Source>;
    /// One of the sources is ready.
    fn handle(&mut self, token: u32, ready: EventSet) -> Result<Progress, Fault>;
    /// Drains what is in flight and gives the queues' positions back, in the order of
    /// `queue_sizes` (`None` for a disabled one). After it the device touches no guest memory.
    fn deactivate(&mut self) -> Vec<Option<virtio_queue::QueueState>>;
    /// The driver reset the device: forget what belongs to the driver. Called at rest.
    fn reset(&mut self) {}

    /// Carries out one request of the host.
    fn command(&mut self, command: DeviceCommand) -> Result<(), HostFault> {
        let _ = command;
        Ok(())
    }
    /// The device's own state, without queues; legal at rest only.
    fn save(&self) -> Result<DeviceState, HostFault>;
    /// Takes a state saved by a device of the same kind and shape; legal at rest only.
    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault>;
}

/// What the worker does after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Done,
    /// Ask for [`VirtioDevice::sources`] again.
    SourcesChanged,
}

/// A device's state as a snapshot stores it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum DeviceState {
    Block(block::BlockState),
    Net(net::NetState),
    Console(console::ConsoleState),
    Entropy,
    Balloon(balloon::BalloonState),
}

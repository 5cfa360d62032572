//! The virtio block device (virtio 1.2, 5.2): one queue, on the thread that may wait for storage.
//!
//! ```text
//!  request.rs  chain -> checked request          engine.rs, ring.rs  io_uring or plain calls
//!  running.rs  queue and answers                 disk.rs             file, base or overlay
//!  execute.rs  each kind of request              overlay.rs, map.rs  base <- golden <- delta
//!  slots.rs    what is in flight                 drive.rs            a disk and its failures
//! ```
//!
//! Deliberately absent: disk formats (a raw file is all there is), several queues, a write cache
//! that the driver can switch, hot resizing.

pub mod disk;
mod drive;
mod engine;
mod execute;
pub mod map;
pub mod overlay;
pub mod request;
mod ring;
mod running;
mod slots;
#[cfg(test)]
pub(in crate::devices) mod testing;
mod vectored;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, ConfigSpace, DeviceKind, DeviceState, Fault, HostFault, Progress, Source,
    VirtioDevice, WorkerThread,
};
pub use disk::Disk;
use disk::SECTOR;
pub use drive::BlockStats;
use drive::Drive;
use engine::Engine;
pub use engine::EngineChoice;
pub use map::{GRANULE, OverlayMap};
pub use overlay::{Golden, Overlay};
use request::{ID_BYTES, Limits, MAX_DISCARD_RANGES, MAX_RANGE_SECTORS, MAX_ZERO_RANGES};
use running::Running;

const QUEUE_SIZE: u16 = 256;
/// Segments of data in a request: a chain holds header and status too.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// log2 of a granule in sectors: the size that is never copied up.
const GRANULE_EXPONENT: u8 = 3;
const _: () = assert!(SECTOR << GRANULE_EXPONENT == GRANULE);

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockSpec {
    pub disk: Disk,
    /// What the guest reads as its serial: at most 20 bytes.
    pub serial: String,
    /// FLUSH reaches the storage; else it is only acknowledged.
    pub durable: bool,
    /// For log lines, such as `vda`.
    pub name: String,
}

/// What a snapshot keeps of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    bytes: u64,
    read_only: bool,
    sync_failed: bool,
    /// Where an overlay's granules are.
    map: Option<OverlayMap>,
}

impl BlockState {
    /// Size of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The overlay's map, to make a [`Golden`] of.
    pub fn map(&self) -> Option<&OverlayMap> {
        self.map.as_ref()
    }
}

/// What wakes the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Kick = 0,
    Engine = 1,
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    drive: Drive,
    limits: Limits,
    config: Arc<ConfigSpace>,
    choice: EngineChoice,
    running: Option<Running>,
}

impl Block {
    /// A disk at rest, as large as its file in whole sectors.
    pub fn new(spec: BlockSpec) -> Result<Self, HostFault> {
        Self::with_engine(spec, EngineChoice::Auto)
    }

    /// As [`Self::new`], with an engine of choice.
    pub fn with_engine(spec: BlockSpec, choice: EngineChoice) -> Result<Self, HostFault> {
        let BlockSpec {
            disk,
            serial,
            durable,
            name,
        } = spec;
        let bytes = disk
            .bytes()
            .map_err(|e| HostFault::new(format!("find the size of disk {name}"), e))?;
        if serial.len() > ID_BYTES {
            return Err(HostFault::msg(format!(
                "serial of disk {name} is longer than {ID_BYTES} bytes"
            )));
        }
        let mut id = [0; ID_BYTES];
        for (byte, from) in id.iter_mut().zip(serial.bytes()) {
            *byte = from;
        }
        let limits = Limits {
            sectors: bytes / SECTOR,
            read_only: disk.is_read_only(),
        };
        Ok(Self {
            config: Arc::new(ConfigSpace::new(config(limits), 0..0)),
            drive: Drive::new(disk, id, durable, name),
            limits,
            choice,
            running: None,
        })
    }

    /// Counters, readable while the disk runs.
    pub fn stats(&self) -> Arc<BlockStats> {
        Arc::clone(&self.drive.stats)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
        ];
        bits.extend(if self.limits.read_only {
            vec![VIRTIO_BLK_F_RO]
        } else {
            vec![VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]
        });
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Block
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        let Some(queue) = activation.queues.into_iter().next().flatten() else {
            return Ok(());
        };
        let engine = Engine::new(self.choice)
            .map_err(|e| HostFault::new("make an io_uring for block i/o", e))?;
        let flushes = activation.features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        let write_through = self.drive.durable && !flushes;
        let running = Running::new(activation.memory, queue, engine, self.limits, write_through);
        // After a pause or a clone, requests may wait that the driver has kicked for before.
        running.kick_self();
        self.running = Some(running);
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(running) = &self.running else {
            return Vec::new();
        };
        let source = |fd, token| Source {
            fd,
            events: EventSet::IN,
            token: token as u32,
        };
        let mut sources = vec![source(running.kick_fd(), Token::Kick)];
        sources.extend(running.engine_fd().map(|fd| source(fd, Token::Engine)));
        sources
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        if let Some(running) = &mut self.running {
            if token == Token::Engine as u32 {
                running.completed(&mut self.drive)?;
            } else {
                running.kicked(&mut self.drive)?;
            }
        }
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<virtio_queue::QueueState>> {
        let running = self.running.take();
        vec![running.map(|running| running.drain(&mut self.drive))]
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        let map = match &self.drive.disk {
            Disk::Overlay(overlay) => Some(overlay.save_map()),
            Disk::Direct(_) | Disk::ReadOnly(_) => None,
        };
        Ok(DeviceState::Block(BlockState {
            bytes: self.limits.sectors * SECTOR,
            read_only: self.limits.read_only,
            sync_failed: self.drive.sync_failed,
            map,
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        let DeviceState::Block(state) = state else {
            return Err(HostFault::msg("saved state is not of a disk"));
        };
        let same_shape =
            state.bytes == self.limits.sectors * SECTOR && state.read_only == self.limits.read_only;
        match (&mut self.drive.disk, state.map) {
            (Disk::Overlay(overlay), Some(map)) if same_shape => overlay
                .restore_map(map)
                .map_err(|e| HostFault::new("restore a disk", e))?,
            (Disk::Direct(_) | Disk::ReadOnly(_), None) if same_shape => {}
            _ => return Err(HostFault::msg("saved disk is of another kind or size")),
        }
        self.drive.sync_failed = state.sync_failed;
        Ok(())
    }
}

/// The configuration space (virtio 1.2, 5.2.4).
fn config(limits: Limits) -> Vec<u8> {
    let granule_blocks = 1_u16 << GRANULE_EXPONENT;
    let mut bytes = Vec::new();
    bytes.extend(limits.sectors.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // size_max: not offered
    bytes.extend(SEG_MAX.to_le_bytes());
    bytes.extend([0; 4]); // geometry: not offered
    bytes.extend(512_u32.to_le_bytes()); // blk_size
    bytes.extend([GRANULE_EXPONENT, 0]); // physical_block_exp, alignment_offset
    bytes.extend(granule_blocks.to_le_bytes()); // min_io_size
    bytes.extend(0_u32.to_le_bytes()); // opt_io_size
    bytes.extend([0, 0]); // writeback: not offered; unused
    bytes.extend(1_u16.to_le_bytes()); // num_queues
    bytes.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
    bytes.extend(MAX_DISCARD_RANGES.to_le_bytes());
    bytes.extend(u32::from(granule_blocks).to_le_bytes()); // discard_sector_alignment
    bytes.extend(MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    bytes.extend(MAX_ZERO_RANGES.to_le_bytes());
    bytes.extend([1, 0, 0, 0]); // write_zeroes_may_unmap, unused
    bytes
}

#[cfg(test)]
#[path = "block_test.rs"]
mod tests;

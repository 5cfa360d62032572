//! The memory balloon (virtio 1.2, 5.5): takes pages back from a guest that can do without.
//!
//! Runs on `vmN/dev`. Pages come by two ways: inflation, when the host asks for a size, and free
//! page reports, which the driver sends by itself. Deflation costs the host nothing until the
//! guest touches the pages again. No hinting, and PAGE_POISON is never offered ([`pages`]).
//!
//! The statistics buffer is held until the host asks for news. It is not stored: when the device
//! stops it goes back by position and is taken anew, so a clone holds its own.

mod active;
mod pages;
pub mod stats;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmm_sys_util::epoll::EventSet;

use super::{
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, HostFault, Progress,
    Source, VirtioDevice, WorkerThread,
};
use active::Active;
use pages::PAGE_BYTES;
pub use stats::{BalloonStats, Statistic};
use stats::{CONFIG_ACTUAL, Numbers};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;
/// Sizes by index, see [`Role`]. Linux refuses a reporting queue of fewer than 32.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 64, 64];
/// Where the host writes the wanted size, in pages.
const CONFIG_NUM_PAGES: usize = 0;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_BYTES;
/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

impl Role {
    /// By the standard (virtio 1.2, 5.5.2) reports come on queue 4. Linux numbers the queues it
    /// uses without gaps, so that without hinting it sends them on 3, and without statistics on
    /// 2. Every index that can only mean reports is taken as such.
    fn of(queue: usize, features: u64) -> Option<Self> {
        let has = |feature| features & feature != 0;
        match queue {
            0 => Some(Self::Inflate),
            1 => Some(Self::Deflate),
            2 if has(F_STATS_VQ) => Some(Self::Statistics),
            2..=4 if has(F_PAGE_REPORTING) => Some(Self::Reporting),
            _ => None,
        }
    }
}

/// What a snapshot keeps of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BalloonState {
    target_mib: u32,
    num_pages: u32,
    actual_pages: u32,
}

/// The balloon.
#[derive(Debug)]
pub struct Balloon {
    config: Arc<ConfigSpace>,
    numbers: Arc<Numbers>,
    /// What the host wants; the driver is told no more than the RAM there is.
    target_mib: u32,
    active: Option<Active>,
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

impl Balloon {
    pub fn new() -> Self {
        // num_pages and actual; the driver writes the second. What follows belongs to features
        // that are not offered.
        let config = ConfigSpace::new(vec![0; 8], CONFIG_ACTUAL..CONFIG_ACTUAL + 4);
        Self {
            config: Arc::new(config),
            numbers: Arc::default(),
            target_mib: 0,
            active: None,
        }
    }

    /// A view that stays valid wherever the device goes.
    pub fn stats(&self) -> BalloonStats {
        BalloonStats::new(&self.numbers, &self.config)
    }

    fn num_pages(&self) -> u32 {
        let mut pages = [0; 4];
        self.config.read(CONFIG_NUM_PAGES, &mut pages);
        u32::from_le_bytes(pages)
    }

    /// Tells the driver the wanted size, if that is news.
    fn apply_target(&self) {
        let Some(active) = &self.active else { return };
        let pages = (u64::from(self.target_mib) * PAGES_PER_MIB).min(active.ram_pages());
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        if pages != self.num_pages() {
            self.config
                .write_by_device(CONFIG_NUM_PAGES, &pages.to_le_bytes());
            active.config_interrupt.signal();
        }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        self.active = Some(Active::new(activation));
        self.apply_target();
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        self.active
            .as_ref()
            .map(Active::sources)
            .unwrap_or_default()
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        if let (Some(active), Ok(index)) = (&mut self.active, usize::try_from(token)) {
            active.serve(index, &self.numbers)?;
        }
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<QueueState>> {
        match self.active.take() {
            Some(active) => active.stop(),
            None => vec![None; QUEUE_SIZES.len()],
        }
    }

    fn reset(&mut self) {
        // A driver that starts over has no pages in the balloon.
        self.config.write_by_device(CONFIG_ACTUAL, &[0; 4]);
    }

    fn command(&mut self, command: DeviceCommand) -> Result<(), HostFault> {
        match command {
            DeviceCommand::SetBalloonTarget(mib) => {
                self.target_mib = mib;
                self.apply_target();
            }
            DeviceCommand::RequestBalloonStats => {
                if let Some(active) = &mut self.active {
                    active.return_statistics();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Balloon(BalloonState {
            target_mib: self.target_mib,
            num_pages: self.num_pages(),
            actual_pages: self.stats().actual_pages(),
        }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        let DeviceState::Balloon(state) = state else {
            return Err(HostFault::msg("saved state is not a balloon's"));
        };
        self.target_mib = state.target_mib;
        self.config
            .write_by_device(CONFIG_NUM_PAGES, &state.num_pages.to_le_bytes());
        self.config
            .write_by_device(CONFIG_ACTUAL, &state.actual_pages.to_le_bytes());
        Ok(())
    }
}

#[cfg(test)]
#[path = "balloon_test.rs"]
mod tests;

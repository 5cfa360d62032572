//! The memory balloon (virtio 1.2, 5.5): takes pages back from a guest that can do without.
//!
//! Runs on `vmN/dev`. Pages come by two ways: inflation, when the host asks for a size, and free
//! page reports, which the driver sends by itself. Deflation costs the host nothing until the
//! guest touches the pages again. No hinting, and PAGE_POISON is never offered ([`pages`]).
//!
//! The statistics buffer is held until the host asks for news. It is not stored: when the device
//! stops it goes back by position and is taken anew, so a clone holds its own.

mod pages;
pub mod stats;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::queue::read_segments;
use super::{
    Activation, Chain, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, GuestFault,
    GuestMemory, HostFault, Interrupt, Progress, RunningQueue, Source, VirtioDevice, WorkerThread,
};
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
/// Page numbers in one request; Linux sends at most 256.
const MAX_PAGE_NUMBERS: u64 = 16 << 10;
/// A report names up to 32 free blocks of 4 MiB; its length costs nothing by itself.
const MAX_REPORT_BYTES: u64 = 1 << 30;
/// Requests and bytes of one wake-up, before the other devices of the loop get their turn.
const MAX_REQUESTS: u32 = 32;
const MAX_BYTES: u64 = 256 << 20;

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

/// The device between activation and deactivation.
#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queues: Vec<(Option<RunningQueue>, Option<Role>)>,
    config_interrupt: Interrupt,
    /// Head of the statistics buffer that waits for the host to ask.
    held: Option<u16>,
    /// Used again for each request.
    chain: Chain,
    bytes: Vec<u8>,
    page_numbers: Vec<u32>,
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
        let ram: u64 = active.memory.iter().map(GuestMemoryRegion::len).sum();
        let pages = (u64::from(self.target_mib) * PAGES_PER_MIB).min(ram / PAGE_BYTES);
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
        let features = activation.features;
        let queues = activation.queues.into_iter().enumerate();
        let queues: Vec<_> = queues
            .map(|(index, mut queue)| {
                let role = Role::of(index, features);
                if let (Some(queue), Some(Role::Reporting)) = (&mut queue, role) {
                    queue.set_max_chain_bytes(MAX_REPORT_BYTES);
                }
                (queue, role)
            })
            .collect();
        // What the driver made available before will not be kicked again.
        queues
            .iter()
            .filter_map(|(queue, _)| queue.as_ref())
            .for_each(kick_again);
        self.active = Some(Active {
            memory: activation.memory,
            queues,
            config_interrupt: activation.config_interrupt,
            held: None,
            chain: Chain::default(),
            bytes: Vec::new(),
            page_numbers: Vec::new(),
        });
        self.apply_target();
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        (0..)
            .zip(queues)
            .filter_map(|(token, (queue, _))| {
                Some(Source {
                    fd: queue.as_ref()?.kick_fd(),
                    events: EventSet::IN,
                    token,
                })
            })
            .collect()
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        if let (Some(active), Ok(index)) = (&mut self.active, usize::try_from(token)) {
            active.serve(index, &self.numbers)?;
        }
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<QueueState>> {
        let Some(mut active) = self.active.take() else {
            return vec![None; QUEUE_SIZES.len()];
        };
        if active.held.take().is_some()
            && let Some(queue) = active.statistics_queue()
        {
            queue.undo_pop();
        }
        active
            .queues
            .iter()
            .map(|(queue, _)| queue.as_ref().map(RunningQueue::state))
            .collect()
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

impl Active {
    /// Takes a queue's requests, within a budget; what is left signals again.
    fn serve(&mut self, index: usize, numbers: &Numbers) -> Result<(), GuestFault> {
        let Some((Some(queue), role)) = self.queues.get_mut(index) else {
            return Ok(());
        };
        queue.consume_kick();
        // A queue of a feature that was not negotiated is never read.
        let Some(role) = role else { return Ok(()) };
        let mut requests = MAX_REQUESTS;
        let mut bytes = MAX_BYTES;
        loop {
            while requests > 0 && bytes > 0 && queue.pop_into(&self.memory, &mut self.chain)? {
                requests -= 1;
                let named = match role {
                    Role::Inflate => {
                        let named = read_page_numbers(
                            &self.memory,
                            &self.chain,
                            &mut self.bytes,
                            &mut self.page_numbers,
                        )?;
                        let given: u64 = pages::ranges(&mut self.page_numbers)
                            .map(|range| pages::give_back(&self.memory, &range))
                            .sum();
                        numbers.add_inflated(named, given);
                        named
                    }
                    // The guest has its pages back when it touches them.
                    Role::Deflate => 0,
                    Role::Reporting => {
                        let named = self.chain.writable_bytes();
                        let given = give_back_report(&self.memory, &self.chain);
                        numbers.add_reported(named, given);
                        named
                    }
                    Role::Statistics => {
                        if self.held.is_some() {
                            return Err(fault("two statistics buffers at once"));
                        }
                        read_statistics(&self.memory, &self.chain, &mut self.bytes, numbers);
                        self.held = Some(self.chain.head);
                        continue;
                    }
                };
                bytes = bytes.saturating_sub(named);
                queue.push(&self.memory, self.chain.head, 0)?;
            }
            queue.signal(&self.memory)?;
            if requests == 0 || bytes == 0 {
                kick_again(queue);
                return Ok(());
            }
            if !queue.enable_kicks(&self.memory)? {
                return Ok(());
            }
            requests -= 1;
        }
    }

    fn statistics_queue(&mut self) -> Option<&mut RunningQueue> {
        self.queues
            .iter_mut()
            .find(|(_, role)| *role == Some(Role::Statistics))
            .and_then(|(queue, _)| queue.as_mut())
    }

    /// Gives the held buffer back: the driver fills it anew (virtio 1.2, 5.5.6.3).
    fn return_statistics(&mut self) {
        let Some(head) = self.held.take() else { return };
        let memory = self.memory.clone();
        if let Some(queue) = self.statistics_queue() {
            // Both rings were checked to lie in memory at activation.
            let _written = queue
                .push(&memory, head, 0)
                .and_then(|()| queue.signal(&memory));
        }
    }
}

/// Copies the page numbers of an inflate request; returns how many bytes of pages they name.
fn read_page_numbers(
    memory: &GuestMemory,
    chain: &Chain,
    bytes: &mut Vec<u8>,
    page_numbers: &mut Vec<u32>,
) -> Result<u64, GuestFault> {
    const NUMBER_BYTES: u64 = 4;
    let length = chain.readable_bytes();
    if !length.is_multiple_of(NUMBER_BYTES) || length > MAX_PAGE_NUMBERS * NUMBER_BYTES {
        return Err(fault("page numbers of an impossible length"));
    }
    bytes.resize(usize::try_from(length).unwrap_or(0), 0);
    if !read_segments(memory, &chain.readable, 0, bytes) {
        return Err(GuestFault::RingMemory);
    }
    let (numbers, _rest) = bytes.as_chunks::<4>();
    page_numbers.clear();
    page_numbers.extend(numbers.iter().map(|n| u32::from_le_bytes(*n)));
    Ok(page_numbers.len() as u64 * PAGE_BYTES)
}

/// Gives back what a free page report names; parts of pages stay.
fn give_back_report(memory: &GuestMemory, chain: &Chain) -> u64 {
    chain
        .writable
        .iter()
        .map(|block| {
            let start = block.addr.0;
            let range = pages::whole_pages(start..start.saturating_add(u64::from(block.len)));
            pages::give_back(memory, &range)
        })
        .sum()
}

fn read_statistics(memory: &GuestMemory, chain: &Chain, bytes: &mut Vec<u8>, numbers: &Numbers) {
    let length = usize::try_from(chain.readable_bytes()).unwrap_or(usize::MAX);
    bytes.resize(length.min(stats::MAX_BYTES), 0);
    if read_segments(memory, &chain.readable, 0, bytes) {
        numbers.record(bytes);
    }
}

fn kick_again(queue: &RunningQueue) {
    // EAGAIN means the counter is full: the loop wakes as it is.
    let _full = queue.kick().write(1);
}

fn fault(problem: &'static str) -> GuestFault {
    GuestFault::Request {
        device: "balloon",
        problem,
    }
}

#[cfg(test)]
#[path = "balloon_test.rs"]
mod tests;

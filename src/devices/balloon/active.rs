//! The balloon between activation and deactivation: what each queue's requests do.

use virtio_queue::QueueState;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::Role;
use super::pages::{self, PAGE_BYTES};
use super::stats::{self, Numbers};
use crate::devices::queue::read_segments;
use crate::devices::{Activation, Chain, GuestFault, GuestMemory, Interrupt, RunningQueue, Source};

/// Page numbers in one request; Linux sends at most 256.
const MAX_PAGE_NUMBERS: u64 = 16 << 10;
/// A report names up to 32 free blocks of 4 MiB; its length costs nothing by itself.
const MAX_REPORT_BYTES: u64 = 1 << 30;
/// Requests and bytes of one wake-up, before the other devices of the loop get their turn.
const MAX_REQUESTS: u32 = 32;
const MAX_BYTES: u64 = 256 << 20;

/// Queues and memory, owned by the worker.
#[derive(Debug)]
pub(super) struct Active {
    memory: GuestMemory,
    queues: Vec<(Option<RunningQueue>, Option<Role>)>,
    pub config_interrupt: Interrupt,
    /// Head of the statistics buffer that waits for the host to ask.
    held: Option<u16>,
    /// Used again for each request.
    chain: Chain,
    bytes: Vec<u8>,
    page_numbers: Vec<u32>,
}

impl Active {
    pub fn new(activation: Activation) -> Self {
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
        Self {
            memory: activation.memory,
            queues,
            config_interrupt: activation.config_interrupt,
            held: None,
            chain: Chain::default(),
            bytes: Vec::new(),
            page_numbers: Vec::new(),
        }
    }

    pub fn ram_pages(&self) -> u64 {
        let bytes: u64 = self.memory.iter().map(GuestMemoryRegion::len).sum();
        bytes / PAGE_BYTES
    }

    /// The kicks, each named by its queue's index.
    pub fn sources(&self) -> Vec<Source> {
        (0..)
            .zip(&self.queues)
            .filter_map(|(token, (queue, _))| {
                Some(Source {
                    fd: queue.as_ref()?.kick_fd(),
                    events: EventSet::IN,
                    token,
                })
            })
            .collect()
    }

    /// Lets go of the queues; returns where it stopped.
    pub fn stop(mut self) -> Vec<Option<QueueState>> {
        if self.held.take().is_some()
            && let Some(queue) = self.statistics_queue()
        {
            queue.undo_pop();
        }
        self.queues
            .iter()
            .map(|(queue, _)| queue.as_ref().map(RunningQueue::state))
            .collect()
    }

    /// Takes a queue's requests, within a budget; what is left signals again.
    pub fn serve(&mut self, index: usize, numbers: &Numbers) -> Result<(), GuestFault> {
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
    pub fn return_statistics(&mut self) {
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

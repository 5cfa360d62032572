//! A driver for tests: rings in real guest memory, and a worker that runs in the caller's thread.

use std::os::fd::RawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::OnHostFault;
use super::{
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, Fault, GuestFault,
    GuestMemory, HostFault, Interrupt, Progress, RunningQueue, Source, VirtioDevice, WorkerThread,
};

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Room that one descriptor's buffer has in a ring's own memory.
pub const BUFFER: u64 = 4096;

/// `mib` of guest memory from address 0.
pub fn memory(mib: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

pub fn event_fd() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

/// Waits until `fd` was signalled, and clears it.
pub fn wait_for(fd: &EventFd) {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    let raw = std::os::fd::AsRawFd::as_raw_fd(fd);
    epoll.ctl(ControlOperation::Add, raw, event).unwrap();
    let mut ready = [EpollEvent::default()];
    assert_eq!(epoll.wait(20_000, &mut ready).unwrap(), 1, "signalled");
    fd.read().unwrap();
}

/// The driver's side of one queue: table, rings and a page for each descriptor, at `base`.
#[derive(Debug)]
pub struct Ring {
    pub mem: GuestMemory,
    pub base: u64,
    pub size: u16,
    pub kick: Arc<EventFd>,
    /// What the device interrupts with.
    pub call: Arc<EventFd>,
    avail: u16,
    used: u16,
    slot: u16,
}

impl Ring {
    /// Bytes that a ring of `size` takes.
    pub fn bytes(size: u16) -> u64 {
        0x1_0000 + u64::from(size) * BUFFER
    }

    pub fn new(mem: &GuestMemory, base: u64, size: u16) -> Self {
        Self {
            mem: mem.clone(),
            base,
            size,
            kick: event_fd(),
            call: event_fd(),
            avail: 0,
            used: 0,
            slot: 0,
        }
    }

    pub fn table(&self) -> u64 {
        self.base
    }

    pub fn avail_ring(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0xc000
    }

    /// Where descriptor `index` has its buffer.
    pub fn buffer(&self, index: u16) -> u64 {
        self.base + 0x1_0000 + u64::from(index) * BUFFER
    }

    /// The device's side, as at DRIVER_OK.
    pub fn queue(&self, event_idx: bool) -> RunningQueue {
        self.queue_at(event_idx, 0, 0)
    }

    /// The device's side, as after a restore.
    pub fn queue_at(&self, event_idx: bool, next_avail: u16, next_used: u16) -> RunningQueue {
        let queue = Queue::try_from(QueueState {
            max_size: self.size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.table(),
            avail_ring: self.avail_ring(),
            used_ring: self.used_ring(),
        })
        .unwrap();
        let interrupt = Interrupt::new(Arc::clone(&self.call));
        RunningQueue::new(queue, Arc::clone(&self.kick), interrupt)
    }

    /// Writes one descriptor at `table`, which need not be the ring's.
    pub fn describe_at(&self, table: u64, index: u16, (addr, len, flags, next): Descriptor) {
        let at = table + u64::from(index) * 16;
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub fn describe(&self, index: u16, descriptor: Descriptor) {
        self.describe_at(self.table(), index, descriptor);
    }

    /// Makes `head` available, without a kick.
    pub fn offer(&mut self, head: u16) {
        let at = self.avail_ring() + 4 + u64::from(self.avail % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(at)).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        let at = GuestAddress(self.avail_ring() + 2);
        self.mem.write_obj(index, at).unwrap();
    }

    /// `used_event`: after which used entry the driver wants its interrupt.
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail_ring() + 4 + u64::from(self.size) * 2;
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Sends `bytes` (at most a page) in one descriptor and kicks; the head used.
    pub fn send(&mut self, bytes: &[u8]) -> u16 {
        let head = self.next_slot();
        let at = self.buffer(head);
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        self.describe(head, (at, u32::try_from(bytes.len()).unwrap(), 0, 0));
        self.offer(head);
        self.kick();
        head
    }

    /// Offers room for `len` bytes (at most a page) and kicks; the head used.
    pub fn offer_room(&mut self, len: u32) -> u16 {
        let head = self.next_slot();
        self.describe(head, (self.buffer(head), len, WRITE, 0));
        self.offer(head);
        self.kick();
        head
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used entry: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self.read(self.used_ring() + 2);
        if index == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        self.used = self.used.wrapping_add(1);
        self.set_used_event(self.used);
        let head: u32 = self.read(at);
        Some((u16::try_from(head).unwrap(), self.read(at + 4)))
    }

    /// The same, waiting for the device's interrupt where there is none yet.
    pub fn wait_used(&mut self) -> (u16, u32) {
        loop {
            // Where to interrupt is in memory before the index is looked at.
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if let Some(used) = self.take_used() {
                return used;
            }
            wait_for(&self.call);
        }
    }

    /// What the device wrote into the next used buffer.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.take_used()?;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        let at = GuestAddress(self.buffer(head));
        self.mem.read_slice(&mut bytes, at).unwrap();
        Some(bytes)
    }

    /// Whether the device has interrupted since the last question.
    pub fn interrupted(&self) -> bool {
        self.call.read().is_ok()
    }

    fn next_slot(&mut self) -> u16 {
        let slot = self.slot;
        self.slot = (slot + 1) % self.size;
        slot
    }

    fn read<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }
}

/// Address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// Serves a running device until none of its sources is ready; panics if that never comes.
pub fn run_ready(device: &mut dyn VirtioDevice) -> Result<(), Fault> {
    for _ in 0..10_000 {
        let epoll = Epoll::new().unwrap();
        let sources = device.sources();
        for source in &sources {
            let event = EpollEvent::new(source.events, u64::from(source.token));
            epoll.ctl(ControlOperation::Add, source.fd, event).unwrap();
        }
        let mut ready = vec![EpollEvent::default(); sources.len().max(1)];
        let count = epoll.wait(0, &mut ready).unwrap();
        if count == 0 {
            return Ok(());
        }
        for event in &ready[..count] {
            let token = u32::try_from(event.data()).unwrap();
            if device.handle(token, event.event_set())? == Progress::SourcesChanged {
                break;
            }
        }
    }
    panic!("the device's sources never become quiet");
}

/// What a probe does with its next event or call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Return every request.
    Serve,
    GuestFault,
    HostFault,
    Panic,
    /// Name a descriptor that cannot be polled among the sources.
    BadSource,
    /// Fail to activate.
    RefuseToStart,
}

/// What happened to a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Activated {
        queues: usize,
    },
    /// That many requests were returned.
    Served(u32),
    Commanded,
    Deactivated,
    Reset,
}

/// A device that returns what it gets, and misbehaves as its script says.
#[derive(Debug)]
pub struct Probe {
    config: Arc<ConfigSpace>,
    sizes: Vec<u16>,
    act: Arc<Mutex<Act>>,
    seen: Sender<Seen>,
    running: Option<Activation>,
}

/// The test's side of a probe.
#[derive(Debug)]
pub struct Script {
    act: Arc<Mutex<Act>>,
    seen: Receiver<Seen>,
}

impl Script {
    pub fn set(&self, act: Act) {
        *self.act.lock().unwrap() = act;
    }

    /// The next thing that happens to the probe.
    pub fn next(&self) -> Seen {
        self.seen
            .recv_timeout(Duration::from_secs(20))
            .expect("something happens to the probe")
    }

    /// What happened that nobody asked for.
    pub fn rest(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }
}

/// A probe with two queues of at most 16, and its script.
pub fn probe() -> (Box<Probe>, Script) {
    let act = Arc::new(Mutex::new(Act::Serve));
    let (sender, seen) = channel();
    let probe = Probe {
        config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4, 5, 6], 2..4)),
        sizes: vec![16, 16],
        act: Arc::clone(&act),
        seen: sender,
        running: None,
    };
    (Box::new(probe), Script { act, seen })
}

/// Host faults as they are reported.
pub fn faults() -> (OnHostFault, Receiver<String>) {
    let (sender, receiver) = channel();
    let on_fault = move |fault: HostFault| sender.send(fault.act).unwrap_or_default();
    (Arc::new(on_fault), receiver)
}

impl Probe {
    fn act(&self) -> Act {
        *self.act.lock().unwrap()
    }

    fn say(&self, seen: Seen) {
        // The test may have ended.
        let _ended = self.seen.send(seen);
    }

    fn serve(&mut self, index: u32) -> Result<u32, GuestFault> {
        let Some(Activation { memory, queues, .. }) = &mut self.running else {
            return Ok(0);
        };
        let Some(queue) = queues.get_mut(index as usize).and_then(Option::as_mut) else {
            return Ok(0);
        };
        queue.consume_kick();
        let mut served = 0;
        while let Some(chain) = queue.pop(memory)? {
            queue.push(memory, chain.head, 0)?;
            served += 1;
        }
        queue.signal(memory)?;
        queue.enable_kicks(memory)?;
        Ok(served)
    }
}

impl VirtioDevice for Probe {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, activation: Activation) -> Result<(), HostFault> {
        if self.act() == Act::RefuseToStart {
            return Err(HostFault::msg("start the probe"));
        }
        let queues = activation.queues.iter().flatten().count();
        self.running = Some(activation);
        self.say(Seen::Activated { queues });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let queues = self.running.iter().flat_map(|r| &r.queues);
        let mut sources: Vec<Source> = (0..)
            .zip(queues)
            .filter_map(|(token, queue)| {
                Some(Source {
                    fd: queue.as_ref()?.kick_fd(),
                    events: EventSet::IN,
                    token,
                })
            })
            .collect();
        if self.act() == Act::BadSource {
            sources.push(Source {
                fd: RawFd::MAX,
                events: EventSet::IN,
                token: 9,
            });
        }
        sources
    }

    fn handle(&mut self, token: u32, _ready: EventSet) -> Result<Progress, Fault> {
        match self.act() {
            Act::GuestFault => Err(GuestFault::RingMemory.into()),
            Act::HostFault => Err(HostFault::msg("serve the probe").into()),
            Act::Panic => panic!("the probe panics as its script says"),
            Act::BadSource => Ok(Progress::SourcesChanged),
            Act::Serve | Act::RefuseToStart => {
                let served = self.serve(token)?;
                self.say(Seen::Served(served));
                Ok(Progress::Done)
            }
        }
    }

    fn deactivate(&mut self) -> Vec<Option<QueueState>> {
        self.say(Seen::Deactivated);
        let queues = self.running.take().map(|r| r.queues).unwrap_or_default();
        queues
            .iter()
            .map(|q| q.as_ref().map(RunningQueue::state))
            .collect()
    }

    fn reset(&mut self) {
        self.say(Seen::Reset);
    }

    fn command(&mut self, _command: DeviceCommand) -> Result<(), HostFault> {
        self.say(Seen::Commanded);
        match self.act() {
            Act::HostFault => Err(HostFault::msg("command the probe")),
            Act::Panic => panic!("the probe panics as its script says"),
            _ => Ok(()),
        }
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Entropy)
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), HostFault> {
        match state {
            DeviceState::Entropy => Ok(()),
            _ => Err(HostFault::msg("not a probe's state")),
        }
    }
}

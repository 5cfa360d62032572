//! A guest's driver for tests: real guest memory, a mock split queue, and the device driven
//! through its trait as the worker would.
#![expect(
    unsafe_code,
    reason = "poll and a private mount have no safe form here"
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{Block, BlockSpec, Disk, EngineChoice, Golden, Overlay};
use crate::devices::{Activation, Fault, GuestMemory, Interrupt, RunningQueue, VirtioDevice};

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
pub const ENGINES: [EngineChoice; 2] = [EngineChoice::Ring, EngineChoice::Plain];
/// FLUSH, DISCARD, WRITE_ZEROES and VERSION_1.
pub const FEATURES: u64 = (1 << 9) | (1 << 13) | (1 << 14) | (1 << 32);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Longest wait for the host's storage: far beyond what a healthy one takes.
const PATIENCE_MS: i32 = 20_000;

/// Guest RAM of 32 MiB.
pub fn ram() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()
}

pub fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    file
}

pub fn overlay(base: &[u8], golden: Option<Golden>) -> Overlay {
    Overlay::new(Arc::new(file_of(base)), golden, file_of(&[])).unwrap()
}

/// A durable disk named vda.
pub fn block(disk: Disk, engine: EngineChoice) -> Block {
    let spec = BlockSpec {
        disk,
        serial: "serial-0".to_owned(),
        durable: true,
        name: "vda".to_owned(),
    };
    Block::with_engine(spec, engine).unwrap()
}

/// A buffer of a request: what the device may read, or how much it may write.
#[derive(Debug, Clone)]
pub enum Buffer {
    Out(Vec<u8>),
    In(u32),
}

/// Where the parts of the queue lie. The mock's own layout lets its rings overlap.
pub const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A split queue of 256, as its driver sees it.
pub struct Rings<'a> {
    pub table: DescriptorTable<'a, GuestMemory>,
    pub avail: AvailRing<'a, GuestMemory>,
    pub used: UsedRing<'a, GuestMemory>,
}

impl<'a> Rings<'a> {
    pub fn new(memory: &'a GuestMemory) -> Self {
        Self {
            table: DescriptorTable::new(memory, GuestAddress(TABLE), 256),
            avail: AvailRing::new(memory, GuestAddress(AVAIL), 256),
            used: UsedRing::new(memory, GuestAddress(USED), 256),
        }
    }

    /// The device's end of it, at its start.
    pub fn device_end() -> Queue {
        Self::device_end_with(false)
    }

    /// The same; with `event_idx`, interrupts come where [`Self::expect_after`] says.
    pub fn device_end_with(event_idx: bool) -> Queue {
        Queue::try_from(QueueState {
            max_size: 256,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size: 256,
            ready: true,
            desc_table: TABLE,
            avail_ring: AVAIL,
            used_ring: USED,
        })
        .unwrap()
    }
}

impl Rings<'_> {
    /// EVENT_IDX: asks for an interrupt after the answer number `index`.
    pub fn expect_after(memory: &GuestMemory, index: u16) {
        // used_event stands behind the available ring's entries.
        memory
            .write_obj(index, GuestAddress(AVAIL + 4 + 2 * 256))
            .unwrap();
    }
}

/// A guest with one disk.
pub struct Guest<'a> {
    pub memory: &'a GuestMemory,
    pub rings: Rings<'a>,
    pub device: Block,
    pub kick: Arc<EventFd>,
    pub interrupt: Arc<EventFd>,
    seen: u16,
    next_slot: u16,
}

/// An answered request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub head: u16,
    pub len: u32,
}

impl<'a> Guest<'a> {
    pub fn new(memory: &'a GuestMemory, device: Block) -> Self {
        Self::with_features(memory, device, FEATURES)
    }

    pub fn with_features(memory: &'a GuestMemory, device: Block, features: u64) -> Self {
        let mut guest = Self {
            memory,
            rings: Rings::new(memory),
            device,
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            interrupt: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            seen: 0,
            next_slot: 0,
        };
        guest.activate(Rings::device_end(), features);
        guest
    }

    fn activate(&mut self, queue: Queue, features: u64) {
        let interrupt = Interrupt::new(Arc::clone(&self.interrupt));
        let running = RunningQueue::new(queue, Arc::clone(&self.kick), interrupt);
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                features,
                queues: vec![Some(running)],
                config_interrupt: Interrupt::none(),
            })
            .unwrap();
    }

    /// Takes the device back, as a pause does.
    pub fn pause(&mut self) -> QueueState {
        self.device.deactivate().remove(0).unwrap()
    }

    /// Goes on where [`Self::pause`] stopped.
    pub fn resume(&mut self, state: QueueState) {
        self.activate(Queue::try_from(state).unwrap(), FEATURES);
    }

    /// Where the data of a head lies: 64 KiB for each.
    pub fn data(head: u16) -> GuestAddress {
        GuestAddress(0x10_0000 + u64::from(head) * 0x1_0000)
    }

    /// Where the header of a head lies.
    pub fn header(head: u16) -> GuestAddress {
        GuestAddress(0x1_0000 + u64::from(head) * 64)
    }

    pub fn status(head: u16) -> GuestAddress {
        GuestAddress(Self::header(head).0 + 32)
    }

    /// Puts raw descriptors at `head` and makes it available, without a kick.
    pub fn offer(&mut self, head: u16, descriptors: &[(u64, u32, bool)]) {
        let last = descriptors.len() - 1;
        for (i, (addr, len, writable)) in descriptors.iter().enumerate() {
            let index = head + u16::try_from(i).unwrap();
            let mut flags = if i < last { NEXT } else { 0 };
            if *writable {
                flags |= WRITE;
            }
            let descriptor = Descriptor::new(*addr, *len, flags, index + 1);
            self.store(index, descriptor);
        }
        self.make_available(head);
    }

    /// As [`Self::offer`], in an indirect table: one head each, whatever the length.
    pub fn offer_indirect(&mut self, head: u16, descriptors: &[(u64, u32, bool)]) {
        let table = 0x4_0000 + u64::from(head) * 256;
        let last = descriptors.len() - 1;
        for (i, (addr, len, writable)) in descriptors.iter().enumerate() {
            let mut flags = if i < last { NEXT } else { 0 };
            if *writable {
                flags |= WRITE;
            }
            let next = u16::try_from(i + 1).unwrap();
            let descriptor = RawDescriptor::from(Descriptor::new(*addr, *len, flags, next));
            let at = GuestAddress(table + 16 * i as u64);
            self.memory.write_obj(descriptor, at).unwrap();
        }
        let len = 16 * u32::try_from(descriptors.len()).unwrap();
        self.store(head, Descriptor::new(table, len, INDIRECT, 0));
        self.make_available(head);
    }

    fn store(&self, index: u16, descriptor: Descriptor) {
        let raw = RawDescriptor::from(descriptor);
        self.rings.table.store(index, raw).unwrap();
    }

    pub fn make_available(&mut self, head: u16) {
        let index = self.rings.avail.idx().load();
        let slot = usize::from(index % 256);
        self.rings.avail.ring().ref_at(slot).unwrap().store(head);
        self.rings.avail.idx().store(index.wrapping_add(1));
    }

    /// Writes a request's header.
    pub fn write_header(&self, head: u16, kind: u32, sector: u64) {
        self.memory.write_obj(kind, Self::header(head)).unwrap();
        let at = GuestAddress(Self::header(head).0 + 4);
        self.memory.write_obj(0_u32, at).unwrap();
        let at = GuestAddress(Self::header(head).0 + 8);
        self.memory.write_obj(sector, at).unwrap();
        self.memory.write_obj(0xee_u8, Self::status(head)).unwrap();
    }

    /// Offers a request of the usual shape in the next free slot; returns its head.
    pub fn request(&mut self, kind: u32, sector: u64, buffer: Option<Buffer>) -> u16 {
        let head = self.next_slot * 4;
        self.next_slot = (self.next_slot + 1) % 63;
        self.write_header(head, kind, sector);
        let mut descriptors = vec![(Self::header(head).0, 16, false)];
        match buffer {
            Some(Buffer::Out(bytes)) => {
                self.memory.write_slice(&bytes, Self::data(head)).unwrap();
                let len = u32::try_from(bytes.len()).unwrap();
                descriptors.push((Self::data(head).0, len, false));
            }
            Some(Buffer::In(len)) => descriptors.push((Self::data(head).0, len, true)),
            None => {}
        }
        descriptors.push((Self::status(head).0, 1, true));
        self.offer(head, &descriptors);
        head
    }

    /// Kicks and runs the device until `count` more requests are answered.
    pub fn run(&mut self, count: u16) -> Result<Vec<Answer>, Fault> {
        self.kick.write(1).unwrap();
        let mut answers = Vec::new();
        while answers.len() < usize::from(count) {
            self.turn(true)?;
            answers.extend(self.answers());
        }
        Ok(answers)
    }

    /// Lets the device handle what is ready; with `wait` there must be something.
    pub fn turn(&mut self, wait: bool) -> Result<(), Fault> {
        let sources = self.device.sources();
        let mut fds: Vec<libc::pollfd> = sources
            .iter()
            .map(|source| libc::pollfd {
                fd: source.fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let timeout = if wait { PATIENCE_MS } else { 0 };
        let ready = loop {
            let count = fds.len() as libc::nfds_t;
            // SAFETY: the array is ours and as long as we say.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) };
            if ready >= 0 {
                break ready;
            }
        };
        assert!(ready > 0 || !wait, "nothing happens");
        for (fd, source) in fds.iter().zip(sources) {
            if fd.revents != 0 {
                self.device.handle(source.token, EventSet::IN)?;
            }
        }
        Ok(())
    }

    /// What the device has answered since the last look.
    pub fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        while self.seen != self.rings.used.idx().load() {
            let slot = usize::from(self.seen % 256);
            let element = self.rings.used.ring().ref_at(slot).unwrap().load();
            answers.push(Answer {
                head: u16::try_from(element.id()).unwrap(),
                len: element.len(),
            });
            self.seen = self.seen.wrapping_add(1);
        }
        answers
    }

    pub fn status_of(&self, head: u16) -> u8 {
        self.memory.read_obj(Self::status(head)).unwrap()
    }

    pub fn bytes_of(&self, head: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, Self::data(head))
            .unwrap();
        bytes
    }

    /// One request from offer to answer: status and used length.
    pub fn call(&mut self, kind: u32, sector: u64, buffer: Option<Buffer>) -> (u8, u32) {
        let head = self.request(kind, sector, buffer);
        let answers = self.run(1).unwrap();
        assert_eq!(answers.len(), 1);
        assert_eq!(answers[0].head, head);
        (self.status_of(head), answers[0].len)
    }

    pub fn read(&mut self, sector: u64, len: u32) -> Result<Vec<u8>, u8> {
        let head = self.request(0, sector, Some(Buffer::In(len)));
        let answers = self.run(1).unwrap();
        match self.status_of(head) {
            OK => {
                assert_eq!(answers, [Answer { head, len: len + 1 }]);
                Ok(self.bytes_of(head, len as usize))
            }
            status => Err(status),
        }
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        let (status, len) = self.call(1, sector, Some(Buffer::Out(bytes.to_vec())));
        assert_eq!(len, 1);
        status
    }

    pub fn flush(&mut self) -> u8 {
        self.call(4, 0, None).0
    }

    /// DISCARD of ranges of (sector, sectors, flags).
    pub fn discard(&mut self, ranges: &[(u64, u32, u32)]) -> u8 {
        self.call(11, 0, Some(Buffer::Out(ranges_bytes(ranges)))).0
    }

    pub fn write_zeroes(&mut self, ranges: &[(u64, u32, u32)]) -> u8 {
        self.call(13, 0, Some(Buffer::Out(ranges_bytes(ranges)))).0
    }

    /// Whether the interrupt was raised since the last look.
    pub fn interrupted(&self) -> bool {
        self.interrupt.read().is_ok()
    }
}

fn ranges_bytes(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

/// Makes `file`'s descriptor mean `other`, behind the device's back.
pub fn swap(file: &File, other: &impl AsRawFd) {
    // SAFETY: both descriptors are open; nothing is closed that anybody still owns.
    let swapped = unsafe { libc::dup2(other.as_raw_fd(), file.as_raw_fd()) };
    assert_eq!(swapped, file.as_raw_fd());
}

/// An unnamed file on a tmpfs of `kib` of its own that nobody else sees; needs root.
pub fn file_on_small_disk(kib: u32) -> File {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this short-lived thread leaves its mount namespace.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
            .expect("a mount namespace of our own (run as root)");
        let flags = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", flags).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let size = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("small", dir.path(), "tmpfs", flags, Some(size.as_c_str())).unwrap();
        let file = tempfile::tempfile_in(dir.path()).unwrap();
        rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        file
    });
    let file = thread.join().unwrap();
    assert!(file.as_raw_fd() >= 0);
    file
}

/// Makes io_uring_setup fail with EPERM on this thread, for good.
pub fn forbid_io_uring() {
    let statement = |code: u32, k: u32, yes: u8, no: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: yes,
        jf: no,
        k,
    };
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let refuse = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let mut filter = [
        // The system call's number is the first field of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, refuse, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: changes this thread only.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(set, 0);
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the program lives until the call returns; the kernel copies it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program, 0, 0) };
    assert_eq!(set, 0);
}

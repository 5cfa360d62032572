//! The entropy device as a guest's driver sees it.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::Interrupt;
use super::super::block::testing::{Rings, ram};
use super::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const BUFFER: u64 = 0x10_0000;

/// A guest that asks with chains of equal buffers, all at the same place.
struct Guest<'a> {
    rings: Rings<'a>,
    device: Entropy,
    kick: Arc<EventFd>,
    interrupt: Arc<EventFd>,
}

impl<'a> Guest<'a> {
    fn new(memory: &'a GuestMemory) -> Self {
        let event = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (kick, interrupt) = (event(), event());
        let rings = Rings::new(memory);
        let line = Interrupt::new(Arc::clone(&interrupt));
        let queue = RunningQueue::new(Rings::device_end(), Arc::clone(&kick), line);
        let mut device = Entropy::new();
        device
            .activate(Activation {
                memory: memory.clone(),
                features: 1 << 32,
                queues: vec![Some(queue)],
                config_interrupt: Interrupt::none(),
            })
            .unwrap();
        Self {
            rings,
            device,
            kick,
            interrupt,
        }
    }

    fn ask(&self, buffers: u16, len: u32, flags: u16) {
        for i in 0..buffers {
            let next = if i + 1 < buffers { NEXT } else { 0 };
            let descriptor = Descriptor::new(BUFFER, len, flags | next, i + 1);
            self.rings
                .table
                .store(i, RawDescriptor::from(descriptor))
                .unwrap();
        }
        let index = self.rings.avail.idx().load();
        let slot = usize::from(index % 256);
        self.rings.avail.ring().ref_at(slot).unwrap().store(0);
        self.rings.avail.idx().store(index.wrapping_add(1));
    }

    fn kick(&mut self) -> Result<Progress, Fault> {
        self.kick.write(1).unwrap();
        self.device.handle(KICK, EventSet::IN)
    }

    /// Bytes that the device says it wrote for the answer in that place of the ring.
    fn used_len(&self, index: usize) -> u32 {
        self.rings.used.ring().ref_at(index).unwrap().load().len()
    }
}

#[test]
fn random_bytes_arrive_and_differ() {
    let memory = ram();
    let mut guest = Guest::new(&memory);
    let mut seen = [[0; 64]; 2];
    for (i, bytes) in seen.iter_mut().enumerate() {
        guest.ask(1, 64, WRITE);
        guest.kick().unwrap();
        assert_eq!(guest.used_len(i), 64);
        assert_eq!(guest.interrupt.read().unwrap(), 1);
        memory.read_slice(bytes, GuestAddress(BUFFER)).unwrap();
    }
    assert_ne!(seen[0], [0; 64]);
    assert_ne!(seen[0], seen[1]);
}

#[test]
fn overlapping_buffers_cannot_ask_for_more_than_one_request_gets() {
    let memory = ram();
    let mut guest = Guest::new(&memory);
    // 60 MiB out of one MiB.
    guest.ask(60, 1 << 20, WRITE);
    guest.kick().unwrap();
    assert_eq!(guest.used_len(0), 4096);
    let mut behind = [0_u8; 16];
    memory
        .read_slice(&mut behind, GuestAddress(BUFFER + 4096))
        .unwrap();
    assert_eq!(behind, [0; 16]);
    // 4 GiB of them: no request of ours is that long.
    guest.ask(200, 20 << 20, WRITE);
    assert!(matches!(guest.kick(), Err(Fault::Guest(_))));
}

#[test]
fn a_request_without_room_is_answered_with_nothing() {
    let memory = ram();
    let mut guest = Guest::new(&memory);
    for (flags, len) in [(0, 64), (WRITE, 0)] {
        guest.ask(1, len, flags);
        guest.kick().unwrap();
    }
    assert_eq!(guest.rings.used.idx().load(), 2);
    assert_eq!((guest.used_len(0), guest.used_len(1)), (0, 0));
}

#[test]
fn a_storm_is_served_in_turns_and_a_pause_keeps_the_place() {
    let memory = ram();
    let mut guest = Guest::new(&memory);
    for _request in 0..40 {
        guest.ask(1, 8, WRITE);
    }
    guest.kick().unwrap();
    assert_eq!(guest.rings.used.idx().load(), 16);
    // It has kicked itself for the rest.
    assert!(guest.kick.read().is_ok());
    let positions = guest.device.deactivate();
    assert_eq!(positions[0].unwrap().next_avail, 16);
    assert!(guest.device.sources().is_empty());
    let state = guest.device.save().unwrap();
    guest.device.restore(state).unwrap();
}

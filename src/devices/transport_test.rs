//! The common configuration as a driver may use it, and as an attacker may.

use std::sync::mpsc::Receiver;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::devices::testing::{Act, Ring, Script, Seen, event_fd, faults, probe, wait_for};

// Registers of the common configuration (virtio 1.2, 4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const NUM_QUEUES: u64 = 18;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_AVAIL: u64 = 40;
const QUEUE_USED: u64 = 48;

const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const MIB: u64 = 1 << 20;

/// Three vectors: configuration and two queues.
struct Bus {
    kicks: Vec<Arc<EventFd>>,
    calls: Vec<Arc<EventFd>>,
}

impl Wiring for Bus {
    fn kick(&self, queue: u16) -> Option<Arc<EventFd>> {
        self.kicks.get(usize::from(queue)).cloned()
    }

    fn interrupt(&self, vector: u16) -> Interrupt {
        let call = self.calls.get(usize::from(vector)).cloned();
        call.map_or_else(Interrupt::none, Interrupt::new)
    }

    fn vectors(&self) -> u16 {
        3
    }
}

/// A transport with a probe of two queues behind it.
struct Machine {
    transport: Transport,
    bus: Bus,
    script: Script,
    faults: Receiver<String>,
    mem: GuestMemory,
    worker: Arc<Worker>,
}

impl Machine {
    /// RAM from 0 to 1 MiB and from 3 to 4 MiB, with a hole between.
    fn new() -> Self {
        let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(3 * MIB), 1 << 20)];
        let mem = GuestMemory::from_ranges(&ranges).unwrap();
        let (device, script) = probe();
        let (on_fault, faults) = faults();
        let worker = Arc::new(Worker::spawn("test/dev", Arc::clone(&on_fault)).unwrap());
        let transport = Transport::new(device, Arc::clone(&worker), mem.clone(), on_fault);
        Self {
            transport,
            bus: Bus {
                kicks: vec![event_fd(), event_fd()],
                calls: vec![event_fd(), event_fd(), event_fd()],
            },
            script,
            faults,
            mem,
            worker,
        }
    }

    /// A second one over the same memory and bus: what a snapshot is restored into.
    fn twin(&self) -> Self {
        let mut twin = Self::new();
        let (device, script) = probe();
        let (on_fault, faults) = faults();
        let worker = Arc::clone(&twin.worker);
        twin.transport = Transport::new(device, worker, self.mem.clone(), on_fault);
        twin.script = script;
        twin.faults = faults;
        twin.bus.kicks.clone_from(&self.bus.kicks);
        twin.bus.calls.clone_from(&self.bus.calls);
        twin.mem = self.mem.clone();
        twin
    }

    fn write(&mut self, offset: u64, width: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.transport.write(offset, &bytes[..width], &self.bus);
    }

    fn read(&self, offset: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.read(offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    fn status(&self) -> u8 {
        u8::try_from(self.read(STATUS, 1)).unwrap()
    }

    fn set_status(&mut self, status: u8) {
        self.write(STATUS, 1, u64::from(status));
    }

    /// Up to FEATURES_OK with these features.
    fn negotiate(&mut self, features: u64) {
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.write(DRIVER_FEATURE_SELECT, 4, 0);
        self.write(DRIVER_FEATURE, 4, features & 0xffff_ffff);
        self.write(DRIVER_FEATURE_SELECT, 4, 1);
        self.write(DRIVER_FEATURE, 4, features >> 32);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Describes queue `index` to the device and enables it.
    fn enable(&mut self, index: u16, size: u16, [desc, avail, used]: [u64; 3]) {
        self.write(QUEUE_SELECT, 2, u64::from(index));
        self.write(QUEUE_SIZE, 2, u64::from(size));
        self.write(QUEUE_VECTOR, 2, u64::from(index) + 1);
        self.write(QUEUE_DESC, 8, desc);
        self.write(QUEUE_AVAIL, 8, avail);
        self.write(QUEUE_USED, 8, used);
        self.write(QUEUE_ENABLE, 2, 1);
    }

    fn ring(&self) -> Ring {
        let mut ring = Ring::new(&self.mem, 0, 16);
        ring.kick = Arc::clone(&self.bus.kicks[0]);
        ring.call = Arc::clone(&self.bus.calls[1]);
        ring
    }

    /// All that a driver does, with one queue enabled.
    fn start(&mut self) -> Ring {
        let ring = self.ring();
        // A driver clears its rings.
        for at in [ring.avail_ring(), ring.used_ring()] {
            vm_memory::Bytes::write_slice(&self.mem, &[0; 256], GuestAddress(at)).unwrap();
        }
        self.write(CONFIG_VECTOR, 2, 0);
        self.negotiate(self.transport.features);
        let addresses = [ring.table(), ring.avail_ring(), ring.used_ring()];
        self.enable(0, 16, addresses);
        self.set_status(RUNNING);
        assert_eq!(self.status(), RUNNING);
        assert_eq!(self.script.next(), Seen::Activated { queues: 1 });
        ring
    }

    fn serves(&mut self, ring: &mut Ring) {
        let head = ring.send(b"x");
        // A kick may have been served for an earlier request already.
        while self.script.next() != Seen::Served(1) {}
        assert_eq!(ring.take_used(), Some((head, 0)));
        assert!(ring.interrupted());
    }

    /// Everything a snapshot would hold of the registers.
    fn registers(&self) -> String {
        serde_json::to_string(&self.transport.state).unwrap()
    }

    fn is_after_reset(&self) -> bool {
        let fresh = TransportState::new(&[16, 16]);
        self.registers() == serde_json::to_string(&fresh).unwrap() && self.status() == 0
    }

    /// Brings the device to a guest fault.
    fn break_contract(&mut self, ring: &mut Ring) {
        self.script.set(Act::GuestFault);
        ring.send(b"x");
        // The driver is told by its configuration interrupt.
        wait_for(&self.bus.calls[0]);
        assert_eq!(self.status(), RUNNING | NEEDS_RESET);
        self.script.set(Act::Serve);
    }

    fn kill_worker(&mut self, ring: &mut Ring) {
        self.script.set(Act::Panic);
        ring.send(b"x");
        let fault = self.faults.recv().unwrap();
        assert_eq!(fault, "device thread panicked");
    }
}

#[test]
fn a_fresh_device_shows_its_shape() {
    let machine = Machine::new();
    assert_eq!(machine.read(NUM_QUEUES, 2), 2);
    assert_eq!(machine.read(QUEUE_SIZE, 2), 16);
    assert_eq!(machine.read(QUEUE_ENABLE, 2), 0);
    assert_eq!(machine.read(QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
    assert_eq!(machine.read(CONFIG_VECTOR, 2), u64::from(NO_VECTOR));
    assert!(machine.is_after_reset());
}

#[test]
fn a_driver_starts_a_device_and_is_served() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.serves(&mut ring);
    assert!(machine.transport.is_running());
}

#[test]
fn features_come_in_two_halves_and_there_is_no_third() {
    let mut machine = Machine::new();
    let offered = machine.transport.features;
    assert_eq!(offered, 0b101 | TRANSPORT_FEATURES);
    for (select, half) in [(0, offered & 0xffff_ffff), (1, offered >> 32)] {
        machine.write(DEVICE_FEATURE_SELECT, 4, select);
        assert_eq!(machine.read(DEVICE_FEATURE, 4), half);
    }
    machine.negotiate(offered);
    for select in [2, 3, 32, 0x8000_0000, 0xffff_ffff] {
        machine.write(DEVICE_FEATURE_SELECT, 4, select);
        machine.write(DRIVER_FEATURE_SELECT, 4, select);
        machine.write(DRIVER_FEATURE, 4, 0xffff_ffff);
        assert_eq!(machine.read(DEVICE_FEATURE, 4), 0);
        assert_eq!(machine.read(DRIVER_FEATURE, 4), 0);
    }
    assert_eq!(machine.transport.state.driver_features, offered);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let version_1 = 1 << VIRTIO_F_VERSION_1;
    for features in [0, 0b101, version_1 | 0b10, version_1 | 1 << 63, u64::MAX] {
        let mut machine = Machine::new();
        machine.negotiate(features);
        assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER, "{features:#x}");
    }
    let mut machine = Machine::new();
    machine.negotiate(version_1);
    assert_ne!(machine.status() & FEATURES_OK, 0);
}

#[test]
fn features_are_settled_by_features_ok() {
    let mut machine = Machine::new();
    let offered = machine.transport.features;
    machine.negotiate(offered);
    machine.write(DRIVER_FEATURE_SELECT, 4, 0);
    machine.write(DRIVER_FEATURE, 4, 0xffff_ffff);
    assert_eq!(machine.transport.state.driver_features, offered);
}

#[test]
fn driver_ok_without_features_ok_starts_nothing() {
    for status in [DRIVER_OK, ACKNOWLEDGE | DRIVER | DRIVER_OK, RUNNING] {
        let mut machine = Machine::new();
        machine.set_status(status);
        assert_eq!(machine.status() & (DRIVER_OK | FEATURES_OK), 0);
        assert_ne!(machine.status() & NEEDS_RESET, 0);
        // Nor does making up for it, until a reset.
        machine.negotiate(machine.transport.features);
        machine.set_status(RUNNING);
        assert_eq!(machine.script.rest(), []);
        machine.set_status(0);
        assert_eq!(machine.script.next(), Seen::Reset);
        machine.start();
    }
}

#[test]
fn driver_ok_without_queues_runs_a_device_that_has_none() {
    let mut machine = Machine::new();
    machine.negotiate(machine.transport.features);
    machine.set_status(RUNNING);
    assert_eq!(machine.script.next(), Seen::Activated { queues: 0 });
    assert_eq!(machine.status(), RUNNING);
    machine.set_status(0);
    assert!(machine.is_after_reset());
}

#[test]
fn status_bits_are_neither_cleared_nor_invented_by_the_driver() {
    let mut machine = Machine::new();
    machine.start();
    for status in [ACKNOWLEDGE, DRIVER, 0x10, 0x20, NEEDS_RESET, 0xff] {
        machine.set_status(status);
        assert_eq!(machine.status() & !FAILED, RUNNING);
    }
    assert_eq!(machine.status(), RUNNING | FAILED);
    assert_eq!(machine.script.rest(), [], "it was started once");
}

#[test]
fn a_reset_in_every_state_gives_a_usable_device() {
    type Reach = fn(&mut Machine);
    let states: [Reach; 10] = [
        |_| {},
        |m| m.set_status(ACKNOWLEDGE),
        |m| m.set_status(ACKNOWLEDGE | DRIVER),
        |m| m.negotiate(m.transport.features),
        |m| m.enable(1, 8, [0x1000, 0x2000, 0x3000]),
        |m| m.set_status(DRIVER_OK),
        |m| drop(m.start()),
        |m| {
            let mut ring = m.start();
            m.break_contract(&mut ring);
        },
        |m| {
            m.start();
            m.transport.pause();
        },
        |m| m.set_status(FAILED),
    ];
    for (number, reach) in states.into_iter().enumerate() {
        let mut machine = Machine::new();
        reach(&mut machine);
        machine.set_status(0);
        assert!(machine.is_after_reset(), "state {number}");
        machine.script.rest();
        let mut ring = machine.start();
        machine.serves(&mut ring);
    }
}

#[test]
fn a_reset_ends_the_use_of_guest_memory_before_it_returns() {
    let mut machine = Machine::new();
    machine.start();
    machine.set_status(0);
    assert_eq!(machine.script.rest(), [Seen::Deactivated, Seen::Reset]);
}

/// Every register of a queue, its width, and a value unlike the one in use.
const QUEUE_REGISTERS: [(u64, usize, u64); 10] = [
    (QUEUE_SIZE, 2, 4),
    (QUEUE_SIZE, 2, 0),
    (QUEUE_VECTOR, 2, 2),
    (QUEUE_ENABLE, 2, 0),
    (QUEUE_DESC, 8, 0x7000),
    (QUEUE_DESC, 4, 0x7000),
    (QUEUE_DESC + 4, 4, 1),
    (QUEUE_AVAIL, 8, 0x8000),
    (QUEUE_USED, 8, 0x9000),
    (QUEUE_USED + 4, 4, 1),
];

#[test]
fn queue_registers_are_read_only_while_the_device_runs() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    for queue in [0, 1] {
        machine.write(QUEUE_SELECT, 2, queue);
        let before = machine.registers();
        for (offset, width, value) in QUEUE_REGISTERS {
            machine.write(offset, width, value);
            assert_eq!(machine.registers(), before, "offset {offset}");
        }
        machine.write(QUEUE_ENABLE, 2, 1);
        assert_eq!(machine.registers(), before);
    }
    machine.serves(&mut ring);
}

#[test]
fn queue_registers_stay_read_only_when_the_running_device_is_paused_or_broken() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.transport.pause();
    let before = machine.registers();
    for (offset, width, value) in QUEUE_REGISTERS {
        machine.write(offset, width, value);
    }
    assert_eq!(machine.registers(), before);
    machine.transport.resume(&machine.bus);
    machine.break_contract(&mut ring);
    let before = machine.registers();
    for (offset, width, value) in QUEUE_REGISTERS {
        machine.write(offset, width, value);
    }
    assert_eq!(machine.registers(), before);
}

#[test]
fn an_enabled_queue_keeps_its_shape() {
    let mut machine = Machine::new();
    machine.enable(0, 8, [0x1000, 0x2000, 0x3000]);
    let before = machine.registers();
    for (offset, width, value) in QUEUE_REGISTERS {
        if offset != QUEUE_VECTOR {
            machine.write(offset, width, value);
            assert_eq!(machine.registers(), before, "offset {offset}");
        }
    }
}

#[test]
fn before_that_every_status_lets_a_driver_set_queues_up() {
    for status in [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, FAILED] {
        let mut machine = Machine::new();
        machine.set_status(status);
        machine.enable(1, 8, [0x1000, 0x2000, 0x3000]);
        assert_eq!(machine.read(QUEUE_SIZE, 2), 8);
        assert_eq!(machine.read(QUEUE_VECTOR, 2), 2);
        assert_eq!(machine.read(QUEUE_ENABLE, 2), 1);
        assert_eq!(machine.read(QUEUE_DESC, 8), 0x1000);
        assert_eq!(machine.read(QUEUE_AVAIL, 8), 0x2000);
        assert_eq!(machine.read(QUEUE_USED, 8), 0x3000);
        assert_eq!(machine.read(QUEUE_NOTIFY_OFF, 2), 1);
    }
}

#[test]
fn impossible_sizes_are_ignored() {
    let mut machine = Machine::new();
    machine.write(QUEUE_SIZE, 2, 8);
    for size in [0, 3, 7, 12, 17, 32, 0x8000, 0xffff] {
        machine.write(QUEUE_SIZE, 2, size);
        assert_eq!(machine.read(QUEUE_SIZE, 2), 8, "{size}");
    }
}

#[test]
fn only_one_enables_a_queue() {
    let mut machine = Machine::new();
    for value in [0, 2, 3, 0xffff] {
        machine.write(QUEUE_ENABLE, 2, value);
        assert_eq!(machine.read(QUEUE_ENABLE, 2), 0);
    }
}

#[test]
fn queues_that_do_not_exist_read_as_unavailable_and_take_nothing() {
    let mut machine = Machine::new();
    for select in [2, 3, 0x7fff, 0xffff] {
        machine.write(QUEUE_SELECT, 2, select);
        let before = machine.registers();
        for (offset, width, value) in QUEUE_REGISTERS {
            machine.write(offset, width, value);
        }
        machine.write(QUEUE_ENABLE, 2, 1);
        assert_eq!(machine.registers(), before);
        assert_eq!(machine.read(QUEUE_SIZE, 2), 0);
        assert_eq!(machine.read(QUEUE_ENABLE, 2), 0);
        assert_eq!(machine.read(QUEUE_NOTIFY_OFF, 2), 0);
        assert_eq!(machine.read(QUEUE_DESC, 8), 0);
        assert_eq!(machine.read(QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
    }
}

#[test]
fn vectors_that_do_not_exist_are_no_vector() {
    let mut machine = Machine::new();
    for register in [CONFIG_VECTOR, QUEUE_VECTOR] {
        machine.write(register, 2, 2);
        assert_eq!(machine.read(register, 2), 2);
        for vector in [3, 0x7fff, 0xffff] {
            machine.write(register, 2, vector);
            assert_eq!(machine.read(register, 2), u64::from(NO_VECTOR));
        }
    }
}

#[test]
fn read_only_registers_take_nothing() {
    let mut machine = Machine::new();
    let before = machine.registers();
    for (offset, width) in [
        (DEVICE_FEATURE, 4),
        (NUM_QUEUES, 2),
        (21, 1),
        (QUEUE_NOTIFY_OFF, 2),
    ] {
        machine.write(offset, width, u64::MAX);
        assert_eq!(machine.registers(), before);
    }
}

#[test]
fn accesses_of_another_width_read_zero_and_change_nothing() {
    let mut machine = Machine::new();
    let before = machine.registers();
    let far = [64, 0xfff, 1 << 32, u64::MAX - 7, u64::MAX - 3, u64::MAX];
    for offset in (0..64).chain(far) {
        for width in 0..=8 {
            let whole = find(offset, width).is_some();
            let halves = width == 8
                && (find(offset, 4).is_some() || find(offset.wrapping_add(4), 4).is_some());
            if whole || halves {
                continue;
            }
            let mut bytes = [0xff; 8];
            machine.transport.read(offset, &mut bytes[..width]);
            assert!(bytes[..width].iter().all(|b| *b == 0), "{offset} {width}");
            machine.write(offset, width, 0x5a5a_5a5a_5a5a_5a5a);
            assert_eq!(machine.registers(), before, "{offset} {width}");
        }
    }
    let mut long = [0xff; 16];
    machine.transport.read(QUEUE_DESC, &mut long);
    assert_eq!(long, [0; 16]);
}

#[test]
fn the_device_configuration_takes_any_offset_and_length() {
    let machine = Machine::new();
    let config = machine.transport.config();
    for offset in (0..20).chain([usize::MAX - 7, usize::MAX - 1, usize::MAX]) {
        for length in 0..=8 {
            let mut data = vec![0xff; length];
            config.read(offset, &mut data);
            for (i, byte) in data.iter().enumerate() {
                let expected = match offset.checked_add(i) {
                    Some(at @ 0..6) => u8::try_from(at).unwrap() + 1,
                    _ => 0,
                };
                assert_eq!(*byte, expected, "{offset} {length}");
            }
        }
    }
    let generation = config.generation();
    for offset in [0, 1, 4, 5, 6, 100, usize::MAX - 3, usize::MAX] {
        config.write_by_driver(offset, &[]);
        config.write_by_driver(offset, &[9]);
    }
    assert_eq!(config.bytes(), [1, 2, 3, 4, 5, 6]);
    config.write_by_driver(0, &[9; 8]);
    assert_eq!(config.bytes(), [1, 2, 9, 9, 5, 6], "its own range only");
    assert_eq!(config.generation(), generation);
    config.write_by_device(5, &[7, 7]);
    assert_ne!(config.generation(), generation);
}

#[test]
fn rings_that_cannot_be_need_a_reset_and_start_nothing() {
    let good = [0x1000, 0x2000, 0x3000];
    let impossible = [
        // Unaligned (virtio 1.2, 2.7).
        [0x1008, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1000, 0x2000, 0x3002],
        // Outside RAM, in the hole, across its edge, at the end of everything.
        [16 * MIB, 0x2000, 0x3000],
        [0x1000, 16 * MIB, 0x3000],
        [0x1000, 0x2000, 16 * MIB],
        [2 * MIB, 0x2000, 0x3000],
        [0x1000, 2 * MIB, 0x3000],
        [0x1000, 0x2000, 2 * MIB],
        [MIB - 128, 0x2000, 0x3000],
        [0x1000, MIB - 8, 0x3000],
        [0x1000, 0x2000, MIB - 8],
        [0x1000, 0x2000, 4 * MIB - 8],
        [u64::MAX - 15, 0x2000, 0x3000],
        [0x1000, u64::MAX - 1, 0x3000],
        [0x1000, 0x2000, u64::MAX - 3],
        [u64::MAX; 3],
    ];
    for addresses in impossible {
        let mut machine = Machine::new();
        machine.write(CONFIG_VECTOR, 2, 0);
        machine.negotiate(machine.transport.features);
        machine.enable(0, 16, good);
        machine.enable(1, 16, addresses);
        machine.set_status(RUNNING);
        assert_eq!(machine.status(), RUNNING | NEEDS_RESET, "{addresses:#x?}");
        assert_eq!(machine.transport.guest_faults(), 1);
        assert!(machine.bus.calls[0].read().is_ok(), "the driver is told");
        assert_eq!(machine.script.rest(), []);
        machine.set_status(0);
        assert!(machine.is_after_reset());
        machine.script.rest();
        machine.start();
        assert!(machine.faults.try_recv().is_err(), "the host is well");
    }
}

#[test]
fn rings_over_each_other_are_contained() {
    for addresses in [
        [0, 0, 0],
        [0x1000, 0x1000, 0x1000],
        [0x1000, 0x1010, 0x1014],
        [0x1000, 0x1ff0, 0x1ff4],
    ] {
        let mut machine = Machine::new();
        machine.negotiate(machine.transport.features);
        machine.enable(0, 16, addresses);
        machine.enable(1, 16, addresses);
        machine.set_status(RUNNING);
        for _ in 0..50 {
            machine.bus.kicks[0].write(1).unwrap();
            machine.bus.kicks[1].write(1).unwrap();
            let _answer = machine.transport.command(DeviceCommand::SetLink(true));
        }
        machine.set_status(0);
        assert!(machine.is_after_reset());
        assert!(machine.faults.try_recv().is_err(), "the host is well");
    }
}

#[test]
fn a_kick_before_driver_ok_is_served_after_it() {
    let mut machine = Machine::new();
    machine.bus.kicks[0].write(1).unwrap();
    machine.bus.kicks[1].write(1).unwrap();
    assert_eq!(machine.script.rest(), []);
    machine.start();
    assert_eq!(machine.script.next(), Seen::Served(0));
}

#[test]
fn a_guest_fault_shows_until_the_reset_and_is_counted() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.break_contract(&mut ring);
    assert_eq!(machine.transport.guest_faults(), 1);
    machine.set_status(0);
    assert!(machine.is_after_reset());
    machine.script.rest();
    let mut ring = machine.start();
    machine.serves(&mut ring);
    assert_eq!(machine.transport.guest_faults(), 1);
}

#[test]
fn a_broken_device_is_not_started_by_pause_and_resume() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.break_contract(&mut ring);
    machine.script.rest();
    machine.transport.pause();
    machine.transport.resume(&machine.bus);
    assert_eq!(machine.script.rest(), [Seen::Deactivated]);
    assert_eq!(machine.status(), RUNNING | NEEDS_RESET);
    // It is saved and restored as broken, too.
    let (state, device) = machine.transport.save().unwrap();
    let mut twin = machine.twin();
    twin.transport.restore(state, device).unwrap();
    twin.transport.resume(&twin.bus);
    assert_eq!(twin.script.rest(), []);
    assert_eq!(twin.status(), RUNNING | NEEDS_RESET);
}

#[test]
fn a_paused_device_goes_on_where_it_stopped() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.serves(&mut ring);
    machine.transport.pause();
    assert_eq!(machine.script.next(), Seen::Deactivated);
    let head = ring.send(b"x");
    assert_eq!(ring.take_used(), None);
    assert_eq!(machine.status(), RUNNING, "the driver does not notice");
    machine.transport.pause();
    machine.transport.resume(&machine.bus);
    machine.transport.resume(&machine.bus);
    assert_eq!(machine.script.next(), Seen::Activated { queues: 1 });
    assert_eq!(machine.script.next(), Seen::Served(1));
    assert_eq!(ring.take_used(), Some((head, 0)));
    machine.serves(&mut ring);
    assert_eq!(machine.script.rest(), []);
}

#[test]
fn a_device_at_rest_has_nothing_to_pause() {
    let mut machine = Machine::new();
    machine.transport.pause();
    machine.transport.resume(&machine.bus);
    assert_eq!(machine.script.rest(), []);
    assert!(machine.is_after_reset());
}

#[test]
fn a_saved_device_goes_on_in_a_restored_one() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    for _ in 0..20 {
        machine.serves(&mut ring);
    }
    assert!(machine.transport.save().is_err(), "not while it runs");
    machine.transport.pause();
    let saved = machine.transport.save().unwrap();
    let stored = serde_json::to_string(&saved).unwrap();
    let (state, device) = serde_json::from_str(&stored).unwrap();
    let mut twin = machine.twin();
    twin.transport.restore(state, device).unwrap();
    assert_eq!(twin.registers(), machine.registers());
    twin.transport.resume(&twin.bus);
    assert_eq!(twin.script.next(), Seen::Activated { queues: 1 });
    twin.serves(&mut ring);
    // What a driver set up before DRIVER_OK is kept as well.
    let mut young = Machine::new();
    young.enable(1, 4, [0x1000, 0x2000, 0x3000]);
    let (state, device) = young.transport.save().unwrap();
    let mut twin = young.twin();
    twin.transport.restore(state, device).unwrap();
    twin.transport.resume(&twin.bus);
    assert_eq!(twin.registers(), young.registers());
    assert_eq!(twin.script.rest(), [], "nobody said DRIVER_OK");
}

#[test]
fn states_that_do_not_fit_are_refused() {
    type Spoil = fn(&mut TransportState);
    let spoilt: [Spoil; 9] = [
        |s| s.queues.truncate(1),
        |s| s.queues.push(QueueSetup::new(16)),
        |s| s.queues[0].max_size = 32,
        |s| s.queues[0].size = 32,
        // What no driver can write.
        |s| s.queues[0].size = 0,
        |s| s.queues[0].size = 3,
        |s| s.status = DRIVER_OK,
        |s| s.status = FEATURES_OK,
        |s| (s.status, s.driver_features) = (FEATURES_OK, (1 << VIRTIO_F_VERSION_1) | (1 << 40)),
    ];
    for spoil in spoilt {
        let machine = Machine::new();
        let (mut state, device) = machine.transport.save().unwrap();
        spoil(&mut state);
        assert!(machine.twin().transport.restore(state, device).is_err());
    }
}

#[test]
fn a_stored_queue_that_cannot_be_needs_a_reset() {
    type Spoil = fn(&mut QueueSetup);
    let spoilt: [Spoil; 3] = [|q| q.desc = u64::MAX, |q| q.avail = 1, |q| q.used = 2 * MIB];
    for spoil in spoilt {
        let mut machine = Machine::new();
        machine.start();
        machine.transport.pause();
        let (mut state, device) = machine.transport.save().unwrap();
        spoil(&mut state.queues[0]);
        state.config_vector = 0x7000;
        let mut twin = machine.twin();
        twin.transport.restore(state, device).unwrap();
        twin.transport.resume(&twin.bus);
        assert_ne!(twin.status() & NEEDS_RESET, 0);
        assert_eq!(twin.script.rest(), []);
    }
}

#[test]
fn commands_reach_the_device_wherever_it_is() {
    let mut machine = Machine::new();
    let link = || DeviceCommand::SetLink(true);
    machine.transport.command(link()).unwrap();
    assert_eq!(machine.script.next(), Seen::Commanded);
    machine.start();
    machine.transport.command(link()).unwrap();
    assert_eq!(machine.script.next(), Seen::Commanded);
    machine.transport.pause();
    machine.transport.command(link()).unwrap();
    assert_eq!(machine.script.rest(), [Seen::Deactivated, Seen::Commanded]);
}

#[test]
fn a_transport_whose_worker_died_is_harmless() {
    let mut machine = Machine::new();
    let mut ring = machine.start();
    machine.kill_worker(&mut ring);
    machine.script.rest();
    // Registers go on answering, no call hangs, and nothing comes to life.
    assert!(
        machine
            .transport
            .command(DeviceCommand::SetLink(true))
            .is_err()
    );
    machine.transport.pause();
    assert!(machine.transport.save().is_err());
    machine.transport.resume(&machine.bus);
    machine.set_status(0);
    assert!(machine.is_after_reset());
    machine.negotiate(machine.transport.features);
    machine.enable(0, 16, [ring.table(), ring.avail_ring(), ring.used_ring()]);
    machine.set_status(RUNNING);
    machine.bus.kicks[0].write(1).unwrap();
    machine.set_status(0);
    machine.transport.reset();
    assert_eq!(machine.script.rest(), []);
    let (state, device) = Machine::new().transport.save().unwrap();
    assert!(machine.transport.restore(state, device).is_err());
    assert!(
        machine.faults.try_recv().is_err(),
        "the fault was told once"
    );
}

#[test]
fn a_worker_that_dies_at_driver_ok_leaves_a_harmless_transport() {
    let mut machine = Machine::new();
    let mut neighbour = machine.twin();
    neighbour.worker = Arc::clone(&machine.worker);
    let (on_fault, _faults) = faults();
    let (device, script) = probe();
    neighbour.script = script;
    let worker = Arc::clone(&machine.worker);
    neighbour.transport = Transport::new(device, worker, machine.mem.clone(), on_fault);
    let mut ring = machine.start();
    machine.kill_worker(&mut ring);
    neighbour.negotiate(neighbour.transport.features);
    neighbour.set_status(RUNNING);
    assert_eq!(neighbour.script.rest(), []);
    neighbour.set_status(0);
    assert!(neighbour.is_after_reset());
}

#[test]
fn a_device_that_cannot_start_ends_the_vm_and_can_be_reset() {
    let mut machine = Machine::new();
    machine.script.set(Act::RefuseToStart);
    machine.negotiate(machine.transport.features);
    machine.set_status(RUNNING);
    assert_eq!(machine.faults.recv().unwrap(), "start the probe");
    machine.set_status(0);
    assert!(machine.is_after_reset());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_writes_leave_a_device_that_a_reset_makes_usable(
        writes in prop::collection::vec(
            (
                prop_oneof![8 => 0_u64..64, 1 => any::<u64>()],
                prop_oneof![4 => Just(1_usize), 4 => Just(2), 4 => Just(4), 2 => Just(8), 1 => 0..=8_usize],
                prop_oneof![
                    4 => 0_u64..32,
                    2 => (0..MIB).prop_map(|a| a & !0xf),
                    1 => any::<u64>()
                ],
            ),
            1..200,
        )
    ) {
        let mut machine = Machine::new();
        for (offset, width, value) in writes {
            machine.write(offset, width, value);
            machine.read(offset, width);
            machine.bus.kicks[0].write(1).unwrap();
        }
        prop_assert!(machine.faults.try_recv().is_err());
        machine.set_status(0);
        prop_assert!(machine.is_after_reset());
        machine.script.rest();
        while machine.bus.kicks[0].read().is_ok() {}
        let mut ring = machine.start();
        machine.serves(&mut ring);
    }
}

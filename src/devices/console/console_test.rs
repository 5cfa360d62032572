//! The console as a driver meets it, kind and hostile.

use std::io::{Read, Write};

use proptest::prelude::*;

use super::serve::{CONTROL_TX, RX1, TX0};
use super::*;
use crate::devices::GuestFault;
use crate::devices::testing::{NEXT, Ring, WRITE, event_fd, faults, memory, run_ready};
use crate::devices::worker::{FaultFlag, Worker};
use crate::devices::{GuestMemory, Interrupt};

/// A console, its driver's rings, and the host's end of the agent's channel.
struct Machine {
    console: Console,
    mem: GuestMemory,
    rings: Vec<Ring>,
    sink: ConsoleSink,
    host: Option<UnixStream>,
    opened: Arc<OnceLock<Instant>>,
    config_call: Arc<vmm_sys_util::eventfd::EventFd>,
}

impl Machine {
    fn at_rest(with_agent: bool) -> Self {
        let sink = ConsoleSink::new(None);
        let opened = Arc::new(OnceLock::new());
        let (host, agent) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let console = Console::new(ConsoleConfig {
            sink: sink.clone(),
            agent: with_agent.then_some(agent),
            agent_port_name: "fleetingd.agent".into(),
            agent_opened: Arc::clone(&opened),
            columns: 80,
            rows: 25,
        })
        .unwrap();
        let mem = memory(2);
        let rings = (0..console.queue_sizes().len() as u64)
            .map(|i| Ring::new(&mem, i * Ring::bytes(QUEUE_SIZE), QUEUE_SIZE))
            .collect();
        Self {
            console,
            mem,
            rings,
            sink,
            host: with_agent.then_some(host),
            opened,
            config_call: event_fd(),
        }
    }

    fn start(&mut self, features: u64) {
        let queues = self.rings.iter().map(|r| Some(r.queue(true))).collect();
        self.start_with(features, queues);
    }

    fn start_with(&mut self, features: u64, queues: Vec<Option<RunningQueue>>) {
        self.console
            .activate(Activation {
                memory: self.mem.clone(),
                features,
                queues,
                config_interrupt: Interrupt::new(Arc::clone(&self.config_call)),
            })
            .unwrap();
        self.run();
    }

    /// Started, both ports ready and open, the messages about it taken.
    fn ready(with_agent: bool) -> Self {
        let mut machine = Self::at_rest(with_agent);
        machine.start(F_SIZE | F_MULTIPORT);
        for _ in 0..8 {
            machine.rings[CONTROL_RX].offer_room(64);
        }
        machine.say(0, 0, 1);
        for port in 0..1 + u32::from(with_agent) {
            machine.say(port, 3, 1);
            machine.say(port, 6, 1);
        }
        assert!(!machine.messages().is_empty());
        machine
    }

    fn run(&mut self) {
        run_ready(&mut self.console).unwrap();
    }

    fn fault(&mut self) -> String {
        match run_ready(&mut self.console) {
            Err(Fault::Guest(GuestFault::Request { problem, .. })) => problem.into(),
            other => panic!("no guest fault but {other:?}"),
        }
    }

    /// One control message of the driver.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        self.rings[CONTROL_TX].send(&bytes);
        self.run();
        assert!(self.rings[CONTROL_TX].take_used().is_some(), "consumed");
    }

    /// The control messages that came, as port, event, value, rest. Buffers are offered again.
    fn messages(&mut self) -> Vec<(u8, u8, u8, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(bytes) = self.rings[CONTROL_RX].take() {
            all.push((bytes[0], bytes[4], bytes[6], bytes[8..].to_vec()));
            self.rings[CONTROL_RX].offer_room(64);
            self.run();
        }
        all
    }

    fn host(&mut self) -> &mut UnixStream {
        self.host.as_mut().unwrap()
    }

    /// Everything the host's end holds now.
    fn host_reads(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let end = self.host().read_to_end(&mut all).unwrap_err();
        assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
        all
    }

    fn watches(&self, token: usize) -> bool {
        let sources = self.console.sources();
        sources.iter().any(|s| s.token as usize == token)
    }
}

#[test]
fn the_configuration_names_size_and_number_of_ports() {
    let with = Machine::at_rest(true).console;
    assert_eq!(with.config().bytes(), [80, 0, 25, 0, 2, 0, 0, 0]);
    assert_eq!(with.queue_sizes().len(), 6);
    let without = Machine::at_rest(false).console;
    assert_eq!(without.config().bytes(), [80, 0, 25, 0, 1, 0, 0, 0]);
    assert_eq!(without.queue_sizes().len(), 4);
}

#[test]
fn a_driver_is_told_what_each_port_is() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    for _ in 0..8 {
        machine.rings[CONTROL_RX].offer_room(64);
    }
    machine.say(0, 0, 1);
    assert_eq!(
        machine.messages(),
        [(0, 1, 1, vec![]), (1, 1, 1, vec![])],
        "PORT_ADD"
    );
    machine.say(0, 3, 1);
    assert_eq!(
        machine.messages(),
        [
            (0, 4, 1, vec![]),
            (0, 5, 0, vec![80, 0, 25, 0]),
            (0, 6, 1, vec![])
        ],
        "CONSOLE_PORT, RESIZE, PORT_OPEN"
    );
    machine.say(1, 3, 1);
    assert_eq!(
        machine.messages(),
        [(1, 7, 1, b"fleetingd.agent".to_vec()), (1, 6, 1, vec![])],
        "PORT_NAME, PORT_OPEN"
    );
    assert!(machine.opened.get().is_none());
    machine.say(1, 6, 1);
    assert!(machine.opened.get().is_some());
}

#[test]
fn output_of_hvc0_is_consumed_at_once_whether_or_not_the_port_is_open() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    let head = machine.rings[TX0].send(b"Linux version");
    machine.run();
    assert_eq!(machine.rings[TX0].take_used(), Some((head, 0)));
    assert!(machine.rings[TX0].interrupted());
    assert_eq!(machine.sink.tail(100), "Linux version");
}

#[test]
fn output_larger_than_a_wake_up_arrives_whole() {
    let mut machine = Machine::ready(false);
    // One chain of 16 descriptors that all show the same 512 KiB.
    for index in 0..QUEUE_SIZE {
        let flags = if index + 1 < QUEUE_SIZE { NEXT } else { 0 };
        machine.rings[TX0].describe(index, (0, 512 << 10, flags, index + 1));
    }
    machine.rings[TX0].offer(0);
    machine.rings[TX0].kick();
    machine.run();
    assert_eq!(machine.sink.total_bytes(), 8 << 20);
    assert_eq!(machine.rings[TX0].take_used(), Some((0, 0)));
    assert_eq!(machine.rings[TX0].take_used(), None);
}

#[test]
fn one_wake_up_is_bounded_and_the_rest_is_not_forgotten() {
    let mut machine = Machine::ready(false);
    machine.rings[TX0].describe(0, (0, 1 << 20, 0, 0));
    machine.rings[TX0].offer(0);
    machine.rings[TX0].kick();
    let tx0 = u32::try_from(TX0).unwrap();
    machine.console.handle(tx0, EventSet::IN).unwrap();
    let first = machine.sink.total_bytes();
    assert!(first > 0 && first < 1 << 20, "{first}");
    machine.run();
    assert_eq!(machine.sink.total_bytes(), 1 << 20);
}

#[test]
fn agent_and_host_talk_both_ways() {
    let mut machine = Machine::ready(true);
    machine.rings[TX1].send(b"hello");
    machine.run();
    assert_eq!(machine.host_reads(), b"hello");
    machine.rings[RX1].offer_room(4096);
    machine.host().write_all(b"identify").unwrap();
    machine.run();
    assert_eq!(machine.rings[RX1].take().unwrap(), b"identify");
    assert!(machine.rings[RX1].interrupted());
}

#[test]
fn a_full_host_end_holds_the_guest_back_and_loses_nothing() {
    let mut machine = Machine::ready(true);
    let mut sent = Vec::new();
    let mut number = 0_u32;
    while machine.watches(TX1) {
        let page: Vec<u8> = (0..1024_u32)
            .flat_map(|i| (number + i).to_le_bytes())
            .collect();
        machine.rings[TX1].send(&page);
        machine.run();
        while machine.rings[TX1].take_used().is_some() {}
        sent.extend(page);
        number += 1024;
    }
    // Two more that nobody takes for now, however often the driver kicks.
    for _ in 0..2 {
        machine.rings[TX1].send(b"more");
        sent.extend(b"more");
    }
    for _ in 0..100 {
        machine.rings[TX1].kick();
        machine.run();
    }
    assert_eq!(machine.rings[TX1].take_used(), None);
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let some = machine.host_reads();
        assert!(!some.is_empty(), "{} of {}", got.len(), sent.len());
        got.extend(some);
        machine.run();
    }
    assert!(got == sent);
    assert!(machine.watches(TX1));
}

#[test]
fn host_bytes_wait_for_the_guest_to_open_and_to_offer_room() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    machine.host().write_all(b"identify").unwrap();
    machine.rings[RX1].offer_room(3);
    machine.run();
    assert_eq!(machine.rings[RX1].take(), None, "not open yet");
    machine.say(1, 3, 1);
    machine.say(1, 6, 1);
    assert_eq!(machine.rings[RX1].take().unwrap(), b"ide");
    machine.run();
    assert!(!machine.watches(AGENT_SOCKET as usize), "no room, no wait");
    machine.rings[RX1].offer_room(100);
    machine.rings[RX1].offer_room(100);
    machine.run();
    assert_eq!(machine.rings[RX1].take().unwrap(), b"ntify");
    assert!(machine.watches(AGENT_SOCKET as usize));
}

#[test]
fn a_guest_that_closes_its_port_stops_the_hosts_bytes() {
    let mut machine = Machine::ready(true);
    machine.rings[RX1].offer_room(100);
    machine.say(1, 6, 0);
    machine.host().write_all(b"later").unwrap();
    machine.run();
    assert_eq!(machine.rings[RX1].take(), None);
    machine.say(1, 6, 1);
    assert_eq!(machine.rings[RX1].take().unwrap(), b"later");
}

#[test]
fn the_end_of_the_host_is_told_after_its_last_bytes() {
    let mut machine = Machine::ready(true);
    machine.rings[RX1].offer_room(100);
    machine.rings[RX1].offer_room(100);
    machine.host().write_all(b"last").unwrap();
    machine.host = None;
    machine.run();
    assert_eq!(machine.rings[RX1].take().unwrap(), b"last");
    assert_eq!(machine.messages(), [(1, 6, 0, vec![])], "PORT_OPEN 0");
    let head = machine.rings[TX1].send(b"nobody hears");
    machine.run();
    assert_eq!(machine.rings[TX1].take_used(), Some((head, 0)));
}

#[test]
fn the_end_of_the_host_frees_a_guest_that_was_held_back() {
    let mut machine = Machine::ready(true);
    let mut given = 0;
    while machine.watches(TX1) {
        machine.rings[TX1].send(&[7; 4096]);
        machine.run();
        given += 1;
    }
    machine.host = None;
    machine.run();
    let mut used = 0;
    while machine.rings[TX1].take_used().is_some() {
        used += 1;
    }
    assert_eq!(used, given);
    assert_eq!(machine.messages(), [(1, 6, 0, vec![])]);
}

#[test]
fn typed_bytes_wait_for_the_port_and_are_bounded() {
    let mut machine = Machine::at_rest(false);
    let flood = vec![b'y'; 1 << 20];
    machine
        .console
        .command(DeviceCommand::ConsoleInput(flood))
        .unwrap();
    machine.start(F_SIZE | F_MULTIPORT);
    for _ in 0..8 {
        machine.rings[RX0].offer_room(1000);
    }
    machine.run();
    assert_eq!(machine.rings[RX0].take(), None, "not open yet");
    machine.say(0, 3, 1);
    machine.say(0, 6, 1);
    let mut got = 0;
    while let Some(bytes) = machine.rings[RX0].take() {
        got += bytes.len();
    }
    assert_eq!(got, MAX_INPUT);
    let typed = DeviceCommand::ConsoleInput(b"ls\n".to_vec());
    machine.console.command(typed).unwrap();
    machine.run();
    assert_eq!(machine.rings[RX0].take().unwrap(), b"ls\n");
}

#[test]
fn a_new_size_reaches_the_driver_by_message_and_configuration() {
    let mut machine = Machine::ready(false);
    let generation = machine.console.config().generation();
    let size = DeviceCommand::ConsoleSize {
        columns: 132,
        rows: 50,
    };
    machine.console.command(size).unwrap();
    machine.run();
    assert_eq!(machine.messages(), [(0, 5, 0, vec![132, 0, 50, 0])]);
    assert_eq!(machine.console.config().bytes()[..4], [132, 0, 50, 0]);
    assert_ne!(machine.console.config().generation(), generation);
    assert!(machine.config_call.read().is_ok());
}

#[test]
fn without_multiport_hvc0_needs_no_messages() {
    let mut machine = Machine::at_rest(true);
    let mut queues: Vec<_> = machine.rings.iter().map(|r| Some(r.queue(true))).collect();
    queues[2..].fill_with(|| None);
    machine.start_with(F_SIZE, queues);
    machine.rings[RX0].offer_room(10);
    machine.rings[TX0].send(b"login:");
    let typed = DeviceCommand::ConsoleInput(b"root\n".to_vec());
    machine.console.command(typed).unwrap();
    machine.run();
    assert_eq!(machine.sink.tail(10), "login:");
    assert_eq!(machine.rings[RX0].take().unwrap(), b"root\n");
}

#[test]
fn a_console_without_any_queue_is_harmless() {
    let mut machine = Machine::at_rest(true);
    let none = (0..6).map(|_| None).collect();
    machine.start_with(F_SIZE | F_MULTIPORT, none);
    machine.host().write_all(b"x").unwrap();
    machine.run();
    let positions = machine.console.deactivate();
    assert!(positions.len() == 6 && positions.iter().all(Option::is_none));
}

#[test]
fn messages_wait_as_flags_while_the_driver_offers_no_buffers() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    for _ in 0..1000 {
        machine.say(0, 0, 1);
        machine.say(0, 3, 1);
        machine.say(1, 3, 1);
    }
    for _ in 0..16 {
        machine.rings[CONTROL_RX].offer_room(64);
    }
    machine.run();
    assert_eq!(machine.messages().len(), 7);
}

#[test]
fn unknown_ports_and_events_change_nothing() {
    let mut machine = Machine::ready(true);
    for event in [0, 1, 2, 4, 5, 7, 8, 0x7fff, 0xffff] {
        machine.say(u32::MAX, event, 0);
    }
    machine.say(9, 3, 1);
    machine.say(9, 6, 1);
    assert_eq!(machine.messages(), []);
    machine.rings[TX0].send(b"alive");
    machine.run();
    assert_eq!(machine.sink.tail(10), "alive");
}

#[test]
fn buffers_of_the_wrong_kind_are_guest_faults() {
    type Setup = fn(&mut Machine);
    let cases: [(Setup, &str); 6] = [
        (
            |m| _ = m.rings[CONTROL_TX].send(b"1234567"),
            "control message is too short",
        ),
        (
            |m| _ = m.rings[CONTROL_TX].offer_room(8),
            "control message is too short",
        ),
        (
            |m| _ = m.rings[TX0].offer_room(8),
            "transmit buffer is writable",
        ),
        (
            |m| _ = m.rings[TX1].offer_room(8),
            "transmit buffer is writable",
        ),
        (
            |m| {
                m.rings[RX1].send(b"x");
                m.host().write_all(b"y").unwrap();
            },
            "receive buffer is readable",
        ),
        (
            |m| {
                m.rings[RX1].offer_room(0);
                m.host().write_all(b"y").unwrap();
            },
            "receive buffer has no room",
        ),
    ];
    for (setup, problem) in cases {
        let mut machine = Machine::ready(true);
        setup(&mut machine);
        assert_eq!(machine.fault(), problem);
        // And it still gives everything back.
        assert_eq!(machine.console.deactivate().len(), 6);
    }
}

#[test]
fn a_control_buffer_too_small_for_its_message_is_a_guest_fault() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    machine.rings[CONTROL_RX].offer_room(7);
    machine.rings[CONTROL_TX].send(&[0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(machine.fault(), "control buffer is too small");
}

#[test]
fn a_message_split_over_descriptors_is_one_message() {
    let mut machine = Machine::at_rest(false);
    machine.start(F_SIZE | F_MULTIPORT);
    machine.rings[CONTROL_RX].offer_room(64);
    let ring = &mut machine.rings[CONTROL_TX];
    for (index, byte) in (0_u16..).zip([0_u8, 0, 0, 0, 0, 0, 1, 0]) {
        let flags = if index < 7 { NEXT } else { 0 };
        let at = ring.buffer(index);
        vm_memory::Bytes::write_obj(&ring.mem, byte, vm_memory::GuestAddress(at)).unwrap();
        ring.describe(index, (at, 1, flags, index + 1));
    }
    ring.offer(0);
    ring.kick();
    machine.run();
    assert_eq!(machine.messages(), [(0, 1, 1, vec![])]);
}

#[test]
fn a_flood_of_kicks_without_requests_does_nothing() {
    let mut machine = Machine::ready(true);
    for _ in 0..200 {
        for ring in &machine.rings {
            ring.kick.write(1000).unwrap();
        }
        machine.run();
    }
    assert_eq!(machine.sink.total_bytes(), 0);
    assert_eq!(machine.messages(), []);
}

#[test]
fn a_tag_of_no_source_is_ignored() {
    let mut machine = Machine::ready(true);
    for token in [7, 1000, u32::MAX] {
        let progress = machine.console.handle(token, EventSet::IN).unwrap();
        assert_eq!(progress, Progress::Done);
    }
}

#[test]
fn a_reset_forgets_the_driver() {
    let mut machine = Machine::ready(true);
    machine.console.deactivate();
    machine.console.reset();
    for ring in &mut machine.rings {
        *ring = Ring::new(&machine.mem, ring.base, QUEUE_SIZE);
        ring.set_avail(0);
        let used = vm_memory::GuestAddress(ring.used_ring() + 2);
        vm_memory::Bytes::write_obj(&machine.mem, 0_u16, used).unwrap();
    }
    machine.start(F_SIZE | F_MULTIPORT);
    machine.rings[CONTROL_RX].offer_room(64);
    machine.host().write_all(b"x").unwrap();
    machine.rings[RX1].offer_room(64);
    machine.run();
    assert_eq!(machine.messages(), []);
    assert_eq!(machine.rings[RX1].take(), None);
}

/// Moves a machine's console into a new one by its serialised state, as a clone does.
fn cloned(machine: &mut Machine) -> Machine {
    let positions = machine.console.deactivate();
    let state = machine.console.save().unwrap();
    let stored = serde_json::to_string(&state).unwrap();
    let mut clone = Machine::at_rest(true);
    clone
        .console
        .restore(serde_json::from_str(&stored).unwrap())
        .unwrap();
    clone.mem = machine.mem.clone();
    clone.rings = std::mem::take(&mut machine.rings);
    let queues = clone.rings.iter().zip(positions).map(|(ring, position)| {
        let position = position.unwrap();
        Some(ring.queue_at(true, position.next_avail, position.next_used))
    });
    let queues = queues.collect();
    clone.start_with(F_SIZE | F_MULTIPORT, queues);
    clone
}

#[test]
fn a_clone_goes_on_where_its_original_stopped() {
    let mut machine = Machine::ready(true);
    let typed = DeviceCommand::ConsoleInput(b"typed".to_vec());
    machine.console.command(typed).unwrap();
    machine.run();
    machine.rings[TX0].send(b"before ");
    machine.run();
    assert!(machine.rings[TX0].take_used().is_some());
    let mut clone = cloned(&mut machine);
    assert!(clone.opened.get().is_some(), "its agent's port is open");
    clone.rings[RX0].offer_room(64);
    clone.rings[TX0].send(b"after");
    clone.rings[TX1].send(b"hello");
    clone.rings[RX1].offer_room(64);
    clone.host().write_all(b"identify").unwrap();
    clone.run();
    assert_eq!(clone.rings[RX0].take().unwrap(), b"typed");
    assert_eq!(clone.sink.tail(100), "after");
    assert_eq!(clone.host_reads(), b"hello");
    assert_eq!(clone.rings[RX1].take().unwrap(), b"identify");
    assert_eq!(clone.messages(), [], "nothing to tell");
}

#[test]
fn a_clone_sends_the_rest_of_a_half_sent_request_once() {
    let mut machine = Machine::ready(true);
    let mut total = 0;
    while machine.watches(TX1) {
        machine.rings[TX1].send(&[7; 4096]);
        machine.run();
        total += 4096;
    }
    let before = machine.host_reads().len();
    // No `run` between: the original never sends the rest.
    let mut clone = cloned(&mut machine);
    assert_eq!(before + clone.host_reads().len(), total);
}

#[test]
fn a_clone_is_told_what_its_original_still_owed() {
    let mut machine = Machine::at_rest(true);
    machine.start(F_SIZE | F_MULTIPORT);
    machine.say(0, 0, 1);
    let mut clone = cloned(&mut machine);
    clone.rings[CONTROL_RX].offer_room(64);
    clone.rings[CONTROL_RX].offer_room(64);
    clone.run();
    assert_eq!(clone.messages(), [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
}

#[test]
fn states_that_do_not_fit_are_refused() {
    let one_port = Machine::at_rest(false).console.save().unwrap();
    let mut console = Machine::at_rest(true).console;
    assert!(console.restore(one_port).is_err());
    let DeviceState::Console(mut state) = console.save().unwrap() else {
        panic!("a console saves a console");
    };
    state.input = vec![0; MAX_INPUT + 1];
    assert!(console.restore(DeviceState::Console(state)).is_err());
    assert!(console.restore(DeviceState::Entropy).is_err());
}

#[test]
fn a_writable_tail_does_not_hide_in_a_transmit_chain() {
    let mut machine = Machine::ready(true);
    let ring = &mut machine.rings[TX0];
    let at = ring.buffer(0);
    ring.describe(0, (at, 4, NEXT, 1));
    ring.describe(1, (at, 4, WRITE, 0));
    ring.offer(0);
    ring.kick();
    assert_eq!(machine.fault(), "transmit buffer is writable");
    assert_eq!(machine.sink.total_bytes(), 0, "checked before it was sent");
}

#[test]
fn on_its_worker_a_slow_host_and_a_slow_guest_lose_nothing() {
    let Machine {
        console,
        mem,
        mut rings,
        host,
        ..
    } = Machine::at_rest(true);
    let mut host = host.unwrap();
    host.set_nonblocking(false).unwrap();
    let (on_fault, faults) = faults();
    let worker = Worker::spawn("test/dev", Arc::clone(&on_fault)).unwrap();
    let activation = Activation {
        memory: mem,
        features: F_SIZE | F_MULTIPORT,
        queues: rings.iter().map(|r| Some(r.queue(true))).collect(),
        config_interrupt: Interrupt::none(),
    };
    let flag = FaultFlag::default();
    let id = worker
        .activate(Box::new(console), activation, flag.clone(), on_fault)
        .unwrap();
    for event in [3, 6] {
        rings[CONTROL_TX].send(&[1, 0, 0, 0, event, 0, 1, 0]);
        rings[CONTROL_TX].wait_used();
    }
    let data: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    std::thread::scope(|scope| {
        let (mut reader, sent) = (host.try_clone().unwrap(), &data);
        scope.spawn(move || {
            let mut got = vec![0; sent.len()];
            for piece in got.chunks_mut(10_000) {
                reader.read_exact(piece).unwrap();
                std::thread::yield_now();
            }
            assert!(&got == sent, "guest to host");
        });
        scope.spawn(|| host.write_all(&data).unwrap());
        let mut rest = rings.split_off(RX1).into_iter();
        let (mut rx, mut tx) = (rest.next().unwrap(), rest.next().unwrap());
        scope.spawn(move || {
            for (number, page) in sent.chunks(4000).enumerate() {
                if number >= usize::from(QUEUE_SIZE) {
                    tx.wait_used();
                }
                tx.send(page);
            }
        });
        let mut got = Vec::new();
        while got.len() < data.len() {
            rx.offer_room(1000);
            let (head, len) = rx.wait_used();
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            let at = vm_memory::GuestAddress(rx.buffer(head));
            vm_memory::Bytes::read_slice(&rx.mem, &mut bytes, at).unwrap();
            got.extend(bytes);
        }
        assert!(got == data, "host to guest");
    });
    assert!(!flag.needs_reset());
    assert_eq!(worker.deactivate(id).unwrap().1.len(), 6);
    assert!(faults.try_recv().is_err());
}

/// Anything a driver or a host may do next.
#[derive(Debug, Clone)]
enum Step {
    Say(u32, u16, u16),
    Send(usize, Vec<u8>),
    Room(usize, u32),
    Raw(usize, u64, u32, u16),
    Avail(usize, u16),
    Kick(usize),
    Typed(usize),
    Host(usize),
    HostReads,
    HostCloses,
}

fn step() -> impl Strategy<Value = Step> {
    let ring = 0..6_usize;
    prop_oneof![
        4 => (0..3_u32, 0..9_u16, 0..2_u16).prop_map(|(p, e, v)| Step::Say(p, e, v)),
        4 => (ring.clone(), prop::collection::vec(any::<u8>(), 0..4096))
            .prop_map(|(r, b)| Step::Send(r, b)),
        6 => (ring.clone(), 0..4096_u32).prop_map(|(r, l)| Step::Room(r, l)),
        2 => (ring.clone(), any::<u64>(), any::<u32>(), any::<u16>())
            .prop_map(|(r, a, l, f)| Step::Raw(r, a, l, f)),
        1 => (ring.clone(), any::<u16>()).prop_map(|(r, i)| Step::Avail(r, i)),
        2 => ring.prop_map(Step::Kick),
        2 => (0..10_000_usize).prop_map(Step::Typed),
        3 => (0..10_000_usize).prop_map(Step::Host),
        2 => Just(Step::HostReads),
        1 => Just(Step::HostCloses),
    ]
}

proptest! {
    #[test]
    fn whatever_comes_the_console_gets_quiet_or_faults_its_guest(
        steps in prop::collection::vec(step(), 1..60),
        ready: bool,
    ) {
        let mut machine = if ready {
            Machine::ready(true)
        } else {
            let mut machine = Machine::at_rest(true);
            machine.start(F_SIZE | F_MULTIPORT);
            machine
        };
        for step in steps {
            match step {
                Step::Say(port, event, value) => {
                    let mut bytes = port.to_le_bytes().to_vec();
                    bytes.extend(event.to_le_bytes());
                    bytes.extend(value.to_le_bytes());
                    machine.rings[CONTROL_TX].send(&bytes);
                }
                Step::Send(ring, bytes) => _ = machine.rings[ring].send(&bytes),
                Step::Room(ring, len) => _ = machine.rings[ring].offer_room(len),
                Step::Raw(ring, addr, len, flags) => {
                    machine.rings[ring].describe(0, (addr, len, flags, 0));
                    machine.rings[ring].offer(0);
                    machine.rings[ring].kick();
                }
                Step::Avail(ring, index) => {
                    machine.rings[ring].set_avail(index);
                    machine.rings[ring].kick();
                }
                Step::Kick(ring) => machine.rings[ring].kick(),
                Step::Typed(len) => {
                    let typed = DeviceCommand::ConsoleInput(vec![b't'; len]);
                    machine.console.command(typed).unwrap();
                }
                Step::Host(len) => {
                    if let Some(host) = &mut machine.host {
                        let _full = host.write(&vec![b'h'; len]);
                    }
                }
                Step::HostReads => {
                    if let Some(host) = &mut machine.host {
                        let _some = host.read(&mut [0; 10_000]);
                    }
                }
                Step::HostCloses => machine.host = None,
            }
            // Panics if the sources never become quiet.
            match run_ready(&mut machine.console) {
                Ok(()) => {}
                Err(Fault::Guest(_)) => break,
                Err(Fault::Host(fault)) => panic!("the host is well, yet {fault}"),
            }
            prop_assert!(machine.console.input.len() <= MAX_INPUT);
        }
        prop_assert_eq!(machine.console.deactivate().len(), 6);
        machine.console.reset();
        prop_assert!(machine.console.save().is_ok());
    }
}

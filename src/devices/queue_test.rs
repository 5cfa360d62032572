//! Rings as a driver may leave them, and as an attacker may.

use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::devices::testing::{Descriptor, INDIRECT, NEXT, Ring, WRITE, event_fd, memory};

const SIZE: u16 = 8;
/// Where tests put indirect tables: above the ring.
const TABLE: u64 = 0x8_0000;
const RAM: u64 = 1 << 20;

fn ring() -> Ring {
    Ring::new(&memory(1), 0, SIZE)
}

/// What the device makes of a chain that begins at head 0.
fn pop(descriptors: &[Descriptor]) -> Result<Chain, GuestFault> {
    let mut ring = ring();
    for (index, descriptor) in (0..).zip(descriptors) {
        ring.describe(index, *descriptor);
    }
    ring.offer(0);
    let popped = ring.queue(true).pop(&ring.mem);
    popped.map(|chain| chain.expect("a request is available"))
}

/// The same for one indirect table of `len` bytes, holding `inner`.
fn pop_indirect(len: u32, inner: &[Descriptor]) -> Result<Chain, GuestFault> {
    let mut ring = ring();
    for (index, descriptor) in (0..).zip(inner) {
        ring.describe_at(TABLE, index, *descriptor);
    }
    ring.describe(0, (TABLE, len, INDIRECT, 0));
    ring.offer(0);
    let popped = ring.queue(true).pop(&ring.mem);
    popped.map(|chain| chain.expect("a request is available"))
}

fn problem(popped: Result<Chain, GuestFault>) -> &'static str {
    match popped {
        Err(GuestFault::Chain { head: 0, problem }) => problem,
        other => panic!("no fault of the chain but {other:?}"),
    }
}

fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

#[test]
fn a_chain_is_what_may_be_read_then_what_may_be_written() {
    let chain = pop(&[
        (0x1000, 16, NEXT, 1),
        (0x2000, 512, NEXT, 2),
        (0x3000, 1, WRITE, 0),
    ])
    .unwrap();
    assert_eq!(chain.readable, [segment(0x1000, 16), segment(0x2000, 512)]);
    assert_eq!(chain.writable, [segment(0x3000, 1)]);
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (528, 1));
}

#[test]
fn an_empty_ring_has_no_request() {
    let ring = ring();
    assert_eq!(ring.queue(true).pop(&ring.mem), Ok(None));
}

#[test]
fn positions_wrap_through_many_requests() {
    let mut ring = ring();
    let mut queue = ring.queue(true);
    for number in 0..70_000_u32 {
        let head = ring.send(&number.to_le_bytes());
        let chain = queue.pop(&ring.mem).unwrap().unwrap();
        assert_eq!(chain.head, head);
        queue.push(&ring.mem, head, number).unwrap();
        assert_eq!(ring.take_used(), Some((head, number)));
    }
    assert_eq!(queue.pop(&ring.mem), Ok(None));
}

#[test]
fn an_available_index_that_jumps_or_runs_backwards_is_a_fault() {
    for index in [SIZE + 1, 100, 0x8000, 0xffff] {
        let mut ring = ring();
        ring.set_avail(index);
        let fault = ring.queue(true).pop(&ring.mem).unwrap_err();
        let expected = GuestFault::AvailIndex {
            index,
            ahead: index,
            size: SIZE,
        };
        assert_eq!(fault, expected);
    }
    let mut ring = ring();
    ring.set_avail(4);
    let mut queue = ring.queue_at(true, 5, 5);
    assert!(matches!(
        queue.pop(&ring.mem),
        Err(GuestFault::AvailIndex { ahead: 0xffff, .. })
    ));
}

#[test]
fn a_fault_does_not_move_the_ring() {
    let mut ring = ring();
    ring.offer(SIZE);
    let mut queue = ring.queue(true);
    for _ in 0..3 {
        assert!(queue.pop(&ring.mem).is_err());
    }
    assert_eq!(queue.state().next_avail, 0);
}

#[test]
fn a_head_outside_the_ring_is_a_fault() {
    for head in [SIZE, SIZE + 1, 0x7fff, 0xffff] {
        let mut ring = ring();
        ring.offer(head);
        assert_eq!(
            ring.queue(true).pop(&ring.mem),
            Err(GuestFault::HeadOutOfRange { head, size: SIZE })
        );
    }
}

#[test]
fn a_head_made_available_twice_is_two_requests() {
    // Whether the first is still in flight is known to the device alone.
    let mut ring = ring();
    ring.describe(3, (0x1000, 4, 0, 0));
    ring.offer(3);
    ring.offer(3);
    let mut queue = ring.queue(true);
    assert_eq!(queue.pop(&ring.mem).unwrap().unwrap().head, 3);
    assert_eq!(queue.pop(&ring.mem).unwrap().unwrap().head, 3);
    assert_eq!(queue.pop(&ring.mem), Ok(None));
}

#[test]
fn chains_that_loop_end_in_a_fault() {
    let own: [Descriptor; 1] = [(0x1000, 4, NEXT, 0)];
    let pair: [Descriptor; 2] = [(0x1000, 4, NEXT, 1), (0x1000, 4, NEXT, 0)];
    let late: [Descriptor; 3] = [
        (0x1000, 4, NEXT, 1),
        (0x1000, 0, NEXT, 2),
        (0x1000, 0, NEXT, 1),
    ];
    let loops = "loops or is longer than the queue";
    assert_eq!(problem(pop(&own)), loops);
    assert_eq!(problem(pop(&pair)), loops);
    assert_eq!(problem(pop(&late)), loops);
}

#[test]
fn a_chain_as_long_as_the_queue_is_the_longest() {
    let mut chain: Vec<Descriptor> = (1..=SIZE).map(|next| (0x1000, 4, NEXT, next)).collect();
    chain[7].2 = 0;
    assert_eq!(pop(&chain).unwrap().readable.len(), 8);
    chain[7] = (0x1000, 4, NEXT, 0);
    assert!(pop(&chain).is_err());
}

#[test]
fn a_next_outside_the_table_is_a_fault() {
    for next in [SIZE, SIZE + 1, 0xffff] {
        let chain = [(0x1000, 4, NEXT, next)];
        assert_eq!(problem(pop(&chain)), "next descriptor outside the table");
    }
}

#[test]
fn descriptors_of_length_zero_are_no_segments() {
    let chain = pop(&[
        (0x1000, 0, NEXT, 1),
        (u64::MAX, 0, NEXT, 2),
        (0x2000, 8, NEXT, 3),
        (0x3000, 0, WRITE, 0),
    ])
    .unwrap();
    assert_eq!(chain.readable, [segment(0x2000, 8)]);
    assert_eq!(chain.writable, []);
}

#[test]
fn a_chain_is_at_most_64_mib_however_often_it_shows_the_same_memory() {
    let too_long = "spans more than this device takes";
    let both = [(0, u32::MAX, NEXT, 1), (0, u32::MAX, 0, 0)];
    assert_eq!(problem(pop(&both)), too_long);
    let mut ring = Ring::new(&memory(64), 0, SIZE);
    let half = 32 << 20;
    ring.describe(0, (0, half, NEXT, 1));
    ring.describe(1, (0, half, 0, 0));
    ring.describe(2, (0, half, NEXT, 3));
    ring.describe(3, (0, half, NEXT, 4));
    ring.describe(4, (0, 1, 0, 0));
    ring.offer(0);
    ring.offer(2);
    let mut queue = ring.queue(true);
    let chain = queue.pop(&ring.mem).unwrap().unwrap();
    assert_eq!(chain.readable_bytes(), 64 << 20);
    assert!(queue.pop(&ring.mem).is_err());
}

#[test]
fn readable_after_writable_is_a_fault() {
    let chain = [(0x1000, 4, WRITE | NEXT, 1), (0x2000, 4, 0, 0)];
    assert_eq!(problem(pop(&chain)), "readable after writable");
}

#[test]
fn buffers_outside_memory_are_faults() {
    for (addr, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (0, 1 + (1 << 20)),
        (1 << 32, 4096),
        (u64::MAX, 1),
        (u64::MAX - 3, 4),
        (u64::MAX - 3, 4096),
    ] {
        for flags in [0, WRITE] {
            let chain = [(addr, len, flags, 0)];
            assert_eq!(problem(pop(&chain)), "buffer outside memory");
        }
    }
    assert!(pop(&[(RAM - 1, 1, 0, 0)]).is_ok());
}

#[test]
fn a_buffer_across_a_hole_is_a_fault_and_across_a_border_is_not() {
    let ranges = [
        (GuestAddress(0), 1 << 20),
        (GuestAddress(1 << 20), 1 << 20),
        (GuestAddress(4 << 20), 1 << 20),
    ];
    let mem = GuestMemory::from_ranges(&ranges).unwrap();
    let mut ring = Ring::new(&mem, 0, SIZE);
    ring.describe(0, (RAM - 8, 16, 0, 0));
    ring.describe(1, (2 * RAM - 8, 16, 0, 0));
    ring.describe(2, (2 * RAM - 8, 4 << 20, 0, 0));
    for head in 0..3 {
        ring.offer(head);
    }
    let mut queue = ring.queue(true);
    let chain = queue.pop(&mem).unwrap().unwrap();
    assert!(write_segments(&mem, &chain.readable, 0, &[7; 16]));
    assert!(queue.pop(&mem).is_err());
}

#[test]
fn an_indirect_table_is_a_chain() {
    let inner = [(0x1000, 4, NEXT, 2), (0, 0, 0, 0), (0x2000, 8, WRITE, 0)];
    let chain = pop_indirect(48, &inner).unwrap();
    assert_eq!(chain.readable, [segment(0x1000, 4)]);
    assert_eq!(chain.writable, [segment(0x2000, 8)]);
}

#[test]
fn indirect_tables_of_impossible_length_are_faults() {
    let inner = [(0x1000, 4, 0, 0)];
    for len in [0, 1, 15, 17, 31] {
        assert_eq!(
            problem(pop_indirect(len, &inner)),
            "indirect table length is not a multiple of 16"
        );
    }
    for len in [16 * (u32::from(SIZE) + 1), 1 << 20, 16 << 16, 0xffff_fff0] {
        assert_eq!(
            problem(pop_indirect(len, &inner)),
            "indirect table longer than the queue"
        );
    }
    assert!(pop_indirect(16 * u32::from(SIZE), &inner).is_ok());
}

#[test]
fn indirect_tables_that_loop_nest_or_leave_themselves_are_faults() {
    let nested = [(TABLE, 16, INDIRECT, 0)];
    assert_eq!(problem(pop_indirect(16, &nested)), "nested indirect table");
    let own = [(0x1000, 4, NEXT, 0)];
    assert_eq!(
        problem(pop_indirect(16, &own)),
        "loops or is longer than the queue"
    );
    let beyond = [(0x1000, 4, NEXT, 2), (0, 0, 0, 0), (0x1000, 4, 0, 0)];
    assert_eq!(
        problem(pop_indirect(32, &beyond)),
        "next descriptor outside the table"
    );
    let both = [(TABLE, 16, INDIRECT | NEXT, 1), (0x1000, 4, 0, 0)];
    assert_eq!(problem(pop(&both)), "INDIRECT together with NEXT");
}

#[test]
fn an_indirect_table_outside_memory_is_a_fault() {
    for addr in [RAM, RAM - 8, u64::MAX, u64::MAX - 15] {
        let chain = [(addr, 16, INDIRECT, 0)];
        assert_eq!(problem(pop(&chain)), "table outside memory");
    }
}

#[test]
fn a_popped_chain_does_not_change_when_the_driver_rewrites_its_table() {
    let mut ring = ring();
    ring.describe(0, (0x1000, 4, 0, 0));
    ring.offer(0);
    let chain = ring.queue(true).pop(&ring.mem).unwrap().unwrap();
    ring.describe(0, (u64::MAX, u32::MAX, WRITE, 7));
    assert_eq!(chain.readable, [segment(0x1000, 4)]);
}

#[test]
fn a_table_rewritten_while_it_is_walked_yields_no_segment_outside_memory() {
    let ring = ring();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let evil: [Descriptor; 4] = [
                (u64::MAX - 1, 64, NEXT, 3),
                (0x1000, u32::MAX, WRITE, 0xffff),
                (TABLE, 32, INDIRECT, 0),
                (RAM - 16, 17, NEXT, 1),
            ];
            let good: Descriptor = (0x1000, 16, NEXT, 1);
            while !stop.load(Ordering::Relaxed) {
                for index in 0..SIZE {
                    ring.describe(index, good);
                    ring.describe(index, evil[usize::from(index) % 4]);
                    ring.describe_at(TABLE, index, evil[usize::from(index + 1) % 4]);
                    ring.describe(index, (0x2000, 16, 0, 0));
                }
            }
        });
        let mut driver = Ring::new(&ring.mem, 0, SIZE);
        let mut chains = 0;
        for round in 0..50_000 {
            // A fault leaves its request at the front: begin afresh.
            driver.set_avail(0);
            driver.offer(round % SIZE);
            if let Ok(Some(chain)) = ring.queue(true).pop(&ring.mem) {
                assert_inside(&ring.mem, &chain);
                chains += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(chains > 0, "some walks saw a whole chain");
    });
}

#[test]
fn a_request_put_back_is_the_next_again() {
    let mut ring = ring();
    let head = ring.send(b"first");
    ring.send(b"second");
    let mut queue = ring.queue(true);
    let first = queue.pop(&ring.mem).unwrap().unwrap();
    queue.undo_pop();
    assert_eq!(queue.pop(&ring.mem).unwrap().unwrap(), first);
    assert_eq!(first.head, head);
}

#[test]
fn a_head_outside_the_ring_cannot_be_returned() {
    let ring = ring();
    let mut queue = ring.queue(true);
    assert!(queue.push(&ring.mem, SIZE, 0).is_err());
    assert_eq!(queue.state().next_used, 0);
}

#[test]
fn the_driver_is_interrupted_where_it_asked_to_be() {
    let mut ring = ring();
    let mut queue = ring.queue(true);
    ring.set_used_event(1);
    for expected in [false, true, false] {
        let head = ring.send(b"x");
        queue.pop(&ring.mem).unwrap().unwrap();
        queue.push(&ring.mem, head, 0).unwrap();
        queue.signal(&ring.mem).unwrap();
        assert_eq!(ring.interrupted(), expected);
    }
}

#[test]
fn without_event_idx_every_return_interrupts() {
    let mut ring = ring();
    let mut queue = ring.queue(false);
    for _ in 0..3 {
        let head = ring.send(b"x");
        queue.pop(&ring.mem).unwrap().unwrap();
        queue.push(&ring.mem, head, 0).unwrap();
        queue.signal(&ring.mem).unwrap();
        assert!(ring.interrupted());
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut ring = ring();
    let mut queue = ring.queue(false);
    for flags in [1_u16, 0] {
        let at = GuestAddress(ring.avail_ring());
        ring.mem.write_obj(flags, at).unwrap();
        let head = ring.send(b"x");
        queue.pop(&ring.mem).unwrap().unwrap();
        queue.push(&ring.mem, head, 0).unwrap();
        queue.signal(&ring.mem).unwrap();
        assert_eq!(ring.interrupted(), flags == 0);
    }
}

#[test]
fn nothing_returned_is_nothing_to_interrupt_for() {
    for event_idx in [false, true] {
        let ring = ring();
        ring.set_used_event(0xffff);
        ring.queue(event_idx).signal(&ring.mem).unwrap();
        assert!(!ring.interrupted());
    }
}

#[test]
fn chains_returned_together_appear_together_also_across_the_rings_end() {
    let mut ring = ring();
    let mut queue = ring.queue(true);
    for _ in 0..5 {
        let three: Vec<u16> = (0..3).map(|_| ring.send(b"x")).collect();
        let mut returned = Vec::new();
        for head in &three {
            assert_eq!(queue.pop(&ring.mem).unwrap().unwrap().head, *head);
            assert_eq!(ring.take_used(), None);
            returned.push((*head, u32::from(*head) + 100));
        }
        queue.push_all(&ring.mem, &returned).unwrap();
        queue.signal(&ring.mem).unwrap();
        assert!(ring.interrupted(), "the first of the three was asked for");
        for expected in returned {
            assert_eq!(ring.take_used(), Some(expected));
        }
    }
    assert_eq!(queue.state().next_used, 15);
    assert_eq!(queue.used_index(&ring.mem), Ok(15));
}

#[test]
fn a_chain_used_again_holds_nothing_of_the_last_one() {
    let mut ring = ring();
    ring.describe(0, (0x1000, 4, NEXT, 1));
    ring.describe(1, (0x2000, 4, WRITE, 0));
    ring.describe(2, (0x3000, 8, WRITE | NEXT, 3));
    ring.describe(3, (RAM, 1, WRITE, 0));
    ring.describe(4, (0x4000, 16, 0, 0));
    for head in [0, 4, 2] {
        ring.offer(head);
    }
    let mut queue = ring.queue(true);
    let mut chain = Chain::default();
    assert_eq!(queue.pop_into(&ring.mem, &mut chain), Ok(true));
    assert_eq!(queue.pop_into(&ring.mem, &mut chain), Ok(true));
    assert_eq!(chain.head, 4);
    assert_eq!(chain.readable, [segment(0x4000, 16)]);
    assert_eq!(chain.writable, []);
    assert!(queue.pop_into(&ring.mem, &mut chain).is_err());
    ring.describe(2, (0x3000, 8, 0, 0));
    assert_eq!(queue.pop_into(&ring.mem, &mut chain), Ok(true));
    assert_eq!(chain.readable, [segment(0x3000, 8)]);
    assert_eq!(chain.writable, []);
}

#[test]
fn a_device_may_allow_longer_chains() {
    let mut ring = Ring::new(&memory(1), 0, SIZE);
    for index in 0..4 {
        let flags = if index < 3 { WRITE | NEXT } else { WRITE };
        ring.describe(index, (0, 1 << 20, flags, index + 1));
    }
    ring.offer(0);
    let mut queue = ring.queue(true);
    queue.set_max_chain_bytes((4 << 20) - 1);
    assert!(queue.pop(&ring.mem).is_err());
    queue.set_max_chain_bytes(4 << 20);
    let chain = queue.pop(&ring.mem).unwrap().unwrap();
    assert_eq!(chain.writable_bytes(), 4 << 20);
}

#[test]
fn requests_that_come_before_kicks_are_enabled_are_noticed() {
    for event_idx in [false, true] {
        let mut ring = ring();
        let mut queue = ring.queue(event_idx);
        queue.disable_kicks(&ring.mem).unwrap();
        ring.send(b"x");
        assert!(queue.enable_kicks(&ring.mem).unwrap());
        queue.pop(&ring.mem).unwrap().unwrap();
        assert!(!queue.enable_kicks(&ring.mem).unwrap());
    }
}

#[test]
fn a_kick_storm_is_one_kick() {
    let ring = ring();
    let queue = ring.queue(true);
    for _ in 0..1000 {
        ring.kick();
    }
    queue.consume_kick();
    assert!(ring.kick.read().is_err(), "empty");
    queue.consume_kick();
}

#[test]
fn a_saturated_interrupt_does_not_block() {
    let call = event_fd();
    call.write(u64::MAX - 1).unwrap();
    Interrupt::new(call.clone()).signal();
    assert!(call.read().is_ok());
}

#[test]
fn pieces_of_segments_cover_exactly_what_was_asked() {
    let segments = [segment(0x1000, 3), segment(0x2000, 5), segment(0x3000, 2)];
    assert_eq!(
        cut(&segments, 2, 7),
        [segment(0x1002, 1), segment(0x2000, 5), segment(0x3000, 1)]
    );
    assert_eq!(cut(&segments, 10, 1), []);
    assert_eq!(cut(&segments, u64::MAX, u64::MAX), []);
    assert_eq!(cut(&segments, 9, u64::MAX), [segment(0x3001, 1)]);
    let mem = memory(1);
    assert!(write_segments(&mem, &segments, 0, b"0123456789"));
    let mut back = [0; 4];
    assert!(read_segments(&mem, &segments, 2, &mut back));
    assert_eq!(&back, b"2345");
    assert!(!read_segments(&mem, &segments, 7, &mut back), "too short");
    assert!(!write_segments(&mem, &segments, 8, b"xyz"), "too short");
}

#[test]
fn vectors_cover_the_segments_and_refuse_what_is_outside() {
    let mem = memory(1);
    let mut vectors = Vec::new();
    let segments = [segment(0x1000, 3), segment(RAM - 5, 5)];
    iovecs(&mem, &segments, &mut vectors).unwrap();
    let lengths: Vec<usize> = vectors.iter().map(|v| v.iov_len).collect();
    assert_eq!(lengths, [3, 5]);
    for outside in [segment(RAM, 1), segment(RAM - 1, 2), segment(u64::MAX, 2)] {
        assert!(iovecs(&mem, &[outside], &mut vectors).is_err());
    }
}

fn assert_inside(mem: &GuestMemory, chain: &Chain) {
    for segment in chain.readable.iter().chain(&chain.writable) {
        assert!(segment.len > 0);
        assert!(
            mem.check_range(segment.addr, segment.len as usize),
            "{segment:?}"
        );
    }
    assert!(chain.readable_bytes() + chain.writable_bytes() <= MAX_CHAIN_BYTES);
    assert!(chain.readable.len() + chain.writable.len() <= 2 * usize::from(SIZE));
}

/// Descriptors that are often right and sometimes anything.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let addr = prop_oneof![
        4 => 0..RAM,
        1 => Just(TABLE),
        1 => (RAM - 64)..(RAM + 64),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => 0..4096_u32,
        2 => (0..10_u32).prop_map(|entries| entries * 16),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (addr, len, flags, next)
}

proptest! {
    #[test]
    fn any_table_yields_segments_inside_memory_or_a_fault(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0..=SIZE, 1..16),
        jump in prop_oneof![8 => Just(0_u16), 1 => any::<u16>()],
        event_idx: bool,
        used_event: u16,
    ) {
        let mut ring = ring();
        for (index, descriptor) in (0..).zip(table) {
            ring.describe(index, descriptor);
        }
        for (index, descriptor) in (0..).zip(indirect) {
            ring.describe_at(TABLE, index, descriptor);
        }
        let mut queue = ring.queue(event_idx);
        for head in heads {
            ring.offer(head);
            ring.set_used_event(used_event);
            // A fault ends the device's use of the queue; here the next round goes on.
            if let Ok(Some(chain)) = queue.pop(&ring.mem) {
                assert_inside(&ring.mem, &chain);
                let mut vectors = Vec::new();
                prop_assert!(iovecs(&ring.mem, &chain.writable, &mut vectors).is_ok());
                prop_assert!(queue.push(&ring.mem, chain.head, 0).is_ok());
            }
            let _wanted = queue.signal(&ring.mem);
            let _more = queue.enable_kicks(&ring.mem);
        }
        let index = ring.queue(event_idx).state().next_avail.wrapping_add(jump);
        ring.set_avail(index);
        if let Ok(Some(chain)) = queue.pop(&ring.mem) {
            assert_inside(&ring.mem, &chain);
        }
    }

    #[test]
    fn raw_bytes_as_a_table_yield_segments_inside_memory_or_a_fault(
        bytes in prop::collection::vec(any::<u8>(), 16 * usize::from(SIZE)),
        head in 0..SIZE,
    ) {
        let mut ring = ring();
        ring.mem.write_slice(&bytes, GuestAddress(ring.table())).unwrap();
        ring.offer(head);
        if let Ok(Some(chain)) = ring.queue(true).pop(&ring.mem) {
            assert_inside(&ring.mem, &chain);
        }
    }

    #[test]
    fn what_is_written_through_segments_is_read_back(
        lengths in prop::collection::vec(0..300_u32, 0..8),
        offset in 0..1000_u64,
        bytes in prop::collection::vec(any::<u8>(), 0..1000),
    ) {
        let mem = memory(1);
        let mut segments = Vec::new();
        for (index, len) in (0_u64..).zip(lengths) {
            segments.push(segment(index * 0x1000, len));
        }
        let fits = offset + bytes.len() as u64 <= total(&segments) || bytes.is_empty();
        prop_assert_eq!(write_segments(&mem, &segments, offset, &bytes), fits);
        let mut back = vec![0; bytes.len()];
        prop_assert_eq!(read_segments(&mem, &segments, offset, &mut back), fits);
        prop_assert!(!fits || back == bytes);
    }
}

//! A guest driver, a NIC and a real TAP in a network namespace of its own. What both data paths
//! promise is tested on both; without vhost-net on this kernel that half says that it is skipped.

#[path = "guest_test.rs"]
mod guest;

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::testing::{NEXT, WRITE};
use crate::devices::worker::{FaultFlag, Worker};
use crate::devices::{Interrupt, RunningQueue};
use crate::testing::{in_network_namespace, run};
use guest::{
    EVENT_IDX, EVERYTHING, Guest, MAC, OURS, PLAIN, VERSION_1, Wire, fold, frame, tap, tcp_segment,
};

const NO_OFFLOAD: [u8; 12] = [0; 12];
const IPV4: [u8; 2] = [8, 0];

/// Runs a test on the user-space path and, where the kernel has it, on vhost-net.
fn on_each_path(test: fn(bool)) {
    in_network_namespace(move || test(false));
    if kernel_has_vhost() {
        in_network_namespace(move || test(true));
    }
}

/// Whether vhost-net can be tested; if not, the skip is printed past the harness's capture.
fn kernel_has_vhost() -> bool {
    let available = vhost::is_available();
    if !available {
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        writeln!(
            std::io::stderr(),
            "SKIP: {test} on vhost-net: /dev/vhost-net does not open here"
        )
        .unwrap();
    }
    available
}

fn boot(features: u64, vhost: bool, buffers: u16) -> (Guest, Wire) {
    let tap = tap();
    let guest = Guest::boot(tap, features, vhost, buffers);
    assert_eq!(guest.nic.uses_vhost(), vhost);
    (guest, Wire::new())
}

/// A frame of the host that the guest must see, and one back.
fn assert_passes(guest: &mut Guest, wire: &mut Wire, mark: &[u8]) {
    wire.send([0; 10], &frame(false, mark));
    let (header, got) = guest.receive(OURS);
    assert_eq!(got, frame(false, mark));
    assert_eq!(header[..10], [0; 10]);
    guest.send(NO_OFFLOAD, &frame(true, mark));
    let (_, got) = wire.receive(OURS);
    assert_eq!(got, frame(true, mark));
}

fn problem(result: Result<usize, Fault>) -> &'static str {
    match result {
        Err(Fault::Guest(GuestFault::Request {
            device: "net",
            problem,
        })) => problem,
        other => panic!("no fault of the guest: {other:?}"),
    }
}

#[test]
fn the_configuration_has_mac_link_and_mtu() {
    in_network_namespace(|| {
        let (guest, _wire) = boot(PLAIN, false, 0);
        assert_eq!(
            guest.nic.config().bytes(),
            [2, 0, 0, 0, 0, 2, 1, 0, 1, 0, 0xdc, 5]
        );
        guest.nic.config().write_by_driver(0, &[0xff; 12]);
        assert_eq!(guest.nic.config().bytes()[..6], MAC);
    });
}

#[test]
fn an_mtu_below_the_standards_is_refused() {
    in_network_namespace(|| {
        let config = NetConfig {
            tap: tap(),
            mac: MAC,
            mtu: 67,
            link_up: true,
            vhost: false,
        };
        assert!(Net::new(config).is_err());
    });
}

#[test]
fn frames_pass_both_ways() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 64);
        for mark in [&[1; 46][..], &[2; 1400], &[3; 1500]] {
            assert_passes(&mut guest, &mut wire, mark);
        }
        // What the kernel moves, we do not see.
        let counts = guest.nic.counters().now();
        let seen = if vhost { 0 } else { 3 };
        assert_eq!((counts.rx_frames, counts.tx_frames), (seen, seen));
    });
}

#[test]
fn frames_pass_in_rings_that_went_round() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(EVERYTHING, vhost, 128);
        for i in 0..600_u16 {
            assert_passes(
                &mut guest,
                &mut wire,
                &[&i.to_le_bytes()[..], &[0; 60]].concat(),
            );
        }
    });
}

#[test]
fn a_large_segment_of_the_guest_reaches_the_host_whole() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(EVERYTHING, vhost, 64);
        let (header, segment) = tcp_segment(true, 60_000);
        guest.send(header, &segment);
        let (kernel, got) = wire.receive(IPV4);
        assert_eq!(kernel[1], 1, "still to be cut");
        assert_eq!(kernel[4..6], 1448_u16.to_le_bytes());
        assert!(got == segment, "every byte of it");
    });
}

#[test]
fn a_large_segment_of_the_host_spans_many_buffers() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(EVERYTHING, vhost, 128);
        let (header, segment) = tcp_segment(false, 60_000);
        wire.send(header[..10].try_into().unwrap(), &segment);
        let (header, got) = guest.receive(IPV4);
        assert_eq!(
            header[..2],
            [1, 1],
            "checksum and segmentation are left to the guest"
        );
        let buffers = (12 + segment.len()).div_ceil(1536);
        assert_eq!(
            usize::from(u16::from_le_bytes([header[10], header[11]])),
            buffers
        );
        assert!(got == segment, "every byte of it");
    });
}

#[test]
fn the_host_cuts_and_sums_for_a_guest_that_cannot() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 128);
        let (header, segment) = tcp_segment(false, 10_000);
        wire.send(header[..10].try_into().unwrap(), &segment);
        let mut payload: Vec<u8> = Vec::new();
        while payload.len() < 10_000 {
            let (header, got) = guest.receive(IPV4);
            assert_eq!(header[..2], [0, 0], "nothing is left to do");
            let mut pseudo = got[26..34].to_vec();
            pseudo.extend([0, 6]);
            pseudo.extend(u16::try_from(got.len() - 34).unwrap().to_be_bytes());
            pseudo.extend(&got[34..]);
            assert_eq!(fold(&pseudo), 0xffff, "the checksum is right");
            payload.extend(&got[54..]);
        }
        assert!(payload == segment[54..], "every byte of it");
    });
}

#[test]
fn offloads_follow_the_features_of_each_activation() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 128);
        let positions = guest.pause();
        guest.features = EVERYTHING & !EVENT_IDX;
        guest.activate(positions);
        let (header, segment) = tcp_segment(false, 20_000);
        wire.send(header[..10].try_into().unwrap(), &segment);
        let (_, got) = guest.receive(IPV4);
        assert_eq!(got.len(), segment.len());
    });
}

#[test]
fn without_merging_a_frame_takes_one_buffer_or_is_dropped() {
    in_network_namespace(|| {
        let features = VERSION_1 | (1 << VIRTIO_NET_F_GUEST_CSUM) | (1 << VIRTIO_NET_F_GUEST_TSO4);
        let (mut guest, mut wire) = boot(features, false, 8);
        let (header, segment) = tcp_segment(false, 20_000);
        wire.send(header[..10].try_into().unwrap(), &segment);
        guest.serve().unwrap();
        assert_eq!(guest.nic.counters().now().rx_dropped, 1);
        wire.send([0; 10], &frame(false, &[7; 1500]));
        let (header, got) = guest.receive(OURS);
        assert_eq!(header[10..], [1, 0]);
        assert_eq!(got, frame(false, &[7; 1500]));
    });
}

#[test]
fn a_flood_without_buffers_neither_spins_nor_freezes() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(PLAIN, false, 0);
        guest.serve().unwrap();
        for i in 0..400_u16 {
            wire.send([0; 10], &frame(false, &i.to_le_bytes().repeat(30)));
            // Each frame wakes the loop at most once, and the loop goes quiet.
            assert!(guest.serve().unwrap() <= 1);
        }
        assert_eq!(guest.serve().unwrap(), 0);
        for _ in 0..128 {
            guest.rx.offer_room(1536);
        }
        for i in 0..400_u16 {
            let (_, got) = guest.receive(OURS);
            assert_eq!(got[14..16], i.to_le_bytes());
        }
        assert_passes(&mut guest, &mut wire, &[9; 64]);
    });
}

#[test]
fn a_ring_too_small_for_the_largest_frame_still_receives() {
    in_network_namespace(|| {
        let tap = tap();
        let mut guest = Guest::boot(tap, EVERYTHING & !EVENT_IDX, false, 0);
        let _positions = guest.pause();
        guest.rx.size = 16;
        guest.activate([(0, 0), (0, 0)]);
        for _ in 0..8 {
            guest.rx.offer_room(1536);
        }
        let mut wire = Wire::new();
        let (header, segment) = tcp_segment(false, 40_000);
        wire.send(header[..10].try_into().unwrap(), &segment);
        wire.send([0; 10], &frame(false, &[5; 100]));
        let (_, got) = guest.receive(OURS);
        assert_eq!(got, frame(false, &[5; 100]));
        assert_eq!(guest.nic.counters().now().rx_dropped, 1);
    });
}

#[test]
fn nothing_passes_while_the_link_is_down() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(EVERYTHING, vhost, 64);
        assert_passes(&mut guest, &mut wire, &[1; 64]);
        let _earlier = guest.config_call.read();

        guest.nic.command(DeviceCommand::SetLink(false)).unwrap();
        assert_eq!(guest.nic.config().bytes()[6..8], [0, 0]);
        assert!(guest.config_call.read().is_ok(), "the driver is told");
        guest.serve().unwrap();
        wire.send([0; 10], &frame(false, &[2; 64]));
        guest.send(NO_OFFLOAD, &frame(true, &[2; 64]));
        assert_eq!(guest.take_used(true), None);
        let counts = guest.nic.counters().now();
        assert_eq!((counts.rx_dropped, counts.tx_dropped), (1, 1));

        // Even what comes just before the link is not for this driver.
        wire.send([0; 10], &frame(false, &[3; 64]));
        guest.nic.command(DeviceCommand::SetLink(true)).unwrap();
        assert_eq!(guest.nic.config().bytes()[6..8], [1, 0]);
        assert!(guest.config_call.read().is_ok(), "the driver is told");
        assert_passes(&mut guest, &mut wire, &[4; 64]);
    });
}

#[test]
fn a_link_that_changes_at_rest_is_told_at_the_next_activation() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        let positions = guest.pause();
        let _earlier = guest.config_call.read();
        guest.nic.command(DeviceCommand::SetLink(false)).unwrap();
        guest.activate(positions);
        assert!(guest.config_call.read().is_ok());
        let positions = guest.pause();
        guest.activate(positions);
        assert!(guest.config_call.read().is_err(), "told once");
    });
}

#[test]
fn a_pause_loses_no_buffer_and_no_frame() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(EVERYTHING, vhost, 64);
        assert_passes(&mut guest, &mut wire, &[1; 64]);
        // Of the 65 buffers offered (one of them twice), one came back.
        let positions = guest.pause();
        assert_eq!(positions, [(1, 1), (1, 1)]);
        // Kicks of this while have nobody to wake.
        guest.post(NO_OFFLOAD, &frame(true, &[2; 64]));
        wire.send([0; 10], &frame(false, &[2; 64]));

        let tap = guest.nic.tap.file().as_fd().try_clone_to_owned().unwrap();
        let state = guest.nic.save().unwrap();
        let Guest { rx, tx, mem, .. } = guest;
        for ring in [&rx, &tx] {
            while ring.kick.read().is_ok() {}
        }
        let nic = Net::new(NetConfig {
            tap,
            mac: MAC,
            mtu: 1500,
            link_up: false,
            vhost,
        })
        .unwrap();
        let mut guest = Guest::resumed(nic, state, (rx, tx, mem), positions);
        assert_eq!(
            guest.nic.config().bytes()[6..8],
            [1, 0],
            "the link is the saved one"
        );
        assert_eq!(guest.receive(OURS).1, frame(false, &[2; 64]));
        assert_eq!(wire.receive(OURS).1, frame(true, &[2; 64]));
        assert_passes(&mut guest, &mut wire, &[3; 64]);
    });
}

#[test]
fn a_new_driver_gets_no_frame_of_the_last_one() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(EVERYTHING, false, 0);
        wire.send([0; 10], &frame(false, &[1; 64]));
        let _positions = guest.pause();
        guest.nic.reset();
        let tap = guest.nic.tap.file().as_fd().try_clone_to_owned().unwrap();
        drop(guest);
        let mut guest = Guest::boot(tap, PLAIN, false, 16);
        wire.send([0; 10], &frame(false, &[2; 64]));
        assert_eq!(guest.receive(OURS).1, frame(false, &[2; 64]));
    });
}

#[test]
fn one_wake_up_sends_a_bounded_number_of_frames() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(PLAIN, false, 0);
        guest.serve().unwrap();
        let one = [&NO_OFFLOAD[..], &frame(true, &[1; 64])].concat();
        for _ in 0..256 {
            guest.tx.send(&one);
        }
        guest.nic.handle(TX_KICK, EventSet::IN).unwrap();
        assert_eq!(guest.nic.counters().now().tx_frames, 256);
        assert!(guest.tx.kick.read().is_ok(), "it wakes itself again");
        for _ in 0..256 {
            wire.receive(OURS);
        }
    });
}

#[test]
fn interrupts_come_where_the_driver_wants_them() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(EVERYTHING, false, 0);
        guest.serve().unwrap();
        let _earlier = guest.tx.interrupted();
        guest.tx.set_used_event(2);
        for (sent, wanted) in [(1, false), (2, false), (3, true), (4, false)] {
            guest.post(NO_OFFLOAD, &frame(true, &[1; 64]));
            guest.serve().unwrap();
            assert_eq!(guest.tx.interrupted(), wanted, "after {sent} frames");
        }
    });
}

#[test]
fn a_driver_without_event_index_can_ask_for_silence() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        guest.serve().unwrap();
        for (flags, wanted) in [(0_u16, true), (1, false), (0, true)] {
            let at = GuestAddress(guest.tx.avail_ring());
            guest.mem.write_obj(flags, at).unwrap();
            guest.post(NO_OFFLOAD, &frame(true, &[1; 64]));
            guest.serve().unwrap();
            assert_eq!(guest.tx.interrupted(), wanted, "flags {flags}");
            guest.tx.kick();
            guest.serve().unwrap();
            assert!(!guest.tx.interrupted(), "nothing was returned");
        }
    });
}

#[test]
fn a_frame_with_an_impossible_header_is_lost_and_nothing_else() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(EVERYTHING, false, 64);
        let body = frame(true, &[6; 64]);
        let bad: [(&str, [u8; 12]); 5] = [
            ("no segment size", [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0]),
            (
                "a checksum beyond the frame",
                [1, 0, 0, 0, 0, 0, 77, 0, 0, 0, 0, 0],
            ),
            (
                "an offset at the end of numbers",
                [1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0],
            ),
            (
                "an unknown segmentation",
                [1, 0x42, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0],
            ),
            (
                "headers longer than the frame",
                [1, 1, 255, 255, 1, 0, 34, 0, 16, 0, 0, 0],
            ),
        ];
        for (refused, (what, header)) in (1..).zip(bad) {
            guest.send(header, &body);
            assert_eq!(guest.nic.counters().now().tx_refused, refused, "{what}");
        }
        // Shorter than a header, shorter than Ethernet, longer than any frame.
        guest.post_pieces(&[&[0; 11]]);
        guest.serve().unwrap();
        guest.send(NO_OFFLOAD, &[0; 13]);
        guest.send(NO_OFFLOAD, &[0; 65535 + 18 + 1]);
        assert_eq!(guest.nic.counters().now().tx_refused, 8);
        while guest.take_used(false).is_some() {}
        assert_passes(&mut guest, &mut wire, &[7; 64]);
    });
}

#[test]
fn a_frame_in_single_bytes_is_a_frame() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(EVERYTHING, false, 64);
        let body = frame(true, &[8; 230]);
        let bytes = [&NO_OFFLOAD[..], &body].concat();
        assert_eq!(bytes.len(), 256);
        let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
        guest.post_pieces(&pieces);
        guest.serve().unwrap();
        assert_eq!(wire.receive(OURS).1, body);
    });
}

#[test]
fn a_buffer_of_the_wrong_direction_or_size_stops_the_device() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        guest.tx.offer_room(100);
        assert_eq!(problem(guest.serve()), "transmit buffer is device-writable");
    });
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        guest.rx.send(&[0; 1536]);
        assert_eq!(
            problem(guest.serve()),
            "receive buffer is not device-writable"
        );
    });
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        guest.rx.offer_room(11);
        assert_eq!(
            problem(guest.serve()),
            "receive buffer is shorter than a header"
        );
    });
}

#[test]
fn a_header_in_pieces_still_tells_how_many_buffers() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(PLAIN, false, 0);
        for i in 0..16 {
            let (at, next) = (guest.rx.buffer(2 * i), 2 * i + 1);
            guest.rx.describe(2 * i, (at, 11, WRITE | NEXT, next));
            guest.rx.describe(next, (at + 11, 2000, WRITE, 0));
            guest.rx.offer(2 * i);
        }
        guest.rx.kick();
        wire.send([0; 10], &frame(false, &[1; 1000]));
        let (header, got) = guest.receive(OURS);
        assert_eq!(header[10..], [1, 0]);
        assert_eq!(got, frame(false, &[1; 1000]));
    });
}

#[test]
fn the_same_receive_buffer_twice_hurts_the_guest_alone() {
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(PLAIN, false, 0);
        for _ in 0..200 {
            guest.rx.describe(0, (guest.rx.buffer(0), 600, WRITE, 0));
            guest.rx.offer(0);
        }
        guest.rx.kick();
        wire.send([0; 10], &frame(false, &[1; 1400]));
        guest.serve().unwrap();
        let used: Vec<_> = std::iter::from_fn(|| guest.take_used(true)).collect();
        assert_eq!(used, [(0, 600), (0, 600), (0, 12 + 14 + 1400 - 1200)]);
    });
}

#[test]
fn an_available_index_that_jumps_stops_the_device() {
    for rx in [true, false] {
        in_network_namespace(move || {
            let (mut guest, _wire) = boot(PLAIN, false, 0);
            guest.serve().unwrap();
            let ring = if rx { &mut guest.rx } else { &mut guest.tx };
            ring.set_avail(257);
            ring.kick();
            let fault = guest.serve().unwrap_err();
            assert!(matches!(fault, Fault::Guest(GuestFault::AvailIndex { .. })));
        });
    }
}

#[test]
fn a_ring_that_vhost_cannot_follow_stops_the_device() {
    if !kernel_has_vhost() {
        return;
    }
    in_network_namespace(|| {
        let (mut guest, mut wire) = boot(PLAIN, true, 64);
        assert_passes(&mut guest, &mut wire, &[1; 64]);
        guest.tx.set_avail(1000);
        guest.tx.kick();
        let error = guest.nic.sources();
        let error = error.iter().find(|s| s.token == VHOST_ERROR).unwrap();
        guest::wait_readable([error.fd], Duration::from_secs(20));
        assert_eq!(problem(guest.serve()), "vhost-net cannot follow a ring");
        assert_eq!(guest.nic.deactivate().len(), 2);
    });
}

/// A ring at the very end of memory is right, but the kernel's interface will not have it.
#[test]
fn a_ring_that_vhost_refuses_is_served_in_user_space() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 0);
        let _positions = guest.pause();
        let avail_ring = (8 << 20) - (6 + 2 * 256);
        let queue = Queue::try_from(QueueState {
            avail_ring,
            ..guest.tx.queue(false).state()
        })
        .unwrap();
        let queue = RunningQueue::new(queue, Arc::clone(&guest.tx.kick), Interrupt::none());
        let body = [&NO_OFFLOAD[..], &frame(true, &[1; 64])].concat();
        guest.tx.send(&body);
        // One entry: the head, at index 1.
        guest
            .mem
            .write_obj(1_u16, GuestAddress(avail_ring + 2))
            .unwrap();
        guest
            .nic
            .activate(Activation {
                memory: guest.mem.clone(),
                features: PLAIN,
                queues: vec![Some(guest.rx.queue(false)), Some(queue)],
                config_interrupt: Interrupt::none(),
            })
            .unwrap();
        guest.watch();
        guest.serve().unwrap();
        assert_eq!(wire.receive(OURS).1, frame(true, &[1; 64]));
        assert_eq!(guest.nic.counters().now().tx_frames, 1);
    });
}

#[test]
fn a_header_rewritten_while_it_is_sent_is_the_checked_one_to_the_host() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(EVERYTHING, false, 0);
        guest.serve().unwrap();
        let (mem, at) = (guest.mem.clone(), GuestAddress(guest.tx.buffer(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let second_cpu = std::thread::spawn(move || {
            // Right, and a segmentation that the kernel would refuse.
            let headers: [[u8; 12]; 2] = [[0; 12], [1, 1, 54, 0, 0, 0, 255, 255, 255, 255, 0, 0]];
            while !stopped.load(Ordering::Relaxed) {
                for header in &headers {
                    mem.write_slice(header, at).unwrap();
                }
            }
        });
        for _ in 0..20_000 {
            guest.post(NO_OFFLOAD, &frame(true, &[1; 64]));
            guest.serve().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        second_cpu.join().unwrap();
        let counts = guest.nic.counters().now();
        assert_eq!(counts.tx_frames + counts.tx_refused, 20_000);
        assert_eq!(counts.tx_dropped, 0, "the kernel refused none");
    });
}

#[test]
fn a_tap_that_is_gone_is_the_hosts_fault() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 64);
        guest.serve().unwrap();
        run("ip link del t0");
        guest.post(NO_OFFLOAD, &frame(true, &[1; 64]));
        let fault = guest.serve().unwrap_err();
        assert!(matches!(fault, Fault::Host(_)), "{fault:?}");
    });
}

#[test]
fn a_queue_left_disabled_is_no_fault() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 0);
        let _positions = guest.pause();
        let queues = vec![None, Some(guest.tx.queue(false))];
        guest
            .nic
            .activate(Activation {
                memory: guest.mem.clone(),
                features: PLAIN,
                queues,
                config_interrupt: Interrupt::none(),
            })
            .unwrap();
        guest.watch();
        wire.send([0; 10], &frame(false, &[1; 64]));
        guest.send(NO_OFFLOAD, &frame(true, &[1; 64]));
        assert_eq!(wire.receive(OURS).1, frame(true, &[1; 64]));
        let states = guest.nic.deactivate();
        assert!(states[0].is_none() && states[1].is_some());
    });
}

#[test]
fn the_state_of_another_device_is_refused() {
    in_network_namespace(|| {
        let (mut guest, _wire) = boot(PLAIN, false, 0);
        guest.pause();
        assert!(guest.nic.restore(DeviceState::Entropy).is_err());
    });
}

/// The whole of it on a real worker: the path changes with the link while the loop runs.
#[test]
fn on_its_worker_the_link_switches_paths() {
    on_each_path(|vhost| {
        let (mut guest, mut wire) = boot(PLAIN, vhost, 0);
        let _positions = guest.pause();
        let on_fault: crate::devices::worker::OnHostFault = Arc::new(|fault| panic!("{fault}"));
        let worker = Worker::spawn("test/dev", Arc::clone(&on_fault)).unwrap();
        let activation = Activation {
            memory: guest.mem.clone(),
            features: PLAIN,
            queues: vec![Some(guest.rx.queue(false)), Some(guest.tx.queue(false))],
            config_interrupt: Interrupt::none(),
        };
        let counters = guest.nic.counters();
        let id = worker
            .activate(
                Box::new(guest.nic),
                activation,
                FaultFlag::default(),
                on_fault,
            )
            .unwrap();
        for round in 0..3 {
            let one = [&NO_OFFLOAD[..], &frame(true, &[round; 64])].concat();
            guest.tx.send(&one);
            assert_eq!(wire.receive(OURS).1, frame(true, &[round; 64]));
            worker
                .command(id, DeviceCommand::SetLink(false))
                .unwrap()
                .unwrap();
            guest.tx.send(&one);
            while counters.now().tx_dropped <= u64::from(round) {
                guest::wait_readable([guest.tx.call.as_raw_fd()], Duration::from_secs(5));
                let _interrupt = guest.tx.call.read();
            }
            worker
                .command(id, DeviceCommand::SetLink(true))
                .unwrap()
                .unwrap();
        }
        let (_nic, positions) = worker.deactivate(id).unwrap();
        assert_eq!(positions[1].unwrap().next_used, 6);
    });
}

//! What is in flight: pauses, resets, heads that come twice, failing syncs, the worker's loop.
//!
//! A read from a pipe in place of the disk's file stays in flight until the test feeds it.
#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are small"
)]

use std::io::{PipeWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::super::testing::*;
use super::super::{Block, Disk, EngineChoice};
use crate::devices::worker::{FaultFlag, Worker};
use crate::devices::{Activation, Fault, GuestFault, Interrupt, RunningQueue, VirtioDevice};

/// A disk of 1 MiB whose reads wait for what is written to the pipe.
fn slow_disk() -> (Block, PipeWriter) {
    let file = Arc::new(file_of(&[0; 1 << 20]));
    let device = block(Disk::Direct(Arc::clone(&file)), EngineChoice::Ring);
    let (reader, writer) = std::io::pipe().unwrap();
    swap(&file, &reader);
    (device, writer)
}

#[test]
fn a_pause_waits_for_everything_in_flight() {
    let memory = ram();
    let (device, mut pipe) = slow_disk();
    let mut guest = Guest::new(&memory, device);
    for head in 0..128 {
        guest.write_header(head, 0, u64::from(head));
        guest.offer_indirect(
            head,
            &[
                (Guest::header(head).0, 16, false),
                (Guest::data(head).0, 512, true),
                (Guest::status(head).0, 1, true),
            ],
        );
    }
    guest.kick.write(1).unwrap();
    // Two wake-ups: one batch does not take all.
    guest.turn(true).unwrap();
    guest.turn(true).unwrap();
    assert_eq!(guest.answers(), []);
    let feeder = std::thread::spawn(move || pipe.write_all(&[0x5a; 128 * 512]).map(|()| pipe));
    let state = guest.pause();
    assert_eq!((state.next_avail, state.next_used), (128, 128));
    assert_eq!(guest.answers().len(), 128);
    assert!(guest.interrupted());
    for head in 0..128 {
        assert_eq!(guest.status_of(head), OK);
        assert_eq!(guest.bytes_of(head, 512), [0x5a; 512]);
    }
    assert!(guest.device.sources().is_empty());
    drop(feeder.join().unwrap().unwrap());
}

#[test]
fn requests_that_a_pause_left_in_the_queue_are_served_after_it() {
    for engine in ENGINES {
        let memory = ram();
        let file = Arc::new(file_of(&[1; 8192]));
        let mut guest = Guest::new(&memory, block(Disk::Direct(file), engine));
        guest.flush();
        let head = guest.request(0, 0, Some(Buffer::In(512)));
        guest.kick.write(1).unwrap();
        let state = guest.pause();
        guest.kick.read().unwrap();
        assert_eq!(guest.answers(), []);
        guest.resume(state);
        guest.turn(true).unwrap();
        while guest.answers().is_empty() {
            guest.turn(true).unwrap();
        }
        assert_eq!(guest.status_of(head), OK);
    }
}

#[test]
fn a_device_that_is_dropped_in_flight_waits_too() {
    let memory = ram();
    let (device, mut pipe) = slow_disk();
    let mut guest = Guest::new(&memory, device);
    let head = guest.request(0, 0, Some(Buffer::In(512)));
    guest.kick.write(1).unwrap();
    guest.turn(true).unwrap();
    let feeder = std::thread::spawn(move || pipe.write_all(&[1; 512]).map(|()| pipe));
    drop(guest);
    let mut bytes = [0; 512];
    vm_memory::Bytes::read_slice(&memory, &mut bytes, Guest::data(head)).unwrap();
    assert_eq!(bytes, [1; 512]);
    drop(feeder.join().unwrap().unwrap());
}

#[test]
fn a_head_that_comes_twice_in_flight_is_a_guest_fault() {
    let memory = ram();
    let (device, mut pipe) = slow_disk();
    let mut guest = Guest::new(&memory, device);
    let head = guest.request(0, 0, Some(Buffer::In(512)));
    guest.kick.write(1).unwrap();
    guest.turn(true).unwrap();
    guest.make_available(head);
    guest.kick.write(1).unwrap();
    match guest.turn(true) {
        Err(Fault::Guest(fault)) => assert_eq!(fault, GuestFault::HeadInFlight { head }),
        other => panic!("{other:?}"),
    }
    pipe.write_all(&[1; 512]).unwrap();
    guest.pause();
    assert_eq!(guest.answers().len(), 1);
    assert_eq!(guest.status_of(head), OK);
}

#[test]
fn a_short_read_is_completed_and_an_end_of_file_is_an_io_error() {
    let memory = ram();
    let file = Arc::new(file_of(&[6; 8192]));
    let device = block(Disk::Direct(Arc::clone(&file)), EngineChoice::Ring);
    let mut guest = Guest::new(&memory, device);
    file.set_len(5000).unwrap();
    assert_eq!(guest.read(8, 4096), Err(IOERR));
    assert_eq!(guest.read(0, 4096).unwrap(), [6; 4096]);
}

#[test]
fn a_flush_that_failed_once_fails_for_ever() {
    for engine in ENGINES {
        let memory = ram();
        let file = Arc::new(file_of(&[0; 8192]));
        let keep = file.try_clone().unwrap();
        let mut guest = Guest::new(&memory, block(Disk::Direct(Arc::clone(&file)), engine));
        assert_eq!(guest.flush(), OK);
        let (reader, _writer) = std::io::pipe().unwrap();
        swap(&file, &reader);
        assert_eq!(guest.flush(), IOERR);
        swap(&file, &keep);
        assert_eq!(guest.flush(), IOERR);
        assert_eq!(guest.write(0, &[1; 512]), OK);
        // A pause does not heal it.
        let state = guest.pause();
        guest.resume(state);
        assert_eq!(guest.flush(), IOERR);
    }
}

#[test]
fn a_disk_that_need_not_last_acknowledges_a_flush_without_one() {
    let memory = ram();
    let file = Arc::new(file_of(&[0; 8192]));
    let spec = super::super::BlockSpec {
        disk: Disk::Direct(Arc::clone(&file)),
        serial: String::new(),
        durable: false,
        name: "vda".to_owned(),
    };
    let mut guest = Guest::new(&memory, Block::new(spec).unwrap());
    let (reader, _writer) = std::io::pipe().unwrap();
    swap(&file, &reader);
    assert_eq!(guest.flush(), OK);
}

#[test]
fn without_flush_every_write_is_durable_by_itself() {
    for engine in ENGINES {
        let memory = ram();
        let file = Arc::new(file_of(&[0; 8192]));
        let device = block(Disk::Direct(Arc::clone(&file)), engine);
        let mut guest = Guest::with_features(&memory, device, 1 << 32);
        assert_eq!(guest.write(1, &[1; 512]), OK);
        let mut bytes = [0; 512];
        file.read_exact_at(&mut bytes, 512).unwrap();
        assert_eq!(bytes, [1; 512]);
        // It takes every write and cannot be synced.
        let null = std::fs::File::options()
            .write(true)
            .open("/dev/null")
            .unwrap();
        swap(&file, &null);
        assert_eq!(guest.write(1, &[2; 512]), IOERR);
    }
}

#[test]
fn a_storm_of_requests_leaves_others_their_turn() {
    for engine in ENGINES {
        let memory = ram();
        let file = Arc::new(file_of(&[0; 64 << 10]));
        let mut guest = Guest::new(&memory, block(Disk::Direct(file), engine));
        for head in 0..200 {
            guest.write_header(head, 8, 0);
            let chain = [
                (Guest::header(head).0, 16, false),
                (Guest::status(head).0, 1, true),
            ];
            guest.offer_indirect(head, &chain);
        }
        guest.kick.write(1).unwrap();
        let mut turns = 0;
        let mut answered = 0;
        while answered < 200 {
            guest.turn(true).unwrap();
            let now = guest.answers().len();
            assert!(now <= 64, "{now} in one turn");
            answered += now;
            turns += 1;
        }
        assert!(turns >= 4);
    }
}

#[test]
fn a_worker_runs_it_and_gives_it_back() {
    for (engine, event_idx) in ENGINES
        .into_iter()
        .zip([false, true])
        .chain(ENGINES.into_iter().zip([true, false]))
    {
        let memory = ram();
        let file = Arc::new(file_of(&[0; 1 << 20]));
        let mut guest = Guest::new(&memory, block(Disk::Direct(file), engine));
        guest.pause();
        let idle = block(Disk::Direct(Arc::new(file_of(&[]))), EngineChoice::Plain);
        let device = Box::new(std::mem::replace(&mut guest.device, idle));
        let worker = Worker::spawn("vm0/blk", Arc::new(|fault| panic!("{fault}"))).unwrap();
        let interrupt = Arc::new(EventFd::new(0).unwrap());
        let line = Interrupt::new(Arc::clone(&interrupt));
        let activation = Activation {
            memory: memory.clone(),
            features: FEATURES,
            queues: vec![Some(RunningQueue::new(
                Rings::device_end_with(event_idx),
                Arc::clone(&guest.kick),
                line,
            ))],
            config_interrupt: Interrupt::none(),
        };
        let id = worker
            .activate(device, activation, FaultFlag::default(), Arc::new(|_| {}))
            .unwrap();
        for i in 0..50_u64 {
            let bytes = vec![i as u8; 4096];
            let kinds = [
                (1, Some(Buffer::Out(bytes))),
                (4, None),
                (0, Some(Buffer::In(4096))),
            ];
            for (kind, buffer) in kinds {
                Rings::expect_after(&memory, guest.rings.used.idx().load());
                let head = guest.request(kind, i * 8, buffer);
                guest.kick.write(1).unwrap();
                // Blocks until the device answers.
                interrupt.read().unwrap();
                let answers = guest.answers();
                assert_eq!(answers.len(), 1);
                assert_eq!(answers[0].head, head, "{i} {kind} {engine:?}");
                assert_eq!(guest.status_of(head), OK);
                if kind == 0 {
                    assert_eq!(guest.bytes_of(head, 4096), vec![i as u8; 4096]);
                }
            }
        }
        let (_device, queues) = worker.deactivate(id).unwrap();
        assert_eq!(queues[0].unwrap().next_used, 150);
    }
}

/// io_uring_setup fails as under a container's seccomp profile.
#[test]
fn a_host_that_forbids_io_uring_gets_plain_calls() {
    let thread = std::thread::spawn(|| {
        forbid_io_uring();
        let memory = ram();
        let file = Arc::new(file_of(&[3; 8192]));
        let disk = || Disk::Direct(Arc::clone(&file));
        let mut guest = Guest::new(&memory, block(disk(), EngineChoice::Auto));
        assert_eq!(guest.device.sources().len(), 1);
        assert_eq!(guest.read(0, 4096).unwrap(), [3; 4096]);
        assert_eq!(guest.flush(), OK);
        assert!(super::super::engine::Engine::new(EngineChoice::Ring).is_err());
    });
    thread.join().unwrap();
    let ring = super::super::engine::Engine::new(EngineChoice::Auto).unwrap();
    assert!(ring.fd().is_some_and(|fd| fd.as_raw_fd() >= 0));
}

//! The worker: devices in and back, faults that stop one device, panics that stop one worker.

use std::sync::mpsc::Receiver;
use std::sync::{OnceLock, Weak};
use std::time::Duration;

use super::*;
use crate::devices::testing::{Act, Ring, Script, Seen, event_fd, faults, memory, probe, wait_for};

const LINK: DeviceCommand = DeviceCommand::SetLink(true);

/// One running probe.
struct Running {
    id: WorkerDevice,
    script: Script,
    ring: Ring,
    flag: FaultFlag,
    config_call: Arc<vmm_sys_util::eventfd::EventFd>,
}

fn worker() -> (Worker, OnHostFault, Receiver<String>) {
    let (on_fault, faults) = faults();
    let worker = Worker::spawn("test/dev", Arc::clone(&on_fault)).unwrap();
    (worker, on_fault, faults)
}

fn start_as(worker: &Worker, on_fault: &OnHostFault, act: Act) -> Running {
    let (device, script) = probe();
    script.set(act);
    let mem = memory(1);
    let ring = Ring::new(&mem, 0, 16);
    let flag = FaultFlag::default();
    let config_call = event_fd();
    let activation = Activation {
        memory: mem,
        features: 0,
        queues: vec![Some(ring.queue(true)), None],
        config_interrupt: Interrupt::new(Arc::clone(&config_call)),
    };
    let on_fault = Arc::clone(on_fault);
    let id = worker
        .activate(device, activation, flag.clone(), on_fault)
        .unwrap();
    Running {
        id,
        script,
        ring,
        flag,
        config_call,
    }
}

fn start(worker: &Worker, on_fault: &OnHostFault) -> Running {
    let running = start_as(worker, on_fault, Act::Serve);
    assert_eq!(running.script.next(), Seen::Activated { queues: 1 });
    running
}

fn serves(running: &mut Running) {
    let head = running.ring.send(b"x");
    assert_eq!(running.script.next(), Seen::Served(1));
    assert_eq!(running.ring.take_used(), Some((head, 0)));
}

fn fault(faults: &Receiver<String>) -> String {
    faults.recv_timeout(Duration::from_secs(20)).unwrap()
}

#[test]
fn a_device_serves_between_activate_and_deactivate() {
    let (worker, on_fault, faults) = worker();
    let mut running = start(&worker, &on_fault);
    serves(&mut running);
    serves(&mut running);
    let (mut device, positions) = worker.deactivate(running.id).unwrap();
    assert_eq!(running.script.next(), Seen::Deactivated);
    assert_eq!(positions.len(), 2);
    assert_eq!(
        positions[0].map(|p| (p.next_avail, p.next_used)),
        Some((2, 2))
    );
    assert!(positions[1].is_none());
    // Nobody polls it any more.
    running.ring.send(b"x");
    let mut other = start(&worker, &on_fault);
    serves(&mut other);
    assert_eq!(running.script.rest(), []);
    device.reset();
    assert!(faults.try_recv().is_err());
}

#[test]
fn a_guest_fault_stops_one_device_and_tells_its_driver() {
    let (worker, on_fault, faults) = worker();
    let mut bad = start(&worker, &on_fault);
    let mut good = start(&worker, &on_fault);
    bad.script.set(Act::GuestFault);
    bad.ring.send(b"x");
    wait_for(&bad.config_call);
    assert!(bad.flag.needs_reset());
    assert_eq!(bad.flag.count(), 1);
    assert!(!good.flag.needs_reset());
    // It is not polled again.
    bad.script.set(Act::Serve);
    bad.ring.send(b"x");
    serves(&mut good);
    serves(&mut good);
    assert_eq!(bad.script.rest(), []);
    assert!(faults.try_recv().is_err(), "the host is well");
}

#[test]
fn a_faulted_device_comes_back_with_its_positions() {
    let (worker, on_fault, _faults) = worker();
    let mut running = start(&worker, &on_fault);
    serves(&mut running);
    running.script.set(Act::GuestFault);
    running.ring.send(b"x");
    wait_for(&running.config_call);
    let (_device, positions) = worker.deactivate(running.id).unwrap();
    assert_eq!(positions[0].map(|p| p.next_avail), Some(1));
    assert_eq!(running.script.next(), Seen::Deactivated);
}

#[test]
fn a_host_fault_is_reported_once_and_the_device_still_comes_back() {
    let (worker, on_fault, faults) = worker();
    let mut running = start(&worker, &on_fault);
    running.script.set(Act::HostFault);
    running.ring.send(b"x");
    assert_eq!(fault(&faults), "serve the probe");
    running.ring.send(b"x");
    assert!(!running.flag.needs_reset());
    worker.deactivate(running.id).unwrap();
    assert!(faults.try_recv().is_err());
}

#[test]
fn a_device_that_cannot_start_is_a_host_fault_and_comes_back() {
    let (worker, on_fault, faults) = worker();
    let running = start_as(&worker, &on_fault, Act::RefuseToStart);
    assert_eq!(fault(&faults), "start the probe");
    let (_device, positions) = worker.deactivate(running.id).unwrap();
    assert!(positions.is_empty());
}

#[test]
fn a_source_that_cannot_be_polled_stops_the_device_and_nothing_spins() {
    let (worker, on_fault, faults) = worker();
    let running = start_as(&worker, &on_fault, Act::BadSource);
    assert_eq!(fault(&faults), "watch a device");
    assert_eq!(running.script.next(), Seen::Activated { queues: 1 });
    // Were its kick still polled, the loop would never sleep again.
    running.script.set(Act::Serve);
    running.ring.kick();
    let mut other = start(&worker, &on_fault);
    serves(&mut other);
    assert_eq!(running.script.rest(), []);
    let polled = worker.endpoint.call_blocking(move |ops| {
        let sources = ops.subscriber_mut(running.id.0)?.sources.len();
        Ok::<_, WorkerGone>(sources)
    });
    assert_eq!(polled.unwrap(), 0);
}

#[test]
fn a_panic_is_one_host_fault_and_the_neighbour_goes_on() {
    let (worker_a, on_fault_a, faults_a) = worker();
    let (worker_b, on_fault_b, faults_b) = worker();
    let mut bad = start(&worker_a, &on_fault_a);
    let mut neighbour = start(&worker_b, &on_fault_b);
    bad.script.set(Act::Panic);
    bad.ring.send(b"x");
    assert_eq!(fault(&faults_a), "device thread panicked");
    serves(&mut neighbour);
    worker_b.command(neighbour.id, LINK).unwrap().unwrap();
    // Every call into the dead worker answers.
    assert!(worker_a.deactivate(bad.id).is_err());
    assert!(worker_a.command(bad.id, LINK).is_err());
    let (device, _script) = probe();
    let activation = Activation {
        memory: memory(1),
        features: 0,
        queues: vec![None, None],
        config_interrupt: Interrupt::none(),
    };
    let again = worker_a.activate(device, activation, FaultFlag::default(), on_fault_a);
    assert!(again.is_err());
    drop(worker_a);
    assert!(faults_a.try_recv().is_err(), "reported once");
    assert!(faults_b.try_recv().is_err());
}

#[test]
fn a_panic_within_a_call_fails_that_call() {
    let (worker, on_fault, faults) = worker();
    let running = start(&worker, &on_fault);
    running.script.set(Act::Panic);
    assert!(worker.command(running.id, LINK).is_err());
    assert_eq!(fault(&faults), "device thread panicked");
}

#[test]
fn the_fault_is_told_when_the_dead_worker_already_answers() {
    // Whoever acts on the fault may call into the worker.
    let slot: Arc<OnceLock<(Weak<Worker>, WorkerDevice)>> = Arc::default();
    let (sender, answered) = std::sync::mpsc::channel();
    let seen = Arc::clone(&slot);
    let on_fault: OnHostFault = Arc::new(move |_fault| {
        let (worker, id) = seen.get().unwrap();
        let worker = worker.upgrade().unwrap();
        let answer = worker.deactivate(*id);
        // The last handle must not go on the worker's own thread.
        drop(worker);
        sender.send(answer.is_err()).unwrap();
    });
    let worker = Arc::new(Worker::spawn("test/dev", Arc::clone(&on_fault)).unwrap());
    let mut running = start(&worker, &on_fault);
    slot.set((Arc::downgrade(&worker), running.id)).unwrap();
    running.script.set(Act::Panic);
    running.ring.send(b"x");
    assert_eq!(answered.recv_timeout(Duration::from_secs(20)), Ok(true));
}

#[test]
fn the_answer_of_a_command_is_the_devices() {
    let (worker, on_fault, faults) = worker();
    let running = start(&worker, &on_fault);
    assert!(worker.command(running.id, LINK).unwrap().is_ok());
    running.script.set(Act::HostFault);
    assert!(worker.command(running.id, LINK).unwrap().is_err());
    assert!(faults.try_recv().is_err());
}

#[test]
fn a_device_that_has_left_cannot_be_reached() {
    let (worker, on_fault, _faults) = worker();
    let running = start(&worker, &on_fault);
    worker.deactivate(running.id).unwrap();
    assert!(worker.deactivate(running.id).is_err());
    assert!(worker.command(running.id, LINK).is_err());
}

#[test]
fn a_worker_that_goes_takes_its_devices_along() {
    let (worker, on_fault, faults) = worker();
    let running = start(&worker, &on_fault);
    let kick = Arc::clone(&running.ring.kick);
    drop(running.ring);
    drop(worker);
    assert_eq!(Arc::strong_count(&kick), 1, "the device's queue is gone");
    assert!(faults.try_recv().is_err());
}

#[test]
fn a_guest_that_repeats_its_fault_fills_no_log() {
    let flag = FaultFlag::default();
    let said: Vec<u64> = (1..=1000).filter(|_fault| flag.raise()).collect();
    assert_eq!(said, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    assert!(flag.needs_reset());
    assert_eq!(flag.count(), 1000);
}

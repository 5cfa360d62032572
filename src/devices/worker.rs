//! The thread that runs devices: one event loop, whose subscribers are the devices themselves.
//!
//! A device comes in by [`Worker::activate`] and goes back by [`Worker::deactivate`]; both are
//! acknowledged calls into the loop. The worker takes no lock, so a vCPU may call it while it
//! holds a transport's mutex. A panic of a device ends the thread and is reported as a host
//! fault of this VM; devices it owned are gone with it.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use virtio_queue::QueueState;

use super::{
    Activation, DeviceCommand, Fault, HostFault, Interrupt, Progress, Source, VirtioDevice,
};

/// Called with the fault that must end this VM.
pub type OnHostFault = Arc<dyn Fn(HostFault) + Send + Sync>;

/// How a running device tells its transport that the driver broke the contract.
#[derive(Debug, Clone, Default)]
pub struct FaultFlag {
    needs_reset: Arc<AtomicBool>,
    /// Guest faults of this device since it was made.
    count: Arc<AtomicU64>,
}

impl FaultFlag {
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub fn clear(&self) {
        self.needs_reset.store(false, Ordering::Release);
    }

    /// Raises the flag and counts. True if this fault is worth a log line: a guest can repeat it
    /// for ever, so only every doubling of the count is.
    pub fn raise(&self) -> bool {
        self.needs_reset.store(true, Ordering::Release);
        let before = self.count.fetch_add(1, Ordering::Relaxed);
        before.wrapping_add(1).is_power_of_two()
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Names a device on its worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkerDevice(SubscriberId);

/// The worker is gone: it panicked, which its host fault has said already.
#[derive(Debug, thiserror::Error)]
#[error("device thread is gone")]
pub struct WorkerGone;

impl From<event_manager::Error> for WorkerGone {
    fn from(_gone: event_manager::Error) -> Self {
        Self
    }
}

/// A device thread.
pub struct Worker {
    endpoint: RemoteEndpoint<Active>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What comes back from a worker.
pub type Returned = (Box<dyn VirtioDevice>, Vec<Option<QueueState>>);

impl Worker {
    /// Starts the loop on a thread of that name.
    pub fn spawn(name: &str, on_fault: OnHostFault) -> io::Result<Self> {
        let mut manager = EventManager::<Active>::new().map_err(to_io)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| {
                    while !stopped.load(Ordering::Acquire) {
                        if let Err(e) = manager.run() {
                            return Err(HostFault::new("poll device events", to_io(e)));
                        }
                    }
                    Ok(())
                }));
                // Calls that wait for this loop end here, before anyone acts on the fault.
                drop(manager);
                match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(fault)) => on_fault(fault),
                    Err(_panic) => on_fault(HostFault::msg("device thread panicked")),
                }
            })?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// Moves a device here and starts it.
    pub fn activate(
        &self,
        mut device: Box<dyn VirtioDevice>,
        activation: Activation,
        flag: FaultFlag,
        on_fault: OnHostFault,
    ) -> Result<WorkerDevice, WorkerGone> {
        let config_interrupt = activation.config_interrupt.clone();
        self.endpoint.call_blocking(move |ops| {
            let dead = match device.activate(activation) {
                Ok(()) => false,
                Err(fault) => {
                    on_fault(fault);
                    true
                }
            };
            let active = Active {
                device,
                flag,
                config_interrupt,
                on_fault,
                sources: Vec::new(),
                dead,
            };
            Ok(WorkerDevice(ops.add_subscriber(active)))
        })
    }

    /// Takes a device back, drained. The one way for reset, pause and save.
    pub fn deactivate(&self, id: WorkerDevice) -> Result<Returned, WorkerGone> {
        self.endpoint.call_blocking(move |ops| {
            let mut active = ops.remove_subscriber(id.0)?;
            let queues = active.device.deactivate();
            Ok((active.device, queues))
        })
    }

    /// Passes on a request of the host; the answer is the device's.
    pub fn command(
        &self,
        id: WorkerDevice,
        command: DeviceCommand,
    ) -> Result<Result<(), HostFault>, WorkerGone> {
        self.endpoint
            .call_blocking(move |ops| Ok(ops.subscriber_mut(id.0)?.device.command(command)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _gone = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            // A panic was caught at the thread's root and reported.
            let _caught = thread.join();
        }
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

/// A device while it is here.
struct Active {
    device: Box<dyn VirtioDevice>,
    flag: FaultFlag,
    config_interrupt: Interrupt,
    on_fault: OnHostFault,
    sources: Vec<Source>,
    /// A fault stopped it: nothing is polled until it goes back.
    dead: bool,
}

impl Active {
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for source in self.device.sources() {
            let events = Events::with_data_raw(source.fd, source.token, source.events);
            match ops.add(events) {
                Ok(()) => self.sources.push(source),
                Err(e) => {
                    self.unwatch(ops);
                    self.dead = true;
                    (self.on_fault)(HostFault::new("watch a device", to_io(e)));
                    return;
                }
            }
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps<'_>) {
        for source in self.sources.drain(..) {
            let events = Events::with_data_raw(source.fd, source.token, source.events);
            // A descriptor that the device closed left the set by itself.
            let _closed = ops.remove(events);
        }
    }

    fn stop(&mut self, fault: Fault, ops: &mut EventOps<'_>) {
        self.unwatch(ops);
        self.dead = true;
        match fault {
            Fault::Guest(fault) => {
                let kind = self.device.kind();
                if self.flag.raise() {
                    let count = self.flag.count();
                    tracing::warn!(device = ?kind, count, "guest broke the virtio contract: {fault}");
                }
                // virtio 1.2, 2.1.2: tell the driver that the device needs a reset.
                self.config_interrupt.signal();
            }
            Fault::Host(fault) => (self.on_fault)(fault),
        }
    }
}

impl MutEventSubscriber for Active {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.dead {
            return;
        }
        match self.device.handle(events.data(), events.event_set()) {
            Ok(Progress::Done) => {}
            Ok(Progress::SourcesChanged) => {
                self.unwatch(ops);
                self.watch(ops);
            }
            Err(fault) => self.stop(fault, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if !self.dead {
            self.watch(ops);
        }
    }
}

fn to_io(error: event_manager::Error) -> io::Error {
    io::Error::other(error.to_string())
}

#[cfg(test)]
#[path = "worker_test.rs"]
mod tests;

//! The virtio common configuration (virtio 1.2, 4.1.4.3): registers, status, features, and who
//! holds the device.
//!
//! Lives behind a short mutex taken by vCPU exits; the device itself is here only while it is at
//! rest. After DRIVER_OK every queue register is read-only. How queues get their kicks and
//! interrupts is the bus's business ([`Wiring`]).

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::worker::{FaultFlag, OnHostFault, Worker, WorkerDevice};
use super::{
    Activation, ConfigSpace, DeviceCommand, DeviceKind, DeviceState, GuestMemory, HostFault,
    Interrupt, RunningQueue, VirtioDevice,
};

/// VIRTIO_MSI_NO_VECTOR.
pub const NO_VECTOR: u16 = 0xffff;
const NEEDS_RESET: u8 = status_bit(VIRTIO_CONFIG_S_NEEDS_RESET);
const ACKNOWLEDGE: u8 = status_bit(VIRTIO_CONFIG_S_ACKNOWLEDGE);
const DRIVER: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER);
const DRIVER_OK: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER_OK);
const FEATURES_OK: u8 = status_bit(VIRTIO_CONFIG_S_FEATURES_OK);
const FAILED: u8 = status_bit(VIRTIO_CONFIG_S_FAILED);
/// Every bit a driver may set.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
/// Features that every device has by its transport.
const TRANSPORT_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// What the bus gives a device's queues.
pub trait Wiring: Send + Sync {
    /// The descriptor that the driver's notification of `queue` signals.
    fn kick(&self, queue: u16) -> Option<Arc<EventFd>>;
    /// The line of an MSI-X vector.
    fn interrupt(&self, vector: u16) -> Interrupt;
    /// How many vectors there are.
    fn vectors(&self) -> u16;
}

/// One register: where, how wide, which.
struct Register {
    offset: u64,
    width: usize,
    name: Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    NumQueues,
    Status,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    QueueNotifyOff,
    /// Halves of the three addresses: 64-bit registers that drivers write in two pieces.
    Desc(Half),
    Avail(Half),
    Used(Half),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    Low,
    High,
}

const REGISTERS: [Register; 19] = [
    register(0, 4, Name::DeviceFeatureSelect),
    register(4, 4, Name::DeviceFeature),
    register(8, 4, Name::DriverFeatureSelect),
    register(12, 4, Name::DriverFeature),
    register(16, 2, Name::ConfigVector),
    register(18, 2, Name::NumQueues),
    register(20, 1, Name::Status),
    register(21, 1, Name::ConfigGeneration),
    register(22, 2, Name::QueueSelect),
    register(24, 2, Name::QueueSize),
    register(26, 2, Name::QueueVector),
    register(28, 2, Name::QueueEnable),
    register(30, 2, Name::QueueNotifyOff),
    register(32, 4, Name::Desc(Half::Low)),
    register(36, 4, Name::Desc(Half::High)),
    register(40, 4, Name::Avail(Half::Low)),
    register(44, 4, Name::Avail(Half::High)),
    register(48, 4, Name::Used(Half::Low)),
    register(52, 4, Name::Used(Half::High)),
];

const fn register(offset: u64, width: usize, name: Name) -> Register {
    Register {
        offset,
        width,
        name,
    }
}

/// What a driver has said about one queue, and where the device stopped in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    vector: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    next_used: u16,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            vector: NO_VECTOR,
            desc: 0,
            avail: 0,
            used: 0,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// The running queue's description; `None` if the driver's numbers are impossible.
    fn queue(&self, event_idx: bool, memory: &GuestMemory) -> Option<Queue> {
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })
        .ok()?;
        queue.is_valid(memory).then_some(queue)
    }
}

/// Who has the device.
enum Held {
    AtRest(Box<dyn VirtioDevice>),
    Running(WorkerDevice),
    /// Lost with its thread.
    Gone,
}

/// A transport's state as a snapshot stores it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransportState {
    status: u8,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    queue_select: u16,
    needs_reset: bool,
    queues: Vec<QueueSetup>,
}

/// The transport of one device.
pub struct Transport {
    kind: DeviceKind,
    features: u64,
    config: Arc<ConfigSpace>,
    state: TransportState,
    held: Held,
    /// The device is here although the driver thinks it runs.
    paused: bool,
    flag: FaultFlag,
    worker: Arc<Worker>,
    memory: GuestMemory,
    on_fault: OnHostFault,
}

impl Transport {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        worker: Arc<Worker>,
        memory: GuestMemory,
        on_fault: OnHostFault,
    ) -> Self {
        Self {
            kind: device.kind(),
            features: device.features() | TRANSPORT_FEATURES,
            config: Arc::clone(device.config()),
            state: TransportState::new(device.queue_sizes()),
            held: Held::AtRest(device),
            paused: false,
            flag: FaultFlag::default(),
            worker,
            memory,
            on_fault,
        }
    }

    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// Whether the driver has said DRIVER_OK.
    pub fn is_running(&self) -> bool {
        self.state.status & DRIVER_OK != 0
    }

    /// Guest faults of this device so far.
    pub fn guest_faults(&self) -> u64 {
        self.flag.count()
    }

    /// The device-specific configuration (virtio 1.2, 4.1.4.6).
    pub fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// A read of the common configuration. What is no register reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((low, high)) = data.split_at_mut_checked(4)
            && high.len() == 4
        {
            // A 64-bit register in one access.
            self.read(offset, low);
            self.read(offset.wrapping_add(4), high);
            return;
        }
        let Some(name) = find(offset, data.len()) else {
            return;
        };
        let value = self.value(name).to_le_bytes();
        for (byte, from) in data.iter_mut().zip(value) {
            *byte = from;
        }
    }

    fn value(&self, name: Name) -> u32 {
        let queue = self.state.queues.get(usize::from(self.state.queue_select));
        let number = |get: fn(&QueueSetup) -> u16| queue.map_or(0, |q| u32::from(get(q)));
        let address = |get: fn(&QueueSetup) -> u64, half| {
            queue.map_or(0, |q| match half {
                Half::Low => low(get(q)),
                Half::High => high(get(q)),
            })
        };
        match name {
            Name::DeviceFeatureSelect => self.state.device_feature_select,
            Name::DeviceFeature => half_of(self.features, self.state.device_feature_select),
            Name::DriverFeatureSelect => self.state.driver_feature_select,
            Name::DriverFeature => {
                half_of(self.state.driver_features, self.state.driver_feature_select)
            }
            Name::ConfigVector => u32::from(self.state.config_vector),
            Name::NumQueues => u32::try_from(self.state.queues.len()).unwrap_or(0),
            Name::Status => {
                let reset = if self.flag.needs_reset() {
                    NEEDS_RESET
                } else {
                    0
                };
                u32::from(self.state.status | reset)
            }
            Name::ConfigGeneration => u32::from(self.config.generation()),
            Name::QueueSelect => u32::from(self.state.queue_select),
            Name::QueueSize => number(|q| q.size),
            Name::QueueVector => queue.map_or(u32::from(NO_VECTOR), |q| u32::from(q.vector)),
            Name::QueueEnable => number(|q| u16::from(q.enabled)),
            Name::QueueNotifyOff => queue.map_or(0, |_| u32::from(self.state.queue_select)),
            Name::Desc(half) => address(|q| q.desc, half),
            Name::Avail(half) => address(|q| q.avail, half),
            Name::Used(half) => address(|q| q.used, half),
        }
    }

    /// A write of the common configuration. What is no register, or not writable now, is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8], wiring: &dyn Wiring) {
        if let Some((low, high)) = data.split_at_checked(4)
            && high.len() == 4
        {
            self.write(offset, low, wiring);
            self.write(offset.wrapping_add(4), high, wiring);
            return;
        }
        let Some(name) = find(offset, data.len()) else {
            return;
        };
        let mut bytes = [0; 4];
        for (byte, from) in bytes.iter_mut().zip(data) {
            *byte = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match name {
            Name::DeviceFeatureSelect => self.state.device_feature_select = value,
            Name::DriverFeatureSelect => self.state.driver_feature_select = value,
            Name::DriverFeature => self.write_features(value),
            Name::ConfigVector => self.state.config_vector = vector(value, wiring),
            Name::QueueSelect => self.state.queue_select = short(value),
            Name::Status => self.write_status(value, wiring),
            Name::DeviceFeature
            | Name::NumQueues
            | Name::ConfigGeneration
            | Name::QueueNotifyOff => {}
            queue_register => self.write_queue(queue_register, value, wiring),
        }
    }

    fn write_features(&mut self, value: u32) {
        // virtio 1.2, 3.1.1: features are settled once FEATURES_OK is set.
        if self.state.status & FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.state.driver_features;
        match self.state.driver_feature_select {
            0 => *features = (*features & !0xffff_ffff) | u64::from(value),
            1 => *features = (*features & 0xffff_ffff) | (u64::from(value) << 32),
            _ => {}
        }
    }

    fn write_queue(&mut self, name: Name, value: u32, wiring: &dyn Wiring) {
        // A queue that changes under a running device is CVE-2026-5747.
        if self.state.status & DRIVER_OK != 0 {
            return;
        }
        let selected = usize::from(self.state.queue_select);
        let Some(queue) = self.state.queues.get_mut(selected) else {
            return;
        };
        match name {
            Name::QueueVector => queue.vector = vector(value, wiring),
            // virtio 1.2, 4.1.4.3.2: an enabled queue keeps its shape, and is not disabled by 0.
            _ if queue.enabled => {}
            Name::QueueSize => {
                let size = short(value);
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.size = size;
                }
            }
            Name::QueueEnable => queue.enabled = value == 1,
            Name::Desc(half) => set_half(&mut queue.desc, half, value),
            Name::Avail(half) => set_half(&mut queue.avail, half, value),
            Name::Used(half) => set_half(&mut queue.used, half, value),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32, wiring: &dyn Wiring) {
        let Ok(new) = u8::try_from(value) else { return };
        if new == 0 {
            self.reset();
            return;
        }
        let old = self.state.status;
        let new = (new & DRIVER_BITS) | old;
        let added = new & !old;
        self.state.status = new;
        if added & FEATURES_OK != 0 && !self.features_acceptable() {
            self.state.status &= !FEATURES_OK;
        }
        if added & DRIVER_OK != 0 {
            if self.state.status & FEATURES_OK == 0 {
                self.state.status &= !DRIVER_OK;
                self.flag.raise();
                return;
            }
            self.start(wiring);
        }
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.state.driver_features;
        accepted & !self.features == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// Moves the device to its worker, unless only a reset can help it.
    fn start(&mut self, wiring: &dyn Wiring) {
        if self.flag.needs_reset() {
            return;
        }
        let Some(queues) = self.running_queues(wiring) else {
            if self.flag.raise() {
                let count = self.flag.count();
                tracing::warn!(device = ?self.kind, count, "guest set up a queue that cannot be");
            }
            wiring.interrupt(self.state.config_vector).signal();
            return;
        };
        let Held::AtRest(device) = std::mem::replace(&mut self.held, Held::Gone) else {
            return;
        };
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.state.driver_features,
            queues,
            config_interrupt: wiring.interrupt(self.state.config_vector),
        };
        let flag = self.flag.clone();
        let on_fault = Arc::clone(&self.on_fault);
        self.held = match self.worker.activate(device, activation, flag, on_fault) {
            Ok(id) => Held::Running(id),
            Err(_gone) => Held::Gone,
        };
    }

    fn running_queues(&self, wiring: &dyn Wiring) -> Option<Vec<Option<RunningQueue>>> {
        let event_idx = self.state.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for (index, setup) in (0_u16..).zip(&self.state.queues) {
            queues.push(if setup.enabled {
                let queue = setup.queue(event_idx, &self.memory)?;
                let kick = wiring.kick(index)?;
                let interrupt = wiring.interrupt(setup.vector);
                Some(RunningQueue::new(queue, kick, interrupt))
            } else {
                None
            });
        }
        Some(queues)
    }

    /// Takes the device back from its worker, and notes how far it came in its queues.
    fn take_back(&mut self) {
        let Held::Running(id) = self.held else { return };
        self.held = match self.worker.deactivate(id) {
            Ok((device, positions)) => {
                for (setup, position) in self.state.queues.iter_mut().zip(positions) {
                    if let Some(position) = position {
                        setup.next_avail = position.next_avail;
                        setup.next_used = position.next_used;
                    }
                }
                Held::AtRest(device)
            }
            Err(_gone) => Held::Gone,
        };
    }

    /// The device as after power-on; returns when it has let go of guest memory.
    pub fn reset(&mut self) {
        self.take_back();
        let sizes: Vec<u16> = self.state.queues.iter().map(|q| q.max_size).collect();
        self.state = TransportState::new(&sizes);
        self.flag.clear();
        self.paused = false;
        if let Held::AtRest(device) = &mut self.held {
            device.reset();
        }
    }

    /// Drains the device and takes it back; the driver does not notice.
    pub fn pause(&mut self) {
        if matches!(self.held, Held::Running(_)) {
            self.take_back();
            self.paused = true;
        }
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&mut self, wiring: &dyn Wiring) {
        if self.paused {
            self.paused = false;
            self.start(wiring);
        }
    }

    /// Registers and device, of a paused or resting device.
    pub fn save(&self) -> Result<(TransportState, DeviceState), HostFault> {
        let Held::AtRest(device) = &self.held else {
            return Err(HostFault::msg("device is not at rest"));
        };
        let state = TransportState {
            needs_reset: self.flag.needs_reset(),
            ..self.state.clone()
        };
        Ok((state, device.save()?))
    }

    /// Takes over a saved state; `resume` then starts the device if it ran.
    pub fn restore(
        &mut self,
        state: TransportState,
        device_state: DeviceState,
    ) -> Result<(), HostFault> {
        let Held::AtRest(device) = &mut self.held else {
            return Err(HostFault::msg("device is not at rest"));
        };
        let fits = state.queues.len() == self.state.queues.len()
            && state
                .queues
                .iter()
                .zip(&self.state.queues)
                .all(|(new, old)| new.max_size == old.max_size && new.size <= old.max_size)
            && state.is_reachable(self.features);
        if !fits {
            return Err(HostFault::msg("saved transport does not fit this device"));
        }
        device.restore(device_state)?;
        if state.needs_reset {
            self.flag.raise();
        }
        self.paused = state.status & DRIVER_OK != 0;
        self.state = state;
        Ok(())
    }

    /// A request of the host, wherever the device is.
    pub fn command(&mut self, command: DeviceCommand) -> Result<(), HostFault> {
        match &mut self.held {
            Held::AtRest(device) => device.command(command),
            Held::Running(id) => self
                .worker
                .command(*id, command)
                .unwrap_or_else(|gone| Err(HostFault::msg(gone.to_string()))),
            Held::Gone => Err(HostFault::msg("device is gone")),
        }
    }
}

impl TransportState {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            needs_reset: false,
            queues: queue_sizes
                .iter()
                .map(|size| QueueSetup::new(*size))
                .collect(),
        }
    }
}

impl TransportState {
    /// Whether a driver's writes can lead here.
    fn is_reachable(&self, features: u64) -> bool {
        let has = |bit| self.status & bit != 0;
        let accepted = self.driver_features & !features == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
        let shaped = |queue: &QueueSetup| queue.size.is_power_of_two();
        self.status & !DRIVER_BITS == 0
            && (!has(DRIVER_OK) || has(FEATURES_OK))
            && (!has(FEATURES_OK) || accepted)
            && self.queues.iter().all(shaped)
    }
}

fn find(offset: u64, width: usize) -> Option<Name> {
    REGISTERS
        .iter()
        .find(|r| r.offset == offset && r.width == width)
        .map(|r| r.name)
}

/// A vector that exists, else none (virtio 1.2, 4.1.5.1.2).
fn vector(value: u32, wiring: &dyn Wiring) -> u16 {
    let vector = short(value);
    if vector < wiring.vectors() {
        vector
    } else {
        NO_VECTOR
    }
}

fn half_of(features: u64, select: u32) -> u32 {
    match select {
        0 => low(features),
        1 => high(features),
        _ => 0,
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the status register has 8 bits"
)]
const fn status_bit(bit: u32) -> u8 {
    bit as u8
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

#[expect(clippy::cast_possible_truncation, reason = "the register has 16 bits")]
fn short(value: u32) -> u16 {
    value as u16
}

fn set_half(address: &mut u64, half: Half, value: u32) {
    *address = match half {
        Half::Low => (*address & !0xffff_ffff) | u64::from(value),
        Half::High => (*address & 0xffff_ffff) | (u64::from(value) << 32),
    };
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;

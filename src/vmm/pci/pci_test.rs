//! A driver, honest and hostile, at the bus: no vCPU, but a real KVM machine behind the wires.

use std::sync::mpsc::channel;
use std::time::Duration;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::devices::entropy::Entropy;
use crate::devices::transport::Transport;
use crate::devices::worker::{OnHostFault, Worker};
use crate::devices::{
    Activation, ConfigSpace, DeviceKind, DeviceState, Fault, HostFault, Progress, Source,
    VirtioDevice, WorkerThread,
};
use crate::vmm::irq::IrqRouter;
use crate::vmm::kvm;
use crate::vmm::memory::VmMemory;

const SLOT: u8 = 3;
const BAR: u64 = SLOT as u64 * layout::BAR_SIZE;
/// Config register of the function's dword.
const fn address(register: u32) -> u32 {
    ADDRESS_ENABLE | ((SLOT as u32) << 11) | register
}

struct Machine {
    bus: Bus,
    _vm: Arc<VmFd>,
    memory: VmMemory,
}

/// A bus with an entropy device in slot 3.
fn machine() -> Machine {
    machine_with(
        Box::new(Entropy::new()),
        Arc::new(|fault| panic!("{fault:?}")),
    )
}

fn machine_with(device: Box<dyn VirtioDevice>, on_fault: OnHostFault) -> Machine {
    let memory = VmMemory::anonymous(64).unwrap();
    let vm = Arc::new(kvm::create_vm(&kvm::open().unwrap()).unwrap());
    let irqs = IrqRouter::new(Arc::clone(&vm)).unwrap();
    let worker = Arc::new(Worker::spawn("test", Arc::clone(&on_fault)).unwrap());
    let transport = Transport::new(device, worker, memory.guest().clone(), on_fault);
    let ready: DriverReady = Arc::new(|_kind| {});
    let function = VirtioFunction::new(SLOT, transport, 1, &vm, &irqs, ready).unwrap();
    let mut bus = Bus::new();
    bus.insert(function).unwrap();
    Machine {
        bus,
        _vm: vm,
        memory,
    }
}

impl Machine {
    fn config32(&self, register: u16) -> u32 {
        let mut data = [0; 4];
        let offset = (u64::from(SLOT) << 15) + u64::from(register);
        self.bus.read_ecam(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, register: u16, data: &[u8]) {
        let offset = (u64::from(SLOT) << 15) + u64::from(register);
        self.bus.write_ecam(offset, data);
    }

    fn enable(&self) {
        self.set_config(config::COMMAND, &[6, 0]);
    }

    fn bar<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bus.read_bar(BAR + offset, &mut data);
        data
    }

    /// Capability id, offset, and the first dwords of each.
    fn capabilities(&self) -> Vec<(u8, u16, [u32; 5])> {
        let mut found = Vec::new();
        let mut at = u16::try_from(self.config32(0x34) & 0xff).unwrap();
        while at != 0 {
            assert!(found.len() < 16, "the list has no end");
            let dwords = [0, 4, 8, 12, 16].map(|more| self.config32(at + more));
            let [id, next, ..] = dwords[0].to_le_bytes();
            found.push((id, at, dwords));
            at = u16::from(next);
        }
        found
    }

    /// Where the window capability is.
    fn window(&self) -> u16 {
        let windows = self.capabilities().into_iter();
        let mut windows = windows.filter(|(id, _, dwords)| *id == 9 && dwords[0] >> 24 == 5);
        windows.next().unwrap().1
    }
}

#[test]
fn ports_and_ecam_show_the_same_and_ones_where_nothing_is() {
    let machine = machine();
    let bus = &machine.bus;
    let ids = [0, u32::from(SLOT)].map(|slot| {
        bus.write_port(0, &(ADDRESS_ENABLE | slot << 11).to_le_bytes());
        let mut by_port = [0; 4];
        bus.read_port(4, &mut by_port);
        let mut by_ecam = [0; 4];
        bus.read_ecam(u64::from(slot) << 15, &mut by_ecam);
        assert_eq!(by_port, by_ecam);
        u32::from_le_bytes(by_port)
    });
    assert_eq!(ids, [0x0008_1b36, 0x1044_1af4]);
    for nowhere in [
        1_u64 << 15,
        (3 << 15) + (1 << 12),
        32 << 15,
        (3 << 15) + 0xffe,
    ] {
        let mut data = [0; 4];
        bus.read_ecam(nowhere, &mut data);
        assert_eq!(data, [0xff; 4], "{nowhere:#x}");
    }
    // Not enabled, another bus, another function.
    for nothing in [
        address(0) & !ADDRESS_ENABLE,
        address(0) | 1 << 16,
        address(0) | 1 << 8,
    ] {
        bus.write_port(0, &nothing.to_le_bytes());
        let mut data = [0; 4];
        bus.read_port(4, &mut data);
        assert_eq!(data, [0xff; 4], "{nothing:#x}");
    }
}

#[test]
fn the_address_register_is_a_dword_and_data_is_read_in_parts() {
    let machine = machine();
    let bus = &machine.bus;
    bus.write_port(0, &address(0).to_le_bytes());
    // Narrow writes are not for this register.
    bus.write_port(0, &[0]);
    bus.write_port(3, &[1]);
    let mut whole = [0; 4];
    bus.read_port(0, &mut whole);
    assert_eq!(u32::from_le_bytes(whole), address(0));
    let mut device = [0; 2];
    bus.read_port(6, &mut device);
    assert_eq!(u16::from_le_bytes(device), 0x1044);
    let mut beyond = [0; 4];
    bus.read_port(6, &mut beyond);
    assert_eq!(beyond, [0xff; 4]);
}

#[test]
fn the_bar_answers_its_size_and_stays_where_it_is() {
    let machine = machine();
    let place = u32::try_from(layout::BAR_WINDOW + BAR).unwrap();
    assert_eq!(machine.config32(config::BAR0), place);
    machine.set_config(config::BAR0, &[0xff; 4]);
    assert_eq!(machine.config32(config::BAR0), 0xffff_0000);
    machine.set_config(config::BAR0, &0xdead_0000_u32.to_le_bytes());
    assert_eq!(machine.config32(config::BAR0), place);
    // The others do not exist.
    for bar in 1..6 {
        machine.set_config(config::BAR0 + bar * 4, &[0xff; 4]);
        assert_eq!(machine.config32(config::BAR0 + bar * 4), 0);
    }
}

#[test]
fn capabilities_name_regions_within_the_bar() {
    let machine = machine();
    let capabilities = machine.capabilities();
    let kinds: Vec<(u8, u32)> = capabilities
        .iter()
        .map(|(id, _, dwords)| (*id, if *id == 9 { dwords[0] >> 24 } else { 0 }))
        .collect();
    assert_eq!(kinds, [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5), (0x11, 0)]);
    for (id, _, [first, bar, offset, length, _]) in capabilities {
        if id == 9 && first >> 24 != 5 {
            assert_eq!(bar & 0xff, 0);
            assert!(u64::from(offset) + u64::from(length) <= layout::BAR_SIZE);
        }
        if id == 0x11 {
            // Two vectors: table size is one less. Table and pending bits in BAR 0.
            assert_eq!(first >> 16, 1);
            assert_eq!((bar & 7, offset & 7), (0, 0));
        }
    }
}

#[test]
fn a_function_whose_memory_is_off_does_not_answer() {
    let machine = machine();
    assert_eq!(machine.bar::<4>(0), [0xff; 4]);
    machine.enable();
    assert_eq!(
        machine.bar::<2>(18),
        1_u16.to_le_bytes(),
        "number of queues"
    );
    machine.set_config(config::COMMAND, &[0, 0]);
    assert_eq!(machine.bar::<4>(0), [0xff; 4]);
}

#[test]
fn the_window_reads_and_writes_what_it_is_set_to() {
    let machine = machine();
    let window = machine.window();
    let select = |offset: u32, length: u32| {
        machine.set_config(window + 8, &offset.to_le_bytes());
        machine.set_config(window + 12, &length.to_le_bytes());
    };
    select(18, 2);
    assert_eq!(machine.config32(window + 16), 1);
    select(22, 2);
    machine.set_config(window + 16, &[7, 0, 0, 0]);
    machine.enable();
    assert_eq!(machine.bar::<2>(22), [7, 0], "queue select");
    // Impossible lengths, offsets and BARs touch nothing.
    for (offset, length) in [(22, 3), (22, 0), (21, 2), (22, u32::MAX), (u32::MAX, 4)] {
        select(offset, length);
        machine.set_config(window + 16, &[9, 9, 9, 9]);
        assert_eq!(machine.bar::<2>(22), [7, 0]);
    }
    select(22, 2);
    machine.set_config(window + 4, &[1]);
    machine.set_config(window + 16, &[9, 9, 9, 9]);
    assert_eq!(machine.bar::<2>(22), [7, 0]);
}

/// Where the driver puts its ring.
const RING: u64 = 0x10_0000;

/// Brings the device to DRIVER_OK with one queue of 8 at RING.
fn drive(machine: &Machine) {
    let write = |offset: u64, data: &[u8]| machine.bus.write_bar(BAR + offset, data);
    machine.enable();
    for status in [0, 1, 3] {
        write(20, &[status]);
    }
    write(8, &1_u32.to_le_bytes());
    write(12, &1_u32.to_le_bytes());
    write(20, &[11]);
    write(24, &8_u16.to_le_bytes());
    for (register, at) in [(32, RING), (40, RING + 0x1000), (48, RING + 0x2000)] {
        write(register, &at.to_le_bytes());
    }
    write(26, &1_u16.to_le_bytes());
    write(28, &1_u16.to_le_bytes());
    write(20, &[15]);
    assert_eq!(machine.bar::<1>(20), [15]);
}

#[test]
fn a_driver_gets_its_answer_and_its_interrupt_waits_while_masked() {
    let machine = machine();
    drive(&machine);
    let guest = machine.memory.guest();
    // One writable buffer of 64 bytes.
    let buffer = GuestAddress(RING + 0x4000);
    guest.write_obj(buffer.0, GuestAddress(RING)).unwrap();
    let tail = [64, 0, 0, 0, 2, 0, 0, 0];
    guest.write_slice(&tail, GuestAddress(RING + 8)).unwrap();
    let avail = [0, 0, 1, 0, 0, 0];
    guest
        .write_slice(&avail, GuestAddress(RING + 0x1000))
        .unwrap();
    // The notification comes through the window: no vCPU is here to do it.
    let window = machine.window();
    machine.set_config(window + 8, &0x3000_u32.to_le_bytes());
    machine.set_config(window + 12, &2_u32.to_le_bytes());
    machine.set_config(window + 16, &[0, 0, 0, 0]);
    let used = GuestAddress(RING + 0x2002);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while machine.bar::<1>(0xc000) != [2] {
        assert!(
            std::time::Instant::now() < deadline,
            "vector 1 is not pending"
        );
        std::thread::yield_now();
    }
    assert_eq!(guest.read_obj::<u16>(used).unwrap(), 1);
    let mut bytes = [0; 64];
    guest.read_slice(&mut bytes, buffer).unwrap();
    assert_ne!(bytes, [0; 64]);
    // Looking at a pending bit does not take it.
    assert_eq!(machine.bar::<1>(0xc000), [2]);
    // Enabled and unmasked, the signal goes to KVM.
    let (_, msix, _) = machine.capabilities()[5];
    machine.set_config(msix + 2, &0x8000_u16.to_le_bytes());
    for (offset, value) in [(16, 0xfee0_0000_u32), (20, 0), (24, 0x41), (28, 0)] {
        machine
            .bus
            .write_bar(BAR + 0x8000 + offset, &value.to_le_bytes());
    }
    assert_eq!(machine.bar::<1>(0xc000), [0]);
}

#[test]
fn no_access_of_any_width_to_any_register_does_more_than_it_may() {
    let machine = machine();
    let identity = |machine: &Machine| {
        [0, 8, 0xc, config::BAR0, 0x2c, 0x34].map(|register| machine.config32(register))
    };
    let before = identity(&machine);
    for pattern in [0x00, 0xff, 0xa5] {
        for register in 0..0x1000_u16 {
            for width in 0..=8 {
                machine.set_config(register, &[pattern; 8][..width]);
                let mut data = [0; 8];
                let offset = (u64::from(SLOT) << 15) + u64::from(register);
                machine.bus.read_ecam(offset, &mut data[..width]);
            }
        }
        machine.set_config(config::BAR0, &[0; 4]);
        assert_eq!(identity(&machine), before);
    }
    machine.enable();
    // Every register of every region, and their ends.
    let regions = [
        0_u64, 0x1000, 0x2000, 0x3000, 0x8000, 0xa000, 0xc000, 0xfff8,
    ];
    for region in regions {
        for offset in (0..0x48).map(|offset| region + offset) {
            for width in 0..=8 {
                for pattern in [0x00, 0xff, 0x0f] {
                    let at = (BAR + offset).min(BAR + layout::BAR_SIZE - 1);
                    machine.bus.write_bar(at, &[pattern; 8][..width]);
                    machine.bus.read_bar(at, &mut [0; 8][..width]);
                }
            }
        }
    }
    for offset in [0, 31 * layout::BAR_SIZE, 0xfff_ffff, u64::MAX] {
        machine.bus.write_bar(offset, &[0; 4]);
        let mut data = [0; 4];
        machine.bus.read_bar(offset, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
    // And it still works.
    drive(&machine);
}

#[test]
fn a_slot_is_taken_once_and_the_bridge_keeps_its_own() {
    let mut machine = machine();
    let function = Arc::clone(machine.bus.functions().next().unwrap());
    assert!(machine.bus.insert(function).is_err());
    assert!(machine.memory.guest().num_regions() == 1);
}

/// A device that panics as soon as it runs.
struct Bomb(Arc<ConfigSpace>);

impl VirtioDevice for Bomb {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.0
    }

    fn thread(&self) -> WorkerThread {
        WorkerThread::Devices
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), HostFault> {
        panic!("bomb");
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn handle(
        &mut self,
        _token: u32,
        _ready: vmm_sys_util::epoll::EventSet,
    ) -> Result<Progress, Fault> {
        Ok(Progress::Done)
    }

    fn deactivate(&mut self) -> Vec<Option<virtio_queue::QueueState>> {
        vec![None]
    }

    fn save(&self) -> Result<DeviceState, HostFault> {
        Ok(DeviceState::Entropy)
    }

    fn restore(&mut self, _state: DeviceState) -> Result<(), HostFault> {
        Ok(())
    }
}

#[test]
fn a_device_that_panics_is_a_host_fault_and_the_bus_still_answers() {
    let (sender, faults) = channel();
    let on_fault: OnHostFault = Arc::new(move |fault: HostFault| {
        sender.send(fault.to_string()).unwrap();
    });
    let config = Arc::new(ConfigSpace::new(Vec::new(), 0..0));
    let machine = machine_with(Box::new(Bomb(config)), on_fault);
    drive(&machine);
    let fault = faults.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(fault.contains("panicked"), "{fault}");
    machine.bus.write_bar(BAR + 20, &[0]);
    assert_eq!(machine.bar::<1>(20), [0]);
    for function in machine.bus.functions() {
        function.pause();
        function.resume();
        function.stop();
    }
}

//! What tests and fuzzers do with a damaged state whose checksum is right: everything that a
//! restore does short of KVM.

use std::fs::File;
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::EventFd;

use super::file::{StateProblem, read, seal};
use super::key::HostKey;
use super::state::MachineState;
use crate::devices::balloon::Balloon;
use crate::devices::block::{Block, BlockSpec, BlockState, Disk, Overlay};
use crate::devices::console::{Console, ConsoleConfig, ConsoleSink};
use crate::devices::entropy::Entropy;
use crate::devices::net::{Net, NetConfig};
use crate::devices::transport::{Transport, Wiring};
use crate::devices::uart::Uart;
use crate::devices::worker::Worker;
use crate::devices::{DeviceKind, DeviceState, GuestMemory, HostFault, Interrupt, VirtioDevice};

/// No test has a larger disk.
const MAX_DISK_BYTES: u64 = 1 << 40;

/// Decodes a payload as if it came from a file of this host.
pub fn decode(payload: &[u8]) -> Result<MachineState, StateProblem> {
    let host = HostKey::from_bytes([0; 32]);
    let file = seal(payload, &host);
    read(&mut file.as_slice(), file.len() as u64, &host)
}

/// Offers each device its state, and lets it run where it fits.
pub fn offer_to_devices(state: MachineState) -> Result<(), HostFault> {
    let worker = worker()?;
    // Addresses above are outside, as they would be in a machine of this size.
    let memory = GuestMemory::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)])
        .map_err(|e| HostFault::msg(e.to_string()))?;
    for function in state.functions {
        let device = device(&function.device, state.agent_channel)?;
        let on_fault = Arc::new(|_fault| {});
        let mut transport = Transport::new(device, Arc::clone(&worker), memory.clone(), on_fault);
        if function.offer(&mut transport).is_ok() {
            transport.resume(&Wires);
            transport.pause();
            let (again, device) = transport.save()?;
            transport.restore(again, device)?;
            transport.reset();
        }
    }
    Uart::new(ConsoleSink::new(None), Interrupt::none()).restore(state.uart)
}

/// One for all: devices come and go.
fn worker() -> Result<Arc<Worker>, HostFault> {
    static WORKER: OnceLock<Option<Arc<Worker>>> = OnceLock::new();
    let spawn = || Worker::spawn("dissect", Arc::new(|_fault| {})).ok();
    let worker = WORKER.get_or_init(|| spawn().map(Arc::new));
    worker.clone().ok_or_else(|| HostFault::msg("no thread"))
}

struct Wires;

impl Wiring for Wires {
    fn kick(&self, _queue: u16) -> Option<Arc<EventFd>> {
        EventFd::new(libc::EFD_NONBLOCK).ok().map(Arc::new)
    }

    fn interrupt(&self, _vector: u16) -> Interrupt {
        Interrupt::none()
    }

    fn vectors(&self) -> u16 {
        4
    }
}

/// A device that the state may belong to.
fn device(state: &DeviceState, agent: bool) -> Result<Box<dyn VirtioDevice>, HostFault> {
    let io = |e| HostFault::new("make a file", e);
    Ok(match state {
        DeviceState::Entropy => Box::new(Entropy::new()),
        DeviceState::Balloon(_) => Box::new(Balloon::new()),
        DeviceState::Net(_) => Box::new(Net::new(NetConfig {
            tap: File::open("/dev/null").map_err(io)?.into(),
            mac: [2; 6],
            mtu: 1500,
            link_up: true,
            vhost: false,
        })?),
        DeviceState::Console(_) => {
            let socket = || std::os::unix::net::UnixStream::pair().map(|(_host, device)| device);
            Box::new(Console::new(ConsoleConfig {
                sink: ConsoleSink::new(None),
                agent: agent.then(socket).transpose().map_err(io)?,
                agent_port_name: "agent".to_owned(),
                agent_opened: Arc::default(),
                columns: 0,
                rows: 0,
            })?)
        }
        DeviceState::Block(state) => Box::new(block(state).map_err(io)?),
    })
}

fn block(state: &BlockState) -> std::io::Result<Block> {
    let file = tempfile::tempfile()?;
    file.set_len(state.bytes().min(MAX_DISK_BYTES))?;
    let disk = match state.map() {
        None => Disk::ReadOnly(Arc::new(file)),
        Some(_) => Disk::Overlay(Overlay::new(Arc::new(tempfile::tempfile()?), None, file)?),
    };
    Block::new(BlockSpec {
        disk,
        serial: String::new(),
        durable: false,
        name: format!("{:?}", DeviceKind::Block),
    })
    .map_err(std::io::Error::other)
}

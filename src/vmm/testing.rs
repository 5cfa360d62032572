//! Tiny guests: a few bytes of 64-bit code in an ELF, and a machine to run them in.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::vm::OnEnd;
use super::{
    DiskSource, DiskSpec, KernelSource, RestoreSpec, Snapshot, StartError, VmEnd, VmHandle, VmSpec,
    layout, restore, start,
};

/// Where a tiny guest's code is loaded and entered.
pub const CODE_AT: u64 = 0x100_0000;
/// No test guest needs longer; a guest that does hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// An ELF with one segment of `code`.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0_u8; 120];
    image[..4].copy_from_slice(b"\x7fELF");
    image[4..7].copy_from_slice(&[2, 1, 1]);
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&CODE_AT.to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[52..58].copy_from_slice(&[64, 0, 56, 0, 1, 0]);
    let segment = &mut image[64..120];
    segment[..8].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0]);
    for (at, value) in [(8, 120), (16, CODE_AT), (24, CODE_AT)] {
        segment[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let len = code.len() as u64;
    segment[32..40].copy_from_slice(&len.to_le_bytes());
    segment[40..48].copy_from_slice(&len.to_le_bytes());
    image.extend_from_slice(code);
    image
}

/// A guest's code, put together instruction by instruction. Clobbers RAX, RDX and RCX.
#[derive(Debug, Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub fn out8(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Writes `value` as 32 bits to a physical address below 4 GiB: mov eax; mov edx; mov [rdx]
    pub fn store32(self, address: u64, value: u32) -> Self {
        self.raw(&[0xb8])
            .raw(&value.to_le_bytes())
            .address(address)
            .raw(&[0x89, 0x02])
    }

    pub fn store16(self, address: u64, value: u16) -> Self {
        self.raw(&[0xb8])
            .raw(&u32::from(value).to_le_bytes())
            .address(address)
            .raw(&[0x66, 0x89, 0x02])
    }

    pub fn store8(self, address: u64, value: u8) -> Self {
        self.address(address).raw(&[0xc6, 0x02, value])
    }

    /// Writes `value` as 32 bits to any address: movabs rcx, address; mov dword [rcx], value
    pub fn store(self, address: u64, value: u32) -> Self {
        self.raw(&[0x48, 0xb9])
            .raw(&address.to_le_bytes())
            .raw(&[0xc7, 0x01])
            .raw(&value.to_le_bytes())
    }

    /// Resets unless `value` is at an address: movabs rcx, address; cmp dword [rcx], value; je
    pub fn expect(self, address: u64, value: u32) -> Self {
        let code = self.raw(&[0x48, 0xb9]).raw(&address.to_le_bytes());
        let code = code.raw(&[0x81, 0x39]).raw(&value.to_le_bytes());
        code.reset_unless_equal()
    }

    /// je over a reset
    pub fn reset_unless_equal(self) -> Self {
        let reset = Self::new().reset().halt().0;
        let over = u8::try_from(reset.len()).unwrap();
        self.raw(&[0x74, over]).raw(&reset)
    }

    /// Waits for a key on the serial port, which is in AL then:
    /// mov edx, LSR; in al, dx; test al, 1; jz to the in; mov dl, DATA; in al, dx
    pub fn key(self) -> Self {
        self.raw(&[0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0xfb])
            .raw(&[0xb2, 0xf8, 0xec])
    }

    /// mov edx, address
    fn address(self, address: u64) -> Self {
        let address = u32::try_from(address).unwrap();
        self.raw(&[0xba]).raw(&address.to_le_bytes())
    }

    /// Prints text on the serial port.
    pub fn print(mut self, text: &str) -> Self {
        for byte in text.bytes() {
            self = self.out8(layout::COM1, byte);
        }
        self
    }

    /// jmp to itself
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    pub fn power_off(self) -> Self {
        self.out8(layout::SLEEP_PORT, layout::S5_VALUE)
    }

    pub fn reset(self) -> Self {
        self.out8(layout::SLEEP_PORT, layout::RESET_VALUE)
    }

    /// cli; hlt: for ever.
    pub fn halt(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }
}

/// A machine for `code`, with 64 MiB, one vCPU and nothing else.
pub fn spec(code: &Code) -> VmSpec {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf(&code.0)).unwrap();
    let (_file, path) = file.keep().unwrap();
    VmSpec {
        name: "vm0".to_owned(),
        vcpus: 1,
        memory_mib: 64,
        kernel: KernelSource::Path(path),
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
        disks: Vec::new(),
        net: None,
        console: None,
        agent_channel: false,
        golden: false,
    }
}

/// A started machine and how it ends.
pub struct Running {
    pub handle: VmHandle,
    ended: Receiver<VmEnd>,
}

impl Running {
    /// The end; panics if none comes.
    pub fn end(self) -> VmEnd {
        let end = match self.ended.recv_timeout(PATIENCE) {
            Ok(end) => end,
            Err(_late) => panic!(
                "still running; console: {:?}",
                self.handle.console_tail(999)
            ),
        };
        assert_eq!(self.handle.end(), Some(end.clone()));
        assert_eq!(self.handle.wait(), end);
        end
    }

    /// Waits until the console shows `text`.
    pub fn wait_for(&self, text: &str) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.handle.console_tail(1 << 16).contains(text) {
            assert!(
                std::time::Instant::now() < deadline,
                "never printed {text:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn try_run(spec: VmSpec) -> Result<Running, StartError> {
    run_by(spec, start)
}

/// Starts a machine by a way of the caller's.
pub fn run_by(
    spec: VmSpec,
    start: impl FnOnce(VmSpec, OnEnd) -> Result<VmHandle, StartError>,
) -> Result<Running, StartError> {
    let (sender, ended) = channel();
    let KernelSource::Path(path) = spec.kernel.clone();
    let started = start(spec, Box::new(move |end| sender.send(end).unwrap()));
    std::fs::remove_file(path).unwrap();
    Ok(Running {
        handle: started?,
        ended,
    })
}

pub fn run(spec: VmSpec) -> Running {
    try_run(spec).unwrap()
}

/// A clone with no disk and no network card, paused.
pub fn clone_of(snapshot: &Snapshot) -> Running {
    try_clone(RestoreSpec::new("vm1"), snapshot).unwrap()
}

pub fn try_clone(spec: RestoreSpec, snapshot: &Snapshot) -> Result<Running, StartError> {
    let (sender, ended) = channel();
    let started = restore(
        spec,
        snapshot,
        Box::new(move |end| sender.send(end).unwrap()),
    );
    Ok(Running {
        handle: started?,
        ended,
    })
}

/// A disk of 64 blocks of 4 KiB and a bit more.
pub fn disk_file() -> Arc<File> {
    let base = tempfile::tempfile().unwrap();
    base.set_len(65 * 4096).unwrap();
    Arc::new(base)
}

pub fn overlay_disk(base: &Arc<File>) -> DiskSpec {
    DiskSpec {
        source: DiskSource::Overlay {
            base: Arc::clone(base),
            delta_dir: std::env::temp_dir(),
        },
        serial: String::new(),
        durable: false,
    }
}

impl RestoreSpec {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            net: None,
            console: None,
        }
    }
}

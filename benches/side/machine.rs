//! One machine, and how each VMM is asked for it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fleetingd::net::open_tap;
use fleetingd::vmm::{self, DiskSource, DiskSpec, KernelSource, NetSpec, VmHandle, VmSpec};

use super::console::Console;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");
const MTU: u16 = 1500;
/// Of the guest's card.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// What is booted.
#[derive(Clone)]
pub struct Machine {
    pub memory_mib: u32,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub cmdline: String,
    /// Each is written by nobody, or by an overlay of the VMM's own, but for QEMU's `raw`.
    pub disks: Vec<PathBuf>,
    /// An existing TAP.
    pub tap: Option<&'static str>,
    /// Whether there is a port for our agent; its link is down until [`Running::raise_link`]
    /// where the VMM can do that.
    pub agent: bool,
}

/// Who boots it.
#[derive(Clone)]
pub enum Vmm {
    /// `fleetingd boot`, a process of its own.
    Fleetingd,
    /// A VM of this process, its disks as a worker has them: a flush is only acknowledged.
    Embedded {
        vhost: bool,
    },
    /// Debian's QEMU, machine type microvm with virtio-pci.
    Qemu {
        drive: &'static str,
        vhost: bool,
    },
    Firecracker(PathBuf),
    CloudHypervisor(PathBuf),
}

/// A private overlay in front of a disk that stays as it is, as ours has.
pub const QEMU_OVERLAY: &str = "snapshot=on,cache=writeback,aio=io_uring";
/// The disk itself, through the page cache.
pub const QEMU_RAW: &str = "snapshot=off,cache=writeback,aio=io_uring";
pub const QEMU: Vmm = Vmm::Qemu {
    drive: QEMU_OVERLAY,
    vhost: true,
};

/// A machine that runs; gone when dropped.
pub struct Running {
    pub console: Console,
    pub started: Instant,
    end: End,
}

enum End {
    Process(Child),
    Embedded(VmHandle),
}

impl Running {
    /// The host's end of the agent's port.
    pub fn agent(&self) -> anyhow::Result<UnixStream> {
        match &self.end {
            End::Process(_) => connect(&agent_socket()),
            End::Embedded(handle) => handle.take_agent().context("no agent channel"),
        }
    }

    pub fn raise_link(&self) -> anyhow::Result<()> {
        match &self.end {
            End::Process(_) => Ok(()),
            End::Embedded(handle) => Ok(handle.set_link(true)?),
        }
    }

    /// The process's id; `None` of a VM of this one.
    pub fn pid(&self) -> Option<u32> {
        match &self.end {
            End::Process(child) => Some(child.id()),
            End::Embedded(_) => None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match &mut self.end {
            End::Process(child) => {
                // It may have ended by itself.
                let _ended = child.kill();
                let _ended = child.wait();
            }
            End::Embedded(handle) => {
                handle.kill();
                handle.wait();
            }
        }
    }
}

impl Vmm {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Fleetingd | Self::Embedded { .. } => "fleetingd",
            Self::Qemu { .. } => "qemu microvm",
            Self::Firecracker(_) => "firecracker",
            Self::CloudHypervisor(_) => "cloud-hypervisor",
        }
    }

    pub fn start(&self, machine: &Machine) -> anyhow::Result<Running> {
        let started = Instant::now();
        let mut command = match self {
            Self::Embedded { vhost } => return embedded(machine, *vhost, started),
            Self::Fleetingd => fleetingd(machine),
            Self::Qemu { drive, vhost } => qemu(machine, drive, *vhost),
            Self::Firecracker(path) => firecracker(path, machine)?,
            Self::CloudHypervisor(path) => cloud_hypervisor(path, machine),
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.name()))?;
        let stdout = child.stdout.take().context("no pipe")?;
        Ok(Running {
            console: Console::of(stdout),
            started,
            end: End::Process(child),
        })
    }
}

fn fleetingd(machine: &Machine) -> Command {
    let mut command = Command::new(EXECUTABLE);
    command
        .args(["boot", "--memory", &machine.memory_mib.to_string()])
        .arg("--kernel")
        .arg(&machine.kernel)
        .arg("--initrd")
        .arg(&machine.initrd)
        .args(["--cmdline", &machine.cmdline])
        .stderr(Stdio::null());
    for disk in &machine.disks {
        command.args(["--disk", &format!("{},cow", disk.display())]);
    }
    if let Some(tap) = machine.tap {
        command.args(["--net", &format!("tap={tap}")]);
    }
    command
}

fn embedded(machine: &Machine, vhost: bool, started: Instant) -> anyhow::Result<Running> {
    let (reader, writer) = std::io::pipe()?;
    let mut disks = Vec::new();
    for (index, path) in machine.disks.iter().enumerate() {
        let base = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        disks.push(DiskSpec {
            source: DiskSource::Overlay {
                base: Arc::new(base),
                delta_dir: path.parent().unwrap_or(Path::new("/")).to_owned(),
            },
            serial: format!("disk{index}"),
            durable: false,
        });
    }
    let net = match machine.tap {
        None => None,
        Some(tap) => Some(NetSpec {
            tap: open_tap(tap)?.into(),
            mac: MAC,
            mtu: MTU,
            link_up: !machine.agent,
            vhost,
        }),
    };
    let spec = VmSpec {
        name: "bench".to_owned(),
        vcpus: 1,
        memory_mib: machine.memory_mib,
        kernel: KernelSource::Path(machine.kernel.clone()),
        initrd: Some(machine.initrd.clone()),
        cmdline: machine.cmdline.clone(),
        disks,
        net,
        console: Some(File::from(std::os::fd::OwnedFd::from(writer))),
        golden: false,
        agent_channel: machine.agent,
    };
    let handle = vmm::start(spec, Box::new(|_end| {}))?;
    Ok(Running {
        console: Console::of(reader),
        started,
        end: End::Embedded(handle),
    })
}

/// As QEMU's documentation has it for the fastest boot that still has PCI: no legacy device but
/// the serial port. Debian's kernel knows virtio-mmio only by a device tree, so PCI it is.
fn qemu(machine: &Machine, drive: &str, vhost: bool) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-M",
            "microvm,accel=kvm,acpi=on,pcie=on,pit=off,pic=off,rtc=off,usb=off,isa-serial=on",
        ])
        .args([
            "-cpu",
            "host",
            "-smp",
            "1",
            "-m",
            &machine.memory_mib.to_string(),
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initrd)
        .args(["-append", &machine.cmdline, "-serial", "stdio"]);
    for (index, disk) in machine.disks.iter().enumerate() {
        let path = disk.display();
        command
            .args([
                "-drive",
                &format!("id=d{index},if=none,format=raw,file={path},discard=unmap,{drive}"),
            ])
            .args(["-device", &format!("virtio-blk-pci,drive=d{index}")]);
    }
    if let Some(tap) = machine.tap {
        let vhost = if vhost { "on" } else { "off" };
        command
            .args([
                "-netdev",
                &format!("tap,id=n,ifname={tap},script=no,downscript=no,vhost={vhost}"),
            ])
            .args(["-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56"]);
    }
    if machine.agent {
        let path = agent_socket();
        command
            .args(["-device", "virtio-serial-pci", "-chardev"])
            .arg(format!(
                "socket,id=agent,server=on,wait=off,path={}",
                path.display()
            ))
            .args([
                "-device",
                "virtserialport,chardev=agent,name=fleetingd.agent",
            ]);
    }
    command
}

/// Where QEMU listens for the host's end of the agent's port.
fn agent_socket() -> PathBuf {
    std::env::temp_dir().join("fleetingd-bench-agent")
}

/// The VMM's process has only just been started.
fn connect(path: &Path) -> anyhow::Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(_early) if started.elapsed().as_secs() < 60 => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other.context("cannot connect to the agent's port"),
        }
    }
}

/// Only machines without disks and cards: its devices are not on PCI.
fn firecracker(path: &Path, machine: &Machine) -> anyhow::Result<Command> {
    if !machine.disks.is_empty() || machine.tap.is_some() {
        bail!("firecracker is only asked for machines without devices");
    }
    let config = serde_json::json!({
        "boot-source": {
            "kernel_image_path": machine.kernel,
            "initrd_path": machine.initrd,
            "boot_args": machine.cmdline,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": machine.memory_mib },
    });
    let file = machine.kernel.with_extension("firecracker.json");
    std::fs::write(&file, config.to_string())
        .with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = Command::new(path);
    command.args(["--no-api", "--config-file"]).arg(file);
    Ok(command)
}

fn cloud_hypervisor(path: &Path, machine: &Machine) -> Command {
    let mut command = Command::new(path);
    command
        .arg("--kernel")
        .arg(&machine.kernel)
        .arg("--initramfs")
        .arg(&machine.initrd)
        .args(["--cmdline", &machine.cmdline, "--cpus", "boot=1"])
        .args(["--memory", &format!("size={}M", machine.memory_mib)])
        .args(["--serial", "tty", "--console", "off"]);
    if !machine.disks.is_empty() {
        command.arg("--disk");
        for disk in &machine.disks {
            command.arg(format!("path={},readonly=on", disk.display()));
        }
    }
    command
}

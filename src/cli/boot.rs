//! `fleetingd boot`: one machine on this terminal, for debugging a kernel, an image or the host.
//!
//! The main thread waits for the machine's end; [`terminal`] has what is typed meanwhile. Nothing
//! here decides anything about machines.
#![expect(clippy::print_stderr, reason = "a command says what happened")]

pub(super) mod terminal;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, bail};
use terminal::Signals;

use crate::net;
use crate::vmm::{
    self, BootPhase, DiskSource, DiskSpec, KernelSource, NetSpec, RestoreSpec, Snapshot, VmHandle,
    VmSpec,
};

/// Exit code of a set-up that failed; a machine's ends have their own.
const SETUP_FAILED: u8 = 3;
/// A file of this magic is no raw image.
const QCOW2: &[u8; 4] = b"QFI\xfb";

/// Boot a Linux kernel in a machine on this terminal
///
/// Exit codes: 0 power-off, 2 usage, 3 set-up, 10 reboot, 11 triple fault, 12 kernel panic,
/// 13 killed, 14 KVM internal error, 15 host fault.
#[derive(Debug, clap::Args)]
pub struct BootArgs {
    /// An ELF vmlinux or a bzImage (vmlinuz)
    #[arg(long, value_name = "FILE", required_unless_present = "restore")]
    kernel: Option<PathBuf>,
    /// An initramfs
    #[arg(long, value_name = "FILE", conflicts_with = "restore")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        conflicts_with = "restore",
        default_value = "console=ttyS0 reboot=a panic=-1"
    )]
    cmdline: String,
    /// A raw disk image, in the order vda, vdb, ...: written in place, read-only with `,ro`, or
    /// with changes that are gone at the end with `,cow`
    #[arg(long = "disk", value_name = "PATH[,ro|,cow]")]
    disks: Vec<DiskArg>,
    /// vCPUs, 1 to 64
    #[arg(long, conflicts_with = "restore", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// Memory, at least 64
    #[arg(long, value_name = "MIB", conflicts_with = "restore", default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..))]
    memory: u32,
    /// The network card: an existing TAP, or none
    #[arg(long, value_name = "tap=NAME|none", default_value = "none")]
    net: NetArg,
    /// Where the console goes: this terminal, or a file
    #[arg(long, value_name = "stdio|FILE", default_value = "stdio")]
    console: PathBuf,
    /// Print when each phase of the boot was reached
    #[arg(long)]
    timing: bool,
    /// Save the machine to a directory whenever this program gets the signal, SIGUSR2; its disks
    /// must be `,ro` or `,cow`
    #[arg(long, num_args = 2, value_names = ["SIGNAL", "DIR"])]
    snapshot_on: Option<Vec<PathBuf>>,
    /// Go on from a snapshot instead of booting a kernel, with the same disks and the like of the
    /// same network card
    #[arg(long, value_name = "DIR", conflicts_with = "kernel")]
    restore: Option<PathBuf>,
}

/// A disk and how it may be changed.
#[derive(Debug, Clone)]
struct DiskArg {
    path: PathBuf,
    access: Access,
}

#[derive(Debug, Clone, Copy)]
enum Access {
    InPlace,
    ReadOnly,
    CopyOnWrite,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, access) = match text.rsplit_once(',') {
            Some((path, "ro")) => (path, Access::ReadOnly),
            Some((path, "cow")) => (path, Access::CopyOnWrite),
            _ => (text, Access::InPlace),
        };
        if path.is_empty() {
            return Err("a disk needs a path".to_owned());
        }
        Ok(Self {
            path: path.into(),
            access,
        })
    }
}

#[derive(Debug, Clone)]
enum NetArg {
    None,
    Tap(String),
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "none" => Ok(Self::None),
            Some(("tap", name)) if (1..16).contains(&name.len()) => Ok(Self::Tap(name.to_owned())),
            _ => Err("either none or tap=NAME".to_owned()),
        }
    }
}

/// Runs the command; returns when the machine has ended.
pub fn run(args: BootArgs) -> ExitCode {
    let timing = args.timing;
    let on_terminal = args.console.as_os_str() == "stdio";
    let started = start(args);
    let handle = match started {
        Ok(handle) => handle,
        Err(error) => return failed(&error),
    };
    let terminal = on_terminal.then(|| terminal::attach(&handle));
    let end = handle.wait();
    // The terminal is itself again before anything is printed.
    drop(terminal);
    if timing {
        for (phase, at) in handle.timing() {
            eprintln!("{:>10.1} ms  {}", at.as_secs_f64() * 1e3, describe(phase));
        }
    }
    eprintln!("the machine ended: {end}");
    ExitCode::from(end.exit_code())
}

/// Says whether machines can run here; for scripts.
pub fn kvm_check() -> ExitCode {
    match vmm::check_kvm() {
        Ok(()) => {
            eprintln!("KVM runs stock kernels here");
            ExitCode::SUCCESS
        }
        Err(problem) => failed(&problem.into()),
    }
}

/// The error and its causes, one a line.
fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    ExitCode::from(SETUP_FAILED)
}

fn describe(phase: BootPhase) -> &'static str {
    match phase {
        BootPhase::Loaded => "kernel and initrd in memory",
        BootPhase::FirstRun => "first instruction",
        BootPhase::FirstOutput => "first console output",
        BootPhase::FirstDriver => "first virtio driver",
        BootPhase::AgentOpen => "agent opened its channel",
        BootPhase::Ended => "ended",
    }
}

fn start(args: BootArgs) -> anyhow::Result<VmHandle> {
    let snapshots = args.snapshot_on.as_deref().map(snapshot_directory);
    let signals = Signals::catch(snapshots.transpose()?).context("cannot catch signals")?;
    let handle = match &args.restore {
        Some(directory) => {
            let snapshot = Snapshot::open(directory)?;
            let handle = vmm::restore(outside(&args)?, &snapshot, Box::new(|_end| {}))?;
            handle.resume()?;
            handle
        }
        None => vmm::start(machine(args)?, Box::new(|_end| {}))?,
    };
    signals.serve(&handle);
    Ok(handle)
}

/// The directory of `--snapshot-on`, which knows one signal only.
fn snapshot_directory(words: &[PathBuf]) -> anyhow::Result<PathBuf> {
    match words {
        [signal, directory] if signal.as_os_str() == "SIGUSR2" => Ok(directory.clone()),
        _ => bail!("--snapshot-on knows the signal SIGUSR2 only"),
    }
}

fn machine(args: BootArgs) -> anyhow::Result<VmSpec> {
    let outside = outside(&args)?;
    Ok(VmSpec {
        name: outside.name,
        vcpus: args.cpus,
        memory_mib: args.memory,
        kernel: KernelSource::Path(args.kernel.context("a machine needs a --kernel")?),
        initrd: args.initrd,
        cmdline: args.cmdline,
        disks: outside.disks,
        net: outside.net,
        console: outside.console,
        agent_channel: false,
        golden: false,
    })
}

/// What a machine has of the host, booted or restored.
fn outside(args: &BootArgs) -> anyhow::Result<RestoreSpec> {
    let console = if args.console.as_os_str() == "stdio" {
        let stdout = io::stdout().as_fd().try_clone_to_owned();
        File::from(stdout.context("cannot use this terminal")?)
    } else {
        let path = &args.console;
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?
    };
    let mut disks = Vec::new();
    for (index, disk) in args.disks.iter().enumerate() {
        disks.push(DiskSpec {
            source: open_disk(disk)?,
            serial: format!("disk{index}"),
            durable: true,
        });
    }
    let net = match &args.net {
        NetArg::None => None,
        NetArg::Tap(name) => Some(open_net(name)?),
    };
    Ok(RestoreSpec {
        name: "boot".to_owned(),
        disks,
        net,
        console: Some(console),
    })
}

fn open_disk(disk: &DiskArg) -> anyhow::Result<DiskSource> {
    let path = &disk.path;
    let write = matches!(disk.access, Access::InPlace);
    let mut file = OpenOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .with_context(|| format!("cannot open the disk {}", path.display()))?;
    let mut magic = [0; 4];
    if file.read_exact(&mut magic).is_ok() && &magic == QCOW2 {
        bail!(
            "the disk {} is a qcow2 image; hint: qemu-img convert -O raw",
            path.display()
        );
    }
    let file = Arc::new(file);
    Ok(match disk.access {
        Access::InPlace => DiskSource::Direct(file),
        Access::ReadOnly => DiskSource::ReadOnly(file),
        Access::CopyOnWrite => DiskSource::Overlay {
            base: file,
            delta_dir: delta_dir()?,
        },
    })
}

/// Where changes of `,cow` disks lie: $TMPDIR, or /var/tmp, which is on a disk.
fn delta_dir() -> anyhow::Result<PathBuf> {
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    dir.canonicalize()
        .with_context(|| format!("cannot use {}; hint: set TMPDIR", dir.display()))
}

fn open_net(name: &str) -> anyhow::Result<NetSpec> {
    let tap = net::open_tap(name)?;
    let mtu = Path::new("/sys/class/net").join(name).join("mtu");
    let mtu = std::fs::read_to_string(&mtu)
        .with_context(|| format!("cannot read {}", mtu.display()))?
        .trim()
        .parse()
        .context("cannot read the TAP's MTU")?;
    // Locally administered, and the same for the same TAP.
    let sum = name.bytes().fold(0x811c_9dc5_u32, |sum, byte| {
        (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let [a, b, c, d] = Ipv4Addr::from(sum).octets();
    Ok(NetSpec {
        tap: tap.into(),
        mac: [0x52, 0x54, a, b, c, d],
        mtu,
        link_up: true,
        vhost: true,
    })
}

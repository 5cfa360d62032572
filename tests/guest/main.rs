//! Stock Debian kernels in machines of ours: boot, disks, network, balloon, and every end.
//!
//! Needs a KVM that runs stock kernels and what `./dev guest` builds; elsewhere each test says
//! that it is skipped, or fails if FLEETINGD_REQUIRE_GUEST=1. `./dev rig` has such a KVM.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![expect(
    clippy::indexing_slicing,
    reason = "a test may stop at the first surprise"
)]
#![expect(clippy::panic, reason = "a test may stop at the first surprise")]

mod disk;
mod memory;
mod net;
mod platform;
#[path = "../tiny_kernel/mod.rs"]
mod tiny_kernel;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleetingd::vmm::{self, KernelSource, VmEnd, VmHandle, VmSpec};

/// What a script's longest step may take where KVM itself is emulated.
const PATIENCE: Duration = Duration::from_secs(240);
/// Where a machine that works ends its script.
const SUCCESS: &str = "FLEETINGD-EXIT 0";

/// What guests boot, and a directory for this run.
struct Files {
    bzimage: PathBuf,
    /// The same kernel unpacked: what most tests boot, as it saves seconds each time.
    vmlinux: PathBuf,
    initrd: PathBuf,
    scratch: tempfile::TempDir,
}

/// The files, or `None` after saying why this test is skipped.
fn files() -> Option<&'static Files> {
    static FILES: OnceLock<Result<Files, String>> = OnceLock::new();
    match FILES.get_or_init(find_files) {
        Ok(files) => Some(files),
        Err(reason) => {
            assert!(
                std::env::var_os("FLEETINGD_REQUIRE_GUEST").is_none_or(|v| v != "1"),
                "{reason}"
            );
            let name = std::thread::current().name().unwrap_or("?").to_owned();
            // Past the harness, which swallows what passing tests print.
            let mut out = std::io::stderr();
            writeln!(out, "SKIP: {name}: {reason}").unwrap();
            None
        }
    }
}

fn find_files() -> Result<Files, String> {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/rig/guest");
    let dir = std::env::var_os("FLEETINGD_GUEST_DIR").map_or_else(default, PathBuf::from);
    let (bzimage, initrd) = (dir.join("vmlinuz"), dir.join("initrd.gz"));
    vmm::check_kvm().map_err(|problem| problem.to_string())?;
    let image =
        fs::read(&bzimage).map_err(|e| format!("{}: {e}; hint: ./dev guest", bzimage.display()))?;
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let vmlinux = scratch.path().join("vmlinux");
    let unpacked = vmm::boot::decompress_kernel(&image).map_err(|e| e.to_string())?;
    fs::write(&vmlinux, unpacked).map_err(|e| e.to_string())?;
    Ok(Files {
        bzimage,
        vmlinux,
        initrd,
        scratch,
    })
}

/// A machine that runs a script as its first process.
struct Guest {
    handle: VmHandle,
    console: tempfile::NamedTempFile,
}

/// Boots `script` in a machine of one vCPU and 256 MiB, changed by `shape`.
fn boot(files: &Files, script: &str, shape: impl FnOnce(&mut VmSpec)) -> Guest {
    let console = tempfile::NamedTempFile::new().unwrap();
    let run = URL_SAFE_NO_PAD.encode(script);
    let mut spec = VmSpec {
        name: "guest".to_owned(),
        vcpus: 1,
        memory_mib: 256,
        kernel: KernelSource::Path(files.vmlinux.clone()),
        initrd: Some(files.initrd.clone()),
        // Of the kernel, a panic alone: its warnings would lie amid what the script prints.
        cmdline: format!("console=hvc0 loglevel=1 reboot=a panic=-1 fleetingd.run={run}"),
        disks: Vec::new(),
        net: None,
        console: Some(console.reopen().unwrap()),
        agent_channel: false,
    };
    shape(&mut spec);
    let handle = vmm::start(spec, Box::new(|_end| {})).unwrap();
    Guest { handle, console }
}

impl Guest {
    /// Everything the guest printed.
    fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console.path()).unwrap()).into_owned()
    }

    /// Waits until the guest has printed `text`.
    fn wait_for(&self, text: &str) {
        until(&format!("{text:?} is printed"), || {
            let output = self.output();
            assert!(
                self.handle.end().is_none() || output.contains(text),
                "ended ({:?}) before {text:?}:\n{output}",
                self.handle.end()
            );
            output.contains(text)
        });
    }

    /// Answers a script that reads a line from its console.
    fn answer(&self) {
        self.handle.console_input(b"\n");
    }

    /// The words behind `key` on the line that begins with it.
    fn value(&self, key: &str) -> String {
        let output = self.output();
        let line = output
            .lines()
            .find_map(|line| line.trim().strip_prefix(key));
        match line {
            Some(value) => value.trim().to_owned(),
            None => panic!("no line {key:?} in:\n{output}"),
        }
    }

    /// How the machine ended.
    fn end(&self) -> VmEnd {
        until("the machine ends", || self.handle.end().is_some());
        self.handle.wait()
    }

    /// Waits for the script's end, which must be a success and a power-off.
    fn succeed(&self) {
        let end = self.end();
        let output = self.output();
        assert_eq!(end, VmEnd::PowerOff, "{output}");
        assert!(output.contains(SUCCESS), "{output}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.handle.kill();
        self.handle.wait();
    }
}

/// Waits for something that nothing else announces.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// SHA-256 as `sha256sum` prints it.
fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

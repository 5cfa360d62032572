//! What every VMM boots: the stock kernel and the small initramfs of the guest tests.

use std::path::{Path, PathBuf};

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Same console, same quiet, no clock of the host's that one VMM lacks and the other has.
const CMDLINE: &str = "console=ttyS0 quiet reboot=a panic=-1 no_timer_check";

pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// An ext4 file system with programs that are too large for the initramfs.
    pub tools: PathBuf,
    /// A directory on a real file system, for disks.
    pub data: PathBuf,
}

impl Guest {
    pub fn from_environment() -> anyhow::Result<Self> {
        let path = |name: &str| {
            let value =
                std::env::var_os(name).with_context(|| format!("no {name}; hint: ./dev bench"))?;
            anyhow::Ok(PathBuf::from(value))
        };
        let dir = path("FLEETINGD_GUEST_DIR")?;
        let data = path("RIG_DATA")?.join("bench");
        std::fs::create_dir_all(&data)
            .with_context(|| format!("cannot make {}", data.display()))?;
        Ok(Self {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.gz"),
            tools: path("FLEETINGD_TOOLS")?,
            data,
        })
    }

    /// A copy of `file` among the disks: 9p, where the checkout may lie, is no place for one.
    pub fn local(&self, file: &Path) -> anyhow::Result<PathBuf> {
        let to = self.data.join(file.file_name().unwrap_or_default());
        std::fs::copy(file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(to)
    }
}

/// A command line whose first process is one `echo` of `marker`: no device, no script, no shell.
pub fn first_process(marker: &str) -> String {
    format!("{CMDLINE} rdinit=/bin/busybox -- echo {marker}")
}

/// A command line that loads the virtio modules, runs a /bin/sh script and powers off.
pub fn script(text: &str) -> String {
    format!("{CMDLINE} fleetingd.run={}", URL_SAFE_NO_PAD.encode(text))
}

/// A command line that goes on with the init of a disk's root file system.
pub fn root(device: &str) -> String {
    format!("{CMDLINE} root={device}")
}

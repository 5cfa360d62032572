//! What the process that started us means to us: we live as long as it does, and it may be the
//! gitlab-runner whose executable the machines should have.
//!
//! A service manager signals the runner's whole control group, long before a graceful stop is over:
//! so the signals that ask a process to end are ignored, and the parent's end is what ends us. Its
//! pidfd tells of that; PR_SET_PDEATHSIG would fire when the parent's *thread* that started us ends.

#![expect(
    unsafe_code,
    reason = "signal(2) and tokio's registration of a descriptor have no safe wrapper"
)]

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::process::Command;

use super::handshake::COOKIE;

/// Where no pidfd can be had.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// How long the parent's executable may take to name itself.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);

/// More than any version text.
const VERSION_BYTES: u64 = 64 << 10;

/// Ignores what asks this process to end; its children inherit that.
pub(super) fn ignore_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGHUP] {
        // SAFETY: SIG_IGN installs no handler, so no code of ours runs in a signal's context.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// The process that started this one.
#[derive(Debug)]
pub(super) struct Parent {
    /// `None` if it is outside of our pid namespace.
    pid: Option<Pid>,
    fd: Option<OwnedFd>,
}

impl Parent {
    pub(super) fn find() -> Self {
        let pid = getppid();
        let fd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        Self { pid, fd }
    }

    /// Waits for the parent's end.
    pub(super) async fn gone(self) {
        // The number may have been somebody else's when the descriptor was opened: then we have
        // another parent by now.
        let same = getppid() == self.pid;
        if let Some(fd) = self.fd.filter(|_| same) {
            // SAFETY: an OwnedFd stays open and the same until it is dropped, and it is moved in.
            let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
            if let Ok(watched) = watched
                && watched.readable().await.is_ok()
            {
                return;
            }
        }
        while getppid() == self.pid {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Where the parent's executable can be read, even after a package upgrade replaced the file.
    pub(super) fn executable(&self) -> Option<PathBuf> {
        let pid = self.pid?.as_raw_nonzero();
        Some(PathBuf::from(format!("/proc/{pid}/exe")))
    }
}

/// The executable if it is a gitlab-runner that a machine could run: it is asked for its version.
pub(super) async fn runner_binary(executable: Option<PathBuf>) -> Option<PathBuf> {
    asked(executable?, VERSION_TIMEOUT).await
}

/// The gitlab-runner of this host, by PATH: what machines get when no runner starts us.
pub async fn installed_runner() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("gitlab-runner"))
        .find_map(|file| file.canonicalize().ok())?;
    asked(found, VERSION_TIMEOUT).await
}

async fn asked(path: PathBuf, limit: Duration) -> Option<PathBuf> {
    if !is_executable_of_guests(&path) {
        return None;
    }
    let mut child = Command::new(&path)
        .arg("--version")
        .env_remove(COOKIE.0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .ok()?;
    let mut text = Vec::new();
    let stdout = child.stdout.take()?;
    let read = async {
        stdout
            .take(VERSION_BYTES)
            .read_to_end(&mut text)
            .await
            .ok()?;
        child.wait().await.ok()
    };
    let status = tokio::time::timeout(limit, read).await.ok()??;
    let text = String::from_utf8_lossy(&text);
    let file = path.read_link().unwrap_or_else(|_| path.clone());
    (status.success() && names_gitlab_runner(&text, &file)).then_some(path)
}

/// Whether a version text is a gitlab-runner's: it names itself, or it is the block that the runner
/// prints, which does not, and the file's name says the rest.
fn names_gitlab_runner(text: &str, file: &Path) -> bool {
    let lower = text.to_ascii_lowercase();
    let named = ["gitlab runner", "gitlab-runner"]
        .iter()
        .any(|name| lower.contains(name));
    let block = ["Version:", "Git revision:", "Git branch:", "GO version:"]
        .iter()
        .all(|key| text.lines().any(|line| line.starts_with(key)));
    let file = file.file_name().unwrap_or_default().to_string_lossy();
    named || (block && file.contains("runner"))
}

/// Whether a file is a 64-bit little-endian ELF for x86-64.
fn is_executable_of_guests(path: &Path) -> bool {
    const MACHINE_X86_64: [u8; 2] = 62u16.to_le_bytes();
    let mut header = [0u8; 20];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.is_ok() && header.starts_with(b"\x7fELF\x02\x01") && header.ends_with(&MACHINE_X86_64)
}

#[cfg(test)]
#[path = "parent_test.rs"]
pub(super) mod tests;

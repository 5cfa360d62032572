//! sshd: its keys are written before it starts, and ready means that its banner was read.

use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{GuestError, system};
use crate::agent::proto::Identity;

/// Where the prebuilt sshd configuration looks for our keys (`%u` is the login).
const AUTHORIZED_KEYS: &str = "/etc/ssh/fleetingd_authorized_keys";
/// How long sshd may take from its start to its banner: the host's own deadline comes first.
const BANNER: Duration = Duration::from_secs(3600);

/// Host key and authorized key; whatever keys were there before are gone.
pub fn write_keys(identity: &Identity) -> Result<(), GuestError> {
    let name = &identity.ssh_host_key_name;
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    {
        return Err(GuestError::Unusable(format!("host key name {name:?}")));
    }
    remove_host_keys()?;
    system::write_file(&format!("/etc/ssh/{name}"), &identity.ssh_host_key, 0o600)?;
    match fs::remove_dir_all(AUTHORIZED_KEYS) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(GuestError::act(format!("clear {AUTHORIZED_KEYS}"))(e));
        }
        _ => {}
    }
    fs::DirBuilder::new()
        .mode(0o755)
        .create(AUTHORIZED_KEYS)
        .map_err(GuestError::act(format!("create {AUTHORIZED_KEYS}")))?;
    // The umask of whoever started us must not hide the folder from sshd.
    fs::set_permissions(AUTHORIZED_KEYS, fs::Permissions::from_mode(0o755))
        .map_err(GuestError::act(format!("open up {AUTHORIZED_KEYS}")))?;
    if let Some(key) = &identity.authorized_key {
        let path = format!("{AUTHORIZED_KEYS}/{}", identity.username);
        system::write_file(&path, &format!("{}\n", key.trim_end()), 0o644)?;
    }
    Ok(())
}

fn remove_host_keys() -> Result<(), GuestError> {
    let entries = fs::read_dir("/etc/ssh").map_err(GuestError::act("list /etc/ssh"))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(entry.path()).map_err(GuestError::act(format!(
                "remove {}",
                entry.path().display()
            )))?;
        }
    }
    Ok(())
}

/// Starts sshd, without waiting for it.
pub fn start() -> Result<(), GuestError> {
    fs::create_dir_all("/run/sshd").map_err(GuestError::act("create /run/sshd"))?;
    let mut command = if system::has_systemd() {
        let unit = ["ssh.service", "sshd.service"]
            .into_iter()
            .find(|unit| {
                [
                    "/etc/systemd/system",
                    "/lib/systemd/system",
                    "/usr/lib/systemd/system",
                ]
                .iter()
                .any(|dir| Path::new(dir).join(unit).exists())
            })
            .ok_or_else(|| {
                GuestError::Unusable(
                    "no ssh.service in the image; hint: install openssh-server".into(),
                )
            })?;
        let mut command = Command::new("systemctl");
        command.args(["--no-block", "start", unit]);
        command
    } else {
        Command::new("/usr/sbin/sshd")
    };
    let null = system::null()?;
    let status = command
        .stdin(null)
        .status()
        .map_err(GuestError::act("start sshd"))?;
    if status.success() {
        Ok(())
    } else {
        Err(GuestError::Unusable(format!("start sshd: {status}")))
    }
}

/// Reads sshd's banner on the machine's own address.
pub fn wait_for_banner(address: Ipv4Addr) -> Result<(), GuestError> {
    let target = SocketAddr::from((address, 22));
    let started = Instant::now();
    while started.elapsed() < BANNER {
        if banner(target).unwrap_or(false) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(GuestError::Timeout {
        act: format!("waiting for sshd on {target}"),
        seconds: BANNER.as_secs(),
    })
}

fn banner(target: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut start = [0; 4];
    stream.read_exact(&mut start)?;
    Ok(&start == b"SSH-")
}

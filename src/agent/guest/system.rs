//! Names, randomness, time and files of the machine.
#![expect(unsafe_code, reason = "two ioctls of /dev/random have no safe wrapper")]

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, Timespec};

use super::GuestError;
use crate::agent::proto::Identity;

/// `RNDADDENTROPY`, _IOW('R', 3, int[2]) of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG`, _IO('R', 7) of linux/random.h.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
/// Entropy we credit at once, in bytes; more only costs time.
const MAX_ENTROPY: usize = 256;
/// How long a wanted unit may take to become active: the host's own deadline comes first.
const UNIT_START: Duration = Duration::from_secs(3600);

/// Layout of `struct rand_pool_info` with a fixed buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; MAX_ENTROPY],
}

/// Mixes the host's randomness into the kernel's pool, credits it and reseeds at once.
pub fn reseed(entropy: &[u8]) -> Result<(), GuestError> {
    let random = OpenOptions::new()
        .write(true)
        .open("/dev/random")
        .map_err(GuestError::act("open /dev/random"))?;
    let mut info = RandPoolInfo {
        entropy_bits: 0,
        bytes: 0,
        buffer: [0; MAX_ENTROPY],
    };
    let mut len: libc::c_int = 0;
    for (slot, byte) in info.buffer.iter_mut().zip(entropy) {
        *slot = *byte;
        len += 1;
    }
    info.bytes = len;
    info.entropy_bits = len * 8;
    // SAFETY: the kernel reads `bytes` bytes behind the header, which lie within `info`; `random`
    // is open for the whole call.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), ioctl(RNDADDENTROPY), &raw const info) };
    if added != 0 {
        return Err(GuestError::act("add entropy")(
            std::io::Error::last_os_error(),
        ));
    }
    // SAFETY: takes no argument; `random` is open for the whole call.
    let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), ioctl(RNDRESEEDCRNG)) };
    if reseeded != 0 {
        return Err(GuestError::act("reseed")(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// musl takes ioctl numbers as `c_int`, glibc as `c_ulong`; the bits are the same.
#[expect(
    clippy::cast_possible_truncation,
    reason = "ioctl numbers have 32 bits"
)]
const fn ioctl(number: libc::c_ulong) -> libc::Ioctl {
    number as libc::Ioctl
}

/// Steps CLOCK_REALTIME; monotonic time goes on untouched.
pub fn set_clock(wall_clock_ns: i64) -> Result<(), GuestError> {
    let time = Timespec {
        tv_sec: wall_clock_ns.div_euclid(1_000_000_000),
        tv_nsec: wall_clock_ns.rem_euclid(1_000_000_000),
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(|e| GuestError::act("set the clock")(e.into()))
}

/// Host name, machine-id and the hosts file.
pub fn set_names(identity: &Identity) -> Result<(), GuestError> {
    rustix::system::sethostname(identity.hostname.as_bytes())
        .map_err(|e| GuestError::act("set the host name")(e.into()))?;
    write_file("/etc/hostname", &format!("{}\n", identity.hostname), 0o644)?;
    let old_id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let mut journals = ["/var/log/journal", "/run/log/journal"]
        .map(Path::new)
        .into_iter();
    if let Some(journals) = journals.find(|folder| folder.is_dir()) {
        keep_journal_readable(journals, old_id.trim(), &identity.machine_id);
    }
    write_file(
        "/etc/machine-id",
        &format!("{}\n", identity.machine_id),
        0o444,
    )?;
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    write_file("/etc/hosts", &hosts_with(&hosts, &identity.hostname), 0o644)
}

/// journald goes on writing under the machine-id that it started with, and journalctl looks under
/// the new one: a link makes them meet. Only a log is lost where that fails.
fn keep_journal_readable(journals: &Path, old_id: &str, new_id: &str) {
    let is_id = |id: &str| id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id(old_id) && is_id(new_id) && old_id != new_id {
        let _ = std::os::unix::fs::symlink(old_id, journals.join(new_id));
    }
}

/// The hosts file with exactly one 127.0.1.1 line, ours: sudo looks the host name up.
fn hosts_with(old: &str, hostname: &str) -> String {
    let mut text: String = old
        .lines()
        .filter(|line| line.split_whitespace().next() != Some("127.0.1.1"))
        .map(|line| format!("{line}\n"))
        .collect();
    if !text.contains("127.0.0.1") {
        text.insert_str(0, "127.0.0.1 localhost\n");
    }
    text.push_str(&format!("127.0.1.1 {hostname}\n"));
    text
}

/// A plain resolv.conf in place of whatever managed it: the NIC is ours, so is its DNS.
pub fn write_resolv_conf(dns: &[Ipv4Addr]) -> Result<(), GuestError> {
    if dns.is_empty() {
        return Ok(());
    }
    let text: String = dns.iter().map(|a| format!("nameserver {a}\n")).collect();
    write_file("/etc/resolv.conf", &text, 0o644)
}

/// Replaces `path` by a new file (a symbolic link is replaced, not followed).
pub fn write_file(path: &str, text: &str, mode: u32) -> Result<(), GuestError> {
    let temp = format!("{path}.fleetingd");
    let written = (|| {
        match fs::remove_file(&temp) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temp)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&temp, path)
    })();
    written.map_err(GuestError::act(format!("write {path}")))
}

/// Waits until each unit is active; a unit that failed is an error at once.
pub fn wait_for_units(units: &[String]) -> Result<(), GuestError> {
    for unit in units {
        let started = Instant::now();
        loop {
            let state = unit_state(unit)?;
            match state.as_str() {
                "active" => break,
                "failed" => return Err(GuestError::Unusable(format!("unit {unit} failed"))),
                _ if started.elapsed() > UNIT_START => {
                    return Err(GuestError::Timeout {
                        act: format!("unit {unit} is {state}; waiting for it"),
                        seconds: UNIT_START.as_secs(),
                    });
                }
                _ => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
    Ok(())
}

fn unit_state(unit: &str) -> Result<String, GuestError> {
    let output = Command::new("systemctl")
        .args(["is-active", "--", unit])
        .stdin(Stdio::null())
        .output()
        .map_err(GuestError::act("run systemctl"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Milliseconds since the kernel started; 0 where /proc is not mounted.
pub fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().unwrap_or_default();
    let (whole, hundredths) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let whole: u64 = whole.parse().unwrap_or(0);
    let hundredths: u64 = hundredths.parse().unwrap_or(0);
    whole * 1000 + hundredths * 10
}

/// Whether systemd runs this machine.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Opens /dev/null for a child that must not hold the console.
pub fn null() -> Result<File, GuestError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(GuestError::act("open /dev/null"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_file_keeps_other_lines_and_has_one_line_of_ours() {
        let old = "127.0.0.1 localhost\n127.0.1.1 old\n10.0.0.1 db\n";
        let new = hosts_with(old, "m1");
        assert_eq!(new, "127.0.0.1 localhost\n10.0.0.1 db\n127.0.1.1 m1\n");
        assert_eq!(hosts_with(&new, "m1"), new);
        assert_eq!(hosts_with("", "m1"), "127.0.0.1 localhost\n127.0.1.1 m1\n");
    }

    #[test]
    fn the_journal_is_found_under_the_new_machine_id() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = ("0".repeat(32), "1".repeat(32));
        keep_journal_readable(dir.path(), &old, &new);
        // journald may make its folder later.
        fs::create_dir(dir.path().join(&old)).unwrap();
        fs::write(dir.path().join(&old).join("system.journal"), "x").unwrap();
        assert!(dir.path().join(&new).join("system.journal").exists());
        keep_journal_readable(dir.path(), "../../etc", &"2".repeat(32));
        keep_journal_readable(dir.path(), &old, &old);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_symbolic_link_is_replaced_and_its_target_kept() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("stub");
        let link = dir.path().join("resolv.conf");
        fs::write(&target, "stub").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_file(link.to_str().unwrap(), "ours", 0o644).unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "stub");
        assert_eq!(fs::read_to_string(&link).unwrap(), "ours");
        assert!(!fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn entropy_is_credited_by_the_kernel() {
        reseed(&[0x5a; 64]).unwrap();
        reseed(&[1; MAX_ENTROPY * 4]).unwrap();
    }
}

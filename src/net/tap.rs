//! One TAP: created by its descriptor and gone with it.
#![expect(unsafe_code, reason = "TUNSETIFF and friends have no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::NetError;

/// Every TAP of ours starts so; followed by its number.
pub const PREFIX: &str = "fleetingd";
/// `_IOW('T', 202, int)` of linux/if_tun.h.
const TUNSETIFF: u32 = 0x4004_54ca;
/// `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
/// Size of `struct virtio_net_hdr_v1`, which the vnet header of a modern device has.
const VNET_HEADER_BYTES: libc::c_int = 12;
/// Frames that may wait in a TAP nobody reads: the kernel's default queue is 1000.
const MAX_DRAINED: usize = 4096;

/// The TAP's name for slot number `number`.
pub fn name(number: u32) -> String {
    format!("{PREFIX}{number}")
}

/// Whether an interface name is one of our TAPs.
pub fn is_ours(interface: &str) -> bool {
    interface
        .strip_prefix(PREFIX)
        .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Creates the TAP: not persistent, with a vnet header, non-blocking.
pub fn create(number: u32) -> Result<File, NetError> {
    open(&name(number))
}

/// Opens a TAP of that name, made by somebody else or now, in the form that a VM needs.
pub fn open(name: &str) -> Result<File, NetError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|source| NetError::OpenTun { source })?;
    let fail = |source| NetError::CreateTap {
        name: name.to_owned(),
        source,
    };
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = libc::c_char::from_ne_bytes([byte]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(flags).map_err(|e| fail(io::Error::other(e)))?;
    // SAFETY: the kernel reads and writes one ifreq, which lives across the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), ioctl(TUNSETIFF), &raw mut request) };
    if made != 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    let size = VNET_HEADER_BYTES;
    // SAFETY: the kernel reads one int, which lives across the call.
    let sized = unsafe { libc::ioctl(file.as_raw_fd(), ioctl(TUNSETVNETHDRSZ), &raw const size) };
    if sized != 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    Ok(file)
}

/// musl takes ioctl numbers as `c_int`, glibc as `c_ulong`; the bits are the same.
#[expect(clippy::cast_possible_wrap, reason = "ioctl numbers have 32 bits")]
const fn ioctl(number: u32) -> libc::Ioctl {
    number as libc::Ioctl
}

/// Throws away what waits in the TAP: frames for the machine before.
pub fn drain(mut tap: &File) {
    let mut frame = [0; 2048];
    for _frame in 0..MAX_DRAINED {
        match tap.read(&mut frame) {
            Ok(n) if n > 0 => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

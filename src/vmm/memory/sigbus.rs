//! A SIGBUS in a registered range (a backing file that shrank, a broken page) costs that VM only:
//! the handler puts an anonymous page there and raises the VM's flag.
//!
//! The handler runs on whichever thread touched the page, so the table it searches has no lock.

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use vmm_sys_util::eventfd::EventFd;

/// Ranges that the handler can know at once: 64 VMs of a subnet and as many spares, in up to two
/// pieces each.
pub const MAX_RANGES: usize = 1024;

/// Raised by the signal handler when a page of the VM's memory was lost.
#[derive(Debug)]
pub struct HostFaultFlag {
    raised: AtomicBool,
    event: EventFd,
}

impl HostFaultFlag {
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            raised: AtomicBool::new(false),
            event,
        })
    }

    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// Readable once the flag is raised.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A range that the handler knows; it forgets it when this goes.
#[derive(Debug)]
pub struct Registration {
    index: usize,
    /// The handler reads the flag by its address.
    _fault: Arc<HostFaultFlag>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(entry) = RANGES.get(self.index) {
            entry.start.store(FREE, Ordering::Release);
        }
    }
}

/// One range for the signal handler: read there without locks.
struct Entry {
    /// Free, being written, or in use: 0, 1, or the range's start.
    start: AtomicUsize,
    end: AtomicUsize,
    flag: AtomicUsize,
    event: AtomicI32,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;

impl Entry {
    const fn new() -> Self {
        Self {
            start: AtomicUsize::new(FREE),
            end: AtomicUsize::new(0),
            flag: AtomicUsize::new(0),
            event: AtomicI32::new(-1),
        }
    }
}

static RANGES: [Entry; MAX_RANGES] = [const { Entry::new() }; MAX_RANGES];

/// Makes the handler know a mapped range; `None` if its table is full.
pub fn register(start: usize, bytes: usize, fault: &Arc<HostFaultFlag>) -> Option<Registration> {
    for (index, entry) in RANGES.iter().enumerate() {
        let claimed =
            entry
                .start
                .compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed);
        if claimed.is_ok() {
            entry.end.store(start + bytes, Ordering::Relaxed);
            let flag = ptr::from_ref(&fault.raised);
            entry
                .flag
                .store(flag.expose_provenance(), Ordering::Relaxed);
            entry
                .event
                .store(fault.event.as_raw_fd(), Ordering::Relaxed);
            entry.start.store(start, Ordering::Release);
            return Some(Registration {
                index,
                _fault: Arc::clone(fault),
            });
        }
    }
    None
}

/// Installs the handler once; other addresses get what they got before.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value of this plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            on_sigbus;
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler is async-signal-safe: atomics, mmap, write and sigaction only.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    });
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() };
    let at = address.addr();
    for entry in &RANGES {
        let start = entry.start.load(Ordering::Acquire);
        if start <= CLAIMED || at < start || at >= entry.end.load(Ordering::Relaxed) {
            continue;
        }
        let page = address.with_addr(at & !0xfff);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: one page inside a registered guest range; what was there is lost anyway.
        let mapped =
            unsafe { libc::mmap(page, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            break;
        }
        let flag: *const AtomicBool =
            ptr::with_exposed_provenance(entry.flag.load(Ordering::Relaxed));
        // SAFETY: the flag lives as long as its VmMemory, whose registration clears the entry before it goes;
        // the faulting access itself keeps the VM's memory in use.
        unsafe { (*flag).store(true, Ordering::Release) };
        let one = 1_u64;
        // SAFETY: eight bytes of a local to an eventfd; write is async-signal-safe.
        unsafe {
            libc::write(
                entry.event.load(Ordering::Relaxed),
                (&raw const one).cast(),
                8,
            )
        };
        return;
    }
    // SAFETY: restoring the default action makes the access fault again and end the process, as
    // it would have without us.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

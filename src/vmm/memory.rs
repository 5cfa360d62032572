//! A VM's memory: mapped, described to KVM, handed to devices, and given back without hurting
//! the neighbours.
//!
//! The address range is reserved first and filled with fixed mappings afterwards, so that a range
//! can be made of several pieces (a snapshot's extents, anonymous memory between them). It is
//! neither inherited by children nor dumped. A SIGBUS in a registered range (a backing file that
//! shrank, a broken page) costs that VM only: the handler puts an anonymous page there and raises
//! the VM's flag.
#![expect(
    unsafe_code,
    reason = "mappings and a signal handler have no safe form"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use crate::devices::GuestMemory;

/// Mappings are aligned so that the kernel can use huge pages.
const ALIGNMENT: usize = 2 << 20;
/// Memory is given back in slices: one munmap of gigabytes holds the process's map lock so long
/// that faults of the neighbours wait for it.
const TEARDOWN_SLICE: usize = 64 << 20;
/// Ranges that the SIGBUS handler can know at once: 64 VMs of a subnet and as many spares, in up
/// to two pieces each.
const MAX_RANGES: usize = 1024;

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error(
        "cannot map {mib} MiB of guest memory; hint: less memory for the machine, or more for the host"
    )]
    Map {
        mib: u64,
        #[source]
        source: io::Error,
    },
    #[error("cannot describe guest memory")]
    Describe(#[source] MmapRegionError),
    #[error("guest memory of {mib} MiB is impossible; hint: at least 64 MiB")]
    Size { mib: u64 },
    #[error("too many virtual machines: the table of {MAX_RANGES} memory ranges is full")]
    TableFull,
    #[error("cannot make an event descriptor")]
    EventFd(#[source] io::Error),
}

/// Raised by the signal handler when a page of the VM's memory was lost.
#[derive(Debug)]
pub struct HostFaultFlag {
    raised: AtomicBool,
    event: EventFd,
}

impl HostFaultFlag {
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }

    /// Readable once the flag is raised.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// One VM's RAM, owned.
#[derive(Debug)]
pub struct VmMemory {
    guest: GuestMemory,
    pieces: Vec<Piece>,
    fault: Arc<HostFaultFlag>,
}

/// A guest range as KVM wants it.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub guest: u64,
    pub host: u64,
    pub bytes: u64,
}

#[derive(Debug)]
struct Piece {
    reservation: *mut libc::c_void,
    reserved: usize,
    start: usize,
    bytes: usize,
    guest: u64,
    entry: usize,
}

// SAFETY: a piece is an address range that only its owner unmaps; the pointer is never
// dereferenced here, and access goes through vm-memory's volatile accessors.
unsafe impl Send for Piece {}
// SAFETY: as above; sharing the numbers is harmless.
unsafe impl Sync for Piece {}

/// What fills a guest range.
enum Backing<'a> {
    Anonymous,
    /// The file's bytes, copied on write.
    PrivateFile(&'a File),
}

impl VmMemory {
    /// Zeroed memory that costs nothing until it is touched.
    pub fn anonymous(mib: u32) -> Result<Self, MemoryError> {
        Self::build(u64::from(mib), &Backing::Anonymous)
    }

    /// A private view of `file`, whose length should be the memory's: what is written stays here.
    pub fn private_file(mib: u32, file: &File) -> Result<Self, MemoryError> {
        Self::build(u64::from(mib), &Backing::PrivateFile(file))
    }

    fn build(mib: u64, backing: &Backing<'_>) -> Result<Self, MemoryError> {
        if mib < 64 {
            return Err(MemoryError::Size { mib });
        }
        install_sigbus_handler();
        let event =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(MemoryError::EventFd)?;
        let fault = Arc::new(HostFaultFlag {
            raised: AtomicBool::new(false),
            event,
        });
        let mut memory = Self {
            guest: GuestMemory::new(),
            pieces: Vec::new(),
            fault,
        };
        let mut regions = Vec::new();
        let mut file_offset = 0;
        for (guest, bytes) in layout::ram_ranges(mib << 20) {
            let piece = memory.map(mib, guest, bytes, backing, file_offset)?;
            regions.push(piece);
            file_offset += bytes;
        }
        memory.guest =
            GuestMemory::from_regions(regions).map_err(|_overlap| MemoryError::Size { mib })?;
        Ok(memory)
    }

    fn map(
        &mut self,
        mib: u64,
        guest: u64,
        bytes: u64,
        backing: &Backing<'_>,
        file_offset: u64,
    ) -> Result<GuestRegionMmap<()>, MemoryError> {
        let fail = |source| MemoryError::Map { mib, source };
        let size = usize::try_from(bytes).map_err(|_narrow| MemoryError::Size { mib })?;
        let reserved = size + ALIGNMENT;
        let reserve_flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh range at an address of the kernel's choice touches no existing mapping.
        let reservation = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_NONE,
                reserve_flags,
                -1,
                0,
            )
        };
        if reservation == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        let start = (reservation.addr()).next_multiple_of(ALIGNMENT);
        // From here the piece's drop undoes everything.
        let mut piece = Piece {
            reservation,
            reserved,
            start,
            bytes: size,
            guest,
            entry: MAX_RANGES,
        };
        let (flags, fd, offset) = match backing {
            Backing::Anonymous => (libc::MAP_ANONYMOUS, -1, 0),
            Backing::PrivateFile(file) => (0, file.as_raw_fd(), file_offset),
        };
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let offset = libc::off_t::try_from(offset).map_err(|e| fail(io::Error::other(e)))?;
        let address = reservation.with_addr(start);
        // SAFETY: MAP_FIXED within the reservation made above, which nobody else uses.
        let mapped = unsafe {
            libc::mmap(
                address,
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: advice about our own mapping; it changes no byte of it.
            if unsafe { libc::madvise(mapped, size, advice) } != 0 {
                return Err(fail(io::Error::last_os_error()));
            }
        }
        piece.entry = register(start, size, &self.fault)?;
        self.pieces.push(piece);
        // SAFETY: the mapping is `size` bytes, readable and writable, and outlives the region:
        // `pieces` unmaps only when this VmMemory is dropped, and clones of `guest` are handed
        // out under that contract (see `guest`).
        let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(mapped.cast()) };
        let region = builder
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(MemoryError::Describe)?;
        GuestRegionMmap::new(region, GuestAddress(guest)).ok_or(MemoryError::Size { mib })
    }

    /// The memory as devices see it. Clones must be gone before this value is: whoever owns it
    /// joins the VM's threads first.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// Guest ranges with their host addresses, for KVM's memory slots.
    pub fn ranges(&self) -> Vec<Range> {
        self.pieces
            .iter()
            .map(|piece| Range {
                guest: piece.guest,
                host: piece.start as u64,
                bytes: piece.bytes as u64,
            })
            .collect()
    }

    /// Raised when a page of this memory was lost.
    pub fn host_fault(&self) -> Arc<HostFaultFlag> {
        Arc::clone(&self.fault)
    }

    /// Bytes of it that are resident and private to this VM.
    pub fn resident_bytes(&self) -> u64 {
        self.pieces.iter().map(Piece::resident).sum()
    }
}

impl Piece {
    fn resident(&self) -> u64 {
        let page = 4096;
        let mut present = vec![0_u8; self.bytes.div_ceil(page)];
        let address = self.reservation.with_addr(self.start);
        // SAFETY: the range is ours and mapped, and the vector has a byte for each page of it.
        let asked = unsafe { libc::mincore(address, self.bytes, present.as_mut_ptr()) };
        if asked != 0 {
            return 0;
        }
        let pages = present.iter().filter(|byte| **byte & 1 != 0).count();
        (pages * page) as u64
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(entry) = RANGES.get(self.entry) {
            entry.clear();
        }
        let mut done = 0;
        while done < self.bytes {
            let slice = TEARDOWN_SLICE.min(self.bytes - done);
            let address = self.reservation.with_addr(self.start + done);
            // SAFETY: within our own mapping, which nobody uses any more.
            unsafe { libc::madvise(address, slice, libc::MADV_DONTNEED) };
            done += slice;
        }
        // SAFETY: exactly the range that `map` reserved; devices and vCPUs that knew it are gone.
        unsafe { libc::munmap(self.reservation, self.reserved) };
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

    fn clear(&self) {
        self.start.store(FREE, Ordering::Release);
    }
}

static RANGES: [Entry; MAX_RANGES] = [const { Entry::new() }; MAX_RANGES];

fn register(start: usize, bytes: usize, fault: &Arc<HostFaultFlag>) -> Result<usize, MemoryError> {
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
            return Ok(index);
        }
    }
    Err(MemoryError::TableFull)
}

/// Installs the handler once; other addresses get what they got before.
fn install_sigbus_handler() {
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
        // SAFETY: the flag lives as long as its VmMemory, which clears the entry before it goes;
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

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn memory_lies_below_and_above_the_hole() {
        for (mib, regions) in [(64, 1), (1024, 1), (3072, 1), (3584, 2), (8192, 2)] {
            let memory = VmMemory::anonymous(mib).unwrap();
            assert_eq!(memory.guest().num_regions(), regions, "{mib}");
            let bytes: u64 = memory.guest().iter().map(GuestMemoryRegion::len).sum();
            assert_eq!(bytes, u64::from(mib) << 20);
            let last = memory.guest().last_addr();
            memory.guest().write_obj(7_u8, last).unwrap();
            assert!(memory.resident_bytes() <= 2 << 20);
        }
        assert!(matches!(
            VmMemory::anonymous(63),
            Err(MemoryError::Size { .. })
        ));
    }

    #[test]
    fn a_backing_file_that_shrinks_costs_that_memory_only() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        let broken = VmMemory::private_file(64, &file).unwrap();
        let neighbour = VmMemory::anonymous(64).unwrap();
        broken.guest().write_obj(1_u8, GuestAddress(0)).unwrap();
        file.set_len(4096).unwrap();
        let read: u8 = broken.guest().read_obj(GuestAddress(1 << 20)).unwrap();
        assert_eq!(read, 0);
        assert!(broken.host_fault().is_raised());
        assert_eq!(broken.host_fault().event().read().unwrap(), 1);
        assert!(!neighbour.host_fault().is_raised());
    }

    #[test]
    fn ranges_are_given_back() {
        for _cycle in 0..2 * MAX_RANGES {
            VmMemory::anonymous(64).unwrap();
        }
    }
}

//! A VM's memory: mapped, described to KVM, handed to devices, and given back without hurting
//! the neighbours.
//!
//! The address range is reserved first and filled with fixed mappings afterwards, so that a range
//! can be made of several pieces: a clone's are its snapshot's extents, copied on write, and
//! anonymous memory between them. It is neither inherited by children nor dumped, and a page that
//! gets lost costs that VM only ([`sigbus`]).
//!
//! ```text
//!  anonymous    |..............................|  a machine that is booted
//!  golden       |==============================|  one memfd, shared: becomes a snapshot's memory
//!  clone        |==|......|====|...............|  extents of a snapshot, the rest anonymous
//! ```
#![expect(
    unsafe_code,
    reason = "mappings and a signal handler have no safe form"
)]

mod extents;
mod sigbus;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestRegionMmap};

use extents::populated;
pub use extents::{Extent, data_ranges, of_file};
pub use sigbus::HostFaultFlag;
use sigbus::{MAX_RANGES, Registration};

use super::layout;
use crate::devices::GuestMemory;

/// Mappings are aligned so that the kernel can use huge pages.
const ALIGNMENT: usize = 2 << 20;
/// Memory is given back in slices: one munmap of gigabytes holds the process's map lock so long
/// that faults of the neighbours wait for it.
const TEARDOWN_SLICE: usize = 64 << 20;

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
    #[error("cannot make a memory file of {mib} MiB")]
    Memfd {
        mib: u64,
        #[source]
        source: io::Error,
    },
}

/// One VM's RAM, owned.
#[derive(Debug)]
pub struct VmMemory {
    guest: GuestMemory,
    pieces: Vec<Piece>,
    fault: Arc<HostFaultFlag>,
    origin: Origin,
}

/// Where the bytes are that nobody has written yet, and where written ones go.
#[derive(Debug)]
enum Origin {
    Anonymous,
    Golden(Arc<File>),
    Snapshot,
}

/// A guest range as KVM wants it.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub guest: u64,
    pub host: u64,
    pub bytes: u64,
    /// Where the range begins in a memory file, which has the ranges one after the other.
    pub file: u64,
}

#[derive(Debug)]
struct Piece {
    /// Goes first: a range that is being unmapped is nobody's.
    registration: Option<Registration>,
    reservation: *mut libc::c_void,
    reserved: usize,
    start: usize,
    bytes: usize,
    guest: u64,
    file: u64,
}

// SAFETY: a piece is an address range that only its owner unmaps; the pointer is never
// dereferenced here, and access goes through vm-memory's volatile accessors.
unsafe impl Send for Piece {}
// SAFETY: as above; sharing the numbers is harmless.
unsafe impl Sync for Piece {}

/// What fills a guest range.
enum Backing<'a> {
    Anonymous,
    /// The file itself.
    Shared(&'a File),
    /// The file's extents, copied on write; anonymous memory between them.
    Private(&'a File, &'a [Extent]),
}

impl VmMemory {
    /// Zeroed memory that costs nothing until it is touched.
    pub fn anonymous(mib: u32) -> Result<Self, MemoryError> {
        Self::build(u64::from(mib), &Backing::Anonymous, Origin::Anonymous)
    }

    /// The same in a memory file, which can become the memory of a snapshot.
    pub fn golden(mib: u32) -> Result<Self, MemoryError> {
        let mib = u64::from(mib);
        let fail = |source: io::Error| MemoryError::Memfd { mib, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("fleetingd-golden", flags).map_err(|e| fail(e.into()))?;
        let file = File::from(file);
        file.set_len(mib << 20).map_err(fail)?;
        let file = Arc::new(file);
        Self::build(
            mib,
            &Backing::Shared(&file),
            Origin::Golden(Arc::clone(&file)),
        )
    }

    /// A private view of the `extents` of `file`, which begin and end on pages: what is written
    /// stays here. The file must stay as it is while this lives.
    pub fn clone_of(mib: u32, file: &File, extents: &[Extent]) -> Result<Self, MemoryError> {
        let backing = Backing::Private(file, extents);
        Self::build(u64::from(mib), &backing, Origin::Snapshot)
    }

    fn build(mib: u64, backing: &Backing<'_>, origin: Origin) -> Result<Self, MemoryError> {
        if mib < 64 {
            return Err(MemoryError::Size { mib });
        }
        sigbus::install();
        let fault = Arc::new(HostFaultFlag::new().map_err(MemoryError::EventFd)?);
        let mut memory = Self {
            guest: GuestMemory::new(),
            pieces: Vec::new(),
            fault,
            origin,
        };
        let mut regions = Vec::new();
        let mut file = 0;
        for (guest, bytes) in layout::ram_ranges(mib << 20) {
            let mut piece = Piece::reserve(guest, bytes, file)
                .map_err(|source| MemoryError::Map { mib, source })?;
            piece
                .fill(backing)
                .map_err(|source| MemoryError::Map { mib, source })?;
            let registered = sigbus::register(piece.start, piece.bytes, &memory.fault);
            piece.registration = Some(registered.ok_or(MemoryError::TableFull)?);
            regions.push(piece.region(mib, backing)?);
            memory.pieces.push(piece);
            file += bytes;
        }
        memory.guest =
            GuestMemory::from_regions(regions).map_err(|_overlap| MemoryError::Size { mib })?;
        Ok(memory)
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
                file: piece.file,
            })
            .collect()
    }

    /// The file that a golden machine's memory is.
    pub fn golden_file(&self) -> Option<&Arc<File>> {
        match &self.origin {
            Origin::Golden(file) => Some(file),
            Origin::Anonymous | Origin::Snapshot => None,
        }
    }

    /// The parts of a range, as offsets from its start, that may hold something else than zero.
    pub fn touched(&self, range: &Range) -> io::Result<Vec<Extent>> {
        match &self.origin {
            Origin::Anonymous => populated(range.host, range.bytes),
            Origin::Golden(file) => data_ranges(file, range.file, range.bytes),
            Origin::Snapshot => Ok(vec![Extent {
                start: 0,
                bytes: range.bytes,
            }]),
        }
    }

    /// Raised when a page of this memory was lost.
    pub fn host_fault(&self) -> Arc<HostFaultFlag> {
        Arc::clone(&self.fault)
    }

    /// Bytes of it that are resident.
    pub fn resident_bytes(&self) -> u64 {
        self.pieces.iter().map(Piece::resident).sum()
    }
}

impl Piece {
    /// Addresses that nobody else gets; the drop gives them back with all that is mapped there.
    fn reserve(guest: u64, bytes: u64, file: u64) -> io::Result<Self> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let reserved = bytes + ALIGNMENT;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh range at an address of the kernel's choice touches no existing mapping.
        let reservation =
            unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
        if reservation == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            registration: None,
            reservation,
            reserved,
            start: reservation.addr().next_multiple_of(ALIGNMENT),
            bytes,
            guest,
            file,
        })
    }

    fn fill(&mut self, backing: &Backing<'_>) -> io::Result<()> {
        let whole = Extent {
            start: self.file,
            bytes: self.bytes as u64,
        };
        match backing {
            Backing::Anonymous => self.map(whole, libc::MAP_PRIVATE, None)?,
            Backing::Shared(file) => self.map(whole, libc::MAP_SHARED, Some(file))?,
            Backing::Private(file, extents) => {
                self.map(whole, libc::MAP_PRIVATE, None)?;
                for extent in extents.iter().filter_map(|extent| extent.within(&whole)) {
                    self.map(extent, libc::MAP_PRIVATE, Some(file))?;
                }
            }
        }
        let address = self.reservation.with_addr(self.start);
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
            // SAFETY: advice about our own mapping; it changes no byte of it.
            if unsafe { libc::madvise(address, self.bytes, advice) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Maps what `part` is of the memory file, which lies within this piece; without a file it is
    /// anonymous.
    fn map(&mut self, part: Extent, sharing: i32, file: Option<&File>) -> io::Result<()> {
        let narrow = |number: u64| usize::try_from(number).map_err(io::Error::other);
        let within = narrow(part.start.saturating_sub(self.file))?;
        let bytes = narrow(part.bytes)?;
        if within.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = self.reservation.with_addr(self.start + within);
        let flags = sharing | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let (flags, fd, offset) = match file {
            None => (flags | libc::MAP_ANONYMOUS, -1, 0),
            Some(file) => {
                let offset = libc::off_t::try_from(part.start).map_err(io::Error::other)?;
                (flags, file.as_raw_fd(), offset)
            }
        };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: MAP_FIXED within the reservation made above, which nobody else uses.
        let mapped = unsafe { libc::mmap(address, bytes, access, flags, fd, offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn region(&self, mib: u64, backing: &Backing<'_>) -> Result<GuestRegionMmap<()>, MemoryError> {
        let sharing = match backing {
            Backing::Shared(_) => libc::MAP_SHARED,
            Backing::Anonymous | Backing::Private(..) => libc::MAP_PRIVATE,
        };
        let address = self.reservation.with_addr(self.start);
        // SAFETY: the mapping is `bytes` long, readable and writable, and outlives the region:
        // `pieces` unmaps only when their VmMemory is dropped, and clones of `guest` are handed
        // out under that contract (see `guest`).
        let builder =
            unsafe { MmapRegionBuilder::new(self.bytes).with_raw_mmap_pointer(address.cast()) };
        let region = builder
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE)
            .build()
            .map_err(MemoryError::Describe)?;
        GuestRegionMmap::new(region, GuestAddress(self.guest)).ok_or(MemoryError::Size { mib })
    }

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
        self.registration = None;
        let mut done = 0;
        while done < self.bytes {
            let slice = TEARDOWN_SLICE.min(self.bytes - done);
            let address = self.reservation.with_addr(self.start + done);
            // SAFETY: within our own mapping, which nobody uses any more.
            unsafe { libc::madvise(address, slice, libc::MADV_DONTNEED) };
            done += slice;
        }
        // SAFETY: exactly the range that `reserve` made; devices and vCPUs that knew it are gone.
        unsafe { libc::munmap(self.reservation, self.reserved) };
    }
}

#[cfg(test)]
#[path = "memory_test.rs"]
mod tests;

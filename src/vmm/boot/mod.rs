//! A kernel in memory, ready to run by its 64-bit entry (Linux x86 boot protocol).
//!
//! ELF vmlinux and bzImage are told apart by their magic. A bzImage's payload is unpacked on the
//! host where we know its compression, which saves the guest the work (KASLR is lost with it);
//! else the bzImage unpacks itself. The kernel file is the operator's or comes out of an image,
//! so nothing in it is trusted: sizes are bounded, addresses checked against RAM.
#![expect(unsafe_code, reason = "the zero page is written as its plain C struct")]

mod payload;

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::{KernelLoader, bzimage::BzImage, elf::Elf};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::layout;
use super::spec::KernelSource;
use crate::devices::GuestMemory;

pub use payload::{PayloadError, decompress_kernel};

/// `HdrS`, at 0x202 of every bzImage.
const SETUP_MAGIC: u32 = 0x5372_6448;
/// Where the setup header lies in a bzImage, and a bound on where it ends.
const HEADER_START: usize = 0x1f1;
const HEADER_END: usize = 0x290;
/// Protocol 2.12 introduced xloadflags.
const MIN_PROTOCOL: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry in a loaded bzImage.
const ENTRY_64: u64 = 0x200;
/// "Undefined" boot loader.
const LOADER_TYPE: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// An initrd must end below this where the kernel does not say (protocol 2.03).
const INITRD_MAX: u64 = 0x7fff_ffff;
/// Larger kernels are not kernels.
const MAX_KERNEL_BYTES: u64 = 512 << 20;

/// What to load.
#[derive(Debug)]
pub struct LoadSpec<'a> {
    pub kernel: &'a KernelSource,
    pub initrd: Option<&'a Path>,
    pub cmdline: &'a str,
    pub rsdp: GuestAddress,
}

/// Where a vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub rip: u64,
    /// Guest address of the zero page, for RSI.
    pub zero_page: u64,
}

/// No kernel could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("cannot read the kernel {}", path.display())]
    OpenKernel {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not a Linux kernel for x86_64; hint: an ELF vmlinux or a bzImage (vmlinuz) with a 64-bit entry", path.display()
    )]
    NotAKernel { path: PathBuf },
    #[error("the kernel {} does not fit into the machine's memory; hint: more --memory", path.display())]
    DoesNotFit { path: PathBuf },
    #[error("cannot read the initrd {}", path.display())]
    OpenInitrd {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the initrd {} ({bytes} bytes) does not fit above the kernel; hint: more --memory", path.display())]
    InitrdDoesNotFit { path: PathBuf, bytes: u64 },
    #[error("the kernel command line has {bytes} bytes, this kernel takes {limit}")]
    CmdlineTooLong { bytes: usize, limit: usize },
    #[error("boot structures do not fit into the machine's memory")]
    Memory,
}

/// Puts kernel, initrd, command line and zero page into memory.
pub fn load(memory: &GuestMemory, spec: &LoadSpec<'_>) -> Result<Entry, LoadError> {
    let KernelSource::Path(path) = spec.kernel;
    let kernel = load_kernel(memory, path)?;
    let mut params = boot_params {
        hdr: kernel.header,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_TYPE;
    write_cmdline(memory, spec.cmdline, &mut params)?;
    if let Some(initrd) = spec.initrd {
        load_initrd(memory, initrd, kernel.end, &mut params)?;
    }
    params.acpi_rsdp_addr = spec.rsdp.0;
    write_e820(memory, &mut params);
    memory
        .write_obj(ZeroPage(params), GuestAddress(layout::ZERO_PAGE))
        .map_err(|_outside| LoadError::Memory)?;
    Ok(Entry {
        rip: kernel.entry,
        zero_page: layout::ZERO_PAGE,
    })
}

struct Kernel {
    entry: u64,
    /// First address after everything the kernel will use before it reads its memory map.
    end: u64,
    header: setup_header,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ZeroPage(boot_params);
// SAFETY: boot_params is a packed C struct of integers and arrays without padding.
unsafe impl ByteValued for ZeroPage {}

fn load_kernel(memory: &GuestMemory, path: &Path) -> Result<Kernel, LoadError> {
    let not_a_kernel = || LoadError::NotAKernel {
        path: path.to_owned(),
    };
    let mut file = open_regular(path).map_err(|source| LoadError::OpenKernel {
        path: path.to_owned(),
        source,
    })?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic)
        .map_err(|_short| not_a_kernel())?;
    if &magic == b"\x7fELF" {
        return load_elf(memory, &mut file, path, None);
    }
    let header = read_header(&mut file).ok_or_else(not_a_kernel)?;
    if header.version < MIN_PROTOCOL || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(not_a_kernel());
    }
    match payload::unpack(&mut file, &header) {
        Ok(vmlinux) => load_elf(memory, &mut Cursor::new(&vmlinux), path, Some(header)),
        Err(PayloadError::Unknown) => load_bzimage(memory, &mut file, path, header),
        Err(_damaged) => Err(not_a_kernel()),
    }
}

fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if meta.len() > MAX_KERNEL_BYTES {
        return Err(io::Error::other("larger than 512 MiB"));
    }
    Ok(file)
}

fn read_header(file: &mut File) -> Option<setup_header> {
    let mut start = [0_u8; HEADER_END];
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_exact(&mut start).ok()?;
    read_header_of(&start)
}

fn read_header_of(image: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let end = HEADER_START.checked_add(bytes.len())?;
    bytes.copy_from_slice(image.get(HEADER_START..end)?);
    (header.header == SETUP_MAGIC).then_some(header)
}

fn load_elf<F: Read + ReadVolatile + Seek>(
    memory: &GuestMemory,
    image: &mut F,
    path: &Path,
    header: Option<setup_header>,
) -> Result<Kernel, LoadError> {
    let start = Some(GuestAddress(layout::HIGH_MEMORY_START));
    let loaded = Elf::load(memory, None, image, start).map_err(|e| classify(&e, path))?;
    // A kernel may use memory behind its image until it has read the memory map: what its header
    // asks for, and 32 MiB where there is no header.
    let init_end = header.map_or(loaded.kernel_end + (32 << 20), |h| {
        h.pref_address + u64::from(h.init_size)
    });
    let fallback = setup_header {
        header: SETUP_MAGIC,
        boot_flag: 0xaa55,
        version: 0x20f,
        kernel_alignment: 0x100_0000,
        cmdline_size: 2047,
        initrd_addr_max: 0x7fff_ffff,
        ..setup_header::default()
    };
    Ok(Kernel {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end.max(init_end),
        header: header.unwrap_or(fallback),
    })
}

fn load_bzimage(
    memory: &GuestMemory,
    file: &mut File,
    path: &Path,
    header: setup_header,
) -> Result<Kernel, LoadError> {
    let at = GuestAddress(header.pref_address);
    let start = Some(GuestAddress(layout::HIGH_MEMORY_START));
    let loaded = BzImage::load(memory, Some(at), file, start).map_err(|e| classify(&e, path))?;
    Ok(Kernel {
        entry: loaded.kernel_load.0 + ENTRY_64,
        end: loaded
            .kernel_end
            .max(header.pref_address + u64::from(header.init_size)),
        header,
    })
}

fn classify(error: &linux_loader::loader::Error, path: &Path) -> LoadError {
    use linux_loader::loader::{Error, bzimage, elf};
    let path = path.to_owned();
    match error {
        Error::MemoryOverflow
        | Error::Elf(elf::Error::ReadKernelImage)
        | Error::Bzimage(bzimage::Error::ReadBzImageCompressedKernel) => {
            LoadError::DoesNotFit { path }
        }
        _ => LoadError::NotAKernel { path },
    }
}

fn write_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    params: &mut boot_params,
) -> Result<(), LoadError> {
    let declared = usize::try_from(params.hdr.cmdline_size).unwrap_or(0);
    let limit = declared.min(layout::CMDLINE_MAX - 1);
    if cmdline.len() > limit || cmdline.contains('\0') {
        return Err(LoadError::CmdlineTooLong {
            bytes: cmdline.len(),
            limit,
        });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|_outside| LoadError::Memory)?;
    params.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE).unwrap_or(0);
    Ok(())
}

fn load_initrd(
    memory: &GuestMemory,
    path: &Path,
    kernel_end: u64,
    params: &mut boot_params,
) -> Result<(), LoadError> {
    let open = |source| LoadError::OpenInitrd {
        path: path.to_owned(),
        source,
    };
    let mut file = open_regular(path).map_err(open)?;
    let bytes = file.metadata().map_err(open)?.len();
    let does_not_fit = || LoadError::InitrdDoesNotFit {
        path: path.to_owned(),
        bytes,
    };
    let declared = match params.hdr.initrd_addr_max {
        0 => INITRD_MAX,
        max => u64::from(max),
    };
    let ceiling = low_ram_end(memory).min(declared + 1);
    // As high as it may lie, on a page of its own.
    let start = ceiling
        .checked_sub(bytes)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel_end.next_multiple_of(4096))
        .ok_or_else(does_not_fit)?;
    let size = usize::try_from(bytes).map_err(|_huge| does_not_fit())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size)
        .map_err(|e| open(io::Error::other(e.to_string())))?;
    params.hdr.ramdisk_image = u32::try_from(start).map_err(|_high| does_not_fit())?;
    params.hdr.ramdisk_size = u32::try_from(bytes).map_err(|_huge| does_not_fit())?;
    Ok(())
}

fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .last_addr()
        .0
        .saturating_add(1)
        .min(layout::LOW_RAM_END)
}

fn write_e820(memory: &GuestMemory, params: &mut boot_params) {
    let low_end = low_ram_end(memory);
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, E820_RAM),
        (
            layout::LOW_MEMORY_END,
            layout::HIGH_MEMORY_START - layout::LOW_MEMORY_END,
            E820_RESERVED,
        ),
        (
            layout::HIGH_MEMORY_START,
            low_end - layout::HIGH_MEMORY_START,
            E820_RAM,
        ),
        (layout::ECAM, layout::ECAM_SIZE, E820_RESERVED),
    ];
    let top = memory.last_addr().0.saturating_add(1);
    if top > layout::HIGH_RAM_START {
        map.push((
            layout::HIGH_RAM_START,
            top - layout::HIGH_RAM_START,
            E820_RAM,
        ));
    }
    let mut count = 0;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        slot.addr = addr;
        slot.size = size;
        slot.r#type = kind;
        count += 1;
    }
    params.e820_entries = count;
}

#[cfg(test)]
#[path = "boot_test.rs"]
mod tests;

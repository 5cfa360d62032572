//! Kernels made by hand: honest, damaged and hostile.

use std::io::Write;

use super::*;
use crate::vmm::memory::VmMemory;
use crate::vmm::testing::{CODE_AT as KERNEL_AT, elf};

fn size(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap()
}

/// A bzImage around `payload`, with one setup sector.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0_u8; 1024 + 0x200];
    let header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: SETUP_MAGIC,
        version: 0x20f,
        loadflags: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: KERNEL_AT,
        init_size: 0x10_0000,
        payload_offset: 0x200,
        payload_length: size(payload),
        code32_start: 0x10_0000,
        ..setup_header::default()
    };
    let bytes = header.as_slice();
    image[HEADER_START..HEADER_START + bytes.len()].copy_from_slice(bytes);
    image.extend_from_slice(payload);
    image
}

fn load_bytes(
    image: &[u8],
    initrd: Option<&Path>,
    cmdline: &str,
) -> (VmMemory, Result<Entry, LoadError>) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(image).unwrap();
    let memory = VmMemory::anonymous(64).unwrap();
    let spec = LoadSpec {
        kernel: &KernelSource::Path(file.path().to_owned()),
        initrd,
        cmdline,
        rsdp: GuestAddress(layout::ACPI_START),
    };
    let entry = load(memory.guest(), &spec);
    (memory, entry)
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut out = LZ4_MAGIC.to_vec();
    let block = lz4_flex::block::compress(data);
    out.extend(size(&block).to_le_bytes());
    out.extend(block);
    out.extend(size(data).to_le_bytes());
    out
}

const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    lzma_rs::xz_compress(&mut std::io::Cursor::new(data), &mut out).unwrap();
    out.extend(size(data).to_le_bytes());
    out
}

fn zstd(data: &[u8]) -> Vec<u8> {
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let mut out = ruzstd::encoding::compress_to_vec(data, level);
    out.extend(size(data).to_le_bytes());
    out
}

#[test]
fn every_compression_gives_the_same_kernel() {
    let code: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let vmlinux = elf(&code);
    for packed in [lz4(&vmlinux), gzip(&vmlinux), xz(&vmlinux), zstd(&vmlinux)] {
        let image = bzimage(&packed);
        assert_eq!(decompress_kernel(&image).unwrap(), vmlinux);
        let (memory, entry) = load_bytes(&image, None, "");
        assert_eq!(entry.unwrap().rip, KERNEL_AT);
        let mut loaded = vec![0; code.len()];
        memory
            .guest()
            .read_slice(&mut loaded, GuestAddress(KERNEL_AT))
            .unwrap();
        assert_eq!(loaded, code);
    }
}

#[test]
fn an_unknown_compression_is_left_to_the_kernel() {
    let (_memory, entry) = load_bytes(&bzimage(b"BZh91AY&SY and more"), None, "");
    assert_eq!(entry.unwrap().rip, KERNEL_AT + ENTRY_64);
}

#[test]
fn a_plain_vmlinux_starts_at_its_entry_with_a_header_of_ours() {
    let (memory, entry) = load_bytes(&elf(b"\xf4"), None, "console=ttyS0");
    assert_eq!(entry.unwrap().rip, KERNEL_AT);
    let page: ZeroPage = memory
        .guest()
        .read_obj(GuestAddress(layout::ZERO_PAGE))
        .unwrap();
    let header = page.0.hdr;
    assert_eq!({ header.header }, SETUP_MAGIC);
    let mut cmdline = [0; 14];
    let at = GuestAddress(u64::from(header.cmd_line_ptr));
    memory.guest().read_slice(&mut cmdline, at).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
    assert_eq!({ page.0.acpi_rsdp_addr }, layout::ACPI_START);
}

#[test]
fn an_initrd_lies_high_and_above_the_kernel() {
    let mut initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.write_all(&[0xab; 5000]).unwrap();
    let (memory, entry) = load_bytes(&elf(b"\xf4"), Some(initrd.path()), "");
    entry.unwrap();
    let page: ZeroPage = memory
        .guest()
        .read_obj(GuestAddress(layout::ZERO_PAGE))
        .unwrap();
    let (start, size) = (page.0.hdr.ramdisk_image, page.0.hdr.ramdisk_size);
    assert_eq!(size, 5000);
    assert_eq!(start, (64 << 20) - 8192);
    let last: u8 = memory
        .guest()
        .read_obj(GuestAddress(u64::from(start) + 4999))
        .unwrap();
    assert_eq!(last, 0xab);
}

#[test]
fn what_is_no_kernel_says_so() {
    let mut truncated = bzimage(&gzip(&elf(b"\xf4")));
    truncated.truncate(1024 + 0x200 + 10);
    let mut damaged = bzimage(&gzip(&elf(&[7; 4096])));
    let end = damaged.len() - 20;
    damaged[end] ^= 0xff;
    let mut old = bzimage(b"x");
    old[HEADER_START + 0x15..HEADER_START + 0x17].copy_from_slice(&[0, 2]);
    let mut many = elf(b"\xf4");
    many[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
    let images: [&[u8]; 8] = [
        b"",
        b"MZ",
        b"#!/bin/sh\nexit 0\n",
        &[0; 4096],
        &truncated,
        &damaged,
        &old,
        &many,
    ];
    for image in images {
        let (_memory, entry) = load_bytes(image, None, "");
        let error = entry.unwrap_err();
        assert!(matches!(error, LoadError::NotAKernel { .. }), "{error}");
        assert!(error.to_string().contains("hint:"));
    }
}

#[test]
fn what_does_not_fit_says_so() {
    let mut outside = elf(b"\xf4");
    outside[64 + 24..64 + 32].copy_from_slice(&(3_u64 << 30).to_le_bytes());
    let (_memory, entry) = load_bytes(&outside, None, "");
    let error = entry.unwrap_err();
    assert!(matches!(error, LoadError::DoesNotFit { .. }), "{error}");
    let mut initrd = tempfile::NamedTempFile::new().unwrap();
    initrd.as_file_mut().set_len(60 << 20).unwrap();
    let (_memory, entry) = load_bytes(&elf(b"\xf4"), Some(initrd.path()), "");
    assert!(matches!(entry, Err(LoadError::InitrdDoesNotFit { .. })));
    let (_memory, entry) = load_bytes(&elf(b"\xf4"), None, &"x".repeat(2048));
    assert!(matches!(
        entry,
        Err(LoadError::CmdlineTooLong { limit: 2047, .. })
    ));
}

#[test]
fn the_memory_map_covers_ram_exactly_and_reserves_the_ecam() {
    for mib in [64, 1024, 3072, 3584, 8192] {
        let memory = VmMemory::anonymous(mib).unwrap();
        let mut params = boot_params::default();
        write_e820(memory.guest(), &mut params);
        let count = usize::from(params.e820_entries);
        let map: Vec<_> = { params.e820_table }[..count].to_vec();
        let ram: u64 = map
            .iter()
            .filter(|e| { e.r#type } == E820_RAM)
            .map(|e| e.size)
            .sum();
        let low_hole = layout::HIGH_MEMORY_START - layout::LOW_MEMORY_END;
        assert_eq!(ram, (u64::from(mib) << 20) - low_hole, "{mib}");
        assert!(
            map.iter()
                .any(|e| { e.addr } == layout::ECAM && { e.r#type } == E820_RESERVED)
        );
    }
}

//! Kernels of a few bytes, for tests of any KVM: an ELF of hand-made code, and the code's parts.

#![allow(
    dead_code,
    clippy::indexing_slicing,
    reason = "each test takes what it needs, and may stop at the first surprise"
)]

pub const SLEEP_PORT: u16 = 0x600;
pub const S5: u8 = 0x34;
pub const COM1: u16 = 0x3f8;
/// jmp to itself
pub const SPIN: [u8; 2] = [0xeb, 0xfe];
/// mov eax, where there is no memory; jmp rax
pub const NOWHERE: [u8; 7] = [0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0];

/// mov dx, port; mov al, value; out dx, al
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// An ELF of `code`, loaded and entered at 16 MiB.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let entry = 0x100_0000_u64.to_le_bytes();
    let size = (code.len() as u64).to_le_bytes();
    let mut image = vec![0_u8; 120];
    for (at, bytes) in [
        (0, &b"\x7fELF\x02\x01\x01"[..]),
        (16, &[2, 0, 62, 0]),
        (24, &entry),
        (32, &[64]),
        (52, &[64, 0, 56, 0, 1, 0]),
        (64, &[1, 0, 0, 0, 5]),
        (72, &[120]),
        (80, &entry),
        (88, &entry),
        (96, &size),
        (104, &size),
    ] {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image.extend(code);
    image
}

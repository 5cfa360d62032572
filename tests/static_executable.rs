//! The executable runs on any host and, as the agent, in any guest: it needs no file but itself.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test may stop at the first surprise"
)]

use std::fs;
use std::process::Command;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const SHT_SYMTAB: u32 = 2;
const SHT_DYNSYM: u32 = 11;

struct Elf(Vec<u8>);

impl Elf {
    fn u16(&self, at: usize) -> usize {
        usize::from(u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap()))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn size(&self, at: usize) -> usize {
        usize::try_from(self.u64(at)).unwrap()
    }

    /// Type, file offset and file size of each program header.
    fn segments(&self) -> Vec<(u32, usize, usize)> {
        let (start, size, count) = (self.size(32), self.u16(54), self.u16(56));
        (0..count)
            .map(|n| start + n * size)
            .map(|at| (self.u32(at), self.size(at + 8), self.size(at + 32)))
            .collect()
    }

    /// Type, file offset, size and link of each section.
    fn sections(&self) -> Vec<(u32, usize, usize, usize)> {
        let (start, size, count) = (self.size(40), self.u16(58), self.u16(60));
        (0..count)
            .map(|n| start + n * size)
            .map(|at| {
                let link = usize::try_from(self.u32(at + 40)).unwrap();
                (
                    self.u32(at + 4),
                    self.size(at + 24),
                    self.size(at + 32),
                    link,
                )
            })
            .collect()
    }

    fn symbols(&self) -> Vec<String> {
        let sections = self.sections();
        let mut names = Vec::new();
        for (kind, offset, size, link) in &sections {
            if ![SHT_SYMTAB, SHT_DYNSYM].contains(kind) {
                continue;
            }
            let strings = sections[*link].1;
            for at in (*offset..offset + size).step_by(24) {
                let start = strings + usize::try_from(self.u32(at)).unwrap();
                let len = self.0[start..].iter().position(|byte| *byte == 0).unwrap();
                names.push(String::from_utf8_lossy(&self.0[start..start + len]).into_owned());
            }
        }
        names
    }
}

#[test]
fn needs_no_interpreter_no_library_and_no_plugin_of_a_libc() {
    let elf = Elf(fs::read(EXECUTABLE).unwrap());
    for (kind, offset, size) in elf.segments() {
        assert_ne!(kind, PT_INTERP, "has an interpreter");
        if kind == PT_DYNAMIC {
            for at in (offset..offset + size).step_by(16) {
                assert_ne!(elf.u64(at), DT_NEEDED, "needs a library");
            }
        }
    }
    let symbols = elf.symbols();
    assert!(
        symbols.len() > 1000,
        "only {} symbols: was it stripped?",
        symbols.len()
    );
    for forbidden in ["__nss_", "dlopen", "__libc_dlopen"] {
        let found = symbols.iter().find(|name| name.starts_with(forbidden));
        assert_eq!(found, None, "has {forbidden}");
    }
    eprintln!("executable: {} KiB with its symbols", elf.0.len() >> 10);
}

#[test]
fn runs_in_an_empty_chroot() {
    let root = tempfile::tempdir().unwrap();
    fs::copy(EXECUTABLE, root.path().join("fleetingd")).unwrap();
    let output = Command::new("chroot")
        .arg(root.path())
        .args(["/fleetingd", "version"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
}

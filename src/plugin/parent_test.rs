//! Which parents count as a gitlab-runner.

use super::*;

const BLOCK: &str = "Version:      17.9.0\nGit revision: c4cbe9dd\nGit branch:   17-9-stable\n\
    GO version:   go1.23.6\nBuilt:        2025-02-20\nOS/Arch:      linux/amd64\n";

#[test]
fn a_runner_names_itself_or_prints_the_runners_block_from_a_file_of_that_name() {
    let runner = Path::new("/usr/bin/gitlab-runner");
    assert!(names_gitlab_runner(BLOCK, runner));
    assert!(names_gitlab_runner("GitLab Runner 18.0", Path::new("/x")));
    assert!(!names_gitlab_runner(BLOCK, Path::new("/usr/bin/other")));
    assert!(!names_gitlab_runner("bash 5.2", runner));
    let ours = BLOCK.replace("Git branch:", "Git ref:");
    assert!(!names_gitlab_runner(&ours, runner));
}

#[test]
fn scripts_and_other_files_are_no_executables_of_guests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for content in [
        b"#!/bin/sh\necho gitlab-runner\n".as_slice(),
        b"\x7fELF",
        b"",
    ] {
        std::fs::write(&path, content).unwrap();
        assert!(!is_executable_of_guests(&path));
    }
    assert!(!is_executable_of_guests(Path::new("/no/such/file")));
    assert!(is_executable_of_guests(Path::new("/proc/self/exe")));
}

/// The smallest static executable around some machine code.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16.to_le_bytes(), 62u16.to_le_bytes()].concat());
    file.extend(1u32.to_le_bytes());
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let size = HEADERS + code.len() as u64;
    // PT_LOAD, readable and executable.
    file.extend([1u32.to_le_bytes(), 5u32.to_le_bytes()].concat());
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// write(1, text), exit(0).
fn that_prints(text: &str) -> Vec<u8> {
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0];
    // lea rsi, [the text: behind the 16 bytes that follow]
    code.extend([0x48, 0x8d, 0x35, 16, 0, 0, 0, 0xba]);
    code.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    code.extend([0x0f, 0x05, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]);
    code.extend(text.bytes());
    elf(&code)
}

/// pause() for ever.
pub(in crate::plugin) fn that_hangs() -> Vec<u8> {
    elf(&[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7])
}

/// Another process writes the file: a child that some other test starts meanwhile could hold ours
/// open for writing, and then nobody can run it.
pub(in crate::plugin) fn executable(dir: &Path, content: &[u8]) -> PathBuf {
    let (draft, path) = (dir.join("draft"), dir.join("gitlab-runner"));
    std::fs::write(&draft, content).unwrap();
    let line = format!("install -m 755 {} {}", draft.display(), path.display());
    crate::testing::run(&line);
    path
}

async fn taken(content: &[u8], limit: Duration) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let path = executable(dir.path(), content);
    asked(path.clone(), limit).await == Some(path)
}

#[tokio::test]
async fn an_executable_is_asked_and_what_it_says_counts() {
    assert!(taken(&that_prints(BLOCK), VERSION_TIMEOUT).await);
    assert!(!taken(&that_prints("echo 9.1\n"), VERSION_TIMEOUT).await);
    assert!(!taken(b"#!/bin/sh\necho gitlab-runner\n", VERSION_TIMEOUT).await);
}

#[tokio::test]
async fn an_executable_that_hangs_is_given_up() {
    assert!(!taken(&that_hangs(), Duration::from_millis(50)).await);
}

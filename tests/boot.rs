//! `fleetingd boot` as its user sees it: exit codes, messages and the terminal. The kernels are a
//! few bytes of code, so any KVM will do.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

mod tiny_kernel;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use tiny_kernel::{COM1, NOWHERE, SLEEP_PORT, SPIN, elf, out};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");
fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(COM1, byte)).collect()
}

fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf(code)).unwrap();
    file
}

fn boot(kernel: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("boot").arg("--kernel").arg(kernel);
    command.args(options).stdin(Stdio::null());
    command
}

fn run(code: &[u8], options: &[&str]) -> Output {
    boot(kernel(code).path(), options).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn each_end_has_its_exit_code_and_its_words() {
    let panic = [print("Kernel panic - not syncing: x\n"), out(SLEEP_PORT, 1)].concat();
    let nowhere = NOWHERE.to_vec();
    for (code, exit, words) in [
        (out(SLEEP_PORT, 0x34), 0, "powered off"),
        (out(SLEEP_PORT, 1), 10, "rebooted"),
        (vec![0x0f, 0x0b], 11, "triple fault"),
        (panic, 12, "kernel panic: x"),
        (nowhere, 14, "kvm internal error"),
    ] {
        let output = run(&code, &[]);
        assert_eq!(output.status.code(), Some(exit), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn what_cannot_be_set_up_is_one_error_with_a_hint() {
    let spin = kernel(&SPIN);
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(b"QFI\xfb and more").unwrap();
    let image = image.path().to_str().unwrap();
    let absent = Path::new("/absent/kernel");
    for (command, words) in [
        (boot(absent, &[]), vec!["/absent/kernel", "No such file"]),
        (
            boot(Path::new("/etc/passwd"), &[]),
            vec!["not a Linux kernel", "hint:"],
        ),
        (
            boot(spin.path(), &["--disk", "/absent"]),
            vec!["cannot open the disk /absent"],
        ),
        (
            boot(spin.path(), &["--disk", image]),
            vec!["qcow2", "hint:"],
        ),
        (
            boot(spin.path(), &["--initrd", "/absent"]),
            vec!["cannot read the initrd"],
        ),
        (
            boot(spin.path(), &["--memory", "400000000"]),
            vec!["larger than", "hint:"],
        ),
        (
            boot(spin.path(), &["--console", "/absent/log"]),
            vec!["cannot write /absent/log"],
        ),
    ] {
        let output = { command }.output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{words:?}");
        let text = stderr(&output);
        assert_eq!(text.matches("error:").count(), 1, "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} in {text}");
        }
    }
    for usage in [
        ["--cpus", "65"],
        ["--memory", "63"],
        ["--net", "bridge"],
        ["--disk", ",ro"],
    ] {
        let output = boot(spin.path(), &usage).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{usage:?}");
    }
}

#[test]
fn the_console_goes_where_it_is_told_and_timing_names_the_phases() {
    let code = [print("hello from the guest\n"), out(SLEEP_PORT, 0x34)].concat();
    let output = run(&code, &["--timing"]);
    assert_eq!(output.stdout, b"hello from the guest\n");
    let text = stderr(&output);
    for phase in [
        "in memory",
        "first instruction",
        "first console output",
        "ended",
    ] {
        assert!(text.contains(phase), "{text}");
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let output = run(&code, &["--console", log.path().to_str().unwrap()]);
    assert!(output.stdout.is_empty());
    let logged = std::fs::read_to_string(log.path()).unwrap();
    assert_eq!(logged, "hello from the guest\n");
}

#[test]
fn a_signal_ends_the_machine() {
    let spin = kernel(&[print("up\n"), SPIN.to_vec()].concat());
    let mut child = boot(spin.path(), &[])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(13), "{status}");
}

/// Waits for a key: mov edx, LSR; in al, dx; test al, 1; jz to the in.
const KEY: [u8; 10] = [0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0xfb];

#[test]
fn a_saved_machine_goes_on_from_its_snapshot_again_and_again() {
    let code = [
        print("up\n"),
        KEY.to_vec(),
        print("on\n"),
        out(SLEEP_PORT, 0x34),
    ]
    .concat();
    let kernel = kernel(&code);
    let directory = tempfile::tempdir().unwrap();
    let saved = directory.path().join("saved");
    let mut child = boot(kernel.path(), &["--snapshot-on", "SIGUSR2"])
        .arg(&saved)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut up).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    for _time in 0..2 {
        rustix::process::kill_process(pid, rustix::process::Signal::USR2).unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"\n") {
            let mut byte = [0];
            child
                .stderr
                .as_mut()
                .unwrap()
                .read_exact(&mut byte)
                .unwrap();
            said.push(byte[0]);
        }
        let said = String::from_utf8(said).unwrap();
        assert!(said.starts_with("saved to"), "{said}");
    }
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), &b"on\n"[..])
    );
    let restore = || {
        let mut command = Command::new(PROGRAM);
        command.args(["boot", "--restore"]).arg(&saved);
        command
    };
    for _time in 0..2 {
        let mut child = restore()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), output.stdout.as_slice()),
            (Some(0), &b"on\n"[..])
        );
    }
    let state = saved.join("state");
    let mut bytes = std::fs::read(&state).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&state, bytes).unwrap();
    let output = restore().output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = stderr(&output);
    assert!(
        text.contains("checksum") && text.contains("hint:"),
        "{text}"
    );
    std::fs::remove_file(&state).unwrap();
    let output = restore().output().unwrap();
    assert!(
        stderr(&output).contains("cannot open the snapshot's"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_terminal_is_raw_meanwhile_and_its_escape_key_ends_the_machine() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let open = || {
        let mut options = File::options();
        options.read(true).write(true);
        options.open(name.to_str().unwrap()).unwrap()
    };
    let terminal = open();
    let is_raw = || {
        !tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    };
    assert!(!is_raw());
    // Echoes what is typed: wait for a byte, in, out, again.
    let echo = [
        &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7][..],
        &[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef],
    ];
    let kernel = kernel(&[print("ready\n"), echo.concat()].concat());
    let mut command = boot(kernel.path(), &[]);
    command.stdin(open()).stdout(open()).stderr(open());
    let mut child = command.spawn().unwrap();
    let mut master = File::from(master);
    let mut seen = String::new();
    let mut expect = |text: &str, master: &mut File| {
        while !seen.contains(text) {
            let mut bytes = [0; 64];
            let count = master.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    expect("press Ctrl-]", &mut master);
    expect("ready", &mut master);
    // Ctrl-C is the guest's: it comes back as it went.
    master.write_all(b"\x03a").unwrap();
    expect("\x03a", &mut master);
    assert!(is_raw());
    master.write_all(b"\x1d").unwrap();
    expect("killed", &mut master);
    assert_eq!(child.wait().unwrap().code(), Some(13));
    assert!(!is_raw());
}

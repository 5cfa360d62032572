//! What tests of several folders share: a private network namespace, commands that must succeed.
#![expect(unsafe_code, reason = "unshare has no safe wrapper")]

use std::process::Command;

/// Runs `body` on a thread of its own in a fresh network namespace; needs root.
pub fn in_network_namespace<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread leaves its namespace, and no descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("a network namespace of our own (run as root)");
        run("ip link set lo up");
        body()
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Runs a command line split at spaces and returns what it printed; panics with both streams.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().expect("a command"))
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("{line}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{line}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Waits until `condition` holds, at most five seconds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(started.elapsed().as_secs() < 5, "not in time: {what}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

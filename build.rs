//! Tells the version block what a release is built from.
//!
//! Other builds do not ask: else every commit would compile the crate anew. Everything comes from
//! the commit, so that the same commit gives the same executable. Where git or its history is
//! missing, the block says "unknown".

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let log = output("git", &["rev-parse", "--git-path", "logs/HEAD"]);
    if let Some(log) = log {
        println!("cargo::rerun-if-changed={log}");
    }
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let facts = [
        (
            "REVISION",
            output("git", &["rev-parse", "--short=8", "HEAD"]),
        ),
        (
            "REFERENCE",
            output("git", &["describe", "--all", "--exact-match"]),
        ),
        ("BUILT", output("git", &["log", "-1", "--format=%cI"])),
        ("RUSTC", output(&rustc, &["--version"])),
    ];
    for (name, value) in facts {
        if let Some(value) = value {
            println!("cargo::rustc-env=FLEETINGD_{name}={value}");
        }
    }
}

/// The first line that a command prints, if it succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}

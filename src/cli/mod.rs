//! Commands, terminal output and exit codes; no business rules.
//!
//! Runs on the main thread. `run` decides by argv\[0\] and the first argument which of the
//! executable's faces is wanted: the plugin, the operator's tool or the guest agent.

use std::process::ExitCode;

mod serve;
mod version;

/// Runs the command that this process's arguments name and returns its exit code.
pub fn run() -> ExitCode {
    let command = std::env::args().nth(1);
    match command.as_deref() {
        None | Some("serve") => serve::run(),
        Some("version" | "-version" | "--version") => version::run(),
        Some(_) => ExitCode::from(2),
    }
}

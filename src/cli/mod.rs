//! Commands, terminal output and exit codes; no business rules.
//!
//! Runs on the main thread. `run` decides by argv\[0\] and the first argument which of the
//! executable's faces is wanted: the plugin, the operator's tool or the guest agent.

use std::process::ExitCode;

/// Runs the command that this process's arguments name and returns its exit code.
pub fn run() -> ExitCode {
    ExitCode::SUCCESS
}

//! Commands, terminal output and exit codes; no business rules.
//!
//! Runs on the main thread. `run` decides by argv\[0\] and the first argument which of the
//! executable's faces is wanted: the plugin, the operator's tool or the guest agent.

pub mod boot;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
enum Cmd {
    Boot(boot::BootArgs),
    KvmCheck,
}

/// Runs the command that this process's arguments name and returns its exit code.
pub fn run() -> ExitCode {
    match Cmd::parse() {
        Cmd::Boot(args) => boot::run(args),
        Cmd::KvmCheck => boot::kvm_check(),
    }
}

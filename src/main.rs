//! The one executable: plugin, operator's tool and guest agent, told apart by its arguments.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    fleetingd::cli::run()
}

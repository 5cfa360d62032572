//! Commands, terminal output and exit codes; no business rules.
//!
//! Runs on the main thread. [`run`] decides by argv\[0\] and the first argument which of the
//! executable's faces is wanted: the plugin that gitlab-runner starts, the operator's tool
//! (`fleetingd`, a link to the same file), or the agent inside a guest.
#![expect(clippy::print_stderr, reason = "this is the terminal's side")]

pub mod boot;
mod bootstrap;
mod images;
mod prebuild;
mod progress;
mod serve;
mod status;
mod table;
mod trial;
mod version;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::agent;

/// A usage error, as clap has it too.
const USAGE: u8 = 2;

/// Disposable virtual machines for gitlab-runner.
#[derive(Debug, Parser)]
#[command(name = "fleetingd", disable_version_flag = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve gitlab-runner (it starts this itself)
    Serve,
    /// Print version and build
    Version,
    /// Install this executable where gitlab-runner looks for plugins
    Bootstrap {
        /// Repository of the plugin, such as `registry.example.com/group/fleetingd`
        repository: String,
    },
    /// Run the main job without GitLab: build the image, start machines, use them, end them
    Try(trial::TrialArgs),
    Prebuild(prebuild::PrebuildArgs),
    Status(status::StatusArgs),
    Images(images::ImagesArgs),
    Boot(boot::BootArgs),
    /// Say whether this host's KVM runs stock kernels: exit code 0 if it does
    #[command(hide = true)]
    KvmCheck,
    /// The guest's side; started inside of machines only
    #[command(hide = true)]
    Agent,
}

/// Runs the command that this process's arguments name and returns its exit code.
pub fn run() -> ExitCode {
    let mut args: Vec<_> = std::env::args_os().collect();
    // Go's flag package takes one dash or two.
    if let Some(first) = args.get_mut(1)
        && (first == "-version" || first == "--version")
    {
        *first = "version".into();
    }
    match Cli::parse_from(&args).command {
        None if called_as_tool(args.first().map(Path::new)) => {
            // Nothing can be done about a closed terminal.
            let _closed = Cli::command().print_help();
            ExitCode::from(USAGE)
        }
        None | Some(Command::Serve) => serve::run(),
        Some(Command::Version) => version::run(),
        Some(Command::Bootstrap { repository }) => bootstrap::run(&repository),
        Some(Command::Try(args)) => trial::run(&args),
        Some(Command::Prebuild(args)) => prebuild::run(&args),
        Some(Command::Status(args)) => status::run(&args),
        Some(Command::Images(args)) => images::run(&args),
        Some(Command::Boot(args)) => boot::run(args),
        Some(Command::KvmCheck) => boot::kvm_check(),
        Some(Command::Agent) => agent::guest::run(),
    }
}

/// Whether the link of the operator's tool was used.
fn called_as_tool(argv0: Option<&Path>) -> bool {
    argv0
        .and_then(Path::file_name)
        .is_some_and(|name| name == "fleetingd")
}

/// Prints an error with its causes, one a line.
fn fail(error: &anyhow::Error, code: ExitCode) -> ExitCode {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
    code
}

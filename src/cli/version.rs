//! `version`: who this program is, in the form of GitLab's own plugins.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::plugin::version;

/// Prints the version block.
pub(super) fn run() -> ExitCode {
    match io::stdout().lock().write_all(version::block().as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_closed) => ExitCode::FAILURE,
    }
}

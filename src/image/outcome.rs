//! What a prebuild guest says of itself, read from its disk after it powered off.
//!
//! The guest is not trusted: the file is bounded, numbers are numbers, and its words are cut and
//! cleaned before they reach a log.

use std::path::Path;

use serde::Deserialize;

use super::commands::ShellCommand;
use super::extract::DiskView;
use super::{ImageError, PrebuildOnError};

const RESULT: &str = "/var/lib/fleetingd/prebuild.json";
const LOG: &str = "/var/lib/fleetingd/prebuild.log";
const MAX_RESULT: u64 = 256 << 10;
/// How much of the log's end is looked at for a command's output.
const MAX_LOG: u64 = 1 << 20;
/// Lines of a failed command that reach the log, and their length.
const SHOWN_LINES: usize = 15;
const SHOWN_CHARS: usize = 400;
const MAX_WARNINGS: usize = 16;
const VERSION: u32 = 1;

#[derive(Debug, Deserialize)]
struct Report {
    version: u32,
    success: bool,
    #[serde(default)]
    reason: String,
    /// Exit codes in order; null for a command that was not reached.
    #[serde(default)]
    commands: Vec<Option<i64>>,
    #[serde(default)]
    warnings: Vec<String>,
}

/// Checks that the prebuild on this disk succeeded; returns its warnings.
pub fn check(
    disk: &DiskView,
    commands: &[ShellCommand],
    on_error: PrebuildOnError,
    console: &Path,
) -> Result<Vec<String>, ImageError> {
    let no_marker = |what: &str| ImageError::NoMarker {
        what: what.to_owned(),
        console: console.to_owned(),
    };
    let bytes = disk
        .read(RESULT, MAX_RESULT)?
        .ok_or_else(|| no_marker("no result file in the guest"))?;
    let report: Report =
        serde_json::from_slice(&bytes).map_err(|_bad| no_marker("its result file is damaged"))?;
    if report.version != VERSION {
        return Err(no_marker("its result file has another version"));
    }
    let mut warnings: Vec<String> = report.warnings.iter().map(|text| clean(text)).collect();
    warnings.truncate(MAX_WARNINGS);
    for (number, command) in (1..).zip(commands) {
        let code = report.commands.get(number - 1).copied().flatten();
        match (code, on_error) {
            (Some(0), _) => {}
            (Some(code), PrebuildOnError::Fail) => {
                return Err(ImageError::CommandFailed {
                    number,
                    code,
                    command: command.summary(),
                    output: output_of(&disk.read_tail(LOG, MAX_LOG), number),
                });
            }
            (Some(code), PrebuildOnError::Continue) => warnings.push(format!(
                "command {number} failed with exit code {code}: {}",
                command.summary()
            )),
            (None, _) => warnings.push(format!(
                "command {number} was not run: one before it ended the script"
            )),
        }
    }
    if !report.success {
        return Err(ImageError::PrebuildFailed {
            reason: clean(&report.reason),
            console: console.to_owned(),
        });
    }
    Ok(warnings)
}

/// The last lines that a command wrote, each ended by a line break.
fn output_of(log: &[u8], number: usize) -> String {
    let log = String::from_utf8_lossy(log);
    let start = format!("[fleetingd: command {number}]");
    let lines: Vec<&str> = log
        .lines()
        .skip_while(|line| *line != start)
        .skip(1)
        .take_while(|line| !line.starts_with("[fleetingd: "))
        .filter(|line| !line.trim().is_empty())
        .collect();
    let shown = lines.iter().skip(lines.len().saturating_sub(SHOWN_LINES));
    shown.map(|line| format!("  {}\n", clean(line))).collect()
}

/// One line of printable text, cut to a sensible length.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN_CHARS)
        .collect::<String>()
        .trim_end()
        .to_owned()
}

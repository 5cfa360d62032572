//! `fleetingd status`: asks every running plugin of this host what it does.
#![expect(clippy::print_stdout, reason = "this is the answer")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::table::{aligned, bytes, duration, printable};
use crate::net;
use crate::pool::Counts;
use crate::pool::control::client::{ControlError, peers};
use crate::pool::control::{Request, Response};
use crate::pool::status::{GroupStatus, ImageStatus, InstanceStatus, epoch};

/// Digits of a generation's name that are shown.
const KEY_DIGITS: usize = 12;

/// Show what every running plugin of this host does
///
/// Exit codes: 0 a plugin answered, 1 none runs or none could be asked, 2 usage.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Print one JSON array of all groups
    #[arg(long)]
    json: bool,
    /// Where the plugins' sockets are
    #[arg(long, value_name = "DIR", default_value = net::RUN_DIR, hide = true)]
    run_directory: PathBuf,
}

/// Runs the command.
pub fn run(args: &StatusArgs) -> ExitCode {
    let (groups, failures) = match ask_all(&args.run_directory) {
        Ok(answers) => answers,
        Err(error) => return super::fail(&error.into(), ExitCode::FAILURE),
    };
    for failure in failures {
        super::fail(&failure, ExitCode::FAILURE);
    }
    if args.json {
        match serde_json::to_string_pretty(&groups) {
            Ok(text) => println!("{text}"),
            Err(error) => return super::fail(&error.into(), ExitCode::FAILURE),
        }
    } else if groups.is_empty() {
        println!("no plugin runs on this host");
    } else {
        let texts: Vec<String> = groups.iter().map(|group| show(group, epoch())).collect();
        print!("{}", texts.join("\n"));
    }
    match groups.is_empty() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

/// The status of every pool that answers, and why others did not.
pub fn ask_all(run_dir: &Path) -> Result<(Vec<GroupStatus>, Vec<anyhow::Error>), ControlError> {
    let mut groups = Vec::new();
    let mut failures = Vec::new();
    for peer in peers(run_dir)? {
        match peer.ask(&Request::Status) {
            Ok(Some(Response::Status(status))) => groups.push(*status),
            // A process that is gone.
            Ok(None) => {}
            Ok(Some(Response::Failed { text } | Response::Done { text })) => {
                failures.push(anyhow::anyhow!("group {}: {text}", peer.group));
            }
            Err(error) => failures.push(error.into()),
        }
    }
    Ok((groups, failures))
}

/// A generation's name as it is shown.
pub fn short(key: &str) -> &str {
    key.get(..KEY_DIGITS).unwrap_or(key)
}

fn show(group: &GroupStatus, now: u64) -> String {
    let mut text = format!(
        "group {}: {} of {} slots, plugin {} (pid {}) up {}, host memory {}\n",
        group.group,
        group.occupied,
        group.max_size,
        group.program_version,
        group.pid,
        duration(group.uptime_s),
        group.host_memory,
    );
    text.push_str(&image(&group.image, now));
    if !group.instances.is_empty() {
        let heading = [
            "INSTANCE", "STATE", "PHASE", "AGE", "ADDRESS", "IMAGE", "DISK", "MEMORY",
        ];
        let lines: Vec<Vec<String>> = group.instances.iter().map(instance).collect();
        text.push_str(&aligned(&heading, &lines));
    }
    text.push_str(&counters(&group.counters));
    if group.dropped_packets.values().any(|packets| *packets > 0) {
        let dropped = listed(&group.dropped_packets);
        let _infallible = writeln!(text, "dropped packets: {dropped}");
    }
    text
}

fn image(image: &ImageStatus, now: u64) -> String {
    let serving = image.generation.as_deref().map_or("none yet", short);
    let pinned = if image.pinned { " (pinned)" } else { "" };
    let mut text = format!("image {serving}{pinned}: {}", image.phase);
    if image.phase == crate::pool::status::IDLE {
        if let Some(at) = image.checked_at {
            let ago = duration(now.saturating_sub(at));
            let _infallible = write!(text, ", checked {ago} ago");
        }
    } else {
        let _infallible = write!(text, " since {}", duration(image.phase_s));
    }
    if !image.detail.is_empty() {
        let _infallible = write!(text, ": {}", printable(&image.detail));
    }
    text.push('\n');
    if let Some(error) = &image.last_error {
        let ago = duration(now.saturating_sub(error.at));
        let _infallible = writeln!(text, "  failed {ago} ago: {}", printable(&error.text));
    }
    text
}

fn instance(instance: &InstanceStatus) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    vec![
        instance.id.clone(),
        instance.state.clone(),
        or_dash(Some(instance.phase.clone()).filter(|phase| !phase.is_empty())),
        duration(instance.age_s),
        or_dash(instance.address.map(|address| address.to_string())),
        or_dash(
            instance
                .generation
                .as_deref()
                .map(|key| short(key).to_owned()),
        ),
        bytes(instance.disk_delta_bytes),
        bytes(instance.memory_bytes),
    ]
}

fn counters(counts: &Counts) -> String {
    let mut text = format!(
        "since the start: {} asked for, {} accepted\n",
        counts.asked, counts.accepted
    );
    for (kind, boots) in &counts.boots {
        let mean =
            |seconds: f64| seconds / f64::from(u32::try_from(boots.count).unwrap_or(1).max(1));
        let phases: Vec<String> = boots
            .phases
            .iter()
            .map(|(phase, spent)| {
                let (mean, longest) = (mean(spent.seconds), spent.longest_seconds);
                format!("{phase} {mean:.3}/{longest:.3}")
            })
            .collect();
        let _infallible = writeln!(
            text,
            "  {} {kind} boots; seconds mean/longest: {}",
            boots.count,
            phases.join(", ")
        );
    }
    let sections = [
        ("failed starts", &counts.failures),
        ("ends", &counts.ends),
        ("image tasks", &counts.images),
    ];
    for (name, counts) in sections {
        if !counts.is_empty() {
            let _infallible = writeln!(text, "  {name}: {}", listed(counts));
        }
    }
    text
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    let parts: Vec<String> = counts
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    parts.join(", ")
}

#[cfg(test)]
#[path = "status_test.rs"]
mod tests;

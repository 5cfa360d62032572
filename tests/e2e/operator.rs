//! What an operator sees of the running plugins, and changes, from another terminal.
#![expect(clippy::indexing_slicing, reason = "what is not there is null")]

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::host;
use crate::say;
use crate::story::Story;

/// The JSON that a command of the program prints.
fn ask(story: &Story, command: &str) -> anyhow::Result<Vec<Value>> {
    let line = format!("{} {command}", story.place.executable.display());
    Ok(serde_json::from_str(&host::run(&line)?)?)
}

pub async fn an_operator_sees_every_machine_and_refreshes_without_disturbing_one(
    story: &mut Story,
) -> anyhow::Result<()> {
    let groups = ask(story, "status --json")?;
    let mut shown = BTreeSet::new();
    let mut generations = BTreeSet::new();
    for group in &groups {
        ensure!(group["image"]["last_error"].is_null(), "{group:#}");
        for one in group["instances"].as_array().context("no instances")? {
            ensure!(one["state"] == "running", "{one:#}");
            ensure!(one["memory_bytes"].as_u64() > Some(50 << 20), "{one:#}");
            ensure!(one["disk_delta_bytes"].as_u64() > Some(0), "{one:#}");
            generations.insert(one["generation"].to_string());
            shown.insert((one["id"].to_string(), one["address"].to_string()));
        }
    }
    let (twin, apart) = (story.twin.as_ref(), story.apart.as_ref());
    let others = [twin, apart].into_iter().flatten();
    let others = others.map(|(_plugin, machine)| machine);
    let known: BTreeSet<_> = (story.machines.iter().chain(others))
        .map(|one| (format!("{:?}", one.id), format!("\"{}\"", one.address)))
        .collect();
    ensure!(
        shown == known,
        "status shows {shown:?}, there are {known:?}"
    );
    ensure!(generations.len() == 1, "{generations:?}");

    let program = story.place.executable.display().to_string();
    say(host::run(&format!("{program} status"))?.trim_end());

    // A look for something newer finds the same file: machines do not notice.
    let refreshed = host::run(&format!("{program} images refresh"))?;
    ensure!(
        refreshed.matches("nothing newer").count() == groups.len(),
        "{refreshed}"
    );
    let images = ask(story, "images list --json")?;
    ensure!(!images.is_empty(), "no image");
    for machine in &mut story.machines {
        machine.run("true").await?;
    }
    let metrics = fs::read_to_string(&story.metrics)?;
    for line in ["# TYPE fleetingd_", "group=\"fleetingd"] {
        ensure!(metrics.contains(line), "no {line:?} in:\n{metrics}");
    }
    say(format_args!(
        "  {} groups, {} machines, {} lines of metrics",
        groups.len(),
        shown.len(),
        metrics.lines().count()
    ));
    Ok(())
}

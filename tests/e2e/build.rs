//! A build that fails: what the operator reads, and what is left.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use fleetingd::plugin::generated::fleeting::update_response::State;

use crate::host::{self, Snapshot};
use crate::plugin::Plugin;
use crate::{Place, say};

/// A whole prebuild, where KVM is emulated.
const BUILD_PATIENCE: Duration = Duration::from_secs(3600);
/// Nothing is left to wait for but the host's own interfaces and tables.
const QUICK: Duration = Duration::from_secs(10);

/// The directory and the variable carry over; the fourth command fails; the fifth is not reached.
const COMMANDS: &str = r#"vm_prebuild_cloudinit_extra_cmds = [
    'cd /tmp',
    'export X=1',
    'test "$PWD$X" = /tmp1',
    'echo some last words; false # breaks here',
    'echo this is not reached',
]"#;

pub async fn a_failing_command_is_named(place: &Place) -> anyhow::Result<()> {
    let before = Snapshot::take(&place.data)?;
    let plugin = Plugin::start("build", &place.executable, &place.config(COMMANDS)?).await?;
    let accepted = plugin.client.increase(1).await?;
    ensure!(accepted == 1, "{accepted} machines were accepted");
    let begun = Instant::now();
    let error = plugin.log_line("no new image: ", BUILD_PATIENCE).await?;
    for words in [
        "command 4 of vm_prebuild_cloudinit_extra_cmds failed",
        "exit code 1",
        "echo some last words; false # breaks here",
        "\n  some last words\n",
        "hint: ",
    ] {
        ensure!(error.contains(words), "no {words:?} in: {error}");
    }
    ensure!(!error.contains("not reached"), "it went on: {error}");
    say(format_args!(
        "  after {:.0} s: {error}",
        begun.elapsed().as_secs_f64()
    ));
    let instances = plugin.client.update().await?;
    ensure!(
        instances.iter().map(|one| one.state).eq([State::Creating]),
        "not one that waits: {instances:?}"
    );
    ensure!(
        !host::interfaces()?.contains("fleetingd0"),
        "its TAP is left"
    );
    let sent = host::sent_packets(&plugin.table(), "fleetingd0")?;
    let sent = sent.context("no counter of fleetingd0 in dropnottap")?;
    ensure!(sent > 0, "the build sent nothing");
    let ending = Instant::now();
    plugin.client.shutdown().await?;
    let took = ending.elapsed();
    ensure!(took < QUICK, "Shutdown took {took:?}");
    plugin.end().await?;
    let left = Snapshot::take(&place.data)?.left_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    say(format_args!(
        "  dropnottap counted {sent} packets of fleetingd0; Shutdown while Creating took {} ms and left \
         nothing",
        took.as_millis()
    ));
    Ok(())
}

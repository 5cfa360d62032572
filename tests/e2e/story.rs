//! Three plugins on one host, from their first machine to their end.
//!
//! ```text
//!  main   three machines, then one more     ends by Shutdown
//!  twin   one machine, the same settings    is killed with SIGKILL
//!  apart  one machine, other settings       its runner, a shell, is killed
//! ```

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::host::Snapshot;
use crate::outside::{OTHER_HOST_PORT, Outside, PORT, PRIVATE};
use crate::plugin::{Machine, Plugin};
use crate::{Place, ending, forging, identity, isolation, operator, say};

/// What the chapters share.
pub struct Story {
    pub place: Place,
    pub outside: Outside,
    pub main: Plugin,
    pub machines: Vec<Machine>,
    pub twin: Option<(Plugin, Machine)>,
    pub apart: Option<(Plugin, Machine)>,
    /// Where the shell wrote the id of its plugin.
    pub apart_pid: PathBuf,
    /// Of every machine that there was.
    pub machine_ids: BTreeSet<String>,
    /// The interface of the machine whose plugin was killed.
    pub killed_tap: String,
    /// `metrics_file` of the main plugin.
    pub metrics: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Story {
    async fn begin(place: Place, outside: Outside) -> anyhow::Result<Self> {
        let scratch = tempfile::tempdir()?;
        let (shell, apart_pid) = (scratch.path().join("runner"), scratch.path().join("pid"));
        let script = format!(
            "#!/bin/sh\n{:?} &\necho $! >{:?}\nwait\n",
            place.executable, apart_pid
        );
        fs::write(&shell, script)?;
        fs::set_permissions(&shell, Permissions::from_mode(0o755))?;
        let metrics = scratch.path().join("main.prom");
        let settings = place.config(&format!("metrics_file = {metrics:?}"))?;
        let main = Plugin::start("main", &place.executable, &settings).await?;
        let mut machines = main.machines(1).await?;
        // The image is there: the others need no build. Two at a time, one for each core of the rig.
        let twin = Plugin::start("twin", &place.executable, &place.config("")?).await?;
        let apart = Plugin::start("apart", &shell, &other_settings(&place)?).await?;
        let (second, of_twin) = tokio::try_join!(main.machines(1), twin.machines(1))?;
        machines.extend(second);
        let (third, of_apart) = tokio::try_join!(main.machines(1), apart.machines(1))?;
        machines.extend(third);
        let of_twin = of_twin
            .into_iter()
            .next()
            .context("no machine of the twin")?;
        let of_apart = of_apart.into_iter().next().context("no machine apart")?;
        Ok(Self {
            place,
            outside,
            main,
            machines,
            twin: Some((twin, of_twin)),
            apart: Some((apart, of_apart)),
            apart_pid,
            machine_ids: BTreeSet::new(),
            killed_tap: String::new(),
            metrics,
            _scratch: scratch,
        })
    }

    /// The n-th machine of the main plugin.
    pub fn machine(&mut self, n: usize) -> anyhow::Result<&mut Machine> {
        self.machines.get_mut(n).context("the machine is gone")
    }

    /// The machine of the plugin with other settings.
    pub fn apart(&mut self) -> anyhow::Result<&mut Machine> {
        let apart = self.apart.as_mut().map(|(_plugin, machine)| machine);
        apart.context("the machine is gone")
    }
}

/// Another subnet, and holes in the wall.
fn other_settings(place: &Place) -> anyhow::Result<fleetingd::plugin::config::Source> {
    let [service, network, ..] = PRIVATE;
    place.config(&format!(
        "vm_subnet = \"172.16.121.\"\n\
         vm_dns = [\"{service}\"]\n\
         allow_private = [\"tcp/{PORT}@{service}\", \"{network}/32\", \"169.254.0.0/16\"]\n\
         allow_host = [\"tcp/{OTHER_HOST_PORT}\"]"
    ))
}

/// Tells it all, and fails with every chapter that failed.
pub async fn tell(place: Place) -> anyhow::Result<()> {
    let outside = Outside::make()?;
    let before = Snapshot::take(&place.data)?;
    let mut failed = Failed::default();
    let begun = Instant::now();
    let mut story = Story::begin(place, outside).await?;
    let s = &mut story;
    say(format_args!(
        "three plugins with five machines after {:.1} s",
        begun.elapsed().as_secs_f64()
    ));
    failed
        .note(
            "each machine is somebody of its own",
            identity::each_machine_is_somebody_of_its_own(s),
        )
        .await;
    failed
        .note(
            "an operator sees every machine and refreshes without disturbing one",
            operator::an_operator_sees_every_machine_and_refreshes_without_disturbing_one(s),
        )
        .await;
    failed
        .note(
            "a machine reaches the world and nothing nearer",
            isolation::a_machine_reaches_the_world_and_nothing_nearer(s),
        )
        .await;
    failed
        .note(
            "what the config allows is open and nothing beside it",
            isolation::what_the_config_allows_is_open_and_nothing_beside_it(s),
        )
        .await;
    failed
        .note(
            "nobody outside reaches a machine",
            isolation::nobody_outside_reaches_a_machine(s),
        )
        .await;
    failed
        .note(
            "forged frames go no further than the TAP",
            forging::forged_frames_go_no_further_than_the_tap(s),
        )
        .await;
    failed
        .note(
            "a plugin killed with -9 costs the others nothing",
            ending::a_plugin_killed_with_9_costs_the_others_nothing(s),
        )
        .await;
    failed
        .note(
            "the next start removes rules of the dead",
            ending::the_next_start_removes_rules_of_the_dead(s),
        )
        .await;
    failed
        .note(
            "a plugin whose runner dies leaves with all it had",
            ending::a_plugin_whose_runner_dies_leaves_with_all_it_had(s),
        )
        .await;
    failed
        .note(
            "a machine that ends by itself is deleted in the next Update",
            ending::a_machine_that_ends_by_itself_is_deleted_in_the_next_update(s),
        )
        .await;
    failed
        .note(
            "the next machine has nothing of those before",
            ending::the_next_machine_has_nothing_of_those_before(s),
        )
        .await;
    failed
        .note(
            "Shutdown leaves nothing",
            ending::shutdown_leaves_nothing(story, &before),
        )
        .await;
    failed.end()
}

/// Chapters that failed, with their reasons.
#[derive(Default)]
struct Failed(Vec<String>);

impl Failed {
    async fn note(&mut self, title: &str, chapter: impl Future<Output = anyhow::Result<()>>) {
        let begun = Instant::now();
        say(format_args!("{title} ..."));
        let result = chapter.await;
        let took = begun.elapsed().as_secs_f64();
        match result {
            Ok(()) => say(format_args!("{title}: ok, {took:.1} s")),
            Err(error) => {
                say(format_args!("{title}: FAILED, {took:.1} s: {error:#}"));
                self.0.push(format!("{title}: {error:#}"));
            }
        }
    }

    fn end(self) -> anyhow::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        bail!("{} failed:\n{}", self.0.len(), self.0.join("\n"))
    }
}

//! Every way in which machines, plugins and runners end, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::host::{self, Process, Snapshot, eventually};
use crate::outside::{PORT, WORLD};
use crate::plugin::Plugin;
use crate::story::Story;
use crate::{PATIENCE, say};

/// The end of a process that was killed: its descriptors close at once, its memory takes a while.
const SOON: Duration = Duration::from_secs(30);
/// A number that no plugin of these tests has.
const ORPHAN: &str = "fleetingd_900";

/// A job that holds a connection, works for a while, and then uses the connection again.
fn job() -> String {
    format!(
        "exec 3<>/dev/tcp/{WORLD}/{PORT} && read -r -t 60 hello <&3 && \
         for n in $(seq 60); do echo $n; sleep 0.2; done && \
         echo ping >&3 && read -r -t 60 answer <&3 && test $answer = ping && echo the job is done"
    )
}

pub async fn a_plugin_killed_with_9_costs_the_others_nothing(
    story: &mut Story,
) -> anyhow::Result<()> {
    let (twin, machine) = story.twin.take().context("no twin")?;
    let process = twin.started;
    let locks = process.locks()?;
    ensure!(locks.len() >= 4, "the twin only holds {locks:?}");
    let service = SocketAddr::from((WORLD, PORT));
    story.outside.accepted.clear();

    let worker = story.machines.first_mut().context("no machine")?;
    let accepted = story.outside.accepted.clone();
    let killing = async {
        eventually("the job has begun", PATIENCE, || {
            Ok(!accepted.by(service).is_empty())
        })
        .await?;
        let begun = Instant::now();
        twin.kill().await?;
        eventually("its TAP and locks are gone", SOON, || {
            let held = host::held_locks()?;
            let tap = host::interfaces()?.contains(&machine.tap);
            Ok(!tap && held.is_disjoint(&locks))
        })
        .await?;
        anyhow::Ok(begun.elapsed())
    };
    let job = job();
    let (output, took) = tokio::join!(worker.run(&job), killing);
    let took = took?;
    ensure!(
        output?.ends_with("the job is done"),
        "the job was disturbed"
    );
    for machine in &story.machines {
        story.main.client.heartbeat(&machine.id).await?;
    }
    say(format_args!(
        "  {} and {} locks were gone after {} ms; a job of another plugin and its connection went on",
        machine.tap,
        locks.len(),
        took.as_millis()
    ));
    story.killed_tap = machine.tap;
    Ok(())
}

pub async fn the_next_start_removes_rules_of_the_dead(story: &mut Story) -> anyhow::Result<()> {
    for family in ["inet", "netdev"] {
        host::run(&format!("nft add table {family} {ORPHAN}"))?;
    }
    let machine = story.machines.first().context("no machine")?;
    let main = story.main.table();
    let counted = host::sent_packets(&main, &machine.tap)?;
    let dead = tables_of_dead(story)?;
    let next = Plugin::start("next", &story.place.executable, &story.place.config("")?).await?;
    let text = host::run("nft list ruleset")?;
    ensure!(!text.contains(ORPHAN), "{ORPHAN} is still there");
    let chain = format!("device \"{}\"", story.killed_tap);
    ensure!(
        !text.contains(&chain),
        "the killed plugin's rules are still there"
    );
    let now = host::sent_packets(&main, &machine.tap)?;
    ensure!(
        now >= counted && now.is_some(),
        "{main} was {counted:?}, is {now:?}"
    );
    next.client.shutdown().await?;
    next.end().await?;
    let left = tables_of_dead(story)?;
    ensure!(left.is_empty(), "still there: {left:?}");
    story.machine(0)?.run("true").await?;
    say(format_args!(
        "  {dead:?} went with the next start, {main} stayed"
    ));
    Ok(())
}

/// Tables of plugins that no longer run.
fn tables_of_dead(story: &Story) -> anyhow::Result<BTreeSet<String>> {
    let mut alive = vec![story.main.table()];
    alive.extend(
        story
            .apart
            .as_ref()
            .map(|(plugin, _machine)| plugin.table()),
    );
    let mut tables = host::tables()?;
    tables.retain(|line| line.contains(" fleetingd_"));
    tables.retain(|line| !alive.iter().any(|table| line.ends_with(table)));
    Ok(tables)
}

pub async fn a_plugin_whose_runner_dies_leaves_with_all_it_had(
    story: &mut Story,
) -> anyhow::Result<()> {
    let (apart, machine) = story.apart.take().context("no other plugin")?;
    let plugin = Process(fs::read_to_string(&story.apart_pid)?.trim().parse()?);
    let locks = plugin.locks()?;
    ensure!(locks.len() >= 4, "it only holds {locks:?}");
    let table = apart.table();
    apart.started.kill()?;
    let took = eventually("the plugin leaves", PATIENCE, || Ok(!plugin.is_alive())).await?;
    ensure!(
        !host::interfaces()?.contains(&machine.tap),
        "its TAP is left"
    );
    let tables = host::tables()?;
    ensure!(
        !tables
            .iter()
            .any(|line| line.ends_with(&format!(" {table}"))),
        "its tables are left: {tables:?}"
    );
    let held = host::held_locks()?;
    ensure!(held.is_disjoint(&locks), "its locks are left: {held:?}");
    say(format_args!(
        "  gone {} ms after its runner, with {}, {table} and {} locks",
        took.as_millis(),
        machine.tap,
        locks.len()
    ));
    Ok(())
}

pub async fn a_machine_that_ends_by_itself_is_deleted_in_the_next_update(
    story: &mut Story,
) -> anyhow::Result<()> {
    let ways = [
        ("power-off", "systemctl poweroff"),
        ("panic", "echo c >/proc/sysrq-trigger"),
        ("reboot", "systemctl reboot"),
    ];
    let mut ids = Vec::new();
    for (machine, (_way, command)) in story.machines.iter_mut().zip(ways) {
        machine.run("sudo -n touch /root/was-here && sync").await?;
        // Detached, as nobody answers once it works.
        let command =
            format!("sudo -n setsid sh -c '(sleep 1; {command}) >/dev/null 2>&1 </dev/null &'");
        machine.run(&command).await?;
        ids.push(machine.id.clone());
    }
    let begun = Instant::now();
    story.main.wait_until_deleted(&ids).await?;
    let panicked = ids.get(1).context("three machines")?;
    let console = story
        .place
        .data
        .join(format!(".instance_data/{panicked}_console"));
    let console = String::from_utf8_lossy(&fs::read(console)?).into_owned();
    ensure!(
        console.contains("Kernel panic"),
        "no panic in its console:\n{console}"
    );
    let why = story.main.log_line("kernel panic", SOON).await?;
    ensure!(
        why.contains("sysrq triggered crash"),
        "the log says {why:?}"
    );
    for id in &ids {
        ensure!(
            story.main.client.heartbeat(id).await.is_err(),
            "{id} has a heartbeat"
        );
    }
    let ways: Vec<&str> = ways.iter().map(|(way, _command)| *way).collect();
    say(format_args!(
        "  Deleted by {} after {:.1} s; the panic stands in its console",
        ways.join(", "),
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

pub async fn the_next_machine_has_nothing_of_those_before(story: &mut Story) -> anyhow::Result<()> {
    let before: BTreeSet<_> = story
        .machines
        .iter()
        .map(|machine| machine.address)
        .collect();
    let mut machines = story.main.machines(1).await?;
    let machine = machines.first_mut().context("no machine")?;
    machine.run("sudo -n test ! -e /root/was-here").await?;
    let machine_id = machine.run("cat /etc/machine-id").await?;
    ensure!(
        story.machine_ids.insert(machine_id.clone()),
        "another machine had {machine_id}"
    );
    ensure!(
        !story.machines.iter().any(|old| old.id == machine.id),
        "{} was there before",
        machine.id
    );
    let again = if before.contains(&machine.address) {
        "used again"
    } else {
        "new"
    };
    say(format_args!(
        "  {}: fresh disk and machine-id, address {again}",
        machine.id
    ));
    story.machines = machines;
    Ok(())
}

pub async fn shutdown_leaves_nothing(story: Story, before: &Snapshot) -> anyhow::Result<()> {
    let data = story.place.data.clone();
    let process = story.main.started;
    let held = process.held_for_machines(&data)?;
    ensure!(
        !held.is_empty(),
        "a plugin with a machine holds nothing for it"
    );
    let begun = Instant::now();
    story.main.client.shutdown().await?;
    let took = begun.elapsed();
    let still = process.held_for_machines(&data)?;
    ensure!(still.is_empty(), "held after Shutdown: {still:?}");
    story.main.end().await?;
    let left = Snapshot::take(&data)?.left_since(before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    say(format_args!(
        "  Shutdown took {} ms with a machine running; {} descriptors and threads of it are gone, and \
         no interface, table, lock or file is left",
        took.as_millis(),
        held.len()
    ));
    Ok(())
}

//! Who a machine is, asked from inside: nothing of it is another one's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use fleetingd::pool::ssh::{SshError, SshSession, SshTarget};

use crate::plugin::Machine;
use crate::say;
use crate::story::Story;

/// `name=value` lines; the last commands must not fail.
const ASK: &str = r#"
echo "host name=$(hostname)"
echo "machine-id=$(cat /etc/machine-id)"
echo "boot-id=$(cat /proc/sys/kernel/random/boot_id)"
echo "host key=$(sudo -n ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key | cut -d' ' -f1,2)"
echo "authorized key=$(sudo -n cat /etc/ssh/fleetingd_authorized_keys/*)"
echo "MAC=$(cat /sys/class/net/*/address | grep -v 00:00:00:00:00:00)"
echo "address=$(ip -4 -o address show scope global | grep -o 'inet [0-9./]*')"
echo "randomness=$(head -c 16 /dev/urandom | od -An -tx1)"
sudo -n true
"#;
/// What differs by its nature; the rest is checked by its value.
const DIFFERENT: [&str; 8] = [
    "host name",
    "machine-id",
    "boot-id",
    "host key",
    "authorized key",
    "MAC",
    "address",
    "randomness",
];
/// How far a machine's clock may be from the host's.
const CLOCK: Duration = Duration::from_secs(2);
/// What the predecessor's users wait for in each machine.
const CLOUD_INIT: Duration = Duration::from_secs(10);

pub async fn each_machine_is_somebody_of_its_own(story: &mut Story) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for machine in &mut story.machines {
        let facts = facts(machine).await?;
        let id = machine.id.clone();
        ensure!(
            facts.get("host name") == Some(&id),
            "{id} is called {facts:?}"
        );
        let machine_id = facts.get("machine-id").context("no machine-id")?;
        ensure!(
            machine_id.len() == 32 && machine_id.bytes().all(|b| b.is_ascii_hexdigit()),
            "{id} has the machine-id {machine_id:?}"
        );
        story.machine_ids.insert(machine_id.clone());
        let address = format!("inet {}/30", machine.address);
        ensure!(facts.get("address") == Some(&address), "{id} has {facts:?}");
        clock_is_right(machine).await?;
        all.push(facts);
    }
    for name in DIFFERENT {
        let values: BTreeSet<&String> = all.iter().filter_map(|facts| facts.get(name)).collect();
        ensure!(
            values.len() == all.len() && !values.iter().any(|value| value.is_empty()),
            "{name} of {} machines: {values:?}",
            all.len()
        );
    }
    keys_are_of_one_machine(&story.machines, &all).await?;
    for machine in &mut story.machines {
        cloud_init_is_done(machine).await?;
    }
    say(format_args!(
        "  different in {} machines: {}",
        all.len(),
        DIFFERENT.join(", ")
    ));
    Ok(())
}

async fn facts(machine: &mut Machine) -> anyhow::Result<BTreeMap<String, String>> {
    let text = machine.run(ASK).await?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect())
}

async fn clock_is_right(machine: &mut Machine) -> anyhow::Result<()> {
    let before = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let text = machine.run("date +%s%N").await?;
    let after = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let clock = Duration::from_nanos(text.parse()?);
    ensure!(
        clock + CLOCK >= before && clock <= after + CLOCK,
        "{} has {clock:?}, the host had {before:?} and then {after:?}",
        machine.id
    );
    Ok(())
}

async fn cloud_init_is_done(machine: &mut Machine) -> anyhow::Result<()> {
    let begun = Instant::now();
    machine.run("cloud-init status --wait").await?;
    let took = begun.elapsed();
    ensure!(
        took < CLOUD_INIT,
        "{}: cloud-init took {took:?}",
        machine.id
    );
    say(format_args!(
        "  {}: cloud-init status --wait answers 0 in {} ms",
        machine.id,
        took.as_millis()
    ));
    Ok(())
}

/// A machine shows the host key that lies in it, and lets nobody in with a neighbour's key.
async fn keys_are_of_one_machine(
    machines: &[Machine],
    all: &[BTreeMap<String, String>],
) -> anyhow::Result<()> {
    let [first, second, ..] = machines else {
        bail!("two machines are needed");
    };
    let host_key = all.first().and_then(|facts| facts.get("host key"));
    let mut target = SshTarget {
        host_key: host_key.cloned(),
        ..first.target.clone()
    };
    SshSession::open(&target).await?.close().await;
    target.credential = second.target.credential.clone();
    match SshSession::open(&target).await {
        Err(SshError::Refused { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_session) => bail!("{} lets the key of {} in", first.id, second.id),
    }
}

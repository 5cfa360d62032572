//! A worker's cold boot: from the start of the VMM to the agent's `ready`, which it says once it
//! has its identity, the link is up and sshd has shown its banner. QEMU boots the same disk, with
//! the same agent on a port of its own and the same words said to it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use fleetingd::agent::{AgentLink, Identity};
use fleetingd::pool::keys::{self, KeyPair, SshKeyType};

use super::guest::{self, Guest};
use super::machine::{MAC, Machine, QEMU, Vmm};
use super::report::{Better, Budget, Row, median};
use super::tap::{GUEST, HOST, PREFIX, TAP, Tap};

const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(600);

pub fn measure(guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let image = std::env::var_os("FLEETINGD_BENCH_IMAGE").map(PathBuf::from);
    let image = image.context("no FLEETINGD_BENCH_IMAGE; hint: ./dev bench")?;
    let tap = Tap::create()?;
    let machine = Machine {
        memory_mib: 1024,
        kernel: guest.local(&guest.kernel)?,
        initrd: guest.local(&guest.initrd)?,
        cmdline: guest::root("LABEL=cloudimg-rootfs"),
        disks: vec![guest.local(&image)?],
        tap: Some(TAP),
        agent: true,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _round in 0..ROUNDS {
        for (vmm, times) in [
            (&Vmm::Embedded { vhost: true }, &mut ours),
            (&QEMU, &mut theirs),
        ] {
            let ready = runtime.block_on(once(vmm, &machine, &tap));
            times.push(ready.with_context(|| format!("{} brought up no worker", vmm.name()))?);
        }
    }
    Ok(vec![
        Row::new("cold boot of a worker to ready", "ms", Better::Lower)
            .value(median(&ours))
            .peer(QEMU.name(), median(&theirs))
            .budget(Budget::Ratio(0.9)),
    ])
}

async fn once(vmm: &Vmm, machine: &Machine, tap: &Tap) -> anyhow::Result<f64> {
    let identity = identity(tap)?;
    let running = vmm.start(machine)?;
    let mut link = AgentLink::new(running.agent()?)?;
    let up = async {
        link.hello().await?;
        link.identify(identity).await?;
        running.raise_link()?;
        link.ready().await?;
        anyhow::Ok(running.started.elapsed().as_secs_f64() * 1e3)
    };
    tokio::time::timeout(PATIENCE, up).await?
}

fn identity(tap: &Tap) -> anyhow::Result<Identity> {
    let (login, host_key) = (
        KeyPair::random(SshKeyType::Ed25519)?,
        KeyPair::random(SshKeyType::Ed25519)?,
    );
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(Identity {
        address: GUEST,
        prefix_len: PREFIX,
        gateway: HOST,
        gateway_mac: tap.mac()?,
        mac: MAC,
        mtu: 1500,
        dns: Vec::new(),
        hostname: "bench".to_owned(),
        machine_id: keys::machine_id(),
        username: "ubuntu".to_owned(),
        authorized_key: Some(login.public_line),
        ssh_host_key: host_key.private_pem.clone(),
        ssh_host_key_name: SshKeyType::Ed25519.host_key_name().to_owned(),
        entropy: keys::entropy(),
        wall_clock_ns: i64::try_from(since.as_nanos())?,
        units: Vec::new(),
    })
}

//! Whom machines reach and who reaches them, by connections that are tried from inside.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};

use anyhow::{Context, ensure};

use crate::outside::{
    HOST_PORT, METADATA, METADATA_PORT, NAME, NEAR, OTHER_HOST_PORT, OTHER_PORT, Outside, PORT,
    PRIVATE, WORLD,
};
use crate::plugin::Machine;
use crate::story::Story;
use crate::{host, say};

/// Tries all at once, so that what is dropped costs one time-out. Prints `HOST:PORT open` or `shut`.
const PROBE: &str = r#"
import socket, sys, threading

def probe(service):
    host, port = service.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 15).close()
        sys.stdout.write(service + " open\n")
    except OSError:
        sys.stdout.write(service + " shut\n")

for service in sys.argv[1:]:
    threading.Thread(target=probe, args=(service,)).start()
"#;

/// A name that a host with internet resolves.
const PUBLIC_NAME: &str = "deb.debian.org";

pub async fn a_machine_reaches_the_world_and_nothing_nearer(
    story: &mut Story,
) -> anyhow::Result<()> {
    let neighbour = story.machine(1)?.address;
    let stranger = story.apart()?.address;
    let uplink = uplink_address()?;
    let open = vec![service(WORLD, PORT), service(WORLD, OTHER_PORT)];
    let gateways = [story.machine(0)?.gateway, story.machine(1)?.gateway];
    let mut shut: Vec<SocketAddr> = PRIVATE.iter().map(|a| service(*a, PORT)).collect();
    shut.push(service(METADATA, METADATA_PORT));
    for address in gateways.into_iter().chain([uplink, NEAR]) {
        shut.push(service(address, HOST_PORT));
        shut.push(service(address, OTHER_HOST_PORT));
    }
    shut.extend([service(neighbour, 22), service(stranger, 22)]);
    let machine = story.machines.first_mut().context("no machine")?;
    check(&story.outside, machine, &open, &shut).await?;
    for address in [neighbour, stranger] {
        machine
            .run(&format!("! ping -c 2 -i 0.2 -W 5 {address}"))
            .await?;
    }
    say(format_args!(
        "  {} open, {} kept shut: private ranges, metadata, the host's own, other machines; no ping \
         to {neighbour} and {stranger}",
        open.len(),
        shut.len()
    ));
    Ok(())
}

pub async fn what_the_config_allows_is_open_and_nothing_beside_it(
    story: &mut Story,
) -> anyhow::Result<()> {
    let [service_only, network, ..] = PRIVATE;
    let gateway = story.apart()?.gateway;
    let open = vec![
        service(service_only, PORT),
        service(network, PORT),
        service(network, OTHER_PORT),
        service(gateway, OTHER_HOST_PORT),
        service(WORLD, PORT),
    ];
    let mut shut = vec![
        service(service_only, OTHER_PORT),
        // Metadata addresses are never opened, though allow_private names them.
        service(METADATA, METADATA_PORT),
        service(gateway, HOST_PORT),
        service(uplink_address()?, HOST_PORT),
        service(story.machine(0)?.address, 22),
    ];
    shut.extend(PRIVATE.iter().skip(2).map(|a| service(*a, PORT)));
    let (_plugin, machine) = story.apart.as_mut().context("no other plugin")?;
    check(&story.outside, machine, &open, &shut).await?;
    let answer = machine.run(&format!("getent ahostsv4 {NAME}")).await?;
    ensure!(answer.contains(&WORLD.to_string()), "{NAME} is {answer}");
    say(format_args!(
        "  {} open by allow_private and allow_host, {} kept shut; a private resolver of vm_dns answers",
        open.len() - 1,
        shut.len()
    ));
    Ok(())
}

pub async fn nobody_outside_reaches_a_machine(story: &mut Story) -> anyhow::Result<()> {
    let machine = service(story.machine(0)?.address, 22);
    // The session that is open already came from the host, which may.
    ensure!(
        !story.outside.reaches(machine)?,
        "{machine} is reached from outside"
    );
    ensure!(
        story.outside.reaches(service(NEAR, HOST_PORT))?,
        "the outside reaches nothing at all"
    );
    let resolves = (PUBLIC_NAME, 80).to_socket_addrs().is_ok();
    if resolves {
        let machine = story.machine(0)?;
        machine
            .run(&format!("getent ahostsv4 {PUBLIC_NAME}"))
            .await?;
    }
    say(format_args!(
        "  {machine} cannot be reached from outside; {PUBLIC_NAME} {}",
        if resolves {
            "resolves in it"
        } else {
            "does not resolve on this host either"
        }
    ));
    Ok(())
}

/// Tries services from a machine; each works from the host itself.
async fn check(
    outside: &Outside,
    machine: &mut Machine,
    open: &[SocketAddr],
    shut: &[SocketAddr],
) -> anyhow::Result<()> {
    outside.answers(open)?;
    outside.answers(shut)?;
    outside.accepted.clear();
    probe(machine, open, shut).await?;
    for service in open.iter().filter(|service| service.ip() == WORLD) {
        let by = outside.accepted.by(*service);
        ensure!(
            by.iter().all(|peer| *peer == NEAR),
            "{service} saw {by:?}, not the masqueraded {NEAR}"
        );
    }
    for service in shut {
        let by = outside.accepted.by(*service);
        ensure!(by.is_empty(), "{service} was reached by {by:?}");
    }
    Ok(())
}

async fn probe(
    machine: &mut Machine,
    open: &[SocketAddr],
    shut: &[SocketAddr],
) -> anyhow::Result<()> {
    let wanted: BTreeMap<String, &str> = open
        .iter()
        .map(|service| (service.to_string(), "open"))
        .chain(shut.iter().map(|service| (service.to_string(), "shut")))
        .collect();
    let services: Vec<&str> = wanted.keys().map(String::as_str).collect();
    let output = machine.python(PROBE, &services).await?;
    let found: BTreeMap<String, &str> = output
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(service, how)| (service.to_owned(), how))
        .collect();
    let wrong: Vec<String> = wanted
        .iter()
        .filter(|(service, how)| found.get(*service) != Some(how))
        .map(|(service, how)| format!("{service} is not {how}"))
        .collect();
    ensure!(
        wrong.is_empty(),
        "from {}: {}",
        machine.id,
        wrong.join(", ")
    );
    Ok(())
}

fn service(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((address, port))
}

/// The host's address on the interface of its default route.
fn uplink_address() -> anyhow::Result<Ipv4Addr> {
    let text = host::run("ip -4 route get 192.0.2.1")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "src");
    let address = words.nth(1).context("the default route has no source")?;
    Ok(address.parse()?)
}

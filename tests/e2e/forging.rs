//! A machine that lies about who it is: each frame leaves it, and none gets any further.

use anyhow::{Context, ensure};

use crate::capture::Capture;
use crate::host::{self, eventually};
use crate::outside::{NAMESPACE, NEAR, WORLD};
use crate::story::Story;
use crate::{PATIENCE, say};

/// What [`PROGRAM`] forges; two honest frames follow.
const FORGED: [&str; 12] = [
    "e2e:neighbours-address",
    "e2e:foreign-address",
    "e2e:forged-mac",
    "e2e:neighbours-echo",
    "e2e:hosts-address",
    "e2e:vlan",
    "e2e:dhcp-server",
    "e2e:arp-neighbour",
    "e2e:arp-gateway",
    "e2e:arp-mac",
    "e2e:ipv6",
    "e2e:router",
];
const HONEST_ECHO: &str = "e2e:honest-echo";
const HONEST_PACKET: &str = "e2e:honest-packet";
const PROGRAM: &str = include_str!("forge.py");

pub async fn forged_frames_go_no_further_than_the_tap(story: &mut Story) -> anyhow::Result<()> {
    let table = story.main.table();
    let other = story.machine(1)?.address.to_string();
    let machine = story.machine(0)?;
    let (tap, gateway) = (machine.tap.clone(), machine.gateway.to_string());
    let neighbours = host::run("ip neighbour show nud permanent")?;
    let dropped = host::dropped_packets(&table, &tap)?;
    let near = Capture::start(None)?;
    let far = Capture::start(Some(NAMESPACE))?;

    let gateway_mac = std::fs::read_to_string(format!("/sys/class/net/{tap}/address"))?;
    let mac = machine
        .run("cat /sys/class/net/*/address | grep -v 00:00:00:00:00:00")
        .await?;
    let address = machine.address.to_string();
    let world = WORLD.to_string();
    let arguments = [&mac, &address, gateway_mac.trim(), &gateway, &other, &world];
    machine.python(PROGRAM, &arguments).await?;

    // Frames keep their order: when the last one is there, the others will not come any more.
    eventually("the honest packet arrives", PATIENCE, || {
        Ok(!far.seen(HONEST_PACKET).is_empty())
    })
    .await?;
    eventually("the honest echo is answered", PATIENCE, || {
        Ok(near
            .seen(HONEST_ECHO)
            .iter()
            .any(|frame| is_echo_reply(frame)))
    })
    .await?;
    let honest = far.seen(HONEST_PACKET);
    let source = honest.first().and_then(|frame| frame.get(26..30));
    ensure!(
        source == Some(&NEAR.octets()),
        "the honest packet came from {source:?}, not masqueraded"
    );
    for mark in FORGED {
        let sent = near.seen(mark);
        ensure!(!sent.is_empty(), "{mark} never left the machine");
        ensure!(
            !sent.iter().any(|frame| is_echo_reply(frame)),
            "the host answered {mark}"
        );
        ensure!(far.seen(mark).is_empty(), "{mark} reached the outside");
    }
    let dropped = host::dropped_packets(&table, &tap)? - dropped;
    let forged = u64::try_from(FORGED.len())?;
    ensure!(
        dropped >= forged,
        "{dropped} of {forged} frames were dropped"
    );
    let now = host::run("ip neighbour show nud permanent")?;
    ensure!(now == neighbours, "neighbours were {neighbours}, are {now}");
    let sent = host::sent_packets(&table, &tap)?.context("no counter in dropnottap")?;
    ensure!(sent > 0, "dropnottap counted nothing for {tap}");
    say(format_args!(
        "  {forged} forged frames seen at {tap}, {dropped} dropped there, none forwarded or answered; \
         an honest one came masqueraded; dropnottap counted {sent} packets"
    ));
    Ok(())
}

/// Ethernet, IPv4 without options, ICMP type 0.
fn is_echo_reply(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&1) && frame.get(34) == Some(&0)
}

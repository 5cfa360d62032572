//! What an operator sees, to the letter.

use super::*;
use crate::pool::status::Told;
use crate::pool::{Boots, Spent};

fn group() -> GroupStatus {
    let spent = |seconds, longest_seconds| Spent {
        seconds,
        longest_seconds,
    };
    let phases = [("login", spent(0.5, 0.3)), ("total", spent(4.0, 2.5))];
    let boots = Boots {
        count: 2,
        phases: phases.map(|(name, s)| (name.to_owned(), s)).into(),
    };
    let one = |name: &str, count| BTreeMap::from([(name.to_owned(), count)]);
    GroupStatus {
        group: "ci".to_owned(),
        program_version: "0.1.0".to_owned(),
        pid: 77,
        uptime_s: 7300,
        store: "/var/lib/fleetingd".into(),
        max_size: 63,
        occupied: 2,
        host_memory: "enough".to_owned(),
        image: ImageStatus {
            generation: Some("0123456789abcdef".to_owned()),
            pinned: false,
            phase: "prebuild".to_owned(),
            phase_s: 75,
            detail: "apt \u{1b}[2Jupgrade".to_owned(),
            last_error: Some(Told {
                at: 940,
                text: "no space".to_owned(),
            }),
            checked_at: Some(10),
        },
        instances: vec![
            InstanceStatus {
                id: "ci-aaaaaaaaaa".to_owned(),
                state: "running".to_owned(),
                phase: "running".to_owned(),
                age_s: 61,
                address: Some([172, 16, 120, 2].into()),
                generation: Some("0123456789abcdef".to_owned()),
                disk_delta_bytes: 3 << 20,
                memory_bytes: 512 << 20,
            },
            InstanceStatus {
                id: "ci-aaaaaaaaab".to_owned(),
                state: "deleted".to_owned(),
                phase: String::new(),
                age_s: 5,
                address: None,
                generation: None,
                disk_delta_bytes: 0,
                memory_bytes: 0,
            },
        ],
        counters: Counts {
            asked: 4,
            accepted: 3,
            boots: BTreeMap::from([("cold".to_owned(), boots)]),
            failures: one("agent", 1),
            ends: BTreeMap::new(),
            images: one("checked", 1),
        },
        dropped_packets: one("from_guest", 9),
    }
}

#[test]
fn a_group_is_shown_in_aligned_lines() {
    let expected = "\
group ci: 2 of 63 slots, plugin 0.1.0 (pid 77) up 2h1m, host memory enough
image 0123456789ab: prebuild since 1m15s: apt  [2Jupgrade
  failed 1m0s ago: no space
INSTANCE       STATE    PHASE    AGE   ADDRESS       IMAGE         DISK     MEMORY
ci-aaaaaaaaaa  running  running  1m1s  172.16.120.2  0123456789ab  3.0 MiB  512 MiB
ci-aaaaaaaaab  deleted  -        5s    -             -             0        0
since the start: 4 asked for, 3 accepted
  2 cold boots; seconds mean/longest: login 0.250/0.300, total 2.000/2.500
  failed starts: agent 1
  image tasks: checked 1
dropped packets: from_guest 9
";
    assert_eq!(show(&group(), 1000), expected);
}

#[test]
fn an_idle_image_says_when_it_was_checked_and_a_first_one_that_it_is_not_there() {
    let mut group = group();
    group.image.phase = "idle".to_owned();
    group.image.detail.clear();
    group.image.last_error = None;
    group.image.pinned = true;
    let text = show(&group, 1010);
    assert!(text.contains("image 0123456789ab (pinned): idle, checked 16m40s ago\n"));
    group.image.generation = None;
    assert!(show(&group, 1010).contains("image none yet"));
}

#[test]
fn what_is_asked_over_the_socket_comes_back_whole() {
    let sent = group();
    let text = serde_json::to_string(&sent).unwrap();
    assert_eq!(serde_json::from_str::<GroupStatus>(&text).unwrap(), sent);
}

#[test]
fn a_host_without_plugins_has_none_to_ask() {
    let dir = tempfile::tempdir().unwrap();
    let (groups, failures) = ask_all(&dir.path().join("absent")).unwrap();
    assert!(groups.is_empty() && failures.is_empty());
}

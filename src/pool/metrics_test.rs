//! The file as node_exporter reads it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt, symlink};

use super::super::counters::{Boots, Spent};
use super::super::status::{ImageStatus, InstanceStatus};
use super::*;

fn status() -> GroupStatus {
    let spent = Spent {
        seconds: 2.5,
        longest_seconds: 2.0,
    };
    let boots = Boots {
        count: 2,
        phases: BTreeMap::from([("login".to_owned(), spent)]),
    };
    let one = |name: &str| BTreeMap::from([(name.to_owned(), 3)]);
    GroupStatus {
        group: "ci".to_owned(),
        program_version: "0.1.0".to_owned(),
        pid: 1,
        uptime_s: 5,
        store: "/s".into(),
        max_size: 63,
        occupied: 1,
        host_memory: "enough".to_owned(),
        image: ImageStatus {
            generation: Some("abc".to_owned()),
            phase: IDLE.to_owned(),
            checked_at: Some(1_800_000_000),
            ..ImageStatus::default()
        },
        instances: vec![InstanceStatus {
            id: "ci-a".to_owned(),
            state: "running".to_owned(),
            phase: "running".to_owned(),
            age_s: 1,
            address: None,
            generation: None,
            disk_delta_bytes: 7,
            memory_bytes: 9,
        }],
        counters: super::super::counters::Counts {
            asked: 5,
            accepted: 4,
            boots: BTreeMap::from([("cold".to_owned(), boots)]),
            failures: one("agent"),
            ends: one("stopped"),
            images: one("good"),
        },
        dropped_packets: one("from_guest"),
    }
}

#[test]
fn every_sample_has_a_help_a_type_and_the_group() {
    let page = render(&status());
    let mut declared = BTreeSet::new();
    let mut samples = 0;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(declared.insert(name.to_owned()), "{name} is declared twice");
            assert!(page.contains(&format!("# HELP {name} ")), "{line}");
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_once('{').unwrap();
            assert!(
                name.starts_with("fleetingd_") && declared.contains(name),
                "{line}"
            );
            let (labels, value) = rest.split_once("} ").unwrap();
            assert!(labels.starts_with("group=\"ci\""), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            samples += 1;
        }
    }
    assert!(samples > 15, "{page}");
    for sample in [
        "fleetingd_slots{group=\"ci\"} 63\n",
        "fleetingd_instances{group=\"ci\",state=\"running\"} 1\n",
        "fleetingd_boot_phase_seconds_total{group=\"ci\",kind=\"cold\",phase=\"login\"} 2.5\n",
        "fleetingd_dropped_packets_total{group=\"ci\",chain=\"from_guest\"} 3\n",
    ] {
        assert!(page.contains(sample), "{sample}in\n{page}");
    }
}

#[test]
fn a_label_keeps_its_quotes_to_itself() {
    assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
}

#[test]
fn the_file_is_replaced_whole_readable_by_all_and_never_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fleetingd.prom");
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let temp = format!(".fleetingd.prom.{}", std::process::id());
    symlink(&victim, dir.path().join(temp)).unwrap();
    for text in ["one\n", "two\n"] {
        write(&path, text).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "nothing is left"
    );
    assert!(write(&dir.path().join("absent/x.prom"), "").is_err());
}

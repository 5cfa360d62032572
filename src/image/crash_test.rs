//! A process that is killed before any change it makes on disk leaves the old state or the new.
//!
//! The test starts itself again as a child that builds, seals, promotes and tidies up, and has
//! the n-th change of that kill it; for every n there is.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::testing::{disk_with, inputs, net, plain_root, unpack, write_into_root};
use super::{BuildInputs, Generation, Store, fault};
use crate::testing::run;

/// Where the child works.
const DIR: &str = "FLEETINGD_CRASH_TEST";
const RESULT: &str =
    r#"{"version": 1, "success": true, "reason": "", "commands": [], "warnings": []}"#;
const GROUP: &str = "g";
const NOW: u64 = 1_800_000_000;

fn store(dir: &Path) -> Store {
    Store::open(&dir.join("store")).unwrap()
}

fn wanted(dir: &Path, disk_gib: u32) -> BuildInputs {
    let mut inputs = inputs(dir, &dir.join("disk.img"));
    inputs.disk_gib = disk_gib;
    inputs
}

/// All that a refresh does on disk, with the test as the guest.
fn refresh(store: &Store, inputs: &BuildInputs) -> Generation {
    let lock = store.try_build_lock().unwrap().unwrap();
    let plan = store.plan(&lock, inputs, &net(), &|_step| {}).unwrap();
    write_into_root(&plan.disk, "/var/lib/fleetingd/prebuild.json", RESULT);
    let generation = store.seal(&lock, plan, &unpack).unwrap();
    store.mark_tested(&generation).unwrap();
    store.promote(GROUP, &generation, 1, NOW).unwrap();
    store.collect_garbage(Some(&lock), NOW).unwrap();
    generation
}

#[test]
#[ignore = "a child of the test below"]
fn child() {
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    refresh(&store(&dir), &wanted(&dir, 3));
}

/// Whether the child was killed at its `n`-th change; it works to its end if there are fewer.
fn killed_at(n: u32, dir: &Path) -> bool {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "image::crash_test::child", "--ignored"])
        .env(DIR, dir)
        .env(fault::AT, n.to_string())
        .output()
        .unwrap();
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{output:?}");
    killed
}

#[test]
fn a_kill_at_each_step_leaves_the_old_generation_or_the_new() {
    let begun = tempfile::tempdir().unwrap();
    let old = {
        disk_with(begun.path(), &plain_root(begun.path()), None);
        let store = store(begun.path());
        refresh(&store, &wanted(begun.path(), 2)).key
    };
    let new = wanted(begun.path(), 3).key(&store(begun.path())).unwrap();
    let mut seen_old = 0;
    let mut seen_new = 0;
    for n in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (begun.path().display(), dir.path().display());
        run(&format!(
            "cp -a --sparse=always {from}/store {from}/disk.img {to}"
        ));
        let killed = killed_at(n, dir.path());
        let store = store(dir.path());
        let record = store.group(GROUP).unwrap();
        let serving = record.serving().unwrap().to_owned();
        match serving.as_str() {
            name if name == old.as_str() => seen_old += 1,
            name if name == new.as_str() => seen_new += 1,
            other => panic!("{other} serves after change {n}"),
        }
        let serving = store.resolve(&serving).unwrap();
        assert!(serving.tested && serving.disk.exists());
        drop(serving);
        // Whatever was left, the next one finishes the work and clears it away.
        let generation = match store.find(&new).unwrap() {
            Some(generation) if generation.tested => {
                store.promote(GROUP, &generation, 1, NOW).unwrap();
                generation
            }
            _ => refresh(&store, &wanted(dir.path(), 3)),
        };
        let lock = store.try_build_lock().unwrap().unwrap();
        store.collect_garbage(Some(&lock), NOW).unwrap();
        assert_eq!(store.generations.names().unwrap(), [new.as_str()]);
        drop(generation);
        if !killed {
            break;
        }
    }
    assert!(
        seen_old > 10 && seen_new > 2,
        "{seen_old} old, {seen_new} new"
    );
}

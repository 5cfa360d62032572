//! What stays, what goes, what serves: over generations that were never booted.

use std::fs;

use tempfile::TempDir;

use super::super::testing::inputs;
use super::super::{BuildInputs, BuildLock};
use super::*;

const NOW: u64 = 1_800_000_000;
const DAY: u64 = 24 * 60 * 60;

struct Bench {
    dir: TempDir,
    store: Store,
    inputs: BuildInputs,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, "0").unwrap();
        Self {
            store: Store::open(&dir.path().join("store")).unwrap(),
            inputs: inputs(dir.path(), &image),
            dir,
        }
    }

    /// As another process has it.
    fn other(&self) -> Store {
        Store::open(&self.dir.path().join("store")).unwrap()
    }

    fn lock(&self) -> BuildLock {
        self.store.try_build_lock().unwrap().unwrap()
    }

    /// A tested generation of the image with this content.
    fn tested(&self, content: &str) -> Generation {
        fs::write(&self.inputs.image, content).unwrap();
        let key = self.inputs.key(&self.store).unwrap();
        let there = self.store.find(&key).unwrap();
        let generation = there.unwrap_or_else(|| self.untested(content));
        self.store.mark_tested(&generation).unwrap();
        self.store.find(&generation.key).unwrap().unwrap()
    }

    fn untested(&self, content: &str) -> Generation {
        fs::write(&self.inputs.image, content).unwrap();
        self.store.forge(&self.lock(), &self.inputs).unwrap()
    }

    /// Promotes and lets go of generations of these contents, one after the other.
    fn serve(&self, group: &str, contents: &[&str]) -> Vec<String> {
        let serve_one = |content: &&str| {
            let generation = self.tested(content);
            self.store.promote(group, &generation, 2, NOW).unwrap();
            generation.key.to_string()
        };
        contents.iter().map(serve_one).collect()
    }

    fn standby(&self, group: &str, any_config: bool) -> Option<String> {
        let record = self.store.group(group).unwrap();
        let lineage = self.inputs.lineage();
        let speaks = |protocol| protocol == 1;
        let found = self.store.standby(&record, &lineage, any_config, &speaks);
        found.unwrap().map(|generation| generation.key.to_string())
    }

    fn there(&self) -> Vec<String> {
        let sealed = self.other().sealed().unwrap();
        sealed.iter().map(|g| g.key.to_string()).collect()
    }
}

#[test]
fn the_last_ones_of_each_group_stay_and_the_others_go() {
    let bench = Bench::new();
    let a = bench.serve("a", &["1", "2", "3"]);
    let b = bench.serve("b", &["4"]);
    let gone = bench.store.collect_garbage(None, NOW).unwrap();
    assert_eq!(gone, [a[0].clone()]);
    let there = bench.there();
    assert!(
        [&a[1], &a[2], &b[0]]
            .iter()
            .all(|kept| there.contains(kept))
    );
    // A group whose configuration is gone keeps nothing for ever.
    let later = NOW + 31 * DAY;
    bench
        .store
        .promote("b", &bench.tested("4"), 2, later)
        .unwrap();
    let gone = bench.store.collect_garbage(None, later).unwrap();
    assert_eq!(gone.len(), 2, "{gone:?}");
    assert_eq!(bench.there(), b);
}

#[test]
fn what_serves_again_is_the_last_that_served() {
    let bench = Bench::new();
    let a = bench.serve("a", &["1", "2", "1"]);
    let record = bench.store.group("a").unwrap();
    assert_eq!(record.history, [a[0].clone(), a[1].clone()]);
    assert_eq!(record.serving(), Some(a[0].as_str()));
}

#[test]
fn a_pinned_generation_serves_and_stays_whatever_is_newer() {
    let bench = Bench::new();
    let a = bench.serve("a", &["1", "2", "3"]);
    let first = bench.store.resolve(&a[0][..16]).unwrap();
    bench.store.pin("a", Some(&first)).unwrap();
    drop(first);
    let record = bench
        .store
        .promote("a", &bench.tested("4"), 2, NOW)
        .unwrap();
    assert_eq!(record.serving(), Some(a[0].as_str()));
    assert_eq!(
        bench.store.collect_garbage(None, NOW).unwrap(),
        [a[1].clone()]
    );
    let pinned = |bench: &Bench| {
        let record = bench.store.group("a").unwrap();
        let lineage = bench.inputs.lineage();
        let found = bench.store.pinned(&record, &lineage, &|_| true).unwrap();
        found.map(|g| g.key.to_string())
    };
    assert_eq!(pinned(&bench), Some(a[0].clone()));
    bench.store.pin("a", None).unwrap();
    assert_eq!(pinned(&bench), None);
    assert_ne!(
        bench.store.group("a").unwrap().serving(),
        Some(a[0].as_str())
    );
}

#[test]
fn a_prebuilt_generation_stays_until_it_has_served_and_others_after_it() {
    let bench = Bench::new();
    let served = bench.serve("a", &["1", "2"]);
    let prebuilt = bench.tested("3").key;
    let generation = bench.store.find(&prebuilt).unwrap().unwrap();
    bench.store.keep_prebuilt("a", &generation, NOW).unwrap();
    drop(generation);
    assert_eq!(
        bench.store.group("a").unwrap().serving(),
        Some(served[1].as_str())
    );
    bench.serve("a", &["4", "5"]);
    assert_eq!(bench.store.collect_garbage(None, NOW).unwrap().len(), 2);
    assert!(bench.there().contains(&prebuilt.to_string()));
    bench.serve("a", &["3", "6", "7"]);
    bench.store.collect_garbage(None, NOW).unwrap();
    assert!(!bench.there().contains(&prebuilt.to_string()));
}

#[test]
fn a_rollback_goes_back_one_generation_at_a_time() {
    let bench = Bench::new();
    let a = bench.serve("a", &["1", "2", "3"]);
    let back = || {
        bench
            .store
            .roll_back("a", &|_| true)
            .map(|g| g.key.to_string())
    };
    assert_eq!(back().unwrap(), a[1]);
    assert_eq!(back().unwrap(), a[0]);
    let error = back().unwrap_err().to_string();
    assert!(error.contains("no image that served before"), "{error}");
    let pinned = bench.store.group("a").unwrap().pinned;
    assert_eq!(pinned, Some(a[0].clone()), "a refusal changes nothing");
    assert!(bench.store.roll_back("nobody", &|_| true).is_err());
    bench.store.pin("a", None).unwrap();
    assert!(bench.store.roll_back("a", &|_| false).is_err());
}

#[test]
fn an_image_by_its_first_digits_must_be_one_and_tested() {
    let bench = Bench::new();
    let a = bench.serve("a", &["1", "2"]);
    let refused = |prefix: &str| bench.store.resolve(prefix).unwrap_err().to_string();
    assert!(refused("").contains("several"));
    assert!(refused("x").contains("no image"));
    assert!(refused("../a").contains("no image"));
    let untested = bench.untested("3").key;
    assert!(refused(untested.as_str()).contains("no machine has come up"));
    assert_eq!(bench.store.resolve(&a[1]).unwrap().key.as_str(), a[1]);
}

#[test]
fn a_new_vendor_image_runner_or_program_has_a_standby_and_a_new_configuration_has_none() {
    let mut bench = Bench::new();
    let served = bench.serve("a", &["1"]).remove(0);
    fs::write(&bench.inputs.image, "2").unwrap();
    let runner = bench.dir.path().join("runner");
    fs::write(&runner, "17").unwrap();
    bench.inputs.runner = super::super::RunnerSource::Binary(runner);
    assert_eq!(bench.standby("a", false), Some(served.clone()));
    assert_eq!(bench.standby("renamed", false), Some(served.clone()));
    // An agent that this program does not understand is of no use.
    let record = bench.store.group("a").unwrap();
    let lineage = bench.inputs.lineage();
    let mute = bench
        .store
        .standby(&record, &lineage, true, &|protocol| protocol == 2);
    assert!(mute.unwrap().is_none());

    let base = bench.inputs.clone();
    type Change<'a> = &'a dyn Fn(&mut BuildInputs);
    let asked_for: [Change<'_>; 3] = [
        &|i| i.disk_gib = 3,
        &|i| i.extra_commands = vec!["a".to_owned()],
        &|i| i.setting = "debian:13".to_owned(),
    ];
    for change in asked_for {
        bench.inputs = base.clone();
        change(&mut bench.inputs);
        assert_eq!(bench.standby("a", false), None);
        assert_eq!(bench.standby("a", true), Some(served.clone()), "serve");
        assert_eq!(bench.standby("b", true), None, "another group's");
    }
    // Nobody could log in.
    bench.inputs = base.clone();
    bench.inputs.password = Some("p".to_owned());
    assert_eq!(bench.standby("a", true), None);
}

#[test]
fn a_generation_that_no_machine_came_up_from_is_no_standby() {
    let bench = Bench::new();
    bench.untested("1");
    assert_eq!(bench.standby("a", true), None);
}

#[test]
fn a_record_that_cannot_be_read_is_an_error_and_keeps_everything() {
    let bench = Bench::new();
    bench.serve("a", &["1", "2", "3"]);
    let path = bench.dir.path().join("store/groups/a.json");
    let good = fs::read_to_string(&path).unwrap();
    let newer = good.replace("\"version\": 1", "\"version\": 2");
    for bad in ["{", newer.as_str(), &" ".repeat(70_000)] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(
            bench.store.group("a"),
            Err(ImageError::Record { .. })
        ));
        assert!(bench.store.collect_garbage(None, NOW).is_err());
        assert_eq!(bench.there().len(), 3);
    }
    assert!(bench.store.group("../x").is_err());
}

#[test]
fn builds_that_live_and_generations_in_use_stay_in_every_process() {
    let bench = Bench::new();
    bench.serve("a", &["1", "2", "3"]);
    let used = bench.untested("4");
    bench.store.generations.sub(".build-dead").unwrap();
    let other = bench.other();
    let half = bench.dir.path().join("store/groups/.a.json.1.1");
    fs::write(&half, "{").unwrap();
    let lock = bench.lock();
    assert_eq!(other.collect_garbage(None, NOW).unwrap().len(), 1);
    assert_eq!(bench.there().len(), 3);
    assert!(!half.exists(), "a record that was not finished");
    let gone = bench.store.collect_garbage(Some(&lock), NOW).unwrap();
    assert_eq!(gone, [".build-dead"], "with the right to build");
    drop(used);
    assert_eq!(other.collect_garbage(None, NOW).unwrap().len(), 1);
}

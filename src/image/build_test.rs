//! Whole builds on tiny disks: the test plays the guest by writing into the disk.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::super::testing::{
    Text, disk_with, ext4, inputs, net, plain_root, unpack, write_into_root,
};
use super::*;
use crate::testing::run;

const RESULT: &str = "/var/lib/fleetingd/prebuild.json";

struct Bench {
    dir: TempDir,
    store: Store,
    inputs: BuildInputs,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = disk_with(dir.path(), &plain_root(dir.path()), None);
        Self {
            store: Store::open(&dir.path().join("store")).unwrap(),
            inputs: inputs(dir.path(), &image),
            dir,
        }
    }

    fn lock(&self) -> BuildLock {
        self.store.try_build_lock().unwrap().unwrap()
    }

    fn plan(&self, lock: &BuildLock) -> BuildPlan {
        let plan = self.store.plan(lock, &self.inputs, &net(), &|_step| {});
        plan.unwrap()
    }

    /// Plans, lets a guest that wrote this result (and log) power off, and seals.
    fn build(&self, result: &str, log: &str) -> Result<Generation, ImageError> {
        let lock = self.lock();
        let plan = self.plan(&lock);
        if !result.is_empty() {
            write_into_root(&plan.disk, RESULT, result);
            write_into_root(&plan.disk, "/var/lib/fleetingd/prebuild.log", log);
        }
        self.store.seal(&lock, plan, &unpack)
    }

    /// What is left in generations/.
    fn left(&self) -> Vec<String> {
        self.store.generations.names().unwrap()
    }
}

fn success(commands: &str) -> String {
    format!(
        r#"{{"version": 1, "success": true, "reason": "", "commands": [{commands}], "warnings": ["w"]}}"#
    )
}

#[test]
fn a_build_that_succeeded_is_found_by_its_key() {
    let bench = Bench::new();
    let key = bench.inputs.key(&bench.store).unwrap();
    assert!(bench.store.find(&key).unwrap().is_none());
    let sealed = bench.build(&success(""), "").unwrap();
    assert_eq!(sealed.key, key);
    assert_eq!(sealed.warnings, ["w"]);
    assert!(!sealed.tested);

    let found = bench.store.find(&key).unwrap().unwrap();
    assert_eq!(fs::read(&found.kernel).unwrap(), b"unpacked kernel 9");
    assert_eq!(
        fs::read(found.initrd.as_ref().unwrap()).unwrap(),
        b"initrd 9"
    );
    assert_eq!(found.root, sealed.root);
    assert_eq!(found.kernel_release, "6.1.0-9-cloud");
    assert_eq!(
        found.open_disk().unwrap().metadata().unwrap().len(),
        2 << 30
    );
    assert!(!found.dir.join(SEED).exists(), "the seed holds secrets");
    bench.store.mark_tested(&found).unwrap();
    assert!(bench.store.find(&key).unwrap().unwrap().tested);
    assert_eq!(bench.left(), [key.as_str()]);
}

#[test]
fn the_seed_holds_what_the_guest_needs() {
    let mut bench = Bench::new();
    let runner = bench.dir.path().join("runner");
    fs::write(&runner, "the runner").unwrap();
    bench.inputs.runner = RunnerSource::Binary(runner);
    bench.inputs.password = Some("pass:word".to_owned());
    bench.inputs.extra_commands = vec!["echo a".to_owned(), "[b, c d]".to_owned()];
    let lock = bench.lock();
    let plan = bench.plan(&lock);
    let seed = plan.seed.display();
    let file = |name: &str| run(&format!("mtype -i {seed} ::{name}"));
    assert_eq!(file("fleetingd"), "the agent");
    assert_eq!(file("gitlab-runner"), "the runner");
    assert_eq!(file("command-1.sh"), "echo a\n");
    assert_eq!(file("command-2.sh"), "'b' 'c d'\n");
    assert_eq!(file("password"), "ubuntu:pass:word\n");
    assert!(file("meta-data").starts_with("instance-id: fleetingd-"));
    assert!(file("user-data").starts_with("#cloud-config\n"));
    assert!(!file("user-data").contains("pass:word"));
    let mode = fs::metadata(&plan.seed).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o600
    );
}

#[test]
fn kernel_and_initrd_are_those_that_the_prebuild_left() {
    let bench = Bench::new();
    let lock = bench.lock();
    let plan = bench.plan(&lock);
    assert_eq!(fs::read(&plan.kernel).unwrap(), b"kernel 9");
    for (path, text) in [
        ("/boot/vmlinuz-6.1.0-10-cloud", "kernel 10"),
        ("/boot/initrd.img-6.1.0-10-cloud", "initrd 10"),
        (RESULT, &success("")),
    ] {
        write_into_root(&plan.disk, path, text);
    }
    let disk = plan.disk.display();
    let start = super::super::testing::ROOT_START;
    let script = bench.dir.path().join("commands");
    fs::write(&script, "mkdir /usr/lib/modules/6.1.0-10-cloud\n").unwrap();
    let script = script.display();
    run(&format!("debugfs -w -f {script} {disk}?offset={start}"));
    let sealed = bench.store.seal(&lock, plan, &unpack).unwrap();
    assert_eq!(sealed.kernel_release, "6.1.0-10-cloud");
    assert_eq!(fs::read(&sealed.kernel).unwrap(), b"unpacked kernel 10");
    assert_eq!(fs::read(sealed.initrd.unwrap()).unwrap(), b"initrd 10");
}

#[test]
fn a_kernel_that_cannot_be_unpacked_is_kept_packed() {
    let bench = Bench::new();
    let lock = bench.lock();
    let plan = bench.plan(&lock);
    write_into_root(&plan.disk, RESULT, &success(""));
    let refuse = |_: &[u8]| Err(io::Error::other("an odd format"));
    let sealed = bench.store.seal(&lock, plan, &refuse).unwrap();
    assert_eq!(fs::read(&sealed.kernel).unwrap(), b"kernel 9");
}

#[test]
fn a_missing_or_damaged_success_marker_is_told_with_the_console() {
    let bench = Bench::new();
    for (result, told) in [
        ("", "no result file"),
        ("{\"version\"", "damaged"),
        ("{\"version\": 9, \"success\": true}", "another version"),
    ] {
        let error = bench.build(result, "").unwrap_err().to_string();
        assert!(error.contains("success marker"), "{error}");
        assert!(error.contains(told), "{error}");
        assert!(error.contains("fleetingd0_console"), "{error}");
        assert_eq!(bench.left(), Vec::<String>::new());
    }
}

#[test]
fn a_failed_command_is_named_with_its_code_and_its_last_lines() {
    let mut bench = Bench::new();
    bench.inputs.extra_commands = vec!["true".to_owned(), "apt-get install nonsense".to_owned()];
    let result = r#"{"version": 1, "success": false, "reason": "r", "commands": [0, 100]}"#;
    let lines: String = (0..40).map(|n| format!("line {n}\n")).collect();
    let log = format!(
        "x\n[fleetingd: command 1]\nfirst\n[fleetingd: command 2]\n{lines}E: \x1b[1mno package\n[fleetingd: command 2 exited with 100]\nlater\n"
    );
    let error = bench.build(result, &log).unwrap_err().to_string();
    let told = "command 2 of vm_prebuild_cloudinit_extra_cmds failed with exit code 100: apt-get install nonsense";
    assert!(error.starts_with(told), "{error}");
    assert!(
        error.contains("  line 39\n  E:  [1mno package\nhint:"),
        "{error}"
    );
    assert!(!error.contains("line 20"), "{error}");
    assert!(
        !error.contains("first") && !error.contains("later"),
        "{error}"
    );

    bench.inputs.on_command_error = PrebuildOnError::Continue;
    let sealed = bench.build(&success("0, 100"), &log).unwrap();
    let warning = "command 2 failed with exit code 100: apt-get install nonsense";
    assert_eq!(sealed.warnings, ["w", warning]);
}

#[test]
fn commands_that_were_not_reached_are_a_warning() {
    let mut bench = Bench::new();
    bench.inputs.extra_commands = vec!["exit 0".to_owned(), "echo x".to_owned()];
    let sealed = bench.build(&success("0, null"), "").unwrap();
    assert!(sealed.warnings[1].starts_with("command 2 was not run"));
}

#[test]
fn the_reason_of_a_failed_prebuild_is_cleaned_and_told() {
    let bench = Bench::new();
    let reason = format!("sshd\\u001b[31m\\n{}", "x".repeat(5000));
    let result = format!(r#"{{"version": 1, "success": false, "reason": "{reason}"}}"#);
    let error = bench.build(&result, "").unwrap_err().to_string();
    assert!(
        error.starts_with("the prebuild failed: sshd [31m xxx"),
        "{error}"
    );
    assert!(error.len() < 700, "{}", error.len());
}

#[test]
fn a_damaged_generation_is_not_found_and_built_again() {
    let bench = Bench::new();
    let sealed = bench.build(&success(""), "").unwrap();
    let (key, dir) = (sealed.key.clone(), sealed.dir.clone());
    let found = || bench.store.find(&key).unwrap().is_some();
    let manifest = fs::read_to_string(dir.join("manifest.json")).unwrap();
    for broken in [
        manifest.replace("\"version\": 2", "\"version\": 1"),
        manifest.replace(key.as_str(), "another"),
        manifest.replace("vmlinuz", "../../x"),
        manifest[..manifest.len() / 2].to_owned(),
        String::new(),
    ] {
        assert_ne!(broken, manifest);
        fs::write(dir.join("manifest.json"), broken).unwrap();
        assert!(!found());
    }
    fs::write(dir.join("manifest.json"), &manifest).unwrap();
    assert!(found());
    let initrd = fs::read(dir.join("initrd")).unwrap();
    fs::write(dir.join("initrd"), "short").unwrap();
    assert!(!found());
    fs::write(dir.join("initrd"), initrd).unwrap();
    assert!(found());
    fs::remove_file(dir.join("vmlinux")).unwrap();
    assert!(!found());

    // Machines may still run on the damaged one; a new one takes its name.
    let again = bench.build(&success(""), "").unwrap();
    assert!(found());
    assert_eq!(again.dir, dir);
    drop(sealed);
    assert_eq!(bench.left().len(), 2);
    let lock = bench.lock();
    let gone = bench.store.collect_garbage(Some(&lock), 0).unwrap();
    assert!(gone[0].starts_with(".old-"), "{gone:?}");
    assert_eq!(bench.left(), [key.as_str()]);
}

#[test]
fn what_a_crash_left_is_ignored_and_collected() {
    let bench = Bench::new();
    let key = bench.inputs.key(&bench.store).unwrap();
    let at = |name: &str| bench.store.generations.at(name);
    // Each step of a build, as a process that was killed there leaves it.
    let half = [
        (".build-1", vec![]),
        (".build-2", vec!["disk.raw"]),
        (
            ".build-3",
            vec!["disk.raw", "vmlinuz", "initrd", "seed.img"],
        ),
        (
            ".build-4",
            vec!["disk.raw", "vmlinuz", "vmlinux", ".manifest.json.7"],
        ),
        (".build-5", vec!["disk.raw", "vmlinuz", "manifest.json"]),
        (".old-6", vec!["disk.raw", "vmlinuz", "manifest.json"]),
    ];
    for (name, files) in &half {
        bench.store.generations.sub(name).unwrap();
        for file in files {
            fs::write(at(name).join(file), "x").unwrap();
        }
    }
    assert!(bench.store.find(&key).unwrap().is_none());
    // A build that lives is left alone, even by its own process.
    let lock = bench.lock();
    let plan = bench.plan(&lock);
    let gone = bench.store.collect_garbage(Some(&lock), 0).unwrap();
    assert_eq!(gone.len(), half.len());
    assert!(plan.disk.exists() && plan.seed.exists());
    drop(plan);
    assert_eq!(bench.left(), Vec::<String>::new());
}

#[test]
fn a_generation_in_use_is_not_collected() {
    let mut bench = Bench::new();
    let old = bench.build(&success(""), "").unwrap();
    bench.inputs.disk_gib = 3;
    let new = bench.build(&success(""), "").unwrap();
    let lock = bench.lock();
    let other_process = Store::open(bench.store.path()).unwrap();
    let collect = || other_process.collect_garbage(Some(&lock), 0).unwrap();
    let clone = old.clone();
    drop(old);
    assert_eq!(collect(), Vec::<String>::new());
    drop(clone);
    assert_eq!(collect().len(), 1);
    assert!(new.disk.exists());
}

#[test]
fn an_image_whose_first_boot_could_not_work_fails_before_it() {
    let mut bench = Bench::new();
    let root = ext4(
        bench.dir.path(),
        "nokernel",
        16,
        &[("etc/os-release", Text(""))],
    );
    bench.inputs.image = disk_with(bench.dir.path(), &root, None);
    let lock = bench.lock();
    let plan = bench.store.plan(&lock, &bench.inputs, &net(), &|_| {});
    let error = plan.unwrap_err().to_string();
    assert!(error.contains("no kernel"), "{error}");
    assert_eq!(bench.left(), Vec::<String>::new());
    bench.inputs.image = Path::new("/nonexistent").to_owned();
    let error = bench.inputs.key(&bench.store).unwrap_err().to_string();
    assert!(error.contains("vm_image /nonexistent"), "{error}");
}

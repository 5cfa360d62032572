//! Who may build, what a key depends on, and folders that somebody prepared for us.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use super::super::testing::inputs;
use super::super::{BuildInputs, PrebuildOnError, RunnerSource};
use super::*;

#[test]
fn a_key_depends_on_what_a_generation_is_made_of_and_on_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let image = dir.path().join("image");
    let runner = dir.path().join("runner");
    fs::write(&image, "image").unwrap();
    fs::write(&runner, "runner").unwrap();
    let base = inputs(dir.path(), &image);
    let key = |inputs: &BuildInputs| inputs.key(&store).unwrap();
    let first = key(&base);
    assert_eq!(first.as_str().len(), 64);
    assert_eq!(key(&base), first);

    type Change<'a> = &'a dyn Fn(&mut BuildInputs);
    let mut changes: Vec<GenerationKey> = Vec::new();
    let differs: [Change<'_>; 8] = [
        &|i| i.disk_gib = 3,
        &|i| i.username = "root".to_owned(),
        &|i| i.password = Some("p".to_owned()),
        &|i| i.extra_commands = vec!["a".to_owned()],
        &|i| i.extra_commands = vec!["a".to_owned(), "b".to_owned()],
        &|i| i.on_command_error = PrebuildOnError::Continue,
        &|i| i.runner = RunnerSource::Binary(runner.clone()),
        &|i| i.agent_protocol = 2,
    ];
    for change in differs {
        let mut inputs = base.clone();
        change(&mut inputs);
        changes.push(key(&inputs));
    }
    fs::write(&runner, "runner of another version").unwrap();
    let mut inputs = base.clone();
    inputs.runner = RunnerSource::Binary(runner.clone());
    changes.push(key(&inputs));
    fs::write(&image, "another image").unwrap();
    changes.push(key(&base));
    changes.push(first.clone());
    let different: std::collections::HashSet<_> = changes.iter().collect();
    assert_eq!(different.len(), changes.len());

    // The program and the image's place are no inputs.
    fs::write(&image, "image").unwrap();
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&image, &elsewhere).unwrap();
    let mut inputs = base.clone();
    inputs.image = elsewhere;
    inputs.agent = Arc::new(File::open(&runner).unwrap());
    assert_eq!(key(&inputs), first);
}

#[test]
fn a_content_is_hashed_once_until_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let path = dir.path().join("image");
    fs::write(&path, "one").unwrap();
    let hash = || {
        store
            .hashes()
            .content_hash(&path, &File::open(&path).unwrap())
    };
    let first = hash().unwrap();
    // Planted in memory: an answer from there is no reading.
    let remembered = dir.path().join("store/images/hashes.json");
    let text = fs::read_to_string(&remembered).unwrap();
    fs::write(&remembered, text.replace(&first, "planted")).unwrap();
    assert_eq!(hash().unwrap(), "planted");
    fs::write(&path, "two").unwrap();
    let second = hash().unwrap();
    assert!(second != "planted" && second != first);
    // A damaged memory is an empty one.
    fs::write(&remembered, "[{").unwrap();
    assert_eq!(hash().unwrap(), second);
    assert!(!fs::read_to_string(&remembered).unwrap().contains("planted"));
}

#[test]
fn names_and_passwords_that_would_reach_a_shell_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = inputs(dir.path(), dir.path());
    for name in [
        "",
        "Root",
        "a b",
        "-a",
        "a;b",
        "0a",
        "ä",
        &"a".repeat(33),
        "$(x)",
    ] {
        let mut inputs = base.clone();
        inputs.username = name.to_owned();
        assert!(inputs.check().is_err(), "{name}");
    }
    for name in ["root", "_a", "ci-runner_2", &"a".repeat(32)] {
        let mut inputs = base.clone();
        inputs.username = name.to_owned();
        inputs.check().unwrap();
    }
    let mut inputs = base.clone();
    inputs.password = Some("a\nroot:x".to_owned());
    assert!(inputs.check().is_err());
}

#[test]
fn one_process_builds_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let (a, b) = (Store::open(&path).unwrap(), Store::open(&path).unwrap());
    let lock = a.try_build_lock().unwrap().unwrap();
    assert!(b.try_build_lock().unwrap().is_none());
    drop(lock);
    let lock = b.try_build_lock().unwrap().unwrap();
    let other = Store::open(&dir.path().join("other")).unwrap();
    assert!(matches!(
        other.check_lock(&lock),
        Err(ImageError::ForeignLock)
    ));
}

#[test]
fn folders_are_flocked_while_the_store_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open(&path).unwrap();
    let names = [
        "",
        "images",
        "generations",
        "groups",
        "snapshots",
        ".instance_data",
    ];
    let lockable = |name: &str| {
        let folder = File::open(path.join(name)).unwrap();
        flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
    };
    assert!(names.iter().all(|name| !lockable(name)));
    drop(store);
    assert!(names.iter().all(|name| lockable(name)));
}

#[test]
fn a_store_that_others_could_redirect_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path| {
        let error = Store::open(path).unwrap_err().to_string();
        assert!(error.contains("hint:"), "{error}");
        error
    };
    let open = dir.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(refused(&open).contains("others can write"));
    assert!(refused(&open.join("below")).contains("others can write"));
    // The sticky bit keeps others from renaming what is ours.
    fs::set_permissions(&open, fs::Permissions::from_mode(0o1777)).unwrap();
    Store::open(&open.join("below")).unwrap();

    let link = dir.path().join("link");
    symlink(dir.path(), &link).unwrap();
    refused(&link);
    // A link on the way is followed where it is ours, and not where its owner could turn it.
    Store::open(&link.join("through")).unwrap();
    std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
    assert!(refused(&link.join("through")).contains("of user 12345"));
    assert!(refused(&link.join("new/store")).contains("of user 12345"));
    assert!(!dir.path().join("new").exists());
    refused(Path::new("relative/store"));
    refused(&dir.path().join("a/../b"));
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    refused(&file);
}

#[test]
fn symbolic_links_inside_the_store_lead_nowhere() {
    for name in [
        "images",
        "generations",
        "groups",
        ".instance_data",
        "snapshots",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::create_dir(&victim).unwrap();
        let store = dir.path().join("store");
        fs::create_dir(&store).unwrap();
        symlink(&victim, store.join(name)).unwrap();
        let error = Store::open(&store).unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    symlink(&victim, store.console_path("fleetingd0")).unwrap();
    symlink(&victim, dir.path().join("store/build.lock")).unwrap();
    symlink(&victim, dir.path().join("store/images/hashes.json")).unwrap();
    assert!(store.create_console("fleetingd0").is_err());
    assert!(store.try_build_lock().is_err());
    assert!(
        store
            .hashes()
            .content_hash(&victim, &File::open(&victim).unwrap())
            .is_err()
    );
    let key = GenerationKey::for_test("k");
    symlink(&victim, dir.path().join("store/generations/k")).unwrap();
    assert!(store.find(&key).is_err());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
}

#[test]
fn consoles_are_files_of_their_instance_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    store.create_console("fleetingd0").unwrap();
    let path = store.console_path("fleetingd0");
    assert!(path.ends_with(".instance_data/fleetingd0_console"));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for name in ["../x", "a/b", "/etc/x", "", ".."] {
        assert!(store.create_console(name).is_err(), "{name}");
    }
    for instance in ["g-2", "g-b", "g-a", "gg-2"] {
        store.create_console(instance).unwrap();
    }
    store.prune_consoles("g", 2).unwrap();
    for (instance, kept) in [("g-2", false), ("g-a", true), ("g-b", true), ("gg-2", true)] {
        assert_eq!(store.console_path(instance).exists(), kept, "{instance}");
    }
    assert!(path.exists(), "the build's console is nobody's surplus");
}

#[test]
fn images_and_machines_may_have_folders_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let (images, disks) = (dir.path().join("images"), dir.path().join("disks"));
    let store = Store::open_apart(&images, &disks).unwrap();
    assert_eq!(store.path(), images);
    store.create_console("group-1").unwrap();
    let names = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&images), ["generations", "groups", "images"]);
    assert_eq!(names(&disks), [".instance_data", "snapshots"]);
    // Builders of the same images queue, wherever their machines' disks lie.
    let other = Store::open_apart(&images, &dir.path().join("more")).unwrap();
    let _lock = store.try_build_lock().unwrap().unwrap();
    assert!(other.try_build_lock().unwrap().is_none());
}

//! What the house must look like: the direction of uses, no fork, no process words where they
//! do not belong. Reads the sources as text; needs nothing else.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs;
use std::path::{Path, PathBuf};

/// Which folders each folder may use, beside itself (docs/ARCH.md).
const ARROWS: [(&str, &[&str]); 8] = [
    (
        "cli",
        &["plugin", "pool", "image", "net", "agent", "vmm", "devices"],
    ),
    ("plugin", &["pool", "image", "net", "agent", "vmm"]),
    ("pool", &["image", "net", "agent", "vmm"]),
    ("image", &[]),
    ("net", &[]),
    ("agent", &[]),
    ("vmm", &["devices"]),
    ("devices", &[]),
];

fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// `src/vmm/pci/bus.rs` belongs to `vmm`.
fn folder(path: &Path) -> Option<String> {
    let inner = path.strip_prefix(root().join("src")).ok()?;
    let first = inner.components().next()?.as_os_str().to_str()?;
    (inner.components().count() > 1).then(|| first.to_owned())
}

fn is_test(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    name.ends_with("_test.rs") || name == "testing.rs"
}

#[test]
fn uses_go_downwards_only() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&root().join("src")) {
        let Some(folder) = folder(&path) else {
            continue;
        };
        let allowed = ARROWS
            .iter()
            .find(|(name, _)| *name == folder)
            .unwrap_or_else(|| panic!("{folder} is not on the map of docs/ARCH.md"))
            .1;
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for target in code.split("crate::").skip(1) {
                let target: String = target
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let known = ARROWS.iter().any(|(name, _)| *name == target);
                if known && target != folder && !allowed.contains(&target.as_str()) {
                    wrong.push(format!(
                        "{}:{}: {folder} -> {target}",
                        path.display(),
                        number + 1
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "wrong arrows:\n{}", wrong.join("\n"));
}

#[test]
fn vmm_and_devices_know_no_tokio_and_devices_no_kvm() {
    for (path, text) in sources(&root().join("src")) {
        let folder = folder(&path).unwrap_or_default();
        let plain_threads = ["vmm", "devices"].contains(&folder.as_str());
        assert!(
            !(plain_threads && text.contains("tokio::")),
            "tokio in {}",
            path.display()
        );
        let kvm = text.contains("kvm_ioctls") || text.contains("kvm_bindings");
        assert!(
            !(folder == "devices" && kvm && !is_test(&path)),
            "KVM in {}",
            path.display()
        );
    }
}

#[test]
fn children_are_spawned_without_fork() {
    for (path, text) in sources(&root().join("src")) {
        for word in ["pre_exec(", "libc::fork", "libc::vfork", "CommandExt"] {
            assert!(
                !text.contains(word) || is_test(&path),
                "{word} in {}: std forks for it, and a fork copies every machine's memory on write",
                path.display()
            );
        }
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for dir in ["src", "tests", "benches"] {
        let dir = root().join(dir);
        if !dir.exists() {
            continue;
        }
        for (path, text) in sources(&dir) {
            let generated = path.components().any(|c| c.as_os_str() == "generated");
            assert!(
                generated || text.starts_with("//!"),
                "{} has no //!",
                path.display()
            );
        }
    }
}

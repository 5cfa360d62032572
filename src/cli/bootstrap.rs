//! `bootstrap REPOSITORY`: copies the folder of this executable to where gitlab-runner looks for
//! plugins, as GitLab's own plugins do in an OCI install.
//!
//! The target carries its final name only when it is whole; an installed version is left alone.
#![expect(clippy::print_stdout, reason = "the path is the answer")]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

const DEFAULT_TARGET: &str = "/plugins";
/// Where a name without a registry belongs (GitLab's fleeting-artifact).
const REGISTRY: &str = "registry.gitlab.com/gitlab-org/fleeting/plugins";

/// Installs and prints where.
pub(super) fn run(repository: &str) -> ExitCode {
    match bootstrap(repository) {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(&error, ExitCode::FAILURE),
    }
}

fn bootstrap(repository: &str) -> anyhow::Result<PathBuf> {
    let root =
        std::env::var_os("FLEETING_PLUGIN_PATH").map_or(DEFAULT_TARGET.into(), PathBuf::from);
    ensure!(
        root.is_dir(),
        "{} is no folder; hint: mount it, or set FLEETING_PLUGIN_PATH",
        root.display()
    );
    let version = version(std::env::var("FLEETING_PLUGIN_PKG_VERSION").ok().as_deref())?;
    let executable = std::env::current_exe().context("cannot find our own executable")?;
    let source = executable
        .parent()
        .context("our executable has no folder")?;
    let target = root.join(full_name(repository)?).join(version);
    if target.exists() {
        return Ok(target);
    }
    let parent = target.parent().context("the target has no folder")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let temp = tempfile::Builder::new()
        .prefix(".fleetingd-")
        .tempdir_in(parent)
        .with_context(|| format!("cannot write into {}", parent.display()))?;
    copy_tree(source, temp.path()).with_context(|| format!("cannot copy {}", source.display()))?;
    match fs::rename(temp.path(), &target) {
        Ok(()) => {
            // It has another name now; nothing is left to remove.
            let _renamed = temp.keep();
            Ok(target)
        }
        // Another bootstrap of the same version was faster.
        Err(_) if target.exists() => Ok(target),
        Err(e) => Err(e).with_context(|| format!("cannot name {}", target.display())),
    }
}

/// Ours, if it is SemVer, which it always is, or what the packager says instead.
fn version(packaged: Option<&str>) -> anyhow::Result<String> {
    let version = packaged.unwrap_or(env!("CARGO_PKG_VERSION"));
    let plain = !version.is_empty()
        && !version.starts_with('.')
        && version
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b".-+_".contains(&b));
    ensure!(
        plain,
        "{version:?} is no version; hint: FLEETING_PLUGIN_PKG_VERSION"
    );
    Ok(version.to_owned())
}

/// `fleetingd` and `group/fleetingd` stand in GitLab's namespace; a name with a dot in its first
/// part names its registry.
fn full_name(repository: &str) -> anyhow::Result<PathBuf> {
    let parts: Vec<&str> = repository.split('/').collect();
    for part in &parts {
        let plain = !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b".-_:".contains(&b));
        if !plain {
            bail!(
                "{repository:?} is no repository; hint: such as registry.example.com/group/fleetingd"
            );
        }
    }
    let names_registry = parts.len() > 1 && parts.first().is_some_and(|p| p.contains(['.', ':']));
    Ok(if names_registry {
        PathBuf::from(repository)
    } else {
        Path::new(REGISTRY).join(repository)
    })
}

fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_stand_in_gitlabs_namespace() {
        let name = |text: &str| full_name(text).unwrap().display().to_string();
        assert_eq!(name("fleetingd"), format!("{REGISTRY}/fleetingd"));
        assert_eq!(name("localhost:5000/a/b"), "localhost:5000/a/b");
        assert_eq!(
            name("registry.example.com/fleetingd"),
            "registry.example.com/fleetingd"
        );
        for bad in ["", "../x", "a//b", "/a", "a b", ".hidden/x"] {
            assert!(full_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_version_cannot_leave_its_folder() {
        assert_eq!(version(None).unwrap(), env!("CARGO_PKG_VERSION"));
        assert_eq!(version(Some("1.2.3-rc.1+b")).unwrap(), "1.2.3-rc.1+b");
        assert!(version(Some("../1")).is_err());
        assert!(version(Some("")).is_err());
    }

    #[test]
    fn a_tree_is_copied_with_its_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("sub")).unwrap();
        fs::write(from.path().join("sub/plugin"), "x").unwrap();
        std::os::unix::fs::symlink("sub/plugin", from.path().join("fleetingd")).unwrap();
        copy_tree(from.path(), to.path()).unwrap();
        assert_eq!(
            fs::read_to_string(to.path().join("fleetingd")).unwrap(),
            "x"
        );
    }
}

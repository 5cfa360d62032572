//! Tiny disks for tests: ext4 file systems made of folders, put into GPTs as vendors do.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dir::write_sparse_at;
use super::{BuildInputs, PrebuildOnError, RunnerSource, SeedNet};
use crate::testing::run;

/// A file, or a link with its target, of a file system to be made.
pub enum Entry<'a> {
    File(&'a str),
    Link(&'a str),
}
pub use Entry::{File as Text, Link};

pub const MIB: u64 = 1 << 20;
/// Where `disk_with` puts its partitions.
pub const ROOT_START: u64 = 40 * MIB;
pub const ROOT_UUID: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";

/// An ext4 file system of `mib` MiB with these files.
pub fn ext4(dir: &Path, label: &str, mib: u64, entries: &[(&str, Entry<'_>)]) -> PathBuf {
    let tree = dir.join(format!("tree-{label}"));
    for (path, entry) in entries {
        let path = tree.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match entry {
            Text(text) => fs::write(path, text).unwrap(),
            Link(target) => symlink(target, path).unwrap(),
        }
    }
    let image = dir.join(format!("{label}.ext4"));
    let _ = fs::remove_file(&image);
    let (tree, to) = (tree.display(), image.display());
    run(&format!("mkfs.ext4 -q -F -L {label} -d {tree} {to} {mib}M"));
    image
}

/// A system's root with one kernel in its /boot.
pub fn plain_root(dir: &Path) -> PathBuf {
    let entries = [
        ("etc/os-release", Text("ID=test\n")),
        ("boot/vmlinuz-6.1.0-9-cloud", Text("kernel 9")),
        ("boot/initrd.img-6.1.0-9-cloud", Text("initrd 9")),
        ("usr/lib/modules/6.1.0-9-cloud/modules.dep", Text("")),
        ("lib", Link("usr/lib")),
        ("var/lib/fleetingd/keep", Text("")),
    ];
    ext4(dir, "cloudimg-rootfs", 16, &entries)
}

/// A GPT disk as Ubuntu lays it out: partition 1 is the root and comes last, 14 is for a BIOS, 15
/// for UEFI, and 16 is a separate /boot where one is given.
pub fn disk_with(dir: &Path, root: &Path, boot: Option<&Path>) -> PathBuf {
    let path = dir.join("disk.img");
    let disk = File::create(&path).unwrap();
    disk.set_len(64 * MIB).unwrap();
    let to = path.display();
    run(&format!(
        "sgdisk -n 1:40M:+20M -u 1:{ROOT_UUID} -n 14:3M:+1M -t 14:ef02 -n 15:1M:+2M -t 15:ef00 -n 16:4M:+20M {to}"
    ));
    copy_at(root, &disk, ROOT_START);
    if let Some(boot) = boot {
        copy_at(boot, &disk, 4 * MIB);
    }
    path
}

fn copy_at(from: &Path, disk: &File, offset: u64) {
    write_sparse_at(disk, &fs::read(from).unwrap(), offset).unwrap();
}

/// Puts a file into the root of a disk of [`disk_with`], as a guest would have.
pub fn write_into_root(disk: &Path, path: &str, text: &str) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::write(&source, text).unwrap();
    let commands = dir.path().join("commands");
    let from = source.display();
    fs::write(&commands, format!("rm {path}\nwrite {from} {path}\n")).unwrap();
    let (script, disk) = (commands.display(), disk.display());
    run(&format!(
        "debugfs -w -f {script} {disk}?offset={ROOT_START}"
    ));
}

/// Inputs of the smallest build from `image`.
pub fn inputs(dir: &Path, image: &Path) -> BuildInputs {
    let agent = dir.join("agent");
    fs::write(&agent, "the agent").unwrap();
    BuildInputs {
        setting: image.display().to_string(),
        image: image.to_owned(),
        disk_gib: 2,
        username: "ubuntu".to_owned(),
        password: None,
        extra_commands: Vec::new(),
        on_command_error: PrebuildOnError::Fail,
        runner: RunnerSource::Package,
        agent: Arc::new(File::open(agent).unwrap()),
        agent_protocol: 1,
    }
}

pub fn net() -> SeedNet {
    SeedNet {
        address: [172, 16, 120, 2].into(),
        prefix_len: 30,
        gateway: [172, 16, 120, 1].into(),
        mac: [0x02, 0x11, 0x22, 0x33, 0x44, 0x55],
        mtu: 1500,
        dns: vec![[9, 9, 9, 9].into(), [1, 1, 1, 1].into()],
    }
}

/// Stands for the VMM's unpacking: everything is wrapped in a word.
pub fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    Ok([b"unpacked ", packed].concat())
}

/// Bytes at an offset of a file.
pub fn bytes_at(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, offset)
        .unwrap();
    bytes
}

//! Disks: what is written is what is read, on the host's side too, and a full host says so.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::sync::Arc;

use fleetingd::vmm::{DiskSource, DiskSpec};

use super::{boot, files, sha256};

const MIB: u64 = 1 << 20;

fn disk(source: DiskSource) -> DiskSpec {
    DiskSpec {
        source,
        serial: "test".to_owned(),
        durable: true,
    }
}

/// A sparse file of 32 MiB.
fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(32 * MIB).unwrap();
    file
}

fn share(file: &File) -> Arc<File> {
    Arc::new(file.try_clone().unwrap())
}

fn read(file: &File, offset: u64, bytes: u64) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(bytes).unwrap()];
    file.read_exact_at(&mut data, offset).unwrap();
    data
}

#[test]
fn contents_are_equal_across_write_flush_pause_and_reread() {
    let Some(files) = files() else { return };
    let script = "
sum() { dd if=$1 bs=1M skip=$2 count=$3 2>/dev/null | sha256sum | cut -c1-64; }
dd if=/dev/urandom of=/tmp/r bs=1M count=12 2>/dev/null
echo A $(sum /tmp/r 0 12)
dd if=/tmp/r of=/dev/vda bs=1M seek=4 conv=fsync 2>/dev/null || exit 1
dd if=/tmp/r of=/dev/vdb bs=1M conv=fsync 2>/dev/null && exit 2
dd if=/tmp/r of=/dev/vdc bs=1M conv=fsync 2>/dev/null || exit 3
echo 3 >/proc/sys/vm/drop_caches
echo B $(sum /dev/vda 4 12)
echo C $(sum /dev/vdc 0 12)
blkdiscard -o 0 -l 8388608 /dev/vdc || exit 4
blkdiscard -o 4194304 -l 4194304 /dev/vda || exit 5
echo 3 >/proc/sys/vm/drop_caches
echo D $(sum /dev/vdc 0 8)
echo E $(sum /dev/vdc 8 4)
echo F $(cat /sys/block/vda/serial)
echo DONE; read k </dev/hvc0
";
    let (direct, read_only, base) = (image(), image(), image());
    let deltas = tempfile::tempdir().unwrap();
    let guest = boot(files, script, |spec| {
        spec.vcpus = 2;
        spec.disks = vec![
            disk(DiskSource::Direct(share(&direct))),
            disk(DiskSource::ReadOnly(share(&read_only))),
            disk(DiskSource::Overlay {
                base: share(&base),
                delta_dir: deltas.path().to_owned(),
            }),
        ];
    });
    guest.wait_for("A ");
    // In the midst of the writes: nothing may get lost or come twice.
    for _round in 0..20 {
        guest.handle.pause().unwrap();
        guest.handle.resume().unwrap();
    }
    guest.wait_for("DONE");
    let delta = guest.handle.stats().disk_delta_bytes;
    guest.answer();
    guest.succeed();

    let written = guest.value("A ");
    assert_eq!(guest.value("B "), written);
    assert_eq!(guest.value("C "), written);
    assert_eq!(guest.value("D "), sha256(&vec![0; 8 << 20]));
    assert_eq!(guest.value("F "), "test");
    assert_eq!(guest.value("E "), sha256(&read(&direct, 12 * MIB, 4 * MIB)));
    assert_eq!(
        sha256(&read(&direct, 4 * MIB, 4 * MIB)),
        sha256(&vec![0; 4 << 20])
    );
    for untouched in [&read_only, &base] {
        assert_eq!(untouched.metadata().unwrap().blocks(), 0);
    }
    assert!(
        (4 * MIB..6 * MIB).contains(&delta),
        "the delta holds {delta} bytes"
    );
    assert_eq!(fs::read_dir(deltas.path()).unwrap().count(), 0);
}

/// A small file system in memory, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=6m", "small"])
            .arg(dir.path());
        assert!(mount.status().unwrap().success(), "needs root");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The machine's delta has no name but holds the mount until the machine is gone.
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        unmounted.unwrap();
    }
}

#[test]
fn a_full_host_disk_is_an_io_error_and_the_machine_goes_on() {
    let Some(files) = files() else { return };
    let script = "
dd if=/dev/zero of=/tmp/z bs=1M count=16 2>/dev/null; tr '\\0' x </tmp/z >/tmp/x
dd if=/tmp/x of=/dev/vda bs=1M conv=fsync 2>/dev/null && exit 1
dmesg | grep -q 'I/O error, dev vda' || exit 2
echo 3 >/proc/sys/vm/drop_caches
echo BASE $(dd if=/dev/vda bs=1M skip=24 count=4 2>/dev/null | sha256sum | cut -c1-64)
blkdiscard -o 0 -l 16777216 /dev/vda || exit 3
dd if=/tmp/x of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null || exit 4
";
    let small = SmallDisk::new();
    let base = image();
    let pattern: Vec<u8> = (0..=255).cycle().take(4 << 20).collect();
    base.write_all_at(&pattern, 24 * MIB).unwrap();
    let guest = boot(files, script, |spec| {
        spec.disks = vec![disk(DiskSource::Overlay {
            base: share(&base),
            delta_dir: small.0.path().to_owned(),
        })];
    });
    guest.succeed();
    assert_eq!(guest.value("BASE "), sha256(&pattern));
}

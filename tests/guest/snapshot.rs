//! A stock kernel saved in the midst of its work, and clones of it that finish that work.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use fleetingd::vmm::{self, DiskSource, DiskSpec, RestoreSpec, Snapshot, VmEnd};

use super::{Guest, boot, files};

/// Two processors busy with the disk, a timer and the console. What was printed before the save
/// is the golden machine's; the clones say the rest.
const SCRIPT: &str = "
sum() { dd if=$1 bs=1M count=8 2>/dev/null | sha256sum | cut -c1-64; }
dd if=/dev/urandom of=/tmp/r bs=1M count=8 2>/dev/null
echo A $(sum /tmp/r)
(n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); echo tick $n; done; echo TICKS $n) &
(sleep 1; echo SLEPT) &
echo WRITING
n=0
while [ $n -lt 128 ]; do
    dd if=/tmp/r of=/dev/vda bs=64k skip=$n seek=$n count=1 conv=notrunc,fsync 2>/dev/null || exit 1
    n=$((n + 1))
    [ $n -eq 8 ] && echo MIDST
done
wait
echo 3 >/proc/sys/vm/drop_caches
echo B $(sum /dev/vda)
echo RANDOM $(head -c 16 /dev/hwrng | sha256sum | cut -c1-64)
echo PROCESSORS $(grep -c ^processor /proc/cpuinfo)
dmesg | grep -iE 'soft lockup|rcu.*stall|I/O error|hung task' && exit 2
echo UPTIME $(cut -d. -f1 /proc/uptime)
";

fn disk(base: &Arc<File>, deltas: &tempfile::TempDir) -> DiskSpec {
    DiskSpec {
        source: DiskSource::Overlay {
            base: Arc::clone(base),
            delta_dir: deltas.path().to_owned(),
        },
        serial: "test".to_owned(),
        durable: false,
    }
}

fn restored(snapshot: &Snapshot, disk: DiskSpec) -> Guest {
    let console = tempfile::NamedTempFile::new().unwrap();
    let spec = RestoreSpec {
        name: "clone".to_owned(),
        disks: vec![disk],
        net: None,
        console: Some(console.reopen().unwrap()),
    };
    let handle = vmm::restore(spec, snapshot, Box::new(|_end| {})).unwrap();
    Guest { handle, console }
}

#[test]
fn clones_of_a_machine_saved_in_the_midst_of_writes_finish_them() {
    let Some(files) = files() else { return };
    let base = tempfile::tempfile().unwrap();
    base.set_len(16 << 20).unwrap();
    let (base, deltas) = (Arc::new(base), tempfile::tempdir().unwrap());
    let golden = boot(files, SCRIPT, |spec| {
        spec.vcpus = 2;
        spec.golden = true;
        spec.disks = vec![disk(&base, &deltas)];
    });
    golden.wait_for("MIDST");
    golden.handle.pause().unwrap();
    let saved = tempfile::tempdir().unwrap();
    golden.handle.save(saved.path()).unwrap();
    let frozen = golden.handle.freeze().unwrap();
    let written = golden.value("A ");
    assert!(!golden.output().contains("B "), "saved too late");

    let stored = Snapshot::open(saved.path()).unwrap();
    let clones =
        [&frozen, &frozen, &stored].map(|snapshot| restored(snapshot, disk(&base, &deltas)));
    // Parked for a while: monotonic time does not notice.
    std::thread::sleep(Duration::from_secs(5));
    for clone in &clones {
        clone.handle.resume().unwrap();
    }
    for clone in &clones {
        clone.succeed();
        assert_eq!(clone.value("B "), written);
        assert_eq!(clone.value("TICKS "), "2000");
        assert_eq!(clone.value("PROCESSORS "), "2");
        assert!(clone.output().contains("SLEPT"));
    }
    let random: Vec<String> = clones.iter().map(|clone| clone.value("RANDOM ")).collect();
    assert!(random[0] != random[1] && random[1] != random[2] && random[0] != random[2]);

    // The file under a clone's memory is cut: that clone ends, its neighbour does not notice.
    let [doomed, neighbour] =
        [&stored, &frozen].map(|snapshot| restored(snapshot, disk(&base, &deltas)));
    neighbour.handle.resume().unwrap();
    let memory = File::options()
        .write(true)
        .open(saved.path().join("memory"));
    memory.unwrap().set_len(0).unwrap();
    doomed.handle.resume().unwrap();
    let end = doomed.end();
    assert!(matches!(end, VmEnd::HostFault { .. }), "{end:?}");
    neighbour.succeed();
    assert_eq!(neighbour.value("B "), written);
}

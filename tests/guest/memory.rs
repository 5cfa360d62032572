//! The balloon: what the guest gives up is really the host's again.

use super::{boot, files, until};

const MIB: u64 = 1 << 20;

#[test]
fn inflating_returns_private_memory_and_deflating_gives_it_back() {
    let Some(files) = files() else { return };
    let script = "
dd if=/dev/zero of=/tmp/f bs=1M count=160 2>/dev/null || exit 1
echo FULL; read k </dev/hvc0
rm /tmp/f
echo FREED; read k </dev/hvc0
dd if=/dev/zero of=/tmp/f bs=1M count=160 2>/dev/null || exit 2
";
    let guest = boot(files, script, |spec| spec.memory_mib = 512);
    let handle = &guest.handle;
    guest.wait_for("FULL");
    let full = handle.stats().resident_bytes;
    assert!(full > 160 * MIB, "{full}");
    guest.answer();
    guest.wait_for("FREED");
    handle.set_balloon_target(256).unwrap();
    until("the balloon holds 256 MiB", || {
        handle.stats().balloon_mib >= 256
    });
    until("private memory went back", || {
        handle.stats().resident_bytes < full - 128 * MIB
    });
    handle.set_balloon_target(0).unwrap();
    until("the balloon is empty", || handle.stats().balloon_mib == 0);
    guest.answer();
    guest.succeed();
}

#[test]
fn a_guest_short_of_memory_takes_it_out_of_the_balloon() {
    let Some(files) = files() else { return };
    let script = "
echo READY; read k </dev/hvc0
dd if=/dev/zero of=/tmp/f bs=1M count=200 2>/dev/null || exit 1
";
    let guest = boot(files, script, |spec| spec.memory_mib = 512);
    guest.wait_for("READY");
    guest.handle.set_balloon_target(380).unwrap();
    until("the balloon holds 300 MiB", || {
        guest.handle.stats().balloon_mib >= 300
    });
    guest.answer();
    guest.succeed();
}

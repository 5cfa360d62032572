//! Getting a vCPU out of KVM_RUN: a real-time signal whose handler sets `immediate_exit`.
//!
//! The flag closes the gap between a vCPU's last look at what it is asked and its entry into the
//! guest: a signal in between makes the entry return at once.
#![expect(
    unsafe_code,
    reason = "a signal handler that writes the shared page of its thread's vCPU"
)]

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{self, Killable, SIGRTMIN};

thread_local! {
    /// The page that this thread shares with KVM; null while it runs no vCPU.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal; the first two real-time signals are the C library's on some systems.
fn number() -> libc::c_int {
    SIGRTMIN() + 2
}

extern "C" fn on_kick(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the page is mapped while RUN names it (see Kickable), and this is its thread.
        let flag = unsafe { &raw mut (*run).immediate_exit };
        // SAFETY: as above; volatile, because KVM reads it too.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Installs the handler, once for the process, without SA_RESTART.
pub fn install() -> Result<(), vmm_sys_util::errno::Error> {
    static INSTALLED: OnceLock<Result<(), vmm_sys_util::errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| signal::register_signal_handler(number(), on_kick))
}

/// Sends the signal to a thread that has not been joined.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // It can fail for a thread that has just ended: then there is nothing to interrupt.
    let _ended = thread.kill(number());
}

/// While this lives, kicks of this thread end the vCPU's KVM_RUN.
pub struct Kickable<'a> {
    vcpu: &'a mut VcpuFd,
}

impl<'a> Kickable<'a> {
    pub fn new(vcpu: &'a mut VcpuFd) -> Self {
        RUN.set(ptr::from_mut(vcpu.get_kvm_run()));
        // A parent may have had it blocked.
        let _kept = signal::unblock_signal(number());
        Self { vcpu }
    }

    pub fn vcpu(&mut self) -> &mut VcpuFd {
        self.vcpu
    }

    /// Takes the request to exit; whoever kicked has said before why.
    pub fn acknowledge(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

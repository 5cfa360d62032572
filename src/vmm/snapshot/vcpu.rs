//! One vCPU's state, read and written in the only orders that are right.
//!
//! CPUID does not travel: it is made from the host's as at boot, and the key of a snapshot sees to
//! it that the host is the same. Called on the vCPU's own thread to save, on the starting thread
//! to restore.
#![expect(
    unsafe_code,
    reason = "KVM_GET_XSAVE2 fills a buffer of the size KVM asked for"
)]

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::msr;

/// Words of the XSAVE area that every KVM has.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / 4;
/// Bounds the XSAVE area: AMX, which no guest of ours has, takes 11 KiB.
const MAX_XSAVE_WORDS: usize = 16 << 10;

/// A vCPU as a snapshot stores it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// A vCPU's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    #[error("cannot read {what} of a vcpu")]
    Read {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("cannot set {what} of a vcpu")]
    Write {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("this host's KVM does not take the value of MSR {index:#x}")]
    Msr { index: u32 },
    #[error("saved {what} have an impossible size")]
    Shape { what: &'static str },
}

impl VcpuStateError {
    pub(super) fn reading(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Read { what, source }
    }

    pub(super) fn writing(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Write { what, source }
    }
}

/// Bytes of this VM's XSAVE area.
pub fn xsave_bytes(vm: &VmFd) -> usize {
    let asked = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    asked.max(size_of::<kvm_xsave>())
}

impl VcpuState {
    /// Reads everything of a vCPU that is out of KVM_RUN; `xsave_bytes` and `msrs` are what its
    /// host asks for.
    pub fn save(vcpu: &VcpuFd, xsave_bytes: usize, msrs: &[u32]) -> Result<Self, VcpuStateError> {
        let reading = VcpuStateError::reading;
        // First: KVM settles pending INIT and SIPI here, which changes what follows.
        let mp_state = vcpu.get_mp_state().map_err(reading("the run state"))?;
        let regs = vcpu.get_regs().map_err(reading("registers"))?;
        let sregs = vcpu.get_sregs().map_err(reading("segments"))?;
        let xsave = save_xsave(vcpu, xsave_bytes)?;
        let xcrs = vcpu.get_xcrs().map_err(reading("XCRs"))?;
        let debug = vcpu.get_debug_regs().map_err(reading("debug registers"))?;
        let lapic = vcpu.get_lapic().map_err(reading("the LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(reading("the TSC's rate"))?;
        let msrs = msr::save(vcpu, msrs)?;
        // Last: everything before may have made an event of a pending exception.
        let events = vcpu.get_vcpu_events().map_err(reading("events"))?;
        Ok(Self {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            tsc_khz,
            msrs,
            events,
        })
    }

    /// Writes everything to a fresh vCPU that has its CPUID.
    pub fn restore(&self, vcpu: &VcpuFd, xsave_bytes: usize) -> Result<(), VcpuStateError> {
        let writing = VcpuStateError::writing;
        vcpu.set_mp_state(self.mp_state)
            .map_err(writing("the run state"))?;
        vcpu.set_regs(&self.regs).map_err(writing("registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(writing("segments"))?;
        self.restore_xsave(vcpu, xsave_bytes)?;
        vcpu.set_xcrs(&self.xcrs).map_err(writing("XCRs"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(writing("debug registers"))?;
        // After the segments, which hold its base, and before the MSRs, which hold its deadline.
        vcpu.set_lapic(&self.lapic).map_err(writing("the LAPIC"))?;
        self.restore_tsc_rate(vcpu)?;
        msr::restore(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(writing("events"))
    }

    /// Whether the numbers in it are of possible sizes.
    pub fn is_possible(&self) -> bool {
        (XSAVE_WORDS..=MAX_XSAVE_WORDS).contains(&self.xsave.len())
            && self.msrs.len() <= msr::MAX_MSRS
    }

    fn restore_xsave(&self, vcpu: &VcpuFd, bytes: usize) -> Result<(), VcpuStateError> {
        if self.xsave.len() * 4 != bytes.next_multiple_of(4) {
            return Err(VcpuStateError::Shape {
                what: "floating point registers",
            });
        }
        let (region, extra) =
            self.xsave
                .split_first_chunk::<XSAVE_WORDS>()
                .ok_or(VcpuStateError::Shape {
                    what: "floating point registers",
                })?;
        let mut xsave = new_xsave(extra.len())?;
        xsave.as_mut_slice().copy_from_slice(extra);
        // SAFETY: the length, which is what the wrapper relies on, is not touched.
        let inner = unsafe { xsave.as_mut_fam_struct() };
        inner.xsave.region = *region;
        // SAFETY: the buffer is as large as KVM asks for on this host, checked above.
        unsafe { vcpu.set_xsave2(&xsave) }.map_err(VcpuStateError::writing("the FPU"))
    }

    /// KVM without TSC scaling takes no rate, not even the one it has.
    fn restore_tsc_rate(&self, vcpu: &VcpuFd) -> Result<(), VcpuStateError> {
        let here = vcpu
            .get_tsc_khz()
            .map_err(VcpuStateError::reading("the TSC's rate"))?;
        if here == self.tsc_khz {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(VcpuStateError::writing("the TSC's rate"))
    }
}

fn new_xsave(extra_words: usize) -> Result<Xsave, VcpuStateError> {
    Xsave::new(extra_words).map_err(|_too_large| VcpuStateError::Shape {
        what: "floating point registers",
    })
}

fn save_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u32>, VcpuStateError> {
    let reading = VcpuStateError::reading("the FPU");
    if bytes <= size_of::<kvm_xsave>() {
        // KVM before 5.17 knows nothing else.
        let xsave = vcpu.get_xsave().map_err(reading)?;
        return Ok(xsave.region.to_vec());
    }
    let mut xsave = new_xsave((bytes - size_of::<kvm_xsave>()).div_ceil(4))?;
    // SAFETY: the buffer is as large as KVM asks for, and no feature is enabled in between.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(reading)?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::boot::Entry;
    use crate::vmm::{cpu, kvm};

    /// Counters that run on by themselves: TSC, its deadline, Hyper-V's two clocks.
    const RUNNING: [u32; 4] = [0x10, 0x6e0, 0x4000_0010, 0x4000_0020];

    fn vcpu(index: u8) -> (VmFd, VcpuFd) {
        let kvm = kvm::open().unwrap();
        let vm = kvm::create_vm(&kvm).unwrap();
        let vcpu = vm.create_vcpu(u64::from(index)).unwrap();
        let supported = cpu::supported(&kvm).unwrap();
        let entry = Entry {
            rip: 0x1234_5678,
            zero_page: 0x9abc,
        };
        cpu::configure(&vcpu, index, 2, &supported, &entry).unwrap();
        (vm, vcpu)
    }

    fn save((vm, vcpu): &(VmFd, VcpuFd)) -> VcpuState {
        let msrs = msr::wanted(&kvm::open().unwrap()).unwrap();
        let state = VcpuState::save(vcpu, xsave_bytes(vm), &msrs).unwrap();
        assert!(state.is_possible());
        let stored = postcard::to_allocvec(&state).unwrap();
        postcard::from_bytes(&stored).unwrap()
    }

    #[test]
    fn a_restored_vcpu_saves_as_the_same_state() {
        for index in [0, 1] {
            let odd = vcpu(index);
            let mut regs = odd.1.get_regs().unwrap();
            (regs.rax, regs.r15) = (7, u64::MAX);
            odd.1.set_regs(&regs).unwrap();
            let mut debug = odd.1.get_debug_regs().unwrap();
            debug.db[3] = 0xdead_beef;
            odd.1.set_debug_regs(&debug).unwrap();
            let first = save(&odd);
            let fresh = vcpu(index);
            first.restore(&fresh.1, xsave_bytes(&fresh.0)).unwrap();
            let second = save(&fresh);
            let comparable = |state: &VcpuState| {
                let mut state = state.clone();
                state.msrs.retain(|msr| !RUNNING.contains(&msr.index));
                state
            };
            let (first, second) = (comparable(&first), comparable(&second));
            assert_eq!(first.msrs, second.msrs);
            let bytes = |state| postcard::to_allocvec(&state).unwrap();
            assert_eq!(bytes(first), bytes(second));
        }
    }

    #[test]
    fn a_state_of_another_shape_is_refused() {
        let (vm, vcpu) = vcpu(0);
        let good = save(&(vm, vcpu));
        let (vm, vcpu) = self::vcpu(0);
        let mut short = good.clone();
        short.xsave.pop();
        assert!(short.restore(&vcpu, xsave_bytes(&vm)).is_err());
        let mut nothing = good.clone();
        nothing.xsave.clear();
        assert!(!nothing.is_possible());
        let mut endless = good;
        endless.msrs = vec![kvm_msr_entry::default(); msr::MAX_MSRS + 1];
        assert!(!endless.is_possible());
    }
}

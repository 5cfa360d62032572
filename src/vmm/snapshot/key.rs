//! What must be the same for a snapshot to be restored: the processor as guests see it, KVM, the
//! kernel and this program.
//!
//! The shape of the machine is not in here: memory, vCPUs and devices are in the state itself, and
//! each device refuses a state of another shape.

use std::fmt;

use kvm_bindings::Msrs;
use kvm_ioctls::{Cap, Kvm};
use sha2::{Digest, Sha256};

use crate::vmm::cpu;
use crate::vmm::kvm::{self, KvmProblem};

/// KVM's answers that a state depends on.
const CAPABILITIES: [Cap; 9] = [
    Cap::Xsave2,
    Cap::Xcrs,
    Cap::MpState,
    Cap::VcpuEvents,
    Cap::Debugregs,
    Cap::AdjustClock,
    Cap::TscControl,
    Cap::TscDeadlineTimer,
    Cap::GetTscKhz,
];

/// KVM would not say what it offers.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    #[error(transparent)]
    Kvm(#[from] KvmProblem),
    #[error("cannot ask KVM what it offers")]
    Ask(#[source] kvm_ioctls::Error),
}

/// A host as snapshots know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostKey([u8; 32]);

impl HostKey {
    /// This host's; some 100 us.
    pub fn of_this_host() -> Result<Self, HostKeyError> {
        let kvm = kvm::open()?;
        let mut hash = Sha256::new();
        let supported = cpu::supported(&kvm).map_err(HostKeyError::Ask)?;
        // As guest 0 of 1 sees it: the host's own numbering of its processors is not in it.
        let cpuid = cpu::filter(&supported, 0, 1)
            .map_err(|_full| HostKeyError::Ask(kvm_ioctls::Error::new(libc::E2BIG)))?;
        for leaf in cpuid.as_slice() {
            let numbers = [leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx];
            let numbers = numbers.into_iter().chain([leaf.ecx, leaf.edx]);
            numbers.for_each(|number| hash.update(number.to_le_bytes()));
        }
        let msrs = kvm.get_msr_index_list().map_err(HostKeyError::Ask)?;
        for index in msrs.as_slice() {
            hash.update(index.to_le_bytes());
        }
        for (index, value) in feature_msrs(&kvm) {
            hash.update(index.to_le_bytes());
            hash.update(value.to_le_bytes());
        }
        for capability in CAPABILITIES {
            hash.update(kvm.check_extension_int(capability).to_le_bytes());
        }
        let system = rustix::system::uname();
        for text in [system.release(), system.version(), system.machine()] {
            hash.update(text.to_bytes_with_nul());
        }
        hash.update(microcode());
        hash.update(env!("CARGO_PKG_VERSION"));
        Ok(Self(hash.finalize().into()))
    }

    /// A key that is no host's, or a stored one.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// In hexadecimal digits, as a folder's name.
impl fmt::Display for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Features that KVM tells by registers; those that do not read are not there.
fn feature_msrs(kvm: &Kvm) -> Vec<(u32, u64)> {
    let Ok(list) = kvm.get_msr_feature_index_list() else {
        return Vec::new();
    };
    let read = |index: &u32| {
        let asked = kvm_bindings::kvm_msr_entry {
            index: *index,
            ..kvm_bindings::kvm_msr_entry::default()
        };
        let mut msrs = Msrs::from_entries(&[asked]).ok()?;
        let count = kvm.get_msrs(&mut msrs).ok()?;
        let value = msrs.as_slice().first().filter(|_| count == 1)?;
        Some((value.index, value.data))
    };
    list.as_slice().iter().filter_map(read).collect()
}

/// The first processor's line.
fn microcode() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = cpus.lines();
    let line = lines.find(|line| line.starts_with("microcode"));
    line.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn the_key_is_the_same_on_every_processor_of_a_host() {
        let before = sched_getaffinity(None).unwrap();
        let on = |cpu| {
            let mut only = CpuSet::new();
            only.set(cpu);
            sched_setaffinity(None, &only).unwrap();
            HostKey::of_this_host().unwrap()
        };
        let allowed = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu));
        let keys: Vec<HostKey> = allowed.map(on).collect();
        sched_setaffinity(None, &before).unwrap();
        assert!(keys.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(keys[0].to_string().len(), 64);
    }
}

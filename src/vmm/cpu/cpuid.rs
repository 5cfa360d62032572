//! What a guest is told about its processor: the host's leaves, less what a snapshot could not
//! carry, with a topology of one socket and one thread a core.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_MWAIT: u32 = 0x5;
const LEAF_EXTENDED_FEATURES: u32 = 0x7;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_SGX: u32 = 0x12;
const LEAF_AMX_TILE: u32 = 0x1d;
const LEAF_AMX_TMUL: u32 = 0x1e;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_CORES: u32 = 0x8000_0008;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const AMD_ECX_SVM: u32 = 1 << 2;
/// Leaf 7.0 EBX: SGX, MPX.
const EBX7_REMOVED: u32 = (1 << 2) | (1 << 14);
/// Leaf 7.0 ECX: WAITPKG, CET shadow stacks, SGX_LC.
const ECX7_REMOVED: u32 = (1 << 5) | (1 << 7) | (1 << 30);
/// Leaf 7.0 EDX: CET IBT, AMX-BF16, AMX-TILE, AMX-INT8.
const EDX7_REMOVED: u32 = (1 << 20) | (1 << 22) | (1 << 24) | (1 << 25);
/// XCR0: MPX bound registers, protection of AMX tiles.
const XCR0_REMOVED: u32 = (1 << 3) | (1 << 4) | (1 << 17) | (1 << 18);

/// Level types of topology leaves (Intel SDM, CPUID 0BH).
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The CPUID of vCPU `index` of `count`.
pub fn filter(supported: &CpuId, index: u8, count: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = Vec::new();
    for entry in supported.as_slice() {
        let mut entry = *entry;
        if keep(&mut entry, index, count) {
            entries.push(entry);
        }
    }
    topology(&mut entries, LEAF_TOPOLOGY, index, count);
    let has_v2 = supported
        .as_slice()
        .iter()
        .any(|entry| entry.function == LEAF_TOPOLOGY_V2);
    if has_v2 {
        topology(&mut entries, LEAF_TOPOLOGY_V2, index, count);
    }
    CpuId::from_entries(&entries)
}

/// Edits a leaf for this vCPU; false if a guest must not see it at all.
fn keep(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) -> bool {
    let (id, cpus) = (u32::from(index), u32::from(count));
    match entry.function {
        LEAF_FEATURES => {
            entry.ecx &= !(ECX_MONITOR | ECX_VMX);
            entry.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (cpus << 16);
            if count > 1 {
                entry.edx |= EDX_HTT;
            } else {
                entry.edx &= !EDX_HTT;
            }
        }
        LEAF_CACHE => {
            // Bits 31:26: cores of the package, 25:14: threads sharing this cache.
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | ((cpus - 1).min(63) << 26);
        }
        LEAF_EXTENDED_FEATURES if entry.index == 0 => {
            entry.ebx &= !EBX7_REMOVED;
            entry.ecx &= !ECX7_REMOVED;
            entry.edx &= !EDX7_REMOVED;
        }
        LEAF_XSAVE if entry.index == 0 => entry.eax &= !XCR0_REMOVED,
        LEAF_XSAVE if entry.index < 32 && (1_u32 << entry.index) & XCR0_REMOVED != 0 => {
            return false;
        }
        LEAF_AMD_FEATURES => entry.ecx &= !AMD_ECX_SVM,
        LEAF_AMD_CORES => {
            let bits = u32::BITS - (cpus - 1).leading_zeros();
            entry.ecx = (cpus - 1) | (bits << 12);
        }
        LEAF_AMD_CACHE => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        LEAF_AMD_TOPOLOGY => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        LEAF_PMU => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        LEAF_MWAIT | LEAF_SGX | LEAF_AMX_TILE | LEAF_AMX_TMUL => return false,
        LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => return false,
        _ => {}
    }
    true
}

/// One thread a core, all cores in one package.
fn topology(entries: &mut Vec<kvm_cpuid_entry2>, leaf: u32, index: u8, count: u8) {
    let (id, cpus) = (u32::from(index), u32::from(count));
    let core_bits = u32::BITS - (cpus - 1).leading_zeros();
    let levels = [
        (0, 0, 1, LEVEL_SMT << 8),
        (1, core_bits, cpus, (LEVEL_CORE << 8) | 1),
        (2, 0, 0, 2),
    ];
    for (level, eax, ebx, ecx) in levels {
        entries.push(kvm_cpuid_entry2 {
            function: leaf,
            index: level,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx: id,
            ..kvm_cpuid_entry2::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn find(id: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        id.as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .copied()
    }

    #[test]
    fn a_guest_sees_no_nesting_no_pmu_and_its_own_topology() {
        let functions = [
            0x1,
            0x4,
            0x5,
            0x7,
            0xa,
            0xb,
            0xd,
            0x12,
            0x8000_0001,
            0x8000_0008,
        ];
        let all: Vec<_> = functions.iter().map(|f| leaf(*f, 0)).collect();
        let supported = CpuId::from_entries(&all).unwrap();
        let id = filter(&supported, 3, 4).unwrap();
        let features = find(&id, 1, 0).unwrap();
        assert_eq!(features.ecx & (ECX_VMX | ECX_MONITOR), 0);
        assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
        assert_eq!(features.ebx >> 24, 3);
        assert_eq!((features.ebx >> 16) & 0xff, 4);
        assert_eq!(find(&id, 0xa, 0).unwrap().eax, 0);
        assert_eq!(find(&id, 0x8000_0001, 0).unwrap().ecx & AMD_ECX_SVM, 0);
        assert!(find(&id, 0x5, 0).is_none() && find(&id, 0x12, 0).is_none());
        let cores = find(&id, 0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, 3));
        assert_eq!(find(&id, 0xd, 0).unwrap().eax & XCR0_REMOVED, 0);
    }

    #[test]
    fn every_count_of_vcpus_has_a_topology() {
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(4, 0)]).unwrap();
        for count in 1..=64 {
            for index in 0..count {
                let id = filter(&supported, index, count).unwrap();
                let bits = find(&id, 0xb, 1).unwrap().eax;
                assert!(u32::from(index) < 1 << bits);
            }
        }
    }
}

//! Which model-specific registers travel, and in which order they go back.
//!
//! KVM's list names most of them, and not those that every x86 has: memory types and machine
//! checks. What does not read is not there. EFER, the segment bases and APICBASE travel with the
//! segments, x2APIC registers with the local APIC.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::vcpu::VcpuStateError;

/// Registers in one call; KVM takes 256.
const CHUNK: usize = 128;
/// More than any processor has: bounds what a stored state can ask for.
pub const MAX_MSRS: usize = 2048;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
const MTRR_CAP: u32 = 0xfe;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
/// Variable ranges, eight pairs; fixed ranges; machine check banks, 32 of four registers.
const RANGES: [std::ops::Range<u32>; 5] = [
    0x200..0x210,
    0x250..0x251,
    0x258..0x25a,
    0x268..0x270,
    0x400..0x480,
];

/// Registers that KVM names and that must not travel.
const DENIED: [(u32, &str); 3] = [
    // MCG_CTL: there only where MCG_CAP says so, and all ones then.
    (0x17b, "reads and does not write without MCG_CTL_P"),
    // MSR_KVM_ASYNC_PF_ACK: a write is an event, not a state.
    (0x4b56_4d07, "an acknowledgement"),
    // The microcode's revision is the host's; the key of a snapshot has it.
    (0x8b, "the host's"),
];

/// Everything worth reading on this host.
pub fn wanted(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let listed = kvm.get_msr_index_list()?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend([MTRR_CAP, MTRR_DEF_TYPE, MCG_CAP, MCG_STATUS]);
    indices.extend(RANGES.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    indices.retain(|index| DENIED.iter().all(|(denied, _reason)| denied != index));
    Ok(indices)
}

/// Reads those of `indices` that are there.
pub fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let asked: Vec<kvm_msr_entry> = chunk.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = list(&asked)?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(VcpuStateError::reading("MSRs"))?;
        saved.extend(msrs.as_slice().iter().take(read));
        // KVM stops at the first that is not there.
        let past = if read < chunk.len() { read + 1 } else { read };
        rest = rest.get(past..).unwrap_or_default();
    }
    Ok(saved)
}

/// Writes saved registers back. One that will not be written must have its value already.
pub fn restore(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), VcpuStateError> {
    let ordered = in_order(saved);
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let written = vcpu
            .set_msrs(&list(chunk)?)
            .map_err(VcpuStateError::writing("MSRs"))?;
        rest = rest.get(written..).unwrap_or_default();
        if written == chunk.len() {
            continue;
        }
        let Some((refused, after)) = rest.split_first() else {
            break;
        };
        if save(vcpu, &[refused.index])?.first().map(|msr| msr.data) != Some(refused.data) {
            return Err(VcpuStateError::Msr {
                index: refused.index,
            });
        }
        rest = after;
    }
    Ok(())
}

/// The timer's deadline after the counter it is compared with. One that reads as zero may have
/// fired without its interrupt having been seen: it is due now.
fn in_order(saved: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let is_deadline = |msr: &&kvm_msr_entry| msr.index == TSC_DEADLINE;
    let mut ordered: Vec<kvm_msr_entry> = saved
        .iter()
        .filter(|msr| !is_deadline(msr))
        .copied()
        .collect();
    let counter = saved.iter().find(|msr| msr.index == TSC);
    ordered.extend(saved.iter().filter(is_deadline).map(|msr| {
        let now = counter.map_or(0, |tsc| tsc.data);
        let due = if msr.data == 0 { now } else { msr.data };
        entry(TSC_DEADLINE, due)
    }));
    ordered
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    Msrs::from_entries(entries).map_err(|_too_many| VcpuStateError::Shape { what: "MSRs" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_comes_last_and_a_timer_that_fired_is_due() {
        let saved = [
            entry(TSC_DEADLINE, 0),
            entry(TSC, 77),
            entry(MTRR_DEF_TYPE, 6),
        ];
        let ordered: Vec<(u32, u64)> = in_order(&saved).iter().map(|m| (m.index, m.data)).collect();
        assert_eq!(ordered, [(TSC, 77), (MTRR_DEF_TYPE, 6), (TSC_DEADLINE, 77)]);
        let armed = [entry(TSC_DEADLINE, 99), entry(TSC, 77)];
        assert_eq!(in_order(&armed).last().unwrap().data, 99);
    }

    #[test]
    fn memory_types_are_read_although_kvm_names_them_not() {
        let kvm = crate::vmm::kvm::open().unwrap();
        let wanted = wanted(&kvm).unwrap();
        assert!(wanted.contains(&MTRR_DEF_TYPE) && wanted.contains(&0x400));
        assert!(wanted.contains(&TSC) && !wanted.contains(&0x17b));
        assert!(wanted.len() <= MAX_MSRS);
    }
}

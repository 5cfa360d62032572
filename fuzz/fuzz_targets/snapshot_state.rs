//! States of snapshots, whole files and payloads with a right checksum: whatever is in them, they
//! are refused or taken over by the devices, and no length in them costs memory.
#![no_main]

use fleetingd::vmm::snapshot;

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    let host = snapshot::HostKey::from_bytes([0; 32]);
    let _refused = snapshot::read(&mut &*file, file.len() as u64, &host);
    let payload = file.get(snapshot::HEADER_BYTES..).unwrap_or_default();
    if let Ok(state) = snapshot::decode(payload) {
        let _refused = snapshot::offer_to_devices(state);
    }
});

//! The state file: a header of fixed length, then the state in postcard's encoding.
//!
//! ```text
//!   0  magic "FLTDSNAP"      16  length of the state     24  key of the host
//!   8  version               56  SHA-256 of all but these 32 bytes
//!  12  zero                  88  the state, to the end of the file
//! ```
//!
//! Numbers are little-endian. Nothing of a file is believed before lengths, checksum, version and
//! host are right. No length in it costs memory that the file does not have, but for the size of a
//! disk: the map of the largest takes 4 MiB. A checksum keeps out damage, not malice: who can write
//! here is root.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

use super::key::HostKey;
use super::state::MachineState;

const MAGIC: &[u8; 8] = b"FLTDSNAP";
/// Counted up with every change of what a state consists of.
const VERSION: u32 = 1;
/// Bytes before the state.
pub const HEADER_BYTES: usize = 88;
const CHECKSUM: std::ops::Range<usize> = 56..88;
/// A vCPU takes some 20 KiB, and a disk's map up to 90 KiB for each GiB that was written.
const MAX_STATE_BYTES: u64 = 64 << 20;

/// Why a state file is not used.
#[derive(Debug, thiserror::Error)]
pub enum StateProblem {
    #[error("it is not a snapshot's state")]
    Magic,
    #[error(
        "it has version {found}, this program reads {VERSION}; hint: make the snapshot again with this program"
    )]
    Version { found: u32 },
    #[error("it claims {bytes} bytes, more than any state has")]
    TooLarge { bytes: u64 },
    #[error("it is {found} bytes long instead of {wanted}; hint: make the snapshot again")]
    Length { found: u64, wanted: u64 },
    #[error("its checksum is wrong; hint: the storage damaged it, make the snapshot again")]
    Checksum,
    #[error(
        "it was made by another host, kernel or version of this program; hint: snapshots do not travel, make it here"
    )]
    OtherHost,
    #[error("it cannot be decoded")]
    Encoding(#[source] postcard::Error),
    #[error("it has {bytes} bytes too many")]
    Trailing { bytes: usize },
    #[error("it has an impossible {what}")]
    Impossible { what: &'static str },
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// A state as a file of `host`.
pub fn encode(state: &MachineState, host: &HostKey) -> Result<Vec<u8>, StateProblem> {
    let payload = postcard::to_allocvec(state).map_err(StateProblem::Encoding)?;
    let bytes = payload.len() as u64;
    if bytes > MAX_STATE_BYTES {
        return Err(StateProblem::TooLarge { bytes });
    }
    Ok(seal(&payload, host))
}

/// A file around a payload, whatever that is: for tests that damage states on purpose.
pub fn seal(payload: &[u8], host: &HostKey) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER_BYTES + payload.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    file.extend_from_slice(host.bytes());
    let sum = checksum(&file, payload);
    file.extend_from_slice(&sum);
    file.extend_from_slice(payload);
    file
}

/// The state of a file that is `length` bytes long.
pub fn read(
    file: &mut impl Read,
    length: u64,
    host: &HostKey,
) -> Result<MachineState, StateProblem> {
    let mut header = [0; HEADER_BYTES];
    if length < HEADER_BYTES as u64 {
        let wanted = HEADER_BYTES as u64;
        return Err(StateProblem::Length {
            found: length,
            wanted,
        });
    }
    file.read_exact(&mut header).map_err(StateProblem::Read)?;
    let bytes = payload_bytes(&header, length)?;
    let mut payload = vec![0; bytes];
    file.read_exact(&mut payload).map_err(StateProblem::Read)?;
    decode(&header, &payload, host)
}

/// The payload's length, once magic, version and both lengths are right.
fn payload_bytes(header: &[u8; HEADER_BYTES], length: u64) -> Result<usize, StateProblem> {
    let (magic, rest) = header.split_first_chunk().ok_or(StateProblem::Magic)?;
    if magic != MAGIC {
        return Err(StateProblem::Magic);
    }
    let (version, rest) = rest.split_first_chunk().ok_or(StateProblem::Magic)?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(StateProblem::Version { found });
    }
    let bytes = rest.get(4..12).and_then(|bytes| bytes.try_into().ok());
    let bytes = bytes.map_or(u64::MAX, u64::from_le_bytes);
    if bytes > MAX_STATE_BYTES {
        return Err(StateProblem::TooLarge { bytes });
    }
    let wanted = HEADER_BYTES as u64 + bytes;
    if length != wanted {
        return Err(StateProblem::Length {
            found: length,
            wanted,
        });
    }
    usize::try_from(bytes).map_err(|_narrow| StateProblem::TooLarge { bytes })
}

fn decode(
    header: &[u8; HEADER_BYTES],
    payload: &[u8],
    host: &HostKey,
) -> Result<MachineState, StateProblem> {
    let (start, sum) = header.split_at(CHECKSUM.start);
    if checksum(start, payload).as_slice() != sum {
        return Err(StateProblem::Checksum);
    }
    if !start.ends_with(host.bytes()) {
        return Err(StateProblem::OtherHost);
    }
    let (state, rest) =
        postcard::take_from_bytes::<MachineState>(payload).map_err(StateProblem::Encoding)?;
    if !rest.is_empty() {
        return Err(StateProblem::Trailing { bytes: rest.len() });
    }
    match state.impossibility() {
        None => Ok(state),
        Some(what) => Err(StateProblem::Impossible { what }),
    }
}

fn checksum(start: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(start);
    hash.update(payload);
    hash.finalize().into()
}

#[cfg(test)]
#[path = "damage_test.rs"]
mod tests;

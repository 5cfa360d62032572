//! Which file holds each granule of an overlay: two levels, the lower one made when the granules
//! of its 64 MiB are first told apart, so that a map of a disk that was never written, or trimmed
//! as a whole, costs sixteen bytes per 64 MiB.
//!
//! The map is what a snapshot stores of a disk. It comes back through [`OverlayMap::try_from`],
//! which checks every length and index, so a map in hand is always a correct one.

use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// Bytes whose whereabouts are known together: a page, and the usual file system block.
pub const GRANULE: u64 = GRANULE_BYTES as u64;
pub const GRANULE_BYTES: usize = 4096;
/// Granules of a chunk: 64 MiB.
const CHUNK_GRANULES: u64 = 16_384;
/// Two bits a granule.
const CHUNK_BYTES: usize = 4096;
/// Bounds what a stored map can make us allocate: a disk of 16 TiB.
const MAX_GRANULES: u64 = 1 << 32;

/// Where a granule's bytes are. The numbers are the stored form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the shared base, or nowhere yet where the base is shorter than the disk.
    Base = 0,
    /// In the frozen delta of the snapshot that this disk was cloned from.
    Golden = 1,
    /// In the disk's own delta.
    Delta = 2,
    /// Nowhere: it reads as zero.
    Zero = 3,
}

impl Place {
    fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Base,
            1 => Self::Golden,
            2 => Self::Delta,
            _ => Self::Zero,
        }
    }

    /// Four granules of this place.
    fn pattern(self) -> u8 {
        // 0b01 repeated, times a two-bit number: no carry.
        0x55 * (self as u8)
    }
}

type Places = [u8; CHUNK_BYTES];

/// The places of 64 MiB. The last chunk of a disk says base about what is beyond its end.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Chunk {
    All(Place),
    Each(Box<Places>),
}

impl Chunk {
    fn place(&self, index: usize) -> Place {
        match self {
            Self::All(place) => *place,
            Self::Each(places) => place_in(places, index),
        }
    }

    fn any(&self, found: impl Fn(u8) -> bool) -> bool {
        match self {
            Self::All(place) => found(place.pattern()),
            Self::Each(places) => places.iter().any(|four| found(*four)),
        }
    }
}

fn place_in(places: &Places, index: usize) -> Place {
    let four = places.get(index / 4).copied().unwrap_or(0);
    Place::from_bits(four >> (2 * (index % 4)))
}

/// The places of all granules of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredMap", into = "StoredMap")]
pub struct OverlayMap {
    granules: u64,
    chunks: Vec<Chunk>,
}

/// A stored map is not one of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    #[error("overlay map of {granules} granules is larger than any disk")]
    TooLarge { granules: u64 },
    #[error("overlay map chunk {index} is out of order or outside the disk")]
    ChunkIndex { index: u32 },
    #[error("overlay map chunk {index} is neither one place nor {CHUNK_BYTES} bytes in base64")]
    Chunk { index: u32 },
    #[error("overlay map says something about granules beyond the disk's end")]
    BeyondEnd,
    #[error("overlay map of a snapshot refers to another snapshot")]
    Nested,
}

impl OverlayMap {
    /// A map of a disk of `bytes`, all in the base.
    pub fn new(bytes: u64) -> Self {
        let granules = bytes.div_ceil(GRANULE);
        let chunks = granules.div_ceil(CHUNK_GRANULES);
        Self {
            granules,
            chunks: vec![Chunk::All(Place::Base); usize::try_from(chunks).unwrap_or(0)],
        }
    }

    /// How many granules the disk has.
    pub fn granules(&self) -> u64 {
        self.granules
    }

    pub fn place(&self, granule: u64) -> Place {
        let (chunk, index) = split(granule);
        let chunk = self.chunks.get(chunk);
        chunk.map_or(Place::Base, |chunk| chunk.place(index))
    }

    /// The place of `granule` and how many granules from it on are there too, at most `limit`.
    pub fn run(&self, granule: u64, limit: u64) -> (Place, u64) {
        let place = self.place(granule);
        let mut count = 1;
        while count < limit {
            let next = granule + count;
            let (chunk, index) = split(next);
            match self.chunks.get(chunk) {
                Some(Chunk::All(all)) if *all == place => {
                    count += CHUNK_GRANULES - next % CHUNK_GRANULES;
                }
                Some(Chunk::Each(places))
                    if index.is_multiple_of(4)
                        && places.get(index / 4) == Some(&place.pattern()) =>
                {
                    count += 4;
                }
                Some(Chunk::Each(places)) if place_in(places, index) == place => count += 1,
                _ => break,
            }
        }
        (place, count.min(limit))
    }

    /// Notes that all granules of `range` are at `place`.
    pub fn set(&mut self, range: Range<u64>, place: Place) {
        let end = range.end.min(self.granules);
        let mut granule = range.start;
        while granule < end {
            let (chunk, index) = split(granule);
            let Some(slot) = self.chunks.get_mut(chunk) else {
                return;
            };
            if index == 0 && end - granule >= CHUNK_GRANULES {
                *slot = Chunk::All(place);
                granule += CHUNK_GRANULES;
                continue;
            }
            if let Chunk::All(all) = slot {
                *slot = Chunk::Each(Box::new([all.pattern(); CHUNK_BYTES]));
            }
            let Chunk::Each(places) = slot else { return };
            let Some(byte) = places.get_mut(index / 4) else {
                return;
            };
            if index.is_multiple_of(4) && end - granule >= 4 {
                *byte = place.pattern();
                granule += 4;
            } else {
                let shift = 2 * (index % 4);
                *byte = (*byte & !(3 << shift)) | ((place as u8) << shift);
                granule += 1;
            }
        }
    }

    /// Whether any granule is in the own delta.
    pub fn needs_delta(&self) -> bool {
        let in_delta = |four: u8| (four >> 1) & !four & 0x55 != 0;
        self.chunks.iter().any(|chunk| chunk.any(in_delta))
    }

    /// The map of a clone: what the snapshot's delta held is golden to it.
    pub fn frozen(&self) -> Result<Self, MapError> {
        let in_golden = |four: u8| four & !(four >> 1) & 0x55 != 0;
        if self.chunks.iter().any(|chunk| chunk.any(in_golden)) {
            return Err(MapError::Nested);
        }
        let mut map = self.clone();
        for chunk in &mut map.chunks {
            match chunk {
                Chunk::All(place) if *place == Place::Delta => *place = Place::Golden,
                Chunk::All(_) => {}
                Chunk::Each(places) => {
                    for four in places.iter_mut() {
                        let (low, high) = (*four & 0x55, (*four >> 1) & 0x55);
                        let zero = high & low;
                        *four = high | (zero << 1);
                    }
                }
            }
        }
        Ok(map)
    }
}

/// Chunk and index in it. A granule's number is bounded by [`MAX_GRANULES`] or misses the table.
fn split(granule: u64) -> (usize, usize) {
    let chunk = usize::try_from(granule / CHUNK_GRANULES).unwrap_or(usize::MAX);
    let index = usize::try_from(granule % CHUNK_GRANULES).unwrap_or(0);
    (chunk, index)
}

/// The form on disk: touched chunks only, in order.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredMap {
    granules: u64,
    chunks: Vec<StoredChunk>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredChunk {
    index: u32,
    places: StoredPlaces,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum StoredPlaces {
    All(u8),
    /// The chunk's bytes in base64: a clone's start parses this.
    Each(String),
}

impl From<OverlayMap> for StoredMap {
    fn from(map: OverlayMap) -> Self {
        let stored = |(index, chunk)| {
            let places = match chunk {
                Chunk::All(Place::Base) => return None,
                Chunk::All(place) => StoredPlaces::All(place as u8),
                Chunk::Each(places) => StoredPlaces::Each(STANDARD.encode(places.as_slice())),
            };
            Some(StoredChunk { index, places })
        };
        Self {
            granules: map.granules,
            chunks: (0_u32..).zip(map.chunks).filter_map(stored).collect(),
        }
    }
}

impl TryFrom<StoredMap> for OverlayMap {
    type Error = MapError;

    fn try_from(stored: StoredMap) -> Result<Self, MapError> {
        let granules = stored.granules;
        if granules > MAX_GRANULES {
            return Err(MapError::TooLarge { granules });
        }
        let mut map = Self::new(granules * GRANULE);
        let mut expected = 0;
        for StoredChunk { index, places } in stored.chunks {
            let slot = usize::try_from(index)
                .ok()
                .filter(|_| index >= expected)
                .and_then(|at| map.chunks.get_mut(at))
                .ok_or(MapError::ChunkIndex { index })?;
            *slot = places.chunk().ok_or(MapError::Chunk { index })?;
            expected = index.saturating_add(1);
        }
        let (last, used) = split(granules);
        if let Some(chunk) = map.chunks.get(last)
            && (used..CHUNK_BYTES * 4).any(|index| chunk.place(index) != Place::Base)
        {
            return Err(MapError::BeyondEnd);
        }
        Ok(map)
    }
}

impl StoredPlaces {
    fn chunk(self) -> Option<Chunk> {
        match self {
            Self::All(bits) => (bits <= 3).then(|| Chunk::All(Place::from_bits(bits))),
            Self::Each(text) => {
                let mut places = Box::new([0; CHUNK_BYTES]);
                let decoded = STANDARD.decode_slice(text, places.as_mut_slice());
                (decoded == Ok(CHUNK_BYTES)).then_some(Chunk::Each(places))
            }
        }
    }
}

#[cfg(test)]
#[path = "map_test.rs"]
mod tests;

//! The map against a plain list, and stored maps that are none of ours.

use proptest::prelude::*;

use super::*;

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Base),
        Just(Place::Golden),
        Just(Place::Delta),
        Just(Place::Zero)
    ]
}

proptest! {
    #[test]
    fn it_agrees_with_a_plain_list(
        granules in 1..60_000_u64,
        steps in proptest::collection::vec((0..60_000_u64, 0..40_000_u64, place()), 1..12),
    ) {
        let mut map = OverlayMap::new(granules * GRANULE);
        let mut list = vec![Place::Base; usize::try_from(granules).unwrap()];
        for (start, len, place) in steps {
            map.set(start..start + len, place);
            for granule in start..(start + len).min(granules) {
                list[usize::try_from(granule).unwrap()] = place;
            }
        }
        let mut at = 0;
        while at < granules {
            let (place, count) = map.run(at, granules - at);
            let here = usize::try_from(at).unwrap();
            let same = list[here..].iter().take_while(|p| **p == list[here]).count();
            prop_assert_eq!((place, count), (list[here], same as u64));
            at += count;
        }
        let stored = serde_json::to_string(&map).unwrap();
        let loaded: OverlayMap = serde_json::from_str(&stored).unwrap();
        prop_assert_eq!(&loaded, &map);
        prop_assert_eq!(map.needs_delta(), list.contains(&Place::Delta));
        match map.frozen() {
            Err(e) => {
                prop_assert_eq!(e, MapError::Nested);
                prop_assert!(list.contains(&Place::Golden));
            }
            Ok(frozen) => {
                for (granule, place) in (0..).zip(list) {
                    let expected = if place == Place::Delta { Place::Golden } else { place };
                    prop_assert_eq!(frozen.place(granule), expected);
                }
            }
        }
    }
}

#[test]
fn a_map_costs_nothing_per_granule_while_they_are_alike() {
    let mut map = OverlayMap::new(1 << 40);
    assert_eq!(map.chunks.len(), 16_384);
    map.set(0..map.granules(), Place::Zero);
    let alike = |chunk: &Chunk| matches!(chunk, Chunk::All(Place::Zero));
    assert!(map.chunks.iter().all(alike));
    map.set(5..6, Place::Delta);
    assert!(!alike(&map.chunks[0]));
    assert_eq!(map.run(6, 1 << 28), (Place::Zero, (1 << 28) - 6));
}

#[test]
fn a_stored_map_that_cannot_be_is_refused() {
    let chunk = |index, len: usize| StoredChunk {
        index,
        places: StoredPlaces::Each(STANDARD.encode(vec![0xaa; len])),
    };
    let load = |granules, chunks| OverlayMap::try_from(StoredMap { granules, chunks });
    let full = CHUNK_GRANULES;
    assert!(load(full, vec![chunk(0, CHUNK_BYTES)]).is_ok());
    let cases = [
        (
            load(u64::MAX, vec![]),
            MapError::TooLarge { granules: u64::MAX },
        ),
        (
            load(full, vec![chunk(1, CHUNK_BYTES)]),
            MapError::ChunkIndex { index: 1 },
        ),
        (
            load(2 * full, vec![chunk(1, CHUNK_BYTES), chunk(1, CHUNK_BYTES)]),
            MapError::ChunkIndex { index: 1 },
        ),
        (
            load(full, vec![chunk(0, CHUNK_BYTES - 1)]),
            MapError::Chunk { index: 0 },
        ),
        (
            load(full, vec![chunk(0, CHUNK_BYTES + 1)]),
            MapError::Chunk { index: 0 },
        ),
        (
            load(
                full,
                vec![StoredChunk {
                    index: 0,
                    places: StoredPlaces::Each("no base64!".to_owned()),
                }],
            ),
            MapError::Chunk { index: 0 },
        ),
        (
            load(
                full,
                vec![StoredChunk {
                    index: 0,
                    places: StoredPlaces::All(4),
                }],
            ),
            MapError::Chunk { index: 0 },
        ),
        (
            load(
                full + 1,
                vec![StoredChunk {
                    index: 1,
                    places: StoredPlaces::All(3),
                }],
            ),
            MapError::BeyondEnd,
        ),
        (
            load(full - 1, vec![chunk(0, CHUNK_BYTES)]),
            MapError::BeyondEnd,
        ),
    ];
    for (loaded, error) in cases {
        assert_eq!(loaded.unwrap_err(), error);
    }
}

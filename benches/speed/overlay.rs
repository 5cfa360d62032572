//! What each disk request asks of the overlay's map.

use std::hint::black_box;

use criterion::Criterion;
use fleetingd::devices::block::OverlayMap;
use fleetingd::devices::block::map::Place;

/// Granules of a 30 GiB disk, the default's size.
const DISK_BYTES: u64 = 30 << 30;
/// Granules of a request of 1 MiB.
const REQUEST_GRANULES: u64 = 256;

/// Where the granules of a request of 1 MiB are, in a disk that is written in every other one.
pub fn measure(criterion: &mut Criterion) {
    let mut map = OverlayMap::new(DISK_BYTES);
    for granule in (0..map.granules()).step_by(2) {
        map.set(granule..granule + 1, Place::Delta);
    }
    let mut group = criterion.benchmark_group("overlay");
    group.bench_function("lookup-4k", |bencher| {
        let mut granule = 0;
        bencher.iter(|| {
            granule = (granule + 7919) % DISK_BYTES.div_ceil(4096);
            black_box(map.place(granule))
        });
    });
    group.bench_function("lookup-1m-fragmented", |bencher| {
        bencher.iter(|| {
            let mut at = 0;
            while at < REQUEST_GRANULES {
                let (place, count) = map.run(black_box(at), REQUEST_GRANULES - at);
                black_box(place);
                at += count;
            }
        });
    });
    group.finish();
}

//! The overlay against a plain array of bytes, through the device and on both engines; and what
//! it does when the host's storage fails.
#![expect(
    clippy::cast_possible_truncation,
    reason = "the numbers of a test are small"
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::super::testing::*;
use super::super::{Block, Disk, EngineChoice};
use super::*;
use crate::devices::{DeviceState, VirtioDevice};

#[derive(Debug, Clone, Copy)]
enum Kind {
    Read,
    Write(u8),
    Discard,
    WriteZeroes { unmap: bool },
}

#[derive(Debug, Clone, Copy)]
struct Step {
    kind: Kind,
    sector: u64,
    sectors: u64,
}

/// Requests that are in flight together, and whether a snapshot is cloned after them.
#[derive(Debug, Clone)]
struct Batch {
    steps: Vec<Step>,
    clone: bool,
}

fn batch(disk_sectors: u64) -> impl Strategy<Value = Batch> {
    let kind = prop_oneof![
        2 => Just(Kind::Read),
        4 => any::<u8>().prop_map(Kind::Write),
        1 => Just(Kind::Discard),
        1 => any::<bool>().prop_map(|unmap| Kind::WriteZeroes { unmap }),
    ];
    // Half of the requests are whole granules, as a file system's are.
    let range = prop_oneof![
        (0..disk_sectors, 1..40_u64),
        (0..disk_sectors / 8, 1..5_u64).prop_map(|(at, len)| (at * 8, len * 8)),
    ];
    let step = (kind, range).prop_map(move |(kind, (sector, sectors))| Step {
        kind,
        sector,
        sectors: sectors.min(disk_sectors - sector),
    });
    (
        proptest::collection::vec(step, 1..12),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(steps, clone)| Batch { steps, clone })
}

/// The requests of a batch that do not overlap an earlier one: only those have one right result
/// together. They may well share granules.
fn disjoint(steps: &[Step]) -> Vec<Step> {
    let mut chosen: Vec<Step> = Vec::new();
    for step in steps {
        let apart = |other: &Step| {
            step.sector + step.sectors <= other.sector
                || other.sector + other.sectors <= step.sector
        };
        if chosen.iter().all(apart) {
            chosen.push(*step);
        }
    }
    chosen
}

/// Submits a batch at once, checks what is read against the model, and carries the rest over.
fn run_batch(guest: &mut Guest<'_>, model: &mut [u8], steps: &[Step]) {
    let mut reads = Vec::new();
    for step in steps {
        let (start, len) = (step.sector as usize * 512, step.sectors as usize * 512);
        let range = start..start + len;
        let named = |flags: u32| {
            let mut bytes = step.sector.to_le_bytes().to_vec();
            bytes.extend((step.sectors as u32).to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            Some(Buffer::Out(bytes))
        };
        match step.kind {
            Kind::Read => {
                let head = guest.request(0, step.sector, Some(Buffer::In(len as u32)));
                reads.push((head, range));
            }
            Kind::Write(seed) => {
                let bytes: Vec<u8> = (0..len).map(|i| seed ^ (i / 512) as u8 ^ 1).collect();
                model[range].copy_from_slice(&bytes);
                guest.request(1, step.sector, Some(Buffer::Out(bytes)));
            }
            Kind::Discard => {
                model[range].fill(0);
                guest.request(11, 0, named(0));
            }
            Kind::WriteZeroes { unmap } => {
                model[range].fill(0);
                guest.request(13, 0, named(u32::from(unmap)));
            }
        }
    }
    let answers = guest.run(u16::try_from(steps.len()).unwrap()).unwrap();
    for answer in answers {
        assert_eq!(guest.status_of(answer.head), OK);
    }
    for (head, range) in reads {
        assert!(guest.bytes_of(head, range.len()) == model[range]);
    }
}

fn check_all(guest: &mut Guest<'_>, model: &[u8]) {
    let mut at = 0;
    while at < model.len() {
        let len = (model.len() - at).min(64 << 10);
        let read = guest.read(at as u64 / 512, len as u32).unwrap();
        assert!(read == model[at..at + len], "differs from {at} on");
        at += len;
    }
}

/// A clone of what `device` has on its disk now; its state goes through its stored form.
fn clone_of(device: &Block, base: &Arc<File>, engine: EngineChoice) -> Block {
    let stored = serde_json::to_string(&device.save().unwrap()).unwrap();
    let state: DeviceState = serde_json::from_str(&stored).unwrap();
    let Disk::Overlay(overlay) = &device.drive.disk else {
        panic!("not an overlay")
    };
    let golden = Golden {
        delta: Arc::new(overlay.delta().try_clone().unwrap()),
        map: overlay.save_map(),
    };
    let disk = Overlay::new(Arc::clone(base), Some(golden), file_of(&[])).unwrap();
    let mut clone = block(Disk::Overlay(disk), engine);
    clone.restore(state).unwrap();
    clone
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn it_holds_what_a_plain_array_would(
        ring in any::<bool>(),
        base_bytes in 1..150_000_usize,
        batches in proptest::collection::vec(batch(290), 1..20),
    ) {
        let engine = if ring { EngineChoice::Ring } else { EngineChoice::Plain };
        let mut model: Vec<u8> = (0..base_bytes).map(|i| (i % 251) as u8).collect();
        let base = Arc::new(file_of(&model));
        // 290 sectors, two beyond a granule's border, or what the base has beyond that.
        let delta = file_of(&[]);
        delta.set_len(290 * 512).unwrap();
        let disk = Overlay::new(Arc::clone(&base), None, delta).unwrap();
        model.resize(usize::try_from(disk.bytes()).unwrap(), 0);
        let memory = ram();
        let mut guest = Guest::new(&memory, block(Disk::Overlay(disk), engine));
        let mut cloned = false;
        for batch in &batches {
            run_batch(&mut guest, &mut model, &disjoint(&batch.steps));
            if batch.clone && !cloned {
                cloned = true;
                guest.pause();
                let clone = clone_of(&guest.device, &base, engine);
                guest = Guest::new(&memory, clone);
            }
        }
        check_all(&mut guest, &model);
    }
}

#[test]
fn clones_of_one_snapshot_do_not_see_each_other() {
    let base = Arc::new(file_of(&[1; 64 << 10]));
    let disk = Overlay::new(Arc::clone(&base), None, file_of(&[])).unwrap();
    let memory = ram();
    let mut golden = Guest::new(&memory, block(Disk::Overlay(disk), EngineChoice::Auto));
    assert_eq!(golden.write(8, &[2; 4096]), OK);
    golden.pause();
    let (memory_a, memory_b) = (ram(), ram());
    let a = clone_of(&golden.device, &base, EngineChoice::Auto);
    let b = clone_of(&golden.device, &base, EngineChoice::Auto);
    let mut a = Guest::new(&memory_a, a);
    let mut b = Guest::new(&memory_b, b);
    assert_eq!(a.write(9, &[3; 512]), OK);
    assert_eq!(b.discard(&[(8, 8, 0)]), OK);
    assert_eq!(
        a.read(8, 1536).unwrap(),
        [[2; 512], [3; 512], [2; 512]].concat()
    );
    assert_eq!(b.read(8, 4096).unwrap(), [0; 4096]);
    assert_eq!(b.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn a_state_of_another_disk_is_refused() {
    let map = |bytes| overlay(&vec![0; bytes], None).save_map();
    let base = || Arc::new(file_of(&[0; 16 << 10]));
    let golden = Golden {
        delta: base(),
        map: map(8 << 10),
    };
    let other_size = Overlay::new(base(), Some(golden), file_of(&[]));
    assert_eq!(other_size.unwrap_err().kind(), io::ErrorKind::InvalidData);

    let mut clone_map = map(16 << 10);
    clone_map.set(0..1, Place::Golden);
    let nested = Golden {
        delta: base(),
        map: clone_map.clone(),
    };
    assert!(Overlay::new(base(), Some(nested), file_of(&[])).is_err());
    let mut plain = Overlay::new(base(), None, file_of(&[])).unwrap();
    assert!(plain.restore_map(clone_map).is_err());

    let mut written = map(16 << 10);
    written.set(1..2, Place::Delta);
    assert!(plain.restore_map(written.clone()).is_err());
    let delta = file_of(&[4; 8 << 10]);
    let mut with_delta = Overlay::new(base(), None, delta).unwrap();
    with_delta.restore_map(written.clone()).unwrap();
    assert_eq!(with_delta.save_map(), written);

    let direct = block(Disk::Direct(base()), EngineChoice::Plain);
    let state = direct.save().unwrap();
    let mut device = block(Disk::Overlay(plain), EngineChoice::Plain);
    assert!(device.restore(state).is_err());
    assert!(device.restore(DeviceState::Entropy).is_err());
}

#[test]
fn discard_gives_space_back_to_the_host() {
    for engine in ENGINES {
        let disk = overlay(&[1; 1 << 20], None);
        let watch = disk.delta().try_clone().unwrap();
        let blocks = || watch.metadata().unwrap().blocks();
        let memory = ram();
        let mut guest = Guest::new(&memory, block(Disk::Overlay(disk), engine));
        assert_eq!(blocks(), 0);
        assert_eq!(guest.write(0, &[2; 64 << 10]), OK);
        assert_eq!(blocks(), 128);
        assert_eq!(guest.discard(&[(0, 64, 0), (64, 64, 0)]), OK);
        assert_eq!(blocks(), 0);
        assert_eq!(guest.read(0, 64 << 10).unwrap(), [0; 64 << 10]);
    }
}

/// Fails after N granules, for several N: what was acknowledged is there, what was refused left
/// the old bytes, and space that is given back can be used again.
#[test]
fn a_full_host_is_an_io_error_and_loses_nothing() {
    for engine in ENGINES {
        for granules in [1, 3, 8, 21] {
            let base = Arc::new(file_of(&[7; 256 << 10]));
            let delta = file_on_small_disk(granules * 4);
            let disk = Overlay::new(base, None, delta).unwrap();
            let memory = ram();
            let device = block(Disk::Overlay(disk), engine);
            let stats = device.stats();
            let mut guest = Guest::new(&memory, device);
            let mut model = vec![7; 256 << 10];
            let mut refused = 0;
            // Parts, wholes and pairs of granules in turn.
            for (i, at) in (0..60_u64).zip((0..).step_by(8)) {
                let sectors: u64 = [3, 8, 16][usize::try_from(i % 3).unwrap()];
                let bytes = vec![i as u8 + 10; sectors as usize * 512];
                let start = at as usize * 512;
                match guest.write(at, &bytes) {
                    OK => model[start..start + bytes.len()].copy_from_slice(&bytes),
                    status => {
                        assert_eq!(status, IOERR);
                        refused += 1;
                        // A granule that was in the delta already may be half overwritten.
                        let now = guest.read(at, bytes.len() as u32).unwrap();
                        model[start..start + bytes.len()].copy_from_slice(&now);
                        let old_or_new =
                            |b: &u8| *b == 7 || *b == i as u8 + 10 || *b == i as u8 + 9;
                        assert!(now.iter().all(old_or_new));
                    }
                }
            }
            assert!(refused > 0);
            assert_eq!(stats.errors.load(Ordering::Relaxed), refused);
            check_all(&mut guest, &model);
            assert_eq!(guest.discard(&[(0, 512, 0)]), OK);
            assert_eq!(guest.write(0, &[9; 4096]), OK);
            assert_eq!(guest.read(0, 4096).unwrap(), [9; 4096]);
        }
    }
}

#[test]
fn a_base_that_was_truncated_is_an_io_error_until_it_is_back() {
    for engine in ENGINES {
        let base = Arc::new(file_of(&[5; 64 << 10]));
        let disk = Overlay::new(Arc::clone(&base), None, file_of(&[])).unwrap();
        let memory = ram();
        let mut guest = Guest::new(&memory, block(Disk::Overlay(disk), engine));
        base.set_len(6000).unwrap();
        assert_eq!(guest.read(0, 8192), Err(IOERR));
        // The copy-up cannot read either: nothing of the write may be seen later.
        assert_eq!(guest.write(17, &[1; 512]), IOERR);
        base.set_len(0).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&*base, &[5; 64 << 10], 0).unwrap();
        assert_eq!(guest.read(0, 64 << 10).unwrap(), [5; 64 << 10]);
    }
}

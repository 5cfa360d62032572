//! A balloon driver over real guest memory: what it gives back is judged by the kernel's own
//! account of the pages, not by our counters.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::devices::testing::{NEXT, Ring, WRITE, event_fd, run_ready};
use crate::devices::{GuestFault, GuestMemory, Interrupt};

const ALL: u64 = (1 << 32) | F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING;
const MIB: u64 = 1 << 20;
/// Rings lie in the first half of the low memory, pages to give back in the second.
const PAGES_AT: u64 = 8 * MIB;
const LOW_RAM: u64 = 16 * MIB;
const HIGH_RAM: u64 = 1 << 32;

/// A guest with RAM on both sides of a hole, and its balloon.
struct Guest {
    balloon: Balloon,
    rings: Vec<Ring>,
    mem: GuestMemory,
    config_call: Arc<EventFd>,
    features: u64,
}

impl Guest {
    fn boot(features: u64) -> Self {
        let low = usize::try_from(LOW_RAM).unwrap();
        let ranges = [(GuestAddress(0), low), (GuestAddress(HIGH_RAM), 2 << 20)];
        let mem = GuestMemory::from_ranges(&ranges).unwrap();
        let sizes = QUEUE_SIZES.into_iter();
        let rings = (0..)
            .zip(sizes)
            .map(|(i, size)| Ring::new(&mem, i * MIB, size))
            .collect();
        let mut guest = Self {
            balloon: Balloon::new(),
            rings,
            mem,
            config_call: event_fd(),
            features,
        };
        guest.activate([(0, 0); 5]);
        guest
    }

    fn activate(&mut self, positions: [(u16, u16); 5]) {
        let rings = self.rings.iter().zip(positions);
        let queues = rings
            .map(|(ring, (avail, used))| Some(ring.queue_at(false, avail, used)))
            .collect();
        self.balloon
            .activate(Activation {
                memory: self.mem.clone(),
                features: self.features,
                queues,
                config_interrupt: Interrupt::new(Arc::clone(&self.config_call)),
            })
            .unwrap();
    }

    fn pause(&mut self) -> [(u16, u16); 5] {
        let states = self.balloon.deactivate();
        std::array::from_fn(|i| {
            let state = states[i].unwrap();
            (state.next_avail, state.next_used)
        })
    }

    fn serve(&mut self) -> Result<(), Fault> {
        run_ready(&mut self.balloon)
    }

    /// Sends page numbers on a queue and waits until they are done.
    fn send_pages(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        self.rings[queue].send(&bytes);
        self.serve().unwrap();
        assert!(self.rings[queue].take_used().is_some());
        assert!(self.rings[queue].interrupted());
    }

    /// Reports free blocks (address, length) in one chain.
    fn report(&mut self, queue: usize, blocks: &[(u64, u32)]) -> Result<(), Fault> {
        let last = u16::try_from(blocks.len()).unwrap() - 1;
        for (i, (at, len)) in (0..).zip(blocks) {
            let next = if i == last { 0 } else { NEXT };
            self.rings[queue].describe(i, (*at, *len, WRITE | next, i + 1));
        }
        self.rings[queue].offer(0);
        self.rings[queue].kick();
        self.serve()
    }

    fn touch(&self, at: u64, bytes: u64) {
        for page in (at..at + bytes).step_by(4096) {
            self.mem.write_obj(0x55_u8, GuestAddress(page)).unwrap();
        }
    }

    fn touched(&self, at: u64) -> bool {
        self.mem.read_obj::<u8>(GuestAddress(at)).unwrap() == 0x55
    }

    /// How many bytes of a guest range the host spends memory on, page by page as the kernel says.
    fn resident(&self, at: u64, bytes: u64) -> u64 {
        /// Present or swapped out (Linux, admin-guide/mm/pagemap).
        const HELD: u64 = 3 << 62;
        let host = self.mem.get_host_address(GuestAddress(at)).unwrap().addr();
        let mut entries = vec![0; usize::try_from(bytes / 4096 * 8).unwrap()];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let offset = host as u64 / 4096 * 8;
        pagemap.read_exact_at(&mut entries, offset).unwrap();
        let (entries, _) = entries.as_chunks::<8>();
        let held = entries
            .iter()
            .filter(|entry| u64::from_le_bytes(**entry) & HELD != 0);
        held.count() as u64 * 4096
    }

    fn num_pages(&self) -> u32 {
        self.balloon.num_pages()
    }
}

fn page(at: u64) -> u32 {
    u32::try_from(at / 4096).unwrap()
}

fn problem(result: Result<(), Fault>) -> &'static str {
    match result {
        Err(Fault::Guest(GuestFault::Request {
            device: "balloon",
            problem,
        })) => problem,
        other => panic!("no fault of the guest: {other:?}"),
    }
}

#[test]
fn page_numbers_join_to_ranges() {
    let join = |mut pages: Vec<u32>| pages::ranges(&mut pages).collect::<Vec<_>>();
    assert_eq!(join(vec![]), []);
    assert_eq!(join(vec![7]).first(), Some(&(0x7000..0x8000)));
    assert_eq!(
        join(vec![9, 3, 2, 3, 4, 2]),
        [0x2000..0x5000, 0x9000..0xa000]
    );
    assert_eq!(
        join(vec![u32::MAX, 0, u32::MAX - 1]),
        [0..0x1000, 0xfff_ffff_e000..0x1000_0000_0000]
    );
}

#[test]
fn only_whole_pages_of_a_report_count() {
    assert_eq!(pages::whole_pages(0x1000..0x3000), 0x1000..0x3000);
    assert_eq!(pages::whole_pages(0x1001..0x3fff), 0x2000..0x3000);
    assert!(pages::whole_pages(0x1001..0x1fff).is_empty());
    assert!(pages::whole_pages(u64::MAX - 5..u64::MAX).is_empty());
}

#[test]
fn inflating_returns_private_memory_to_the_host() {
    let mut guest = Guest::boot(ALL);
    guest.touch(PAGES_AT, 4 * MIB);
    assert_eq!(guest.resident(PAGES_AT, 4 * MIB), 4 * MIB);
    let pages: Vec<u32> = (0..1024).map(|i| page(PAGES_AT) + i).rev().collect();
    for part in pages.chunks(256) {
        guest.send_pages(0, part);
    }
    assert_eq!(guest.resident(PAGES_AT, 4 * MIB), 0);
    assert_eq!(guest.balloon.stats().inflated_bytes(), 4 * MIB);
    // The guest's again as soon as it deflates and touches them.
    guest.send_pages(1, &pages[..256]);
    guest.touch(PAGES_AT + 3 * MIB, MIB);
    assert!(guest.resident(PAGES_AT, 4 * MIB) >= MIB);
}

#[test]
fn page_numbers_outside_memory_twice_or_of_the_queue_hurt_nobody() {
    let mut guest = Guest::boot(ALL);
    guest.touch(PAGES_AT, MIB);
    let hole = [
        page(LOW_RAM),
        page(HIGH_RAM - 4096),
        page(HIGH_RAM + 2 * MIB),
    ];
    guest.send_pages(0, &[&hole[..], &[u32::MAX, u32::MAX - 1]].concat());
    assert_eq!(guest.balloon.stats().inflated_bytes(), 0);
    assert_eq!(guest.balloon.stats().ignored_bytes(), 5 * 4096);

    // A run across the end of RAM: what is RAM goes.
    guest.touch(LOW_RAM - 4096, 4096);
    guest.send_pages(
        0,
        &[page(LOW_RAM), page(LOW_RAM - 4096), page(LOW_RAM - 4096)],
    );
    assert!(!guest.touched(LOW_RAM - 4096));
    assert_eq!(guest.balloon.stats().inflated_bytes(), 4096);
    assert!(guest.touched(PAGES_AT), "nothing else went");

    // Its own queue: the rings read as zero, which the next request makes a fault of the guest.
    let ring = &guest.rings[0];
    let own = [ring.table(), ring.avail_ring(), ring.used_ring()].map(page);
    let bytes: Vec<u8> = own.iter().flat_map(|p| p.to_le_bytes()).collect();
    guest.rings[0].send(&bytes);
    assert!(matches!(guest.serve(), Err(Fault::Guest(_))));
}

#[test]
fn page_numbers_of_an_impossible_length_stop_the_device() {
    let mut guest = Guest::boot(ALL);
    guest.rings[0].send(&[0; 5]);
    assert_eq!(
        problem(guest.serve()),
        "page numbers of an impossible length"
    );
    // A million of them in one descriptor.
    let mut guest = Guest::boot(ALL);
    guest.rings[0].describe(0, (PAGES_AT, 4 << 20, 0, 0));
    guest.rings[0].offer(0);
    guest.rings[0].kick();
    assert_eq!(
        problem(guest.serve()),
        "page numbers of an impossible length"
    );
}

#[test]
fn deflating_what_was_never_inflated_changes_nothing() {
    let mut guest = Guest::boot(ALL);
    guest.touch(PAGES_AT, 4096);
    guest.send_pages(1, &[page(PAGES_AT), u32::MAX]);
    assert!(guest.touched(PAGES_AT));
}

#[test]
fn a_free_page_report_returns_whole_pages_of_ram() {
    // By the standard's index, and by the one that Linux takes without hinting.
    for queue in [3, 4] {
        let mut guest = Guest::boot(ALL);
        guest.touch(PAGES_AT, 4 * MIB);
        guest.touch(HIGH_RAM, MIB);
        let blocks = [
            (PAGES_AT, 2 << 20),
            // Overlapping, and off the page on both ends.
            (PAGES_AT + MIB, 1 << 20),
            (PAGES_AT + 3 * MIB + 1, 8190),
            (HIGH_RAM, 1 << 20),
        ];
        guest.report(queue, &blocks).unwrap();
        assert!(guest.rings[queue].take_used().is_some());
        assert_eq!(guest.resident(PAGES_AT, 2 * MIB), 0);
        assert_eq!(guest.resident(HIGH_RAM, MIB), 0);
        assert!(guest.touched(PAGES_AT + 2 * MIB));
        assert!(guest.touched(PAGES_AT + 3 * MIB) && guest.touched(PAGES_AT + 3 * MIB + 4096));
        assert!(!guest.touched(HIGH_RAM));
        assert_eq!(guest.balloon.stats().reported_bytes(), 4 * MIB);
    }
}

#[test]
fn a_report_as_long_as_linux_sends_is_taken() {
    let mut guest = Guest::boot(ALL);
    // 32 blocks of 4 MiB; the same memory again and again costs nothing.
    guest.report(3, &[(PAGES_AT, 4 << 20); 32]).unwrap();
    assert_eq!(guest.balloon.stats().reported_bytes(), 128 * MIB);
}

#[test]
fn a_report_outside_memory_stops_the_device() {
    let mut guest = Guest::boot(ALL);
    let fault = guest.report(3, &[(LOW_RAM - 4096, 8192)]).unwrap_err();
    assert!(matches!(fault, Fault::Guest(GuestFault::Chain { .. })));
}

#[test]
fn queues_of_features_that_were_not_negotiated_are_not_read() {
    let mut guest = Guest::boot(1 << 32);
    guest.touch(PAGES_AT, 4096);
    for queue in [2, 3, 4] {
        guest.report(queue, &[(PAGES_AT, 4096)]).unwrap();
        assert_eq!(guest.rings[queue].take_used(), None);
    }
    assert!(guest.touched(PAGES_AT));
}

#[test]
fn without_statistics_reports_move_down_as_linux_has_it() {
    let mut guest = Guest::boot(ALL & !F_STATS_VQ);
    guest.touch(PAGES_AT, 4096);
    guest.report(2, &[(PAGES_AT, 4096)]).unwrap();
    assert!(!guest.touched(PAGES_AT));
}

fn statistics(entries: &[(u16, u64)]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
        .collect()
}

#[test]
fn statistics_are_held_until_the_host_asks_again() {
    let mut guest = Guest::boot(ALL);
    let stats = guest.balloon.stats();
    assert_eq!(stats.get(Statistic::FreeMemory), None);
    guest.rings[2].send(&statistics(&[(4, 1000), (5, 4000), (6, 1500), (99, 7)]));
    guest.serve().unwrap();
    assert_eq!(stats.get(Statistic::FreeMemory), Some(1000));
    assert_eq!(stats.get(Statistic::TotalMemory), Some(4000));
    assert_eq!(stats.get(Statistic::AvailableMemory), Some(1500));
    assert_eq!(stats.get(Statistic::SwapIn), None);
    assert_eq!(guest.rings[2].take_used(), None, "held");

    guest
        .balloon
        .command(DeviceCommand::RequestBalloonStats)
        .unwrap();
    assert!(guest.rings[2].take_used().is_some() && guest.rings[2].interrupted());
    guest.rings[2].send(&statistics(&[(4, 900)]));
    guest.serve().unwrap();
    assert_eq!(stats.get(Statistic::FreeMemory), Some(900));
    assert_eq!(stats.reports(), 2);
}

#[test]
fn the_held_statistics_buffer_survives_a_pause() {
    let mut guest = Guest::boot(ALL);
    guest.rings[2].send(&statistics(&[(4, 1000)]));
    guest.serve().unwrap();
    let positions = guest.pause();
    assert_eq!(positions[2], (0, 0), "given back by position");
    let state = guest.balloon.save().unwrap();

    guest.balloon = Balloon::new();
    guest.balloon.restore(state).unwrap();
    guest.activate(positions);
    guest.serve().unwrap();
    guest
        .balloon
        .command(DeviceCommand::RequestBalloonStats)
        .unwrap();
    assert_eq!(guest.rings[2].take_used(), Some((0, 0)));
}

#[test]
fn asking_for_statistics_that_never_came_is_no_fault() {
    let mut guest = Guest::boot(ALL);
    for _ in 0..2 {
        guest
            .balloon
            .command(DeviceCommand::RequestBalloonStats)
            .unwrap();
    }
    guest.serve().unwrap();
    assert_eq!(guest.rings[2].take_used(), None);
}

#[test]
fn strange_statistics_are_read_to_a_limit_or_stop_the_device() {
    // Empty, then cut off, then long.
    for bytes in [vec![], vec![4; 9], vec![0xff; 4096]] {
        let mut guest = Guest::boot(ALL);
        guest.rings[2].send(&bytes);
        guest.serve().unwrap();
        assert_eq!(guest.balloon.stats().get(Statistic::FreeMemory), None);
    }
    let mut guest = Guest::boot(ALL);
    guest.rings[2].describe(0, (0, u32::MAX, 0, 0));
    guest.rings[2].offer(0);
    guest.rings[2].kick();
    assert!(matches!(
        guest.serve(),
        Err(Fault::Guest(GuestFault::Chain { .. }))
    ));
    let mut guest = Guest::boot(ALL);
    guest.rings[2].send(&[]);
    guest.rings[2].send(&[]);
    assert_eq!(problem(guest.serve()), "two statistics buffers at once");
}

#[test]
fn the_target_is_told_once_and_is_at_most_the_ram() {
    let mut guest = Guest::boot(ALL);
    assert!(guest.config_call.read().is_err());
    let mut set = |mib| {
        guest
            .balloon
            .command(DeviceCommand::SetBalloonTarget(mib))
            .unwrap();
        (guest.num_pages(), guest.config_call.read().is_ok())
    };
    assert_eq!(set(4), (1024, true));
    assert_eq!(set(4), (1024, false));
    assert_eq!(set(u32::MAX), (18 * 256, true));
    assert_eq!(set(0), (0, true));
}

#[test]
fn a_target_set_at_rest_is_told_at_activation() {
    let mut guest = Guest::boot(ALL);
    let positions = guest.pause();
    guest
        .balloon
        .command(DeviceCommand::SetBalloonTarget(2))
        .unwrap();
    assert!(guest.config_call.read().is_err());
    guest.activate(positions);
    assert_eq!(guest.num_pages(), 512);
    assert!(guest.config_call.read().is_ok());
}

#[test]
fn the_driver_says_how_large_the_balloon_is_and_a_reset_empties_it() {
    let mut guest = Guest::boot(ALL);
    let stats = guest.balloon.stats();
    let config = Arc::clone(guest.balloon.config());
    config.write_by_driver(0, &[0xff; 4]);
    config.write_by_driver(4, &300_u32.to_le_bytes());
    assert_eq!((guest.num_pages(), stats.actual_pages()), (0, 300));
    guest.pause();
    let state = guest.balloon.save().unwrap();
    guest.balloon.reset();
    assert_eq!(stats.actual_pages(), 0);
    guest.balloon.restore(state).unwrap();
    assert_eq!(stats.actual_pages(), 300);
    assert!(guest.balloon.restore(DeviceState::Entropy).is_err());
}

#[test]
fn one_wake_up_takes_a_bounded_number_of_requests() {
    let mut guest = Guest::boot(ALL);
    guest.serve().unwrap();
    for _ in 0..100 {
        guest.rings[1].send(&[]);
    }
    guest.balloon.handle(1, EventSet::IN).unwrap();
    let used = std::iter::from_fn(|| guest.rings[1].take_used()).count();
    assert_eq!(used, 32);
    guest.serve().unwrap();
    let used = std::iter::from_fn(|| guest.rings[1].take_used()).count();
    assert_eq!(used, 68, "it wakes itself until all are done");
}

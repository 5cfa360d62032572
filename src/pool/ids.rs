//! Instance ids: valid host names that never come back, even after a restart.
//!
//! Ten base32 digits hold 50 bits: 32 of the start second, 18 of a counter. A process that starts
//! in a later second than its predecessor ended can't repeat an id; one second's counter is
//! exhausted only after 262 144 machines, and then the second itself moves on.

use super::spec::InstanceId;

/// RFC 4648's base32 alphabet in lower case, sorted so that ids sort by age.
const DIGITS: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
const COUNTER_BITS: u32 = 18;
const DIGIT_COUNT: u32 = 10;

/// Hands out ids of one group.
#[derive(Debug)]
pub struct IdSource {
    group: String,
    /// The last number given out.
    last: u64,
}

impl IdSource {
    pub fn new(group: &str) -> Self {
        Self {
            group: group.to_owned(),
            last: 0,
        }
    }

    /// The next id; greater than all before, also when the clock goes backwards.
    pub fn next(&mut self, epoch_seconds: u64) -> InstanceId {
        let earliest = (epoch_seconds & 0xffff_ffff) << COUNTER_BITS;
        self.last = earliest.max(self.last.wrapping_add(1));
        let mut text = format!("{}-", self.group);
        for place in (0..DIGIT_COUNT).rev() {
            let digit = usize::try_from((self.last >> (place * 5)) & 31).unwrap_or(0);
            text.push(char::from(DIGITS.get(digit).copied().unwrap_or(b'2')));
        }
        InstanceId(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_host_names_that_rise_whatever_the_clock_does() {
        let mut source = IdSource::new("fleetingd0");
        let mut last = InstanceId(String::new());
        for seconds in [
            1_800_000_000,
            1_800_000_000,
            1_799_999_000,
            0,
            1_800_000_001,
        ] {
            let id = source.next(seconds);
            assert!(id > last, "{id} after {last}");
            let (group, digits) = id.as_str().split_once('-').unwrap();
            assert_eq!((group, digits.len()), ("fleetingd0", 10));
            assert!(digits.bytes().all(|b| DIGITS.contains(&b)));
            assert!(id.as_str().len() <= 63);
            last = id;
        }
    }

    #[test]
    fn a_restarted_process_repeats_no_id() {
        let mut first = IdSource::new("g");
        let mut given: Vec<InstanceId> = (0..1000).map(|_| first.next(100)).collect();
        let mut second = IdSource::new("g");
        given.extend((0..1000).map(|_| second.next(101)));
        let before = given.len();
        given.sort();
        given.dedup();
        assert_eq!(given.len(), before);
    }
}

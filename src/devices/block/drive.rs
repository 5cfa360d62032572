//! A disk as its device sees it: the storage, its serial, and how well it has fared.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Disk;
use super::request::{ByteRange, ID_BYTES};

/// At most one line about a disk's failures in this time.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// What a disk has done so far; shared, so that it can be read while the disk runs.
#[derive(Debug, Default)]
pub struct BlockStats {
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    /// Requests that the host's storage failed.
    pub errors: AtomicU64,
}

/// The disk and what belongs to it, at rest and running alike.
#[derive(Debug)]
pub struct Drive {
    pub disk: Disk,
    pub serial: [u8; ID_BYTES],
    /// FLUSH reaches storage.
    pub durable: bool,
    /// A sync failed: the kernel has forgotten what it could not write, so none can succeed again.
    pub sync_failed: bool,
    pub stats: Arc<BlockStats>,
    name: String,
    reported: Option<Instant>,
    unreported: u64,
}

impl Drive {
    pub fn new(disk: Disk, serial: [u8; ID_BYTES], durable: bool, name: String) -> Self {
        Self {
            disk,
            serial,
            durable,
            sync_failed: false,
            stats: Arc::default(),
            name,
            reported: None,
            unreported: 0,
        }
    }

    /// Counts a failure of the host and tells the operator, but not each time.
    pub fn report(&mut self, act: &str, range: Option<ByteRange>, error: &io::Error) {
        self.stats.errors.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let quiet = self
            .reported
            .is_some_and(|last| now.duration_since(last) < REPORT_EVERY);
        if quiet {
            self.unreported += 1;
            return;
        }
        let more = std::mem::take(&mut self.unreported);
        self.reported = Some(now);
        tracing::warn!(
            disk = %self.name,
            unreported = more,
            "{}",
            describe(&self.name, act, range, error)
        );
    }

    /// Makes completed writes durable, and remembers if that failed. Blocks for storage.
    pub fn sync(&mut self) -> io::Result<()> {
        if self.sync_failed {
            return Err(io::Error::other("an earlier sync of this disk failed"));
        }
        let Some(file) = self.disk.written_file() else {
            return Ok(());
        };
        let result = rustix::fs::fdatasync(file);
        self.sync_failed = result.is_err();
        Ok(result?)
    }
}

/// One line: the disk, the act, the cause, and what the operator can do.
fn describe(name: &str, act: &str, range: Option<ByteRange>, error: &io::Error) -> String {
    let place = range.map_or(String::new(), |range| {
        format!(" of {} bytes at {}", range.len, range.offset)
    });
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; hint: free space where the disk's file lies, the guest sees i/o errors until then"
        }
        _ if error.raw_os_error() == Some(libc::EIO) => {
            "; hint: the host's storage fails, see its kernel log"
        }
        _ => "",
    };
    format!("{name}: {act}{place}: {error}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_disk_is_counted_each_time_and_told_now_and_then() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut drive = Drive::new(Disk::Direct(file), [0; 20], false, "vda".to_owned());
        let error = io::Error::from_raw_os_error(libc::EIO);
        for _failure in 0..5 {
            drive.report("read", None, &error);
        }
        assert_eq!(drive.stats.errors.load(Ordering::Relaxed), 5);
        assert_eq!(drive.unreported, 4);
        drive.reported = drive.reported.map(|last| last - REPORT_EVERY);
        drive.report("read", None, &error);
        assert_eq!(drive.unreported, 0);
    }

    #[test]
    fn a_full_disk_is_told_in_one_line_with_a_hint() {
        let range = ByteRange {
            offset: 8192,
            len: 512,
        };
        let error = io::Error::from_raw_os_error(libc::ENOSPC);
        let line = describe("vda", "write", Some(range), &error);
        assert!(
            line.starts_with("vda: write of 512 bytes at 8192: No space left"),
            "{line}"
        );
        assert!(line.contains("; hint: free space"), "{line}");
    }
}

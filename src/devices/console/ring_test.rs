//! The sink: what it keeps, what it finds, and files that are slow, full or gone.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::*;

fn file_of(stream: UnixStream) -> File {
    File::from(std::os::fd::OwnedFd::from(stream))
}

#[test]
fn the_ring_keeps_the_last_64_kib_and_counts_everything() {
    let sink = ConsoleSink::new(None);
    for number in 0..20_000 {
        sink.write(format!("{number:08}\n").as_bytes());
    }
    assert_eq!(sink.total_bytes(), 180_000);
    let all = sink.tail(usize::MAX);
    assert_eq!(all.len(), RING_BYTES);
    assert!(all.ends_with("00019998\n00019999\n"));
    assert_eq!(sink.tail(9), "00019999\n");
}

#[test]
fn one_write_larger_than_the_ring_leaves_its_end() {
    let sink = ConsoleSink::new(None);
    let mut big = vec![b'x'; 3 * RING_BYTES];
    big.extend(b"end");
    sink.write(b"before");
    sink.write(&big);
    assert_eq!(sink.tail(usize::MAX).len(), RING_BYTES);
    assert_eq!(sink.tail(4), "xend");
}

#[test]
fn first_output_is_the_time_of_the_first_byte() {
    let sink = ConsoleSink::new(None);
    sink.write(b"");
    assert_eq!(sink.first_output(), None);
    let before = Instant::now();
    sink.write(b"a");
    let first = sink.first_output().unwrap();
    assert!(first >= before);
    sink.write(b"b");
    assert_eq!(sink.first_output(), Some(first));
}

#[test]
fn invalid_utf8_is_replaced() {
    let sink = ConsoleSink::new(None);
    sink.write(b"a\xff\xfeb");
    assert_eq!(sink.tail(10), "a\u{fffd}\u{fffd}b");
}

#[test]
fn a_panic_is_seen_across_every_border_between_writes() {
    let text = b"[ 1.0] Kernel panic - not syncing: VFS";
    for cut in 0..text.len() {
        let sink = ConsoleSink::new(None);
        sink.write(&text[..cut]);
        sink.write(&text[cut..]);
        assert!(sink.panicked(), "cut at {cut}");
    }
}

#[test]
fn a_panic_is_seen_after_a_beginning_that_fails() {
    let sink = ConsoleSink::new(None);
    sink.write(b"Kernel panKernel panic - not syncin");
    assert!(!sink.panicked());
    sink.write(b"KKernel panic - not syncing");
    assert!(sink.panicked());
}

#[test]
fn a_log_receives_everything() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let sink = ConsoleSink::new(Some(log.reopen().unwrap()));
    let line = vec![b'.'; 1000];
    for _ in 0..200 {
        sink.write(&line);
    }
    assert_eq!(std::fs::read(log.path()).unwrap().len(), 200_000);
}

#[test]
fn a_full_disk_costs_the_file_and_nothing_else() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let sink = ConsoleSink::new(Some(full));
    sink.write(b"one");
    assert!(lock(&sink.inner.output).is_none(), "given up");
    sink.write(b"two");
    assert_eq!(sink.tail(10), "onetwo");
}

#[test]
fn a_log_stops_at_its_limit() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut output = Output::new(log.reopen().unwrap());
    output.set_room(10);
    output.write(b"0123456789").unwrap();
    assert!(output.write(b"x").is_err());
    assert_eq!(std::fs::read(log.path()).unwrap(), b"0123456789");
}

#[test]
fn a_reader_that_never_reads_is_given_up_in_bounded_time() {
    for kind in ["pipe", "socket", "terminal"] {
        let (reader, writer): (File, File) = match kind {
            "pipe" => {
                let (reader, writer) = std::io::pipe().unwrap();
                let reader = std::os::fd::OwnedFd::from(reader);
                (reader.into(), std::os::fd::OwnedFd::from(writer).into())
            }
            "socket" => {
                let (reader, writer) = UnixStream::pair().unwrap();
                (file_of(reader), file_of(writer))
            }
            _ => terminal(),
        };
        let sink = ConsoleSink::new(Some(writer));
        let begun = Instant::now();
        // Far more than a pipe, a socket or a terminal holds.
        for _ in 0..1024 {
            sink.write(&[b'z'; 4096]);
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{kind}");
        assert_eq!(sink.total_bytes(), 4 << 20);
        assert!(lock(&sink.inner.output).is_none(), "{kind} is given up");
        drop(reader);
    }
}

#[test]
fn a_slow_reader_gets_everything_in_order() {
    let (mut reader, writer) = terminal();
    let sink = ConsoleSink::new(Some(writer));
    let sent: Vec<u8> = (b'a'..=b'w').cycle().take(300_000).collect();
    let expected = sent.clone();
    let thread = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    for chunk in sent.chunks(777) {
        sink.write(chunk);
    }
    thread.join().unwrap();
}

#[test]
fn the_terminal_of_others_stays_blocking() {
    let (_reader, writer) = terminal();
    let sink = ConsoleSink::new(Some(writer.try_clone().unwrap()));
    sink.write(b"x");
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}

/// A raw pseudo-terminal: the operator's side, and the side that a program writes.
fn terminal() -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let slave = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut settings = tcgetattr(&slave).unwrap();
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings).unwrap();
    (master.into(), slave)
}

//! What go-plugin's reader of log lines relies on.

use std::sync::{Arc, Mutex};

use super::*;

#[derive(Debug, thiserror::Error)]
#[error("cannot open the door")]
struct Outer(#[source] io::Error);

fn lines_of(style: Style, body: impl FnOnce()) -> Vec<String> {
    let written = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&written);
    let lines = Lines {
        style,
        write: move |line| sink.lock().unwrap().push(line),
    };
    tracing::subscriber::with_default(Registry::default().with(lines), body);
    let written = written.lock().unwrap();
    written.clone()
}

#[test]
fn a_line_is_one_object_with_the_types_that_the_host_asserts() {
    let lines = lines_of(Style::Json, || {
        let error = Outer(io::Error::other("it is locked"));
        tracing::warn!(
            instance = "a-1",
            attempt = 3u64,
            left = -1i64,
            ratio = 0.5,
            ok = false,
            error = &error as &dyn Error,
            "start failed:\n{}",
            "why \"so\""
        );
    });
    let [line] = lines.as_slice() else {
        panic!("{lines:?}")
    };
    assert_eq!(line.matches('\n').count(), 1);
    assert!(line.ends_with('\n'));
    let value: Value = serde_json::from_str(line).unwrap();
    assert_eq!(value["@message"], "start failed:\nwhy \"so\"");
    assert_eq!(value["@level"], "warn");
    assert_eq!(value["@module"], "fleetingd.plugin.log.tests");
    assert_eq!(value["instance"], "a-1");
    assert_eq!(value["attempt"], 3);
    assert_eq!(value["left"], -1);
    assert_eq!(value["ratio"], 0.5);
    assert_eq!(value["ok"], false);
    assert_eq!(value["error"], "cannot open the door: it is locked");
    let time = value["@timestamp"].as_str().unwrap();
    assert_eq!(time.len(), "2006-01-02T15:04:05.000000Z".len());
    assert_eq!(time.split_once('.').unwrap().1.len(), "000000Z".len());
}

#[test]
fn every_level_has_the_name_that_the_host_knows() {
    let lines = lines_of(Style::Json, || {
        tracing::trace!("a");
        tracing::debug!("b");
        tracing::info!("c");
        tracing::warn!("d");
        tracing::error!("e");
    });
    let levels: Vec<String> = lines
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|line| line["@level"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(levels, ["trace", "debug", "info", "warn", "error"]);
}

#[test]
fn no_line_is_too_long_to_be_parsed() {
    let control = "\u{1}".repeat(200_000);
    for line in lines_of(Style::Json, || {
        tracing::info!(console = control, "{control}");
        tracing::info!(console = control, "short");
        tracing::info!("{}", "é".repeat(40_000));
    }) {
        assert!(line.len() < 64 << 10, "{}", line.len());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert!(!value["@message"].as_str().unwrap().is_empty());
        assert_eq!(value["truncated"], true);
    }
}

#[test]
fn timestamps_follow_the_calendar() {
    for (seconds, micros, text) in [
        (0, 0, "1970-01-01T00:00:00.000000Z"),
        (951_782_399, 999_999, "2000-02-28T23:59:59.999999Z"),
        (951_782_400, 7, "2000-02-29T00:00:00.000007Z"),
        (951_868_800, 0, "2000-03-01T00:00:00.000000Z"),
        (1_798_761_599, 500_000, "2026-12-31T23:59:59.500000Z"),
        (4_107_542_400, 0, "2100-03-01T00:00:00.000000Z"),
    ] {
        let since = Duration::from_secs(seconds) + Duration::from_micros(micros);
        assert_eq!(timestamp(since), text);
    }
}

#[test]
fn a_terminal_gets_text() {
    let lines = lines_of(Style::Text, || tracing::info!(n = 2, "hello"));
    assert_eq!(lines, ["INFO  hello n=2\n"]);
}

/// A host that reads nothing until it is let go.
struct Stuck(Receiver<()>, Arc<Mutex<Vec<u8>>>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _released = self.0.recv();
        self.1.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn nobody_waits_for_a_host_that_does_not_read_and_lost_lines_are_counted() {
    let (release, stuck) = mpsc::channel();
    let written = Arc::new(Mutex::new(Vec::new()));
    let queue = Queue::to(Stuck(stuck, Arc::clone(&written)));
    let lines = QUEUE_LINES + 100;
    for n in 0..lines {
        queue.put(format!("{n}\n"));
    }
    // One more than the queue holds may be in the writer's hands.
    let lost = queue.lost.load(Ordering::Relaxed);
    assert!((99..=100).contains(&lost), "{lost}");
    drop(release);
    let (done, flushed) = mpsc::sync_channel(1);
    while queue.entries.try_send(Entry::Flush(done.clone())).is_err() {
        std::thread::yield_now();
    }
    flushed.recv().unwrap();
    let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
    let kept = u64::try_from(text.lines().count()).unwrap();
    assert_eq!(kept, u64::try_from(lines).unwrap() - lost);
    assert!(text.starts_with("0\n1\n2\n"));
}

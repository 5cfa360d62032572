//! Log lines in the form that go-plugin reads from stderr: one JSON object a line.
//!
//! The host parses `@message`, `@level` and `@timestamp` by type (a wrong type panics it), shows
//! every other key as a field, and cannot parse lines of 64 KiB and more. Text that is no JSON is
//! shown at its debug level only, so panics are told as log lines too.
//!
//! Any thread may log, a vCPU's too, and none of them ever waits for the host to read: one thread
//! writes, what it cannot take is dropped and counted.

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::{EnvFilter, Registry};

use crate::chain::chain;

/// Overrides which lines are written, in `tracing-subscriber`'s syntax.
pub const FILTER_VARIABLE: &str = "FLEETINGD_LOG";

/// The host filters by level itself.
const DEFAULT_FILTER: &str = "warn,fleetingd=debug";

/// Below the 64 KiB that the host reads as one line.
const MAX_LINE_BYTES: usize = 60_000;

/// What is left of the message of a line that would be too long: at six bytes for each escaped
/// character it fits.
const SHORT_MESSAGE_CHARS: usize = 8_000;

/// Lines that wait for a host that does not read.
const QUEUE_LINES: usize = 4096;

/// How long the last lines of a process may take.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// For go-plugin.
    Json,
    /// For people.
    Text,
}

/// Starts logging to stderr, in JSON for a host and in plain text for a terminal without one. Only
/// the first call of a process counts. Hold on to what it returns until the process ends.
pub fn start(host: bool) -> Flush {
    let style = if !host && io::stderr().is_terminal() {
        Style::Text
    } else {
        Style::Json
    };
    let filter = std::env::var(FILTER_VARIABLE)
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(DEFAULT_FILTER));
    let queue = Queue::to(io::stderr());
    let lines = Lines {
        style,
        write: {
            let queue = queue.clone();
            move |line| queue.put(line)
        },
    };
    let subscriber = Registry::default().with(filter).with(lines);
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        panic::set_hook(Box::new(|info| {
            let place = info.location().map(ToString::to_string);
            let reason = info
                .payload_as_str()
                .unwrap_or("a value that is not a string");
            let thread = std::thread::current();
            tracing::error!(
                place,
                thread = thread.name(),
                "panicked: {reason}; hint: this is a bug, please report it"
            );
        }));
    }
    Flush(queue)
}

/// Writes the last lines when it is dropped.
#[must_use]
#[derive(Debug)]
pub struct Flush(Queue);

impl Drop for Flush {
    fn drop(&mut self) {
        let (done, flushed) = mpsc::sync_channel(1);
        if self.0.entries.try_send(Entry::Flush(done)).is_ok() {
            // A host that reads nothing any more gets nothing any more.
            let _late = flushed.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

enum Entry {
    Line(String),
    Flush(SyncSender<()>),
}

/// Where lines wait for the thread that writes them.
#[derive(Debug, Clone)]
struct Queue {
    entries: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Queue {
    fn to(output: impl Write + Send + 'static) -> Self {
        let (entries, queued) = mpsc::sync_channel(QUEUE_LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        // Without a thread there is no log; the process has other troubles then.
        let _none = std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&queued, &counted, output));
        Self { entries, lost }
    }

    fn put(&self, line: String) {
        if self.entries.try_send(Entry::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Each line is one write. A host that is gone cannot be told anything.
fn write_lines(queued: &Receiver<Entry>, lost: &AtomicU64, mut output: impl Write) {
    while let Ok(entry) = queued.recv() {
        match entry {
            Entry::Line(line) => {
                let _gone = output.write_all(line.as_bytes());
            }
            Entry::Flush(done) => {
                let _gone = output.flush();
                let _gone = done.send(());
            }
        }
        let lines = lost.swap(0, Ordering::Relaxed);
        if lines > 0 {
            tracing::warn!(
                lines,
                "log lines were lost: the host did not read them in time"
            );
        }
    }
}

/// Formats events as lines and hands each whole line on.
struct Lines<W> {
    style: Style,
    write: W,
}

impl<S: Subscriber, W: Fn(String) + Send + Sync + 'static> Layer<S> for Lines<W> {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let meta = event.metadata();
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let line = match self.style {
            Style::Json => json_line(*meta.level(), meta.target(), since, fields),
            Style::Text => text_line(*meta.level(), fields),
        };
        (self.write)(line);
    }
}

#[derive(Debug, Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        // go-plugin's own keys begin with an @, which no field of ours does.
        self.others
            .insert(field.name().trim_start_matches('@').to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, Value::from(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Value::from(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Value::from(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Value::from(value));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            _ => self.put(field, Value::from(value)),
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.put(field, Value::from(chain(value)));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

fn json_line(level: Level, target: &str, since_epoch: Duration, fields: Fields) -> String {
    let Fields {
        message,
        others: mut line,
    } = fields;
    let short: String = message.chars().take(SHORT_MESSAGE_CHARS).collect();
    let frame = [
        ("@level", level.as_str().to_ascii_lowercase()),
        ("@module", target.replace("::", ".")),
        ("@timestamp", timestamp(since_epoch)),
        ("@message", message),
    ];
    line.extend(frame.map(|(key, value)| (key.to_owned(), Value::from(value))));
    let mut text = Value::Object(line.clone()).to_string();
    if text.len() > MAX_LINE_BYTES {
        line.retain(|key, _value| key.starts_with('@'));
        line.insert("@message".to_owned(), Value::from(short));
        line.insert("truncated".to_owned(), Value::from(true));
        text = Value::Object(line).to_string();
    }
    text.push('\n');
    text
}

fn text_line(level: Level, fields: Fields) -> String {
    let mut line = format!("{:5} {}", level.as_str(), fields.message);
    for (key, value) in fields.others {
        let _infallible = write!(line, " {key}={value}");
    }
    line.push('\n');
    line
}

/// `2006-01-02T15:04:05.000000Z`: always six decimals.
fn timestamp(since_epoch: Duration) -> String {
    const DAY_SECONDS: u64 = 24 * 60 * 60;
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_date(seconds / DAY_SECONDS);
    let of_day = seconds % DAY_SECONDS;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:06}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        since_epoch.subsec_micros()
    )
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil_date(mut day: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let days = if leap(year) { 366 } else { 365 };
        if day < days {
            break;
        }
        day -= days;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
#[path = "log_test.rs"]
mod tests;

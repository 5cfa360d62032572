//! The counters as a file for node_exporter's textfile collector.
//!
//! Written beside its name and renamed, so a reader never sees half of it; readable by everybody,
//! as the collector runs as a user of its own. Not synced: after a crash of the host the next
//! write makes it anew.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::driver::Message;
use super::host::Host;
use super::operator;
use super::status::{GroupStatus, IDLE};

/// How often the file is written; node_exporter is asked about as often.
const PERIOD: Duration = Duration::from_secs(15);

/// Starts the writer; it ends with the pool.
pub fn start(host: &Arc<Host>, outbox: &mpsc::WeakUnboundedSender<Message>) {
    let Some(path) = host.spec().metrics_file.clone() else {
        return;
    };
    let (host, outbox) = (Arc::downgrade(host), outbox.clone());
    tokio::spawn(async move {
        let mut failed = false;
        loop {
            let (Some(host), Some(driver)) = (host.upgrade(), outbox.upgrade()) else {
                return;
            };
            let Some(status) = operator::status(&host, &driver).await else {
                return;
            };
            drop((host, driver));
            let written = {
                let path = path.clone();
                tokio::task::spawn_blocking(move || write(&path, &render(&status))).await
            };
            // Told once, not every time.
            if let Ok(Err(e)) = &written
                && !failed
            {
                tracing::warn!("cannot write metrics_file {}: {e}", path.display());
            }
            failed = !matches!(written, Ok(Ok(())));
            tokio::time::sleep(PERIOD).await;
        }
    });
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The collector passes over what does not end in .prom.
    let temp = path.with_file_name(format!(".{name}.{}", std::process::id()));
    // A link that somebody put there is not written through.
    let _none = fs::remove_file(&temp);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temp)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.set_permissions(Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&temp, path));
    if written.is_err() {
        let _left = fs::remove_file(&temp);
    }
    written
}

/// The exposition format of Prometheus, version 0.0.4.
fn render(status: &GroupStatus) -> String {
    let mut page = Page {
        group: &status.group,
        text: String::new(),
    };
    let counts = &status.counters;
    page.info(status);
    page.gauge(
        "slots",
        "Instances that fit at once.",
        f64::from(status.max_size),
    );
    page.gauge(
        "slots_occupied",
        "Instances that hold a slot or will.",
        f64::from(status.occupied),
    );
    page.instances(status);
    page.gauge(
        "image_serves",
        "Whether machines have an image to start from.",
        f64::from(u8::from(status.image.generation.is_some())),
    );
    page.gauge(
        "image_task_running",
        "Whether the image is being looked after.",
        f64::from(u8::from(status.image.phase != IDLE)),
    );
    page.gauge(
        "image_failed",
        "Whether the last look after the image failed.",
        f64::from(u8::from(status.image.last_error.is_some())),
    );
    if let Some(at) = status.image.checked_at {
        page.head(
            "image_checked_timestamp_seconds",
            "gauge",
            "When the image was last found to be as it should.",
        );
        page.sample("image_checked_timestamp_seconds", &[], &at.to_string());
    }
    page.counter(
        "instances_requested_total",
        "Instances that the runner asked for.",
        &[],
        counts.asked,
    );
    page.counter(
        "instances_accepted_total",
        "Instances that were accepted.",
        &[],
        counts.accepted,
    );
    page.by(
        "start_failures_total",
        "Starts that failed, by reason.",
        "reason",
        &counts.failures,
    );
    page.by(
        "machine_ends_total",
        "Machines that ended after they had come up, by how.",
        "how",
        &counts.ends,
    );
    page.by(
        "image_tasks_total",
        "Image tasks by outcome, and builds.",
        "outcome",
        &counts.images,
    );
    page.by(
        "dropped_packets_total",
        "Packets that the rules dropped, by chain.",
        "chain",
        &status.dropped_packets,
    );
    page.boots(status);
    page.text
}

/// A page in the making; every sample carries the group.
struct Page<'a> {
    group: &'a str,
    text: String,
}

type Counts = std::collections::BTreeMap<String, u64>;

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _infallible = write!(
            self.text,
            "# HELP fleetingd_{name} {help}\n# TYPE fleetingd_{name} {kind}\n"
        );
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: &str) {
        let _infallible = write!(
            self.text,
            "fleetingd_{name}{{group=\"{}\"",
            escaped(self.group)
        );
        for (label, text) in labels {
            let _infallible = write!(self.text, ",{label}=\"{}\"", escaped(text));
        }
        let _infallible = writeln!(self.text, "}} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, "gauge", help);
        self.sample(name, &[], &value.to_string());
    }

    fn counter(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.head(name, "counter", help);
        self.sample(name, labels, &value.to_string());
    }

    /// A counter for each word that was counted; nothing before the first.
    fn by(&mut self, name: &str, help: &str, label: &str, counts: &Counts) {
        if counts.is_empty() {
            return;
        }
        self.head(name, "counter", help);
        for (word, count) in counts {
            self.sample(name, &[(label, word)], &count.to_string());
        }
    }

    fn info(&mut self, status: &GroupStatus) {
        self.head("info", "gauge", "The program and the image that serves.");
        let generation = status.image.generation.as_deref().unwrap_or_default();
        let labels = [
            ("version", status.program_version.as_str()),
            ("generation", generation),
        ];
        self.sample("info", &labels, "1");
    }

    fn instances(&mut self, status: &GroupStatus) {
        self.head("instances", "gauge", "Instances by state.");
        for state in ["creating", "running", "deleting"] {
            let count = status.instances.iter().filter(|i| i.state == state).count();
            self.sample("instances", &[("state", state)], &count.to_string());
        }
        let sum = |of: fn(&super::status::InstanceStatus) -> u64| {
            status.instances.iter().map(of).sum::<u64>().to_string()
        };
        let (memory, disk) = (sum(|i| i.memory_bytes), sum(|i| i.disk_delta_bytes));
        self.head("memory_bytes", "gauge", "Guest memory that is resident.");
        self.sample("memory_bytes", &[], &memory);
        self.head(
            "disk_delta_bytes",
            "gauge",
            "What machines' own disks take on storage.",
        );
        self.sample("disk_delta_bytes", &[], &disk);
    }

    fn boots(&mut self, status: &GroupStatus) {
        let boots = &status.counters.boots;
        if boots.is_empty() {
            return;
        }
        self.head("boots_total", "counter", "Machines that came up, by kind.");
        for (kind, boots) in boots {
            self.sample("boots_total", &[("kind", kind)], &boots.count.to_string());
        }
        self.head(
            "boot_phase_seconds_total",
            "counter",
            "Time that machines which came up spent in each phase of their start.",
        );
        for (kind, boots) in boots {
            for (phase, spent) in &boots.phases {
                let labels = [("kind", kind.as_str()), ("phase", phase.as_str())];
                let seconds = spent.seconds.to_string();
                self.sample("boot_phase_seconds_total", &labels, &seconds);
            }
        }
    }
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
#[path = "metrics_test.rs"]
mod tests;

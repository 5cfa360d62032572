//! The main job with machines that our VMM boots from a whole distribution's image: the plugin's
//! own executable, driven through its handshake as gitlab-runner does, and its machines used over
//! SSH.
//!
//! Boots are dear where KVM itself is emulated, so the machines of one story serve all its
//! chapters; a chapter that fails is named at the end and the next one goes on. Needs root, a KVM
//! that runs stock kernels, and what `./dev images` builds; elsewhere a test says that it is
//! skipped, or fails if FLEETINGD_REQUIRE_GUEST=1. `./dev rig` has such a KVM.

mod build;
mod capture;
mod ending;
mod forging;
mod host;
mod identity;
mod isolation;
mod operator;
mod outside;
mod plugin;
mod story;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use fleetingd::plugin::client::PluginClient;
use fleetingd::plugin::config::Source;
use fleetingd::vmm;
use tokio::sync::Mutex;

/// What the longest single step may take where KVM is emulated and the machine is busy.
const PATIENCE: Duration = Duration::from_secs(300);
/// What a boot may take there, several at once.
const BOOT_PATIENCE: Duration = Duration::from_secs(900);

/// The tests share the host's interfaces, tables and locks.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Where everything is.
struct Place {
    executable: PathBuf,
    image: PathBuf,
    /// `vm_disk_directory`, kept between runs so that the generation in it is built once.
    data: PathBuf,
}

impl Place {
    /// `None` after saying why the test is skipped.
    fn find() -> anyhow::Result<Option<Self>> {
        let found = (|| {
            vmm::check_kvm().map_err(|problem| problem.to_string())?;
            let folder = |name: &str| {
                std::env::var_os(name)
                    .map(PathBuf::from)
                    .ok_or_else(|| format!("{name} is not set; hint: ./dev test"))
            };
            let image = folder("FLEETINGD_IMAGES")?.join("standin.qcow2");
            if !image.exists() {
                return Err(format!("no {}; hint: ./dev images", image.display()));
            }
            Ok(Self {
                executable: executable(),
                image,
                data: folder("RIG_DATA")?,
            })
        })();
        match found {
            Ok(place) => Ok(Some(place)),
            Err(reason) => {
                let required =
                    std::env::var_os("FLEETINGD_REQUIRE_GUEST").is_some_and(|v| v == "1");
                ensure!(!required, "{reason}");
                say(format_args!("SKIP: {reason}"));
                Ok(None)
            }
        }
    }

    /// The keys that every plugin here is started with; those that take part in the image are the
    /// same everywhere, so that one generation serves all.
    fn config(&self, more: &str) -> anyhow::Result<Source> {
        let text = format!(
            "vm_image = {image:?}\n\
             vm_disk_directory = {data:?}\n\
             vm_disk_size_gb = 4\n\
             vm_memory_mb = 768\n\
             vm_num_cpu_cores = 1\n\
             memory_overcommit = 16\n\
             boot_timeout = \"15m\"\n\
             image_build_timeout = \"1h\"\n\
             vm_enable_virtio_console = true\n\
             {more}\n",
            image = self.image,
            data = self.data,
        );
        Ok(Source::from_toml(&text)?)
    }
}

fn executable() -> PathBuf {
    std::env::var_os("FLEETINGD_BIN").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd")).to_owned(),
        PathBuf::from,
    )
}

/// A line for whoever watches, past the harness, which swallows what passing tests print.
fn say(line: impl Display) {
    // A closed terminal is no reason to fail.
    let _closed = writeln!(std::io::stdout().lock(), "e2e: {line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_with_several_problems_names_each_of_them_in_one_error() -> anyhow::Result<()> {
    let client = PluginClient::start(&executable(), |_line| {}).await?;
    let source = Source::from_json(
        br#"{"vm_imag": "/a", "vm_memory_mb": "lots", "vm_num_cpu_cores": 0, "vm_subnet": "10.0.0.1/8",
             "prebuild_on_error": "ignore", "boot_timeout": "soon"}"#,
        Default::default(),
    )?;
    let error = client
        .init(&source)
        .await
        .err()
        .context("such a config was accepted")?
        .to_string();
    for word in [
        "\"vm_imag\"",
        "vm_memory_mb",
        "vm_num_cpu_cores",
        "vm_subnet",
        "prebuild_on_error",
        "boot_timeout",
    ] {
        ensure!(error.contains(word), "no {word:?} in:\n{error}");
    }
    let status = client.end().await?;
    ensure!(status.success(), "the plugin ended with {status}");
    say(format_args!(
        "{} problems in one error, for example: {}",
        error.lines().count(),
        error.lines().next().unwrap_or_default()
    ));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_live_apart_and_leave_nothing() -> anyhow::Result<()> {
    let _alone = ALONE.lock().await;
    match Place::find()? {
        Some(place) => story::tell(place).await,
        None => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_command_of_the_operator_fails_the_build_and_is_named() -> anyhow::Result<()> {
    let _alone = ALONE.lock().await;
    match Place::find()? {
        Some(place) => build::a_failing_command_is_named(&place).await,
        None => Ok(()),
    }
}

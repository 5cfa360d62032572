//! What the pool is asked to run: the configuration as validated values, and what it answers.
//!
//! Built once by whoever reads a configuration (the plugin from GitLab's JSON, the command line
//! from TOML); nothing here is parsed or checked again.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::SshKeyType;
use crate::image::{ImageSource, PrebuildOnError, RunnerSource};
use crate::net::NetSpec;

/// A pool as it is asked for.
#[derive(Debug, Clone)]
pub struct PoolSpec {
    pub net: NetSpec,
    /// `group_name`; that of the tables' number if `None`.
    pub group: Option<String>,
    /// `vm_disk_directory`: absolute.
    pub disk_directory: PathBuf,
    /// `image_directory`: absolute; often the same.
    pub image_directory: PathBuf,
    pub shape: Shape,
    /// `vm_image` and the keys beside it.
    pub image: ImageSource,
    pub disk_gib: u32,
    /// `vm_prebuild_cloudinit_extra_cmds`, each a YAML item as its author wrote it.
    pub extra_commands: Vec<String>,
    pub on_command_error: PrebuildOnError,
    pub runner: RunnerSource,
    /// Whether workers' consoles are kept in `.instance_data` too.
    pub keep_consoles: bool,
    pub memory_overcommit: f64,
    pub build_timeout: Duration,
    pub boot_timeout: Duration,
    pub ssh_key_type: SshKeyType,
    pub login: Login,
    pub vmm: VmmKind,
    pub image_policy: ImagePolicy,
    /// Where the counters are written for node_exporter, if anywhere.
    pub metrics_file: Option<PathBuf>,
    /// In place of `/run/fleetingd`: for tests, which must not meet the host's own.
    pub run_directory: Option<PathBuf>,
}

/// How generations come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImagePolicy {
    /// `image_refresh`: how long after one check the next is due; `None` for never.
    pub refresh: Option<Duration>,
    /// `image_keep`: how many of the last generations stay.
    pub keep: u32,
    pub on_change: OnChange,
}

impl Default for ImagePolicy {
    fn default() -> Self {
        Self {
            refresh: Some(Duration::from_secs(24 * 60 * 60)),
            keep: 2,
            on_change: OnChange::Wait,
        }
    }
}

/// What machines start from while a changed configuration's image is being built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnChange {
    /// Nothing: they wait.
    #[default]
    Wait,
    /// The image of before.
    Serve,
}

/// What one machine is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub vcpus: u8,
    pub memory_mib: u32,
}

/// How the runner logs in: `connector_config` as GitLab sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    pub username: String,
    /// `use_static_credentials`: the same for every machine; else a fresh key for each.
    pub fixed: Option<FixedCredential>,
}

/// Credentials that the operator gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FixedCredential {
    Password(String),
    /// A private key file's text.
    Key(String),
}

/// What boots machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VmmKind {
    #[default]
    Embedded,
    /// Boots nothing and is Running at once.
    #[cfg(feature = "test-vmm")]
    Fake {
        /// How long a start takes.
        boot: Duration,
    },
}

/// Names an instance for its whole life and never again: `<group>-<10 base32 digits>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub(super) String);

impl InstanceId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What Update says of an instance (fleeting's State).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstanceState {
    Creating,
    Running,
    Deleting,
    Deleted,
}

/// How to reach a running instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectInfo {
    pub address: Ipv4Addr,
    pub username: String,
    /// PEM of the private key, unless the login is by password.
    pub key: Option<String>,
    pub password: Option<String>,
}

/// Why the pool has no answer about an instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    #[error("no instance {id}")]
    Unknown { id: String },
    #[error("instance {id} is {state}")]
    NotRunning { id: String, state: String },
    #[error("the pool has ended")]
    Ended,
}

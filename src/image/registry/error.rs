//! Why a generation did not come from a registry, or did not get there.

use std::path::PathBuf;

use oci_client::errors::OciDistributionError;

use super::name::Digest;
use crate::image::{ImageError, SourceError};

/// What went wrong between the store and a registry, each with its remedy.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    #[error(transparent)]
    Store(#[from] ImageError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("a task of the transfer failed")]
    Task(#[source] tokio::task::JoinError),

    // The way there.
    #[error("cannot reach the registry {registry}; hint: is it up, and is a proxy needed?")]
    Unreachable {
        registry: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the registry answered {status} for {what}")]
    Status {
        what: String,
        status: reqwest::StatusCode,
    },
    #[error(
        "the registry does not let us have {what} ({status}); hint: `docker login` writes what REGISTRY_AUTH_FILE or ~/.docker/config.json must hold for it"
    )]
    Denied {
        what: String,
        status: reqwest::StatusCode,
    },
    #[error("cannot log in to the registry {registry}; hint: are its credentials right?")]
    Login {
        registry: String,
        #[source]
        source: Box<OciDistributionError>,
    },
    #[error("cannot use the credentials in {}: {reason}", path.display())]
    Credentials { path: PathBuf, reason: String },
    #[error("{what} is not in the registry; hint: `fleetingd images push` puts it there")]
    NotThere { what: String },
    #[error("the registry did not take {what}; hint: may this user write there?")]
    NotTaken {
        what: String,
        #[source]
        source: Box<OciDistributionError>,
    },

    // What came.
    #[error("{what} has more than the {limit} bytes that it should have")]
    TooLarge { what: String, limit: u64 },
    #[error("{what} ended after {bytes} bytes, too early")]
    Truncated { what: String, bytes: u64 },
    #[error(
        "{what} has the digest {found}, {expected} is right; it was thrown away; hint: the registry's storage is damaged, or somebody changes what it sends"
    )]
    WrongDigest {
        what: String,
        expected: Digest,
        found: Digest,
    },
    #[error("{name} is no image of fleetingd: {reason}")]
    NotOurs { name: String, reason: String },
    #[error("{name} has {count} layers, more than the {limit} that we take")]
    TooManyLayers {
        name: String,
        count: usize,
        limit: usize,
    },
    #[error("{file} at {offset} of {name} does not unpack to what it should be: {reason}")]
    Unpack {
        name: String,
        file: &'static str,
        offset: u64,
        reason: String,
    },
    #[error("no room for {name} in {}: it takes {needed_mib} MiB, {free_mib} MiB are free; hint: free some, or set image_directory", path.display())]
    DiskFull {
        name: String,
        path: PathBuf,
        needed_mib: u64,
        free_mib: u64,
    },

    // Whether to believe it.
    #[error(
        "{name} would be taken on trust alone; hint: write {name}@{digest}, or set vm_image_keyring to the keys that may sign it"
    )]
    NoTrust { name: String, digest: Digest },
    #[error(
        "{name} is {digest} now{before}, which nobody signed; hint: `fleetingd images push --sign-key FILE` signs it"
    )]
    Unsigned {
        name: String,
        digest: Digest,
        /// What the tag led to when it was taken last.
        before: String,
    },
    #[error("the signature of {name} ({digest}) does not hold: {reason}; hint: vm_image_keyring")]
    BadSignature {
        name: String,
        digest: Digest,
        reason: String,
    },
    #[error(
        "{name} has gone back: {digest} was signed before {accepted}, which was taken last; hint: sign it again, or to go back nevertheless remove {}", record.display()
    )]
    WentBack {
        name: String,
        digest: Digest,
        accepted: String,
        record: PathBuf,
    },
    #[error("cannot sign with {}: {reason}; hint: an armored OpenPGP secret key without a passphrase", path.display())]
    SignKey { path: PathBuf, reason: String },

    // Whether it fits.
    #[error(
        "image {key} does not say what it holds: an older version prepared it; hint: prepare it again (fleetingd images refresh, prebuild)"
    )]
    NoContents { key: String },
    #[error(
        "{name} is for {image}, this host is {host}; hint: push one that was prepared on such a host"
    )]
    OtherArchitecture {
        name: String,
        image: String,
        host: String,
    },
    #[error(
        "{name} speaks protocol {image} of the agent, this program {ours}; hint: prepare and push it with this version"
    )]
    OtherProtocol {
        name: String,
        image: u32,
        ours: String,
    },
    #[error(
        "{name} is for the user {image:?}, connector_config.username is {config:?}; hint: they must be the same"
    )]
    OtherUsername {
        name: String,
        image: String,
        config: String,
    },
    #[error(
        "{name} has another password for {username:?} than connector_config; hint: leave the password out on both hosts, keys are made for each machine"
    )]
    OtherPassword { name: String, username: String },
    #[error(
        "{name} has a disk of {image_mib} MiB, vm_disk_size_gb is {config_gib}; hint: they must be the same"
    )]
    OtherDisk {
        name: String,
        image_mib: u64,
        config_gib: u32,
    },
    #[error(
        "the guest's gitlab-runner in {name} is {image}, this host has {config}; hint: install the same gitlab-runner on both hosts, or set vm_runner_binary"
    )]
    OtherRunner {
        name: String,
        image: String,
        config: String,
    },
}

impl RegistryError {
    /// Whether the same request may well succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Truncated { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || [408, 425, 429].contains(&status.as_u16())
            }
            Self::NotTaken { source, .. } => match &**source {
                OciDistributionError::RequestError(_) => true,
                OciDistributionError::ServerError { code, .. } => *code >= 500,
                _ => false,
            },
            _ => false,
        }
    }

    /// Whether what has come so far is of use to a later try.
    pub(super) fn leaves_use(&self) -> bool {
        let of_host = matches!(self, Self::Store(_) | Self::DiskFull { .. } | Self::Task(_));
        let of_access = matches!(self, Self::Denied { .. } | Self::Login { .. });
        self.is_passing() || of_host || of_access
    }
}

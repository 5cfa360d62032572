//! Why an image could not be had, each with its remedy.

use std::path::PathBuf;

use super::checksum::Checksum;
use crate::image::ImageError;

/// Why there is no image, or no newer one.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Store(#[from] ImageError),
    #[error("a task of the download failed")]
    Task(#[source] tokio::task::JoinError),
    #[error(
        "no certificate authorities found on this host{detail}; hint: install ca-certificates, or name a PEM file in SSL_CERT_FILE"
    )]
    NoAuthorities { detail: String },
    #[error("cannot set up HTTPS")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("cannot use vm_image_keyring {}: {reason}", path.display())]
    Keyring { path: PathBuf, reason: String },
    #[error("cannot use {}: {reason}; hint: remove it to begin anew", path.display())]
    DamagedRecord { path: PathBuf, reason: String },
    #[error("an image by URL needs its checksum; hint: vm_image_sha256 = \"...\"")]
    NoChecksum,

    #[error("{name} is a prepared image, which nothing is built from")]
    Prepared { name: String },

    // The way there.
    #[error(
        "cannot reach {url}; hint: is a proxy needed (HTTPS_PROXY in the runner's environment), or image_mirror?"
    )]
    Unreachable {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error(
        "{url} answered {status}; hint: does it exist there? image_mirror names another server"
    )]
    Status {
        url: String,
        status: reqwest::StatusCode,
    },
    #[error("{from} redirects to {to}, which is not https; hint: another image_mirror")]
    RedirectToHttp { from: String, to: String },
    #[error("{url} redirects without end")]
    TooManyRedirects { url: String },
    #[error(
        "{url} is a web page and not what it should be; hint: does a proxy or a login page answer for it?"
    )]
    WebPage { url: String },

    // What came.
    #[error("{url} has more than the {limit} bytes that we take")]
    TooLarge { url: String, limit: u64 },
    #[error("{url} has {bytes} bytes, its index says {expected}")]
    WrongSize {
        url: String,
        bytes: u64,
        expected: u64,
    },
    #[error("{url} ended after {bytes} bytes, too early")]
    Truncated { url: String, bytes: u64 },
    #[error(
        "no room for the image in {}: {needed}; hint: free some, or set image_directory", path.display()
    )]
    DiskFull { path: PathBuf, needed: String },
    #[error(
        "{url} has the checksum {found}, {expected} is right; it was thrown away; hint: another image_mirror, or try again later"
    )]
    WrongChecksum {
        url: String,
        expected: Checksum,
        found: Checksum,
    },

    // What it says.
    #[error("{url} cannot be understood: {reason}")]
    BadIndex { url: String, reason: String },
    #[error("{url} offers no {wanted}; hint: there are {known}")]
    NoRelease {
        url: String,
        wanted: String,
        known: String,
    },
    #[error("{url} has no checksum of {name}")]
    NotListed { url: String, name: String },
    #[error(
        "the index says another checksum of {name} than the signed {url}; hint: the server may be in the middle of a change, try again later"
    )]
    IndexDisagrees { url: String, name: String },
    #[error(
        "the signature {url} does not hold: {reason}; hint: a mirror that signs by itself needs vm_image_keyring"
    )]
    BadSignature { url: String, reason: String },
    #[error(
        "{image} is offered older than what was taken before: {offered} after {accepted}; hint: the mirror is behind; to go back nevertheless, remove {}", record.display()
    )]
    Downgrade {
        image: String,
        offered: String,
        accepted: String,
        record: PathBuf,
    },
}

impl SourceError {
    /// Whether the same request may well succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Truncated { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || [408, 425, 429].contains(&status.as_u16())
            }
            _ => false,
        }
    }
}

//! What can go wrong between a vendor's image and a sealed generation, each with its remedy.

use std::io;
use std::path::{Path, PathBuf};

/// Why the store, a build or a seal could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(
        "cannot use {} as vm_disk_directory: {reason}; hint: an absolute path to a folder of this user that nobody else can write to", path.display()
    )]
    StoreUnsafe { path: PathBuf, reason: String },
    #[error("cannot {act} {}", path.display())]
    File {
        act: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot read vm_image {}; hint: a local qcow2 or raw file", path.display())]
    OpenImage {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("vm_image {} {what}; hint: {hint}", path.display())]
    UnusableImage {
        path: PathBuf,
        what: String,
        hint: &'static str,
    },
    #[error("cannot convert vm_image {}", path.display())]
    Convert {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "vm_image {} needs {image_gib} GiB, vm_disk_size_gb is {disk_gib}; hint: set vm_disk_size_gb to {image_gib} or more", path.display()
    )]
    DiskTooSmall {
        path: PathBuf,
        image_gib: u64,
        disk_gib: u32,
    },
    #[error("vm_image {} changed while it was read; hint: replace it by a rename", path.display())]
    ImageChanged { path: PathBuf },
    #[error(
        "the partition table is unusable: {reason}; hint: a GPT disk image, as Ubuntu and Debian publish them"
    )]
    PartitionTable { reason: String },
    #[error(
        "no root file system: {found}; hint: it must be ext4 on a GPT partition, as in Ubuntu's and Debian's cloud images"
    )]
    NoRoot { found: String },
    #[error(
        "no kernel in {place}; hint: the image needs a kernel package (linux-image-cloud-amd64, linux-image-virtual)"
    )]
    NoKernel { place: String },
    #[error("{path} in the image has {bytes} bytes, more than the {limit} that we read")]
    GuestFileTooLarge {
        path: String,
        bytes: u64,
        limit: u64,
    },
    #[error("cannot read {path} in the image")]
    GuestFile {
        path: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cannot write the seed volume {}", path.display())]
    Seed {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the seed volume would need {bytes} bytes, more than {limit}; hint: is vm_runner_binary the right file?"
    )]
    SeedTooLarge { bytes: u64, limit: u64 },
    #[error(
        "user name {name:?} does not match [a-z_][a-z0-9_-]{{0,31}}; hint: connector_config.username"
    )]
    Username { name: String },
    #[error("the password in connector_config holds a line break or a NUL")]
    Password,
    #[error("the template {name} {what}")]
    Template { name: &'static str, what: String },
    #[error(
        "the prebuild ended without its success marker ({what}); hint: its console is {}", console.display()
    )]
    NoMarker { what: String, console: PathBuf },
    #[error("the prebuild failed: {reason}; hint: its console is {}", console.display())]
    PrebuildFailed { reason: String, console: PathBuf },
    #[error(
        "command {number} of vm_prebuild_cloudinit_extra_cmds failed with exit code {code}: {command}\n{output}hint: correct the command, or set prebuild_on_error = \"continue\""
    )]
    CommandFailed {
        /// Counted from 1, as a person counts.
        number: usize,
        code: i64,
        command: String,
        /// Last lines of its output, each ended by a line break.
        output: String,
    },
    #[error("{name:?} {what}; hint: fleetingd images list")]
    NoGeneration { name: String, what: &'static str },
    #[error("{group:?} is no name of a group")]
    NoGroup { group: String },
    #[error("group {group} has no image that served before; hint: fleetingd images list")]
    NothingBefore { group: String },
    #[error("cannot read {}, nothing is removed; hint: it is damaged or of a newer version, remove it to forget what that group has served", path.display())]
    Record { path: PathBuf },
    #[error("the build lock was taken for another store")]
    ForeignLock,
}

impl ImageError {
    /// For `map_err` on an act upon one path of the host.
    pub(super) fn file(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { act, path, source }
    }
}

//! What a generation is made from, and the key that names it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::commands::ShellCommand;
use super::dir::is_plain_name;
use super::{ImageError, PrebuildOnError, RunnerSource, Store, template};

/// Everything that goes into a generation.
#[derive(Debug, Clone)]
pub struct BuildInputs {
    /// `vm_image` as the operator wrote it. Not part of the key: its content is.
    pub setting: String,
    /// A local qcow2 or raw file.
    pub image: PathBuf,
    pub disk_gib: u32,
    /// The login; made in the prebuild where the image does not have it.
    pub username: String,
    /// The operator's static password; none where keys are used.
    pub password: Option<String>,
    /// `vm_prebuild_cloudinit_extra_cmds`, as written.
    pub extra_commands: Vec<String>,
    pub on_command_error: PrebuildOnError,
    pub runner: RunnerSource,
    /// Our own executable, opened at start: it becomes the guest's agent. Not part of the key.
    pub agent: Arc<File>,
    /// The number of the agent's protocol, which stands for the agent in the key.
    pub agent_protocol: u32,
}

/// The name of a generation: a hash of its inputs, 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationKey(String);

impl GenerationKey {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of a generation with this name; `None` if no generation can have it.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let plain = is_plain_name(name) && !name.starts_with('.');
        plain.then(|| Self(name.to_owned()))
    }

    /// The key of what has its name by a digest: 64 hexadecimal digits.
    pub(super) fn from_digest(hex: &str) -> Self {
        Self(hex.to_owned())
    }

    #[cfg(test)]
    pub fn for_test(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// The first digits, enough for a log line.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl std::fmt::Display for GenerationKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl BuildInputs {
    /// Hashes the inputs. The contents of the image and of the runner are read only when `store`
    /// does not remember them (by device, inode, size and times). Blocks.
    pub fn key(&self, store: &Store) -> Result<GenerationKey, ImageError> {
        self.check()?;
        let image = open_image(&self.image)?;
        let mut hash = Fields::new();
        hash.add(b"fleetingd generation 1");
        hash.add(store.hashes().content_hash(&self.image, &image)?.as_bytes());
        hash.add(&self.disk_gib.to_le_bytes());
        hash.add(self.username.as_bytes());
        hash.add(self.password.as_deref().unwrap_or_default().as_bytes());
        hash.add(&self.agent_protocol.to_le_bytes());
        let runner = self.runner_sha256(store)?;
        hash.add(runner.as_deref().unwrap_or("package").as_bytes());
        for text in template::fingerprint_texts(self)? {
            hash.add(text.as_bytes());
        }
        for command in self.commands() {
            hash.add(command.script().as_bytes());
        }
        Ok(GenerationKey(hash.finish()))
    }

    /// The operator's commands as shell.
    pub fn commands(&self) -> Vec<ShellCommand> {
        let items = self.extra_commands.iter();
        items.map(|item| ShellCommand::parse(item)).collect()
    }

    /// Refuses what must not reach a template.
    pub fn check(&self) -> Result<(), ImageError> {
        let mut bytes = self.username.bytes();
        let first = bytes
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
        let rest =
            bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-');
        if !first || !rest || self.username.len() > 32 {
            return Err(ImageError::Username {
                name: self.username.clone(),
            });
        }
        let password = self.password.as_deref().unwrap_or_default();
        if password.contains(['\n', '\r', '\0']) {
            return Err(ImageError::Password);
        }
        Ok(())
    }
}

/// Opens the operator's image, which may be a symbolic link: it is the operator's own path.
pub fn open_image(path: &Path) -> Result<File, ImageError> {
    File::open(path)
        .and_then(|file| {
            if file.metadata()?.is_file() {
                Ok(file)
            } else {
                Err(std::io::Error::other("not a regular file"))
            }
        })
        .map_err(|source| ImageError::OpenImage {
            path: path.to_owned(),
            source,
        })
}

/// A hash of fields, each preceded by its length so that none runs into the next.
pub(super) struct Fields(Sha256);

impl Fields {
    pub(super) fn new() -> Self {
        Self(Sha256::new())
    }

    pub(super) fn add(&mut self, field: &[u8]) {
        let len = u64::try_from(field.len()).unwrap_or(u64::MAX);
        self.0.update(len.to_le_bytes());
        self.0.update(field);
    }

    pub(super) fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

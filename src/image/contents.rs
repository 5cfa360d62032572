//! What a generation holds, in words that a host which did not build it can check.
//!
//! The key and the lineage are hashes: they say that two generations differ, not in what. Where a
//! generation comes from elsewhere, a person wants to know.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{BuildInputs, ImageError, RunnerSource, Store};

/// Part of a generation's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// As Rust calls it, such as `x86_64`.
    pub architecture: String,
    /// Who logs in.
    pub username: String,
    /// SHA-256 of the agent's executable.
    pub agent: String,
    /// SHA-256 of the guest's gitlab-runner; none where the vendor's package was asked for.
    pub runner: Option<String>,
}

impl BuildInputs {
    /// What a generation of these inputs holds. Reads the files that `store` does not remember.
    pub fn contents(&self, store: &Store) -> Result<Contents, ImageError> {
        let agent = Path::new("/proc/self/exe");
        Ok(Contents {
            architecture: std::env::consts::ARCH.to_owned(),
            username: self.username.clone(),
            agent: store.hashes().content_hash(agent, &self.agent)?,
            runner: self.runner_sha256(store)?,
        })
    }

    /// SHA-256 of the guest's gitlab-runner; none where it is the vendor's package.
    pub fn runner_sha256(&self, store: &Store) -> Result<Option<String>, ImageError> {
        let RunnerSource::Binary(path) = &self.runner else {
            return Ok(None);
        };
        let file = std::fs::File::open(path).map_err(ImageError::file("open", path))?;
        store.hashes().content_hash(path, &file).map(Some)
    }
}

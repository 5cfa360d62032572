//! Whether machines of this host and configuration can start from a generation of another host.

use super::RegistryError;
use super::name::RegistryName;
use super::pull::disk_bytes;
use crate::image::generation::Manifest;
use crate::image::{Contents, Lineage};

/// What a generation must be.
#[derive(Debug, Clone)]
pub struct Expected {
    /// As Rust calls it.
    pub architecture: String,
    /// What a configuration asks for; none where nobody starts machines yet.
    pub machines: Option<ExpectedMachines>,
}

/// What a configuration asks for.
#[derive(Debug, Clone)]
pub struct ExpectedMachines {
    pub username: String,
    /// What this configuration's own build would have.
    pub lineage: Lineage,
    pub disk_gib: u32,
    /// SHA-256 of the guest's gitlab-runner; none where the vendor's package is asked for.
    pub runner: Option<String>,
    /// SHA-256 of our own executable.
    pub agent: String,
    /// Whether this program speaks a protocol of the agent.
    pub speaks: fn(u32) -> bool,
}

impl Expected {
    /// What this host needs whatever its configuration.
    pub fn of_host() -> Self {
        Self {
            architecture: std::env::consts::ARCH.to_owned(),
            machines: None,
        }
    }

    /// Refuses what machines could not start from, and names both sides.
    pub(super) fn check(
        &self,
        name: &RegistryName,
        manifest: &Manifest,
    ) -> Result<(), RegistryError> {
        let contents = manifest.contents.as_ref();
        let contents = contents.ok_or_else(|| RegistryError::NotOurs {
            name: name.to_string(),
            reason: "it does not say what it holds".to_owned(),
        })?;
        if contents.architecture != self.architecture {
            return Err(RegistryError::OtherArchitecture {
                name: name.to_string(),
                image: contents.architecture.clone(),
                host: self.architecture.clone(),
            });
        }
        match &self.machines {
            Some(machines) => machines.check(name, manifest, contents),
            None => Ok(()),
        }
    }
}

impl ExpectedMachines {
    fn check(
        &self,
        name: &RegistryName,
        manifest: &Manifest,
        contents: &Contents,
    ) -> Result<(), RegistryError> {
        let image_name = name;
        let name = name.to_string();
        let protocol = manifest.lineage.agent_protocol;
        if !(self.speaks)(protocol) {
            return Err(RegistryError::OtherProtocol {
                name,
                image: protocol,
                ours: self.lineage.agent_protocol.to_string(),
            });
        }
        if contents.username != self.username {
            return Err(RegistryError::OtherUsername {
                name,
                image: contents.username.clone(),
                config: self.username.clone(),
            });
        }
        if !manifest.lineage.same_login(&self.lineage) {
            let username = self.username.clone();
            return Err(RegistryError::OtherPassword { name, username });
        }
        let disk = disk_bytes(manifest);
        if disk != u64::from(self.disk_gib) << 30 {
            return Err(RegistryError::OtherDisk {
                name,
                image_mib: disk >> 20,
                config_gib: self.disk_gib,
            });
        }
        if contents.runner != self.runner {
            let show = |runner: &Option<String>| match runner {
                Some(sha256) => format!("the one of SHA-256 {sha256}"),
                None => "the vendor's package".to_owned(),
            };
            return Err(RegistryError::OtherRunner {
                name,
                image: show(&contents.runner),
                config: show(&self.runner),
            });
        }
        if contents.agent != self.agent {
            // As after an upgrade of this program: the protocol is what counts.
            tracing::info!("the agent in {image_name} is of another build of this program");
        }
        Ok(())
    }
}

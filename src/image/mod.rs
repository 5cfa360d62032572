//! From a vendor's image to a sealed generation, and the store they live in.
//!
//! ```text
//!  BuildInputs ── key ──> Store::find ──────────────────────────────> Generation
//!       │                     │ not there                                 ^
//!       │              Store::try_build_lock                              │ rename
//!       └──> Store::plan: raw disk, kernel, initrd, seed volume ─> BuildPlan ─> Store::seal
//!                                                      the pool runs the prebuild VM between
//! ```
//!
//! This folder never starts a VM. Every function blocks: the pool calls them from threads that
//! may. A crash at any point leaves the old state or the new one; what was half built carries no
//! lock any more and is removed by [`Store::collect_garbage`].

mod build;
mod commands;
mod convert;
mod dir;
mod error;
mod extract;
mod generation;
mod inputs;
mod outcome;
mod partitions;
mod seed;
mod store;
mod template;

use std::path::PathBuf;

pub use build::{BuildPlan, BuildProgress, Unpack};
pub use error::ImageError;
pub use generation::Generation;
pub use inputs::{BuildInputs, GenerationKey};
pub use store::{BuildLock, Store};
pub use template::SeedNet;

/// What a failing command of the operator does to a prebuild.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrebuildOnError {
    #[default]
    Fail,
    Continue,
}

/// Where the guest's gitlab-runner comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunnerSource {
    /// This executable, copied into the image.
    Binary(PathBuf),
    /// The vendor's package, installed by the prebuild where it can be had.
    Package,
}
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct ImageError;
#[derive(Debug, Clone)]
pub struct GenerationKey;
impl std::fmt::Display for GenerationKey {
    fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
#[derive(Debug)]
pub struct Store;
#[derive(Debug)]
pub struct BuildLock;
#[derive(Debug, Clone)]
pub struct Generation {
    pub key: GenerationKey,
    pub disk: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub root: String,
    pub tested: bool,
}
#[derive(Debug)]
pub struct BuildPlan {
    pub disk: PathBuf,
    pub seed: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub root: String,
}
#[derive(Debug)]
pub struct SeedNet {
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub dns: Vec<Ipv4Addr>,
}
#[derive(Debug)]
pub struct BuildProgress;
impl std::fmt::Display for BuildProgress {
    fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
#[derive(Debug)]
pub struct BuildInputs {
    pub image: PathBuf,
    pub disk_gib: u32,
    pub username: String,
    pub password: Option<String>,
    pub extra_commands: Vec<String>,
    pub on_command_error: PrebuildOnError,
    pub runner: RunnerSource,
    pub agent: File,
    pub agent_protocol: u32,
}
impl BuildInputs {
    pub fn key(&self, _s: &Store) -> Result<GenerationKey, ImageError> {
        Err(ImageError)
    }
}
impl Store {
    pub fn open(_d: &Path) -> Result<Self, ImageError> {
        Ok(Self)
    }
    pub fn find(&self, _k: &GenerationKey) -> Result<Option<Generation>, ImageError> {
        Ok(None)
    }
    pub fn try_build_lock(&self) -> Result<Option<BuildLock>, ImageError> {
        Ok(None)
    }
    pub fn plan(
        &self,
        _l: &BuildLock,
        _i: &BuildInputs,
        _n: &SeedNet,
        _p: &dyn Fn(BuildProgress),
    ) -> Result<BuildPlan, ImageError> {
        Err(ImageError)
    }
    pub fn seal(&self, _l: &BuildLock, _p: BuildPlan) -> Result<Generation, ImageError> {
        Err(ImageError)
    }
    pub fn mark_tested(&self, _g: &Generation) -> Result<(), ImageError> {
        Ok(())
    }
    pub fn console_path(&self, _i: &str) -> PathBuf {
        PathBuf::new()
    }
    pub fn create_console(&self, _i: &str) -> Result<File, ImageError> {
        Err(ImageError)
    }
    pub fn collect_garbage(&self, _k: &GenerationKey) -> Result<(), ImageError> {
        Ok(())
    }
}

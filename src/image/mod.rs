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
mod contents;
mod convert;
#[cfg(test)]
mod crash_test;
mod dir;
mod error;
mod extract;
mod fault;
mod gc;
mod generation;
mod inputs;
mod lineage;
mod outcome;
mod partitions;
mod record;
pub mod registry;
mod seed;
mod source;
mod store;
mod template;
#[cfg(test)]
mod testing;
mod zstd_qcow2;

use std::path::PathBuf;

pub use reqwest::Url;

pub use build::{BuildPlan, BuildProgress, Unpack};
pub use contents::Contents;
pub use error::ImageError;
pub use generation::Generation;
pub use inputs::{BuildInputs, GenerationKey};
pub use lineage::Lineage;
pub use record::GroupRecord;
pub use source::{
    Checksum, DebianRelease, ImageName, ImageSource, LocalImage, SourceError, SourceProgress,
    TellProgress, UbuntuRelease, Vendor, mirror, obtain, stored,
};
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

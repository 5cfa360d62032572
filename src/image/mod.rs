//! From a vendor's image to a sealed generation, and the store they live in.

use std::path::PathBuf;

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

//! Disposable virtual machines for gitlab-runner, as a fleeting plugin.
//!
//! The folders are the architecture and uses go one way only:
//!
//! ```text
//! cli -> plugin -> pool -> {image, net, agent, vmm}      vmm -> devices
//! ```
//!
//! `docs/ARCH.md` is the map; `tests/tidy.rs` keeps the arrows.

pub mod agent;
mod chain;
pub mod cli;
pub mod devices;
pub mod image;
pub mod net;
pub mod plugin;
pub mod pool;
#[cfg(test)]
pub mod testing;
pub mod vmm;

//! The face that gitlab-runner sees: go-plugin's handshake, GitLab's fleeting protocol over gRPC,
//! log lines in go-plugin's form, and the configuration as GitLab sends it.
//!
//! Everything runs in tokio tasks of the one runtime that [`run`] starts. The pool answers from
//! memory, so no call here waits for anything slow, but Init (the preflight) and Shutdown. Nothing
//! here knows a VM. stdout carries the handshake line and nothing else.
//!
//! ```text
//!  run ─> serve ─┬─ handshake   environment, socket, the line
//!                ├─ connection  accept ─> mux (if asked) ─> tls (if asked) ─> router
//!                ├─ fleeting    seven calls ─> pool          go_plugin   broker, controller, stdio
//!                └─ parent      whose end is ours
//! ```

pub mod client;
pub mod config;
mod connection;
mod fleeting;
mod go_plugin;
mod handshake;
pub mod log;
mod mux;
mod parent;
mod router;
mod serve;
mod tls;
pub mod version;

pub use handshake::{COOKIE, started_by_host};
pub use parent::installed_runner;
pub use serve::run;

/// What `proto/` says, generated: see `tests/generated.rs`.
#[allow(
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::indexing_slicing,
    missing_docs,
    reason = "generated"
)]
pub mod generated {
    /// GitLab's fleeting protocol.
    pub mod fleeting {
        include!("generated/proto.rs");
    }
    /// go-plugin's own services.
    pub mod go_plugin {
        include!("generated/plugin.rs");
    }
    /// Both as a FileDescriptorSet, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.bin");
}

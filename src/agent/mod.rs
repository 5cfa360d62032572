//! The guest agent, and the host's end of its channel.
//!
//! A worker's network belongs to the agent: the link is down until the host has said who this
//! machine is. One channel (virtio-console port 1) carries it all:
//!
//! ```text
//!   guest                                host
//!     hello   ────────────────────────>
//!             <──────────────────────── identify     (address, names, keys, entropy, time)
//!     applied ────────────────────────>
//!                                       raises the link
//!     ready   ────────────────────────>              (link UP seen, sshd's banner read)
//!             <──────────────────────── set_clock    (any time later)
//! ```
//!
//! [`host`] runs in a tokio task of the pool, [`guest`] is a process of its own in the guest and
//! uses no tokio. The agent does nothing before `identify`.

pub mod guest;
pub mod host;
pub mod proto;

pub use host::{AgentError, AgentLink};
pub use proto::{Identity, PROTOCOL, Ready, speaks};

//! The socket by which the operator's tool talks to a running pool: `<group>.sock` beside the
//! locks, for root alone.
//!
//! One JSON object a line each way, requests no longer than [`MAX_REQUEST_BYTES`]. Both ends are
//! this program, maybe of another version: unknown fields are passed over, an unknown request is
//! answered by an error.

pub mod client;
pub mod server;

use serde::{Deserialize, Serialize};

use super::status::GroupStatus;

/// Of a request's line.
pub const MAX_REQUEST_BYTES: u64 = 4096;
/// Of an answer's line: a thousand instances take some 300 KiB.
pub const MAX_RESPONSE_BYTES: u64 = 16 << 20;
/// What a socket's name ends in.
pub const SUFFIX: &str = ".sock";

/// What a pool can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    Status,
    /// Look for a newer image now.
    Refresh,
    /// Serve the image whose name begins so, whatever is newer.
    Pin {
        generation: String,
    },
    /// Serve what is newest again.
    Unpin,
    /// Serve and pin the image that served before.
    RollBack,
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    Status(Box<GroupStatus>),
    /// It is done, or has begun; for people.
    Done {
        text: String,
    },
    Failed {
        text: String,
    },
}

//! The virtio balloon device.

use serde::{Deserialize, Serialize};

/// What a snapshot keeps of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BalloonState {}

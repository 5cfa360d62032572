//! What two generations must have in common for one to stand in for the other.
//!
//! A generation's key changes with everything that goes into it. Where only what is *found* has
//! changed (the vendor's image, the guest's runner, this program's templates) the old one is as
//! good as it was; where the operator changed what is *asked for*, it is not.

use serde::{Deserialize, Serialize};

use super::inputs::{BuildInputs, Fields};

/// The ancestry of a generation; part of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// A hash of what the operator asked for.
    config: String,
    /// A hash of how the runner logs in.
    login: String,
    /// The agent inside.
    pub agent_protocol: u32,
}

impl Lineage {
    /// Whether both were asked for by the same configuration.
    pub fn same_config(&self, other: &Self) -> bool {
        self.config == other.config && self.login == other.login
    }

    /// The same where no configuration has asked for it: `name` tells it from all others.
    pub(super) fn of_nobody(&self, name: &str) -> Self {
        let mut config = Fields::new();
        config.add(b"fleetingd pulled 1");
        config.add(name.as_bytes());
        Self {
            config: config.finish(),
            ..self.clone()
        }
    }

    /// Whether the runner can log in to machines of both.
    pub fn same_login(&self, other: &Self) -> bool {
        self.login == other.login
    }
}

impl BuildInputs {
    /// Their lineage; reads no file.
    pub fn lineage(&self) -> Lineage {
        let password = self.password.as_deref().unwrap_or_default();
        let mut login = Fields::new();
        login.add(b"fleetingd login 1");
        login.add(self.username.as_bytes());
        login.add(password.as_bytes());
        let mut config = Fields::new();
        config.add(b"fleetingd lineage 1");
        config.add(self.setting.as_bytes());
        config.add(&self.disk_gib.to_le_bytes());
        config.add(format!("{:?}", self.on_command_error).as_bytes());
        for command in self.commands() {
            config.add(command.script().as_bytes());
        }
        Lineage {
            config: config.finish(),
            login: login.finish(),
            agent_protocol: self.agent_protocol,
        }
    }
}

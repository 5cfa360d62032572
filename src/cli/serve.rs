//! `serve`, and a start without a command: the plugin, if a runner started it.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::plugin;

/// Exit code of every wrong use.
const USAGE: u8 = 2;

const EXPLANATION: &str = "\
This is a fleeting plugin: gitlab-runner starts it, and nobody else needs to.

Name it in the runner's config.toml:

    [[runners]]
      executor = \"instance\"            # or docker-autoscaler
      [runners.autoscaler]
        plugin = \"fleeting-plugin-fleetingd\"
        [runners.autoscaler.plugin_config]
          vm_image = \"/path/to/cloud-image.qcow2\"

For commands of your own, see: fleeting-plugin-fleetingd --help
";

/// Serves the runner that started this process, or explains to a person what this is.
pub(super) fn run() -> ExitCode {
    if plugin::started_by_host() {
        return plugin::run();
    }
    // Nobody reads it if stderr is closed.
    let _closed = io::stderr().lock().write_all(EXPLANATION.as_bytes());
    ExitCode::from(USAGE)
}

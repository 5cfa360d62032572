//! The guest side: a small process started early by systemd (or any init) in every worker.
//!
//! Single-threaded and blocking: it opens its port, says hello, applies one identity, reports
//! ready and then serves clock steps until the machine ends. It does nothing before `identify`,
//! so the same image is every machine. A failure is told to the host and ends the machine's start;
//! the agent never powers off or retries on its own.

mod netlink;
mod port;
mod ssh;
mod system;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use super::proto::{Identity, PROTOCOL, Ready, ToGuest, ToHost};
use port::Port;

/// Why an identity could not be applied; its text travels to the host's log.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("{act}: {source}")]
    Act {
        act: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{act} timed out after {seconds} s")]
    Timeout { act: String, seconds: u64 },
    #[error("{0}")]
    Unusable(String),
}

impl GuestError {
    fn act(act: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let act = act.into();
        move |source| Self::Act { act, source }
    }
}

/// Runs the agent until the machine ends. Blocks for ever; returns only when the port is gone.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), GuestError> {
    let mut port = Port::open()?;
    port.send(&ToHost::Hello { protocol: PROTOCOL })?;
    while let Some(message) = port.receive()? {
        match message {
            ToGuest::Identify(identity) => {
                if let Err(error) = bring_up(&identity, &mut port) {
                    port.send(&ToHost::Failed {
                        reason: error.to_string(),
                    })?;
                }
            }
            ToGuest::SetClock { wall_clock_ns } => system::set_clock(wall_clock_ns)?,
        }
    }
    Ok(())
}

/// Applies the identity, asks for the link and reports ready.
fn bring_up(identity: &Identity, port: &mut Port) -> Result<(), GuestError> {
    let mut phases = Phases::start();
    system::reseed(&identity.entropy)?;
    system::set_clock(identity.wall_clock_ns)?;
    system::set_names(identity)?;
    ssh::write_keys(identity)?;
    phases.mark("identity");
    let interface = netlink::find_interface(identity.mac)?;
    netlink::configure(&interface, identity)?;
    system::write_resolv_conf(&identity.dns)?;
    phases.mark("network");
    port.send(&ToHost::Applied)?;
    ssh::start()?;
    netlink::wait_for_link(&interface)?;
    phases.mark("link");
    ssh::wait_for_banner(identity.address)?;
    phases.mark("sshd");
    system::wait_for_units(&identity.units)?;
    phases.mark("units");
    port.send(&ToHost::Ready(Ready {
        phases_ms: phases.marks,
        uptime_ms: system::uptime_ms(),
    }))
}

struct Phases {
    start: Instant,
    marks: BTreeMap<String, u64>,
}

impl Phases {
    fn start() -> Self {
        Self {
            start: Instant::now(),
            marks: BTreeMap::new(),
        }
    }

    fn mark(&mut self, phase: &str) {
        let ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.marks.insert(phase.to_owned(), ms);
    }
}

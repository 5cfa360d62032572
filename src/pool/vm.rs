//! A VM as tasks see it: the VMM's blocking calls behind async ones, and its end as a future.

use std::io;

use tokio::sync::watch;

use crate::agent::AgentLink;
use crate::vmm::{self, StartError, VmEnd, VmGone, VmHandle, VmSpec};

/// A running VM; killed when dropped.
#[derive(Debug)]
pub struct Vm {
    handle: VmHandle,
    end: watch::Receiver<Option<VmEnd>>,
}

/// No VM came of a spec.
#[derive(Debug, thiserror::Error)]
pub enum VmStartError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the start itself failed")]
    Task(#[source] tokio::task::JoinError),
}

impl Vm {
    pub async fn start(spec: VmSpec) -> Result<Self, VmStartError> {
        let (tell, end) = watch::channel(None);
        let start = move || {
            let on_end = Box::new(move |end| {
                tell.send_replace(Some(end));
            });
            vmm::start(spec, on_end)
        };
        let handle = tokio::task::spawn_blocking(start)
            .await
            .map_err(VmStartError::Task)??;
        Ok(Self { handle, end })
    }

    /// Waits until the VM has ended and everything it held is released.
    pub async fn ended(&self) -> VmEnd {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(end)) => end.clone(),
            // The supervising thread is gone without a word: so is the VM.
            _ => VmEnd::Killed,
        }
    }

    /// Ends the VM and waits until it has let go of everything.
    pub async fn kill(&self) -> VmEnd {
        self.handle.kill();
        self.ended().await
    }

    /// The host's end of the agent channel, once.
    pub fn agent(&self) -> io::Result<AgentLink> {
        let stream = self
            .handle
            .take_agent()
            .ok_or_else(|| io::Error::other("the agent channel was taken already"))?;
        AgentLink::new(stream)
    }

    /// Remote control that keeps nothing alive.
    pub fn handle(&self) -> VmHandle {
        self.handle.clone()
    }

    pub async fn set_link(&self, up: bool) -> Result<(), VmGone> {
        let handle = self.handle.clone();
        tokio::task::spawn_blocking(move || handle.set_link(up))
            .await
            .unwrap_or(Err(VmGone))
    }

    pub fn console_tail(&self, max_bytes: usize) -> String {
        self.handle.console_tail(max_bytes)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.handle.kill();
    }
}

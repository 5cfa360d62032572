//! The pool: instances and their lifecycle.
//!
//! [`brain`] decides, the [`driver`] task acts, and each machine has one task ([`machine`]) that
//! owns everything the machine holds of the host. [`Pool`] is the handle that the gRPC services
//! use: each call is one message to the driver, which answers from memory.
//!
//! ```text
//!  Pool ──message──> driver ──step──> brain
//!                      │ ^
//!             Start/Stop │ Ready/Released
//!                      v │
//!                    machine task: slot ─> VM ─> identify ─> link ─> SSH ─> ... ─> released
//!                    builder task: image ─> prebuild VM ─> sealed ─> smoke test ─> current
//! ```

pub mod brain;
mod builder;
pub mod control;
mod counters;
mod driver;
#[cfg(feature = "test-vmm")]
mod fake;
mod host;
pub mod ids;
pub mod keys;
pub mod limits;
mod machine;
mod memory;
mod metrics;
mod operator;
mod prebuild;
mod preflight;
mod refresh;
mod registry;
pub mod spec;
pub mod ssh;
pub mod status;
mod vendor;
mod view;
mod vm;

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

pub use builder::BuildError;
pub use counters::{Boots, Counts, Spent};
pub use prebuild::{Onlooker, PrebuildError, Prebuilt, prebuild};
pub use spec::{
    ConnectInfo, FixedCredential, ImagePolicy, InstanceId, InstanceState, Login, OnChange,
    PoolError, PoolSpec, Shape, VmmKind,
};

use brain::{Answer, Event};
use driver::{Driver, Message};
use host::Host;

/// A running pool. Cheap to clone; when the last clone is gone everything is released.
#[derive(Debug, Clone)]
pub struct Pool {
    to_driver: mpsc::UnboundedSender<Message>,
    group: Arc<str>,
    max_size: u32,
}

impl Pool {
    /// Checks the host, takes this process's share of it and starts to build the image in the
    /// background. Returns within a second, with every problem found, one line each.
    pub async fn open(spec: PoolSpec) -> Result<Self, Vec<String>> {
        let (host, warnings) = Host::open(spec).await?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let (group, max_size) = (Arc::from(host.group()), host.max_size());
        let to_driver = Driver::spawn(host);
        Ok(Self {
            to_driver,
            group,
            max_size,
        })
    }

    /// The group's name, which begins every id.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Instances that fit at once.
    pub fn max_size(&self) -> u32 {
        self.max_size
    }

    /// The state of every instance that is known.
    pub async fn update(&self) -> Result<Vec<(InstanceId, InstanceState)>, PoolError> {
        match self.ask(Event::Update).await? {
            Answer::Instances(instances) => Ok(instances),
            _ => Err(PoolError::Ended),
        }
    }

    /// Accepts up to `n` new instances and says how many.
    pub async fn increase(&self, n: u32) -> Result<u32, PoolError> {
        let epoch_seconds = status::epoch();
        match self.ask(Event::Increase { n, epoch_seconds }).await? {
            Answer::Accepted(accepted) => Ok(accepted),
            _ => Err(PoolError::Ended),
        }
    }

    /// Ends instances; returns those of `ids` that go or are gone.
    pub async fn decrease(&self, ids: Vec<String>) -> Result<Vec<String>, PoolError> {
        match self.ask(Event::Decrease { ids }).await? {
            Answer::Going(ids) => Ok(ids),
            _ => Err(PoolError::Ended),
        }
    }

    /// How to reach a running instance; the same for its whole life.
    pub async fn connect_info(&self, id: &str) -> Result<ConnectInfo, PoolError> {
        let id = id.to_owned();
        self.send(|reply| Message::ConnectInfo { id, reply })
            .await?
    }

    /// Whether an instance is alive.
    pub async fn heartbeat(&self, id: &str) -> Result<(), PoolError> {
        self.connect_info(id).await.map(|_info| ())
    }

    /// Ends all instances and gives back what this process holds of the host.
    pub async fn shutdown(&self) {
        // A driver that is gone has released everything already.
        let _gone = self.send(|reply| Message::Close { reply }).await;
    }

    async fn ask(&self, event: Event) -> Result<Answer, PoolError> {
        self.send(|reply| Message::Ask { event, reply }).await
    }

    async fn send<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Result<T, PoolError> {
        let (reply, answer) = oneshot::channel();
        self.to_driver
            .send(message(reply))
            .map_err(|_gone| PoolError::Ended)?;
        answer.await.map_err(|_gone| PoolError::Ended)
    }
}

#[cfg(test)]
mod pool_test;
#[cfg(test)]
mod refresh_test;

//! GitLab's fleeting protocol, each call handed to the pool.
//!
//! The pool answers from memory. Two calls take time, as the protocol allows: Init (the pool's
//! preflight, below a second) and Shutdown (everything is released when it returns). An error and a
//! count cannot travel together, so Increase answers with what it could do.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::config::{Config, Connector, Host, Problems, Source};
use super::generated::fleeting::instance_group_server::InstanceGroup;
use super::generated::fleeting::update_response::State;
use super::generated::fleeting::{
    ConnectInfoRequest, ConnectInfoResponse, ConnectorConfig, DecreaseRequest, DecreaseResponse,
    Empty, HeartbeatRequest, IncreaseRequest, IncreaseResponse, InitRequest, InitResponse,
    UpdateResponse,
};
use super::{parent, version};
use crate::image::RunnerSource;
use crate::pool::{InstanceState, Pool, PoolError};

/// The service: one group, from its Init to its Shutdown.
#[derive(Clone)]
pub(super) struct Fleeting {
    phase: Arc<Mutex<Phase>>,
    /// What may be a gitlab-runner.
    parent_executable: Option<PathBuf>,
}

/// ```text
///  Waiting ──Init──> Opening ──ok──> Open ──Shutdown──> Ended
///     ^                 │                                 ^
///     └──failed, gone───┘        Waiting ──Shutdown───────┘
/// ```
enum Phase {
    Waiting,
    Opening,
    Open(Open),
    Ended(Option<Pool>),
}

/// A pool that answers.
#[derive(Clone)]
struct Open {
    pool: Pool,
    connector: Arc<Connector>,
}

impl Fleeting {
    pub(super) fn new(parent_executable: Option<PathBuf>) -> Self {
        Self {
            phase: Arc::new(Mutex::new(Phase::Waiting)),
            parent_executable,
        }
    }

    /// Ends the group, whether or not the runner asked for it; returns when all is released.
    pub(super) async fn close(&self) {
        let pool = {
            let mut phase = self.phase();
            let pool = match &*phase {
                Phase::Open(open) => Some(open.pool.clone()),
                Phase::Ended(pool) => pool.clone(),
                Phase::Waiting | Phase::Opening => None,
            };
            *phase = Phase::Ended(pool.clone());
            pool
        };
        // Asked again, the pool waits for the end of the first time.
        if let Some(pool) = pool {
            pool.shutdown().await;
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        // Nothing panics while it is held; a poisoned phase is as good as another.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> Result<Open, Status> {
        match &*self.phase() {
            Phase::Open(open) => Ok(open.clone()),
            Phase::Waiting | Phase::Opening => Err(Status::failed_precondition(
                "the group is not initialised yet",
            )),
            Phase::Ended(_) => Err(ended()),
        }
    }

    async fn start(&self, request: InitRequest) -> Result<Open, Problems> {
        let connector = request
            .settings
            .and_then(|settings| settings.connector_config)
            .unwrap_or_default();
        let source = Source::from_json(&request.config, connector)?;
        let runner = if source.sets("vm_runner_binary") {
            None
        } else {
            parent::runner_binary(self.parent_executable.clone()).await
        };
        let config = source.check(&Host {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            runner: runner.map_or(RunnerSource::Package, RunnerSource::Binary),
        })?;
        let Config {
            pool,
            connector,
            warnings,
        } = config;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let pool = Pool::open(pool).await.map_err(Problems::from)?;
        Ok(Open {
            pool,
            connector: Arc::new(connector),
        })
    }
}

/// Gives the phase back if Init fails, or is given up by its caller.
struct Opening<'a>(&'a Fleeting);

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        let mut phase = self.0.phase();
        if matches!(*phase, Phase::Opening) {
            *phase = Phase::Waiting;
        }
    }
}

#[tonic::async_trait]
impl InstanceGroup for Fleeting {
    type UpdateStream = Pin<Box<dyn Stream<Item = Result<UpdateResponse, Status>> + Send>>;

    async fn init(&self, request: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        {
            let mut phase = self.phase();
            match *phase {
                Phase::Waiting => *phase = Phase::Opening,
                Phase::Ended(_) => return Err(ended()),
                Phase::Opening | Phase::Open(_) => {
                    return Err(Status::already_exists("the group is initialised already"));
                }
            }
        }
        let _opening = Opening(self);
        let begun = Instant::now();
        let open = self.start(request.into_inner()).await.map_err(|problems| {
            for problem in problems.lines() {
                tracing::error!("{problem}");
            }
            Status::invalid_argument(problems.to_string())
        })?;
        let answer = InitResponse {
            id: open.pool.group().to_owned(),
            max_size: open.pool.max_size(),
            version: version::VERSION.to_owned(),
            build_info: version::build_info(),
        };
        let pool = open.pool.clone();
        let over = {
            let mut phase = self.phase();
            let over = matches!(*phase, Phase::Ended(_));
            if !over {
                *phase = Phase::Open(open);
            }
            over
        };
        if over {
            pool.shutdown().await;
            return Err(ended());
        }
        tracing::info!(
            group = answer.id,
            max_size = answer.max_size,
            version = answer.version,
            took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "initialised"
        );
        Ok(Response::new(answer))
    }

    async fn update(
        &self,
        _request: Request<Empty>,
    ) -> Result<Response<Self::UpdateStream>, Status> {
        let instances = self.open()?.pool.update().await.map_err(status)?;
        let messages = instances.into_iter().map(|(id, state)| {
            Ok(UpdateResponse {
                instance: id.to_string(),
                state: i32::from(match state {
                    InstanceState::Creating => State::Creating,
                    InstanceState::Running => State::Running,
                    InstanceState::Deleting => State::Deleting,
                    InstanceState::Deleted => State::Deleted,
                }),
            })
        });
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn increase(
        &self,
        request: Request<IncreaseRequest>,
    ) -> Result<Response<IncreaseResponse>, Status> {
        let n = request.into_inner().n;
        let accepted = self.open()?.pool.increase(n).await.map_err(status)?;
        // More than n panics the runner.
        let succeeded = accepted.min(n);
        tracing::debug!(n, succeeded, "increase");
        Ok(Response::new(IncreaseResponse { succeeded }))
    }

    async fn decrease(
        &self,
        request: Request<DecreaseRequest>,
    ) -> Result<Response<DecreaseResponse>, Status> {
        let ids = request.into_inner().instances;
        let n = ids.len();
        let succeeded = self.open()?.pool.decrease(ids).await.map_err(status)?;
        tracing::debug!(n, succeeded = succeeded.len(), "decrease");
        Ok(Response::new(DecreaseResponse { succeeded }))
    }

    async fn connect_info(
        &self,
        request: Request<ConnectInfoRequest>,
    ) -> Result<Response<ConnectInfoResponse>, Status> {
        let Open { pool, connector } = self.open()?;
        let id = request.into_inner().instance;
        let info = pool.connect_info(&id).await.map_err(status)?;
        let address = info.address.to_string();
        Ok(Response::new(ConnectInfoResponse {
            connector: Some(ConnectorConfig {
                os: "linux".to_owned(),
                arch: "amd64".to_owned(),
                protocol: "ssh".to_owned(),
                username: info.username,
                password: info.password.unwrap_or_else(|| connector.password.clone()),
                key: info.key.map(String::into_bytes).unwrap_or_default(),
                use_static_credentials: connector.login.fixed.is_some(),
                keepalive: connector.keepalive,
                timeout: connector.timeout,
                protocol_port: 22,
            }),
            external_addr: address.clone(),
            internal_addr: address,
            expires: 0,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<Empty>, Status> {
        let id = request.into_inner().instance;
        self.open()?.pool.heartbeat(&id).await.map_err(status)?;
        Ok(Response::new(Empty {}))
    }

    async fn shutdown(&self, _request: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::info!("shutting down: all machines are released");
        self.close().await;
        Ok(Response::new(Empty {}))
    }
}

fn ended() -> Status {
    Status::failed_precondition("the group has been shut down")
}

fn status(error: PoolError) -> Status {
    let text = error.to_string();
    match error {
        PoolError::Unknown { .. } => Status::not_found(text),
        PoolError::NotRunning { .. } => Status::failed_precondition(text),
        PoolError::Ended => Status::unavailable(text),
    }
}

#[cfg(all(test, feature = "test-vmm"))]
#[path = "fleeting_test.rs"]
mod tests;

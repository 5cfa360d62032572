//! The host's side of the handshake: starts a plugin's executable as gitlab-runner would and calls
//! it. For `fleetingd try` and tests; like fleeting's own host it leaves AutoMTLS off.
//!
//! The plugin's log lines are handed to the caller, one by one, as they come.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tower::service_fn;

use super::config::Source;
use super::generated::fleeting::instance_group_client::InstanceGroupClient;
use super::generated::fleeting::update_response::State;
use super::generated::fleeting::{
    ConnectInfoRequest, ConnectInfoResponse, DecreaseRequest, Empty, HeartbeatRequest,
    IncreaseRequest, InitRequest, InitResponse, Settings,
};
use super::generated::go_plugin;
use super::generated::go_plugin::grpc_controller_client::GrpcControllerClient;
use super::handshake::{APP_PROTOCOL, COOKIE, CORE_PROTOCOL};

/// As long as go-plugin's host waits for the line.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Longer than any call takes: the slowest, Shutdown, ends every machine. What does not answer in
/// this time never will.
const CALL_TIMEOUT: Duration = Duration::from_secs(300);

/// As long as go-plugin's host waits after asking a plugin to end.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A plugin could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot start {path}")]
    Start {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} printed no handshake within {START_TIMEOUT:?}")]
    Silent { path: PathBuf },
    #[error("{path} is no plugin of this protocol: it printed {line:?}")]
    Handshake { path: PathBuf, line: String },
    #[error("cannot connect to the plugin")]
    Connect(#[source] tonic::transport::Error),
    /// The text is the plugin's own, with every problem on a line of its own.
    #[error("{call} failed: {text}", text = .status.message())]
    Call {
        call: &'static str,
        status: Box<Status>,
    },
    #[error("cannot wait for the plugin's end")]
    Wait(#[source] io::Error),
}

impl ClientError {
    /// gRPC's code, if a call failed.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Call { status, .. } => Some(status.code()),
            _ => None,
        }
    }
}

/// A running plugin. Dropping it kills the process; [`PluginClient::end`] asks first.
#[derive(Debug)]
pub struct PluginClient {
    child: Child,
    channel: Channel,
}

/// An instance as Update tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub id: String,
    pub state: State,
}

impl PluginClient {
    /// Starts `path` and connects to it. `log` gets each line of its stderr, on a task of its own.
    pub async fn start(
        path: &Path,
        mut log: impl FnMut(&str) + Send + 'static,
    ) -> Result<Self, ClientError> {
        let mut child = Command::new(path)
            .env(COOKIE.0, COOKIE.1)
            .env("PLUGIN_PROTOCOL_VERSIONS", APP_PROTOCOL.to_string())
            .env_remove("PLUGIN_CLIENT_CERT")
            .env_remove("PLUGIN_MULTIPLEX_GRPC")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| ClientError::Start {
                path: path.to_owned(),
                source,
            })?;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(async move {
                let mut lines = BufReader::new(stderr).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    log(&line);
                }
            });
        }
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut stdout = BufReader::new(stdout);
            let read = tokio::time::timeout(START_TIMEOUT, stdout.read_line(&mut line)).await;
            match read {
                Ok(Ok(_)) => {}
                Ok(Err(source)) => {
                    return Err(ClientError::Start {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(_elapsed) => {
                    return Err(ClientError::Silent {
                        path: path.to_owned(),
                    });
                }
            }
        }
        let socket = socket_of(&line).ok_or_else(|| ClientError::Handshake {
            path: path.to_owned(),
            line: line.trim_end().to_owned(),
        })?;
        let channel = connect(socket).await.map_err(ClientError::Connect)?;
        Ok(Self { child, channel })
    }

    /// The process's id, until its end has been seen.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// The connection, for services that have no method here.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Init, with what an operator wrote.
    pub async fn init(&self, source: &Source) -> Result<InitResponse, ClientError> {
        let request = InitRequest {
            config: source.plugin_config(),
            settings: Some(Settings {
                connector_config: Some(source.connector_config().clone()),
            }),
        };
        let answer = self.group().init(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(failed("Init"))
    }

    /// Every instance that the plugin knows.
    pub async fn update(&self) -> Result<Vec<Instance>, ClientError> {
        let failed = failed("Update");
        let mut messages = self
            .group()
            .update(Empty {})
            .await
            .map_err(&failed)?
            .into_inner();
        let mut instances = Vec::new();
        while let Some(message) = messages.message().await.map_err(&failed)? {
            instances.push(Instance {
                state: message.state(),
                id: message.instance,
            });
        }
        Ok(instances)
    }

    /// Asks for `n` more and says how many will come.
    pub async fn increase(&self, n: u32) -> Result<u32, ClientError> {
        let answer = self.group().increase(IncreaseRequest { n }).await;
        answer
            .map(|answer| answer.into_inner().succeeded)
            .map_err(failed("Increase"))
    }

    /// Ends instances; returns those that go or are gone.
    pub async fn decrease(&self, instances: Vec<String>) -> Result<Vec<String>, ClientError> {
        let answer = self.group().decrease(DecreaseRequest { instances }).await;
        answer
            .map(|answer| answer.into_inner().succeeded)
            .map_err(failed("Decrease"))
    }

    /// How to log in to a running instance.
    pub async fn connect_info(&self, instance: &str) -> Result<ConnectInfoResponse, ClientError> {
        let request = ConnectInfoRequest {
            instance: instance.to_owned(),
        };
        let answer = self.group().connect_info(request).await;
        answer
            .map(tonic::Response::into_inner)
            .map_err(failed("ConnectInfo"))
    }

    /// Whether an instance is alive.
    pub async fn heartbeat(&self, instance: &str) -> Result<(), ClientError> {
        let request = HeartbeatRequest {
            instance: instance.to_owned(),
        };
        let answer = self.group().heartbeat(request).await;
        answer.map(|_empty| ()).map_err(failed("Heartbeat"))
    }

    /// Everything is released when it returns.
    pub async fn shutdown(&self) -> Result<(), ClientError> {
        let answer = self.group().shutdown(Empty {}).await;
        answer.map(|_empty| ()).map_err(failed("Shutdown"))
    }

    /// Asks the process to end, as a host does: after two seconds it is killed.
    pub async fn end(mut self) -> Result<ExitStatus, ClientError> {
        // A plugin that is gone already needs no asking.
        let _gone = GrpcControllerClient::new(self.channel.clone())
            .shutdown(go_plugin::Empty {})
            .await;
        drop(self.channel);
        match tokio::time::timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(status) => status.map_err(ClientError::Wait),
            Err(_elapsed) => {
                self.child.kill().await.map_err(ClientError::Wait)?;
                self.child.wait().await.map_err(ClientError::Wait)
            }
        }
    }

    fn group(&self) -> InstanceGroupClient<Channel> {
        InstanceGroupClient::new(self.channel.clone())
    }
}

fn failed(call: &'static str) -> impl Fn(Status) -> ClientError {
    move |status| ClientError::Call {
        call,
        status: Box::new(status),
    }
}

/// The socket of a handshake line without TLS.
fn socket_of(line: &str) -> Option<PathBuf> {
    let fields: Vec<&str> = line.trim_end().split('|').collect();
    let [core, app, "unix", socket, "grpc", ""] = fields.as_slice() else {
        return None;
    };
    let ours = core.parse() == Ok(CORE_PROTOCOL) && app.parse() == Ok(APP_PROTOCOL);
    ours.then(|| PathBuf::from(socket))
}

async fn connect(socket: PathBuf) -> Result<Channel, tonic::transport::Error> {
    // The address is the socket's, whatever the URI says.
    Endpoint::from_static("http://localhost")
        .timeout(CALL_TIMEOUT)
        .connect_with_connector(service_fn(move |_uri: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_handshake_is_understood() {
        assert_eq!(
            socket_of("1|0|unix|/tmp/a.sock|grpc|\n"),
            Some(PathBuf::from("/tmp/a.sock"))
        );
        for line in [
            "",
            "hello\n",
            "2|0|unix|/tmp/a.sock|grpc|\n",
            "1|1|unix|/tmp/a.sock|grpc|\n",
            "1|0|tcp|127.0.0.1:1|grpc|\n",
            "1|0|unix|/tmp/a.sock|grpc|Y2VydA\n",
        ] {
            assert_eq!(socket_of(line), None, "{line}");
        }
    }
}

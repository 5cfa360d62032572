//! The plugin's process: from the handshake to its end.
//!
//! It ends when the host says so (GRPCController), when the process that started it is gone, or
//! when it cannot serve. Whatever the reason, the pool is shut down first. After GRPCController the
//! host waits for two seconds and then kills: what cannot be released by then is held by
//! descriptors and goes with the process.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use super::connection;
use super::fleeting::Fleeting;
use super::generated::DESCRIPTORS;
use super::generated::fleeting::instance_group_server::{self, InstanceGroupServer};
use super::generated::go_plugin::grpc_broker_server::{self, GrpcBrokerServer};
use super::generated::go_plugin::grpc_controller_server::{self, GrpcControllerServer};
use super::generated::go_plugin::grpc_stdio_server::{self, GrpcStdioServer};
use super::go_plugin::{GoPlugin, Stop};
use super::handshake::{HandshakeError, Socket, Wishes};
use super::log;
use super::parent::{self, Parent};
use super::router::Router;
use super::tls::{AutoMtls, TlsError};

/// As the other side has it: no limit worth the name.
const MAX_MESSAGE_BYTES: usize = 0x7fff_ffff;

/// Calls are short, and machines have threads of their own.
const MAX_RUNTIME_THREADS: usize = 4;

/// How long answers on their way out may take when it is over.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// How long the pool may take when it is over; what is left goes with the process.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(60);

/// The name under which go-plugin asks for health.
const HEALTH_NAME: &str = "plugin";

/// The plugin cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    #[error("AutoMTLS failed")]
    Tls(#[from] TlsError),
    #[error("cannot describe the services")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the server failed")]
    Server(#[from] tonic::transport::Error),
}

/// Serves the host that started this process until it is over. Blocks; call it once, on a process
/// for which [`super::started_by_host`] holds.
pub fn run() -> ExitCode {
    let _flush = log::start(true);
    parent::ignore_signals();
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "the plugin failed");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), ServeError> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cpus.min(MAX_RUNTIME_THREADS))
        .thread_name("plugin")
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let result = runtime.block_on(until_over());
    runtime.shutdown_background();
    result
}

async fn until_over() -> Result<(), ServeError> {
    let parent = Parent::find();
    let wishes = Wishes::from_variables(|name| std::env::var(name).ok());
    if !wishes.speaks_ours {
        tracing::error!("the host speaks no version of fleeting that this plugin knows");
    }
    let socket = Socket::open(&wishes)?;
    let tls = wishes
        .client_certificate
        .as_deref()
        .map(AutoMtls::for_client)
        .transpose()?;
    let stop = Stop::new();
    let fleeting = Fleeting::new(parent.executable());
    let router = router(&fleeting, &stop).await?;
    socket.announce(tls.as_ref().map(|tls| tls.certificate.as_slice()), &wishes)?;

    let acceptor = tls.map(|tls| tls.config.into());
    let connections = connection::accept(socket.listener.clone(), acceptor, wishes.multiplex);
    let server =
        Server::builder().serve_with_incoming_shutdown(router, ReceiverStream::new(connections), {
            let stop = stop.clone();
            async move { stop.happened().await }
        });
    let mut server = std::pin::pin!(server);
    tokio::select! {
        result = &mut server => {
            fleeting.close().await;
            return Ok(result?);
        }
        () = stop.happened() => {}
        () = parent.gone() => tracing::warn!("the process that started the plugin is gone: leaving"),
    }
    stop.now();
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, server);
    let closed = tokio::time::timeout(CLOSE_TIMEOUT, fleeting.close());
    let (_drained, closed) = tokio::join!(drained, closed);
    if closed.is_err() {
        tracing::warn!("machines are left to end with the process");
    }
    Ok(())
}

async fn router(fleeting: &Fleeting, stop: &Stop) -> Result<Router, ServeError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status(HEALTH_NAME, tonic_health::ServingStatus::Serving)
        .await;
    let go_plugin = GoPlugin { stop: stop.clone() };
    Ok(Router::default()
        .with(
            instance_group_server::SERVICE_NAME,
            InstanceGroupServer::new(fleeting.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .with(
            grpc_broker_server::SERVICE_NAME,
            GrpcBrokerServer::new(go_plugin.clone()),
        )
        .with(
            grpc_controller_server::SERVICE_NAME,
            GrpcControllerServer::new(go_plugin.clone()),
        )
        .with(
            grpc_stdio_server::SERVICE_NAME,
            GrpcStdioServer::new(go_plugin),
        )
        .with(
            tonic_health::pb::health_server::SERVICE_NAME,
            health_service,
        )
        .with(
            tonic_reflection::pb::v1::server_reflection_server::SERVICE_NAME,
            reflection().build_v1().map_err(ServeError::Reflection)?,
        )
        .with(
            tonic_reflection::pb::v1alpha::server_reflection_server::SERVICE_NAME,
            reflection()
                .build_v1alpha()
                .map_err(ServeError::Reflection)?,
        ))
}

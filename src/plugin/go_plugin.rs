//! go-plugin's own services: broker, controller and stdio.
//!
//! fleeting brokers no connection and this plugin prints nothing, so two of them are streams that
//! stay open until either side ends.

use std::pin::Pin;

use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::generated::go_plugin::conn_info::Knock;
use super::generated::go_plugin::grpc_broker_server::GrpcBroker;
use super::generated::go_plugin::grpc_controller_server::GrpcController;
use super::generated::go_plugin::grpc_stdio_server::GrpcStdio;
use super::generated::go_plugin::{ConnInfo, Empty, StdioData};

/// Tells every part of the process that it is over; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Stop(watch::Sender<bool>);

impl Stop {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    pub(super) fn now(&self) {
        self.0.send_replace(true);
    }

    /// Waits until it is over.
    pub(super) async fn happened(&self) {
        // `self` is a sender, so the channel is never closed.
        let mut over = self.0.subscribe();
        let _open = over.wait_for(|over| *over).await;
    }
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// All three, stateless but for the end.
#[derive(Debug, Clone)]
pub(super) struct GoPlugin {
    pub(super) stop: Stop,
}

#[tonic::async_trait]
impl GrpcBroker for GoPlugin {
    type StartStreamStream = Outgoing<ConnInfo>;

    async fn start_stream(
        &self,
        request: Request<Streaming<ConnInfo>>,
    ) -> Result<Response<Self::StartStreamStream>, Status> {
        let (answers, outgoing) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            let over = stop.happened();
            tokio::select! {
                () = over => {}
                () = broker(request.into_inner(), answers) => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// Answers every knock: nobody lives here.
async fn broker(
    mut incoming: Streaming<ConnInfo>,
    answers: mpsc::Sender<Result<ConnInfo, Status>>,
) {
    while let Ok(Some(info)) = incoming.message().await {
        if !info.knock.is_some_and(|knock| knock.knock && !knock.ack) {
            continue;
        }
        let answer = ConnInfo {
            service_id: info.service_id,
            knock: Some(Knock {
                knock: true,
                ack: true,
                error: "this plugin brokers no connections".to_owned(),
            }),
            ..ConnInfo::default()
        };
        if answers.send(Ok(answer)).await.is_err() {
            return;
        }
    }
}

#[tonic::async_trait]
impl GrpcController for GoPlugin {
    async fn shutdown(&self, _request: Request<Empty>) -> Result<Response<Empty>, Status> {
        tracing::debug!("the runner ends the plugin");
        self.stop.now();
        Ok(Response::new(Empty {}))
    }
}

#[tonic::async_trait]
impl GrpcStdio for GoPlugin {
    type StreamStdioStream = Outgoing<StdioData>;

    async fn stream_stdio(
        &self,
        _request: Request<()>,
    ) -> Result<Response<Self::StreamStdioStream>, Status> {
        let (silence, outgoing) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.happened() => {}
                () = silence.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

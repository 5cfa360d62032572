//! Connections of the host, with AutoMTLS and multiplexing taken off.
//!
//! Each is prepared in a task of its own, so that one that stalls holds up no other.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

use super::mux;

/// How long a client may take for its TLS handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait after a failed accept: the process may be out of descriptors for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Ready connections that the server has not taken yet.
const BACKLOG: usize = 16;

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Bytes to and from the host.
pub(super) struct Connection(Box<dyn Io>);

type Ready = mpsc::Sender<io::Result<Connection>>;

/// Accepts connections until the receiver is dropped.
pub(super) fn accept(
    listener: Arc<UnixListener>,
    tls: Option<TlsAcceptor>,
    multiplex: bool,
) -> mpsc::Receiver<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(BACKLOG);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            match accepted {
                Ok((stream, _peer)) if multiplex => {
                    tokio::spawn(demultiplex(stream, tls.clone(), ready.clone()));
                }
                Ok((stream, _peer)) => {
                    tokio::spawn(prepare(stream, tls.clone(), ready.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    connections
}

async fn demultiplex(stream: impl Io + 'static, tls: Option<TlsAcceptor>, ready: Ready) {
    let mut streams = mux::serve(stream);
    while let Some(stream) = streams.recv().await {
        tokio::spawn(prepare(stream, tls.clone(), ready.clone()));
    }
}

async fn prepare(stream: impl Io + 'static, tls: Option<TlsAcceptor>, ready: Ready) {
    let connection = match tls {
        None => Connection(Box::new(stream)),
        Some(tls) => match tokio::time::timeout(TLS_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => Connection(Box::new(stream)),
            Ok(Err(error)) => {
                tracing::warn!(%error, "refused a connection");
                return;
            }
            Err(_elapsed) => return,
        },
    };
    // A server that is gone needs no connections.
    let _over = ready.send(Ok(connection)).await;
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

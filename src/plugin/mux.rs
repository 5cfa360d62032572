//! Several connections over one: the yamux protocol, as far as a go-plugin host that asks for
//! multiplexing needs it.
//!
//! The host opens every stream; we open none. One task reads frames, one writes them, and each
//! stream has one that moves bytes between its window and its reader. Nothing is held beyond the
//! windows that were granted.
//!
//! ```text
//!  version 0 │ type │ flags  │ stream         │ length            big endian, then a payload
//!     u8     │ u8   │ u16    │ u32, 0 = all   │ u32               if the type is data
//! ```

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

const DATA: u8 = 0;
const WINDOW_UPDATE: u8 = 1;
const PING: u8 = 2;
const GO_AWAY: u8 = 3;

const SYN: u16 = 1;
const ACK: u16 = 2;
const FIN: u16 = 4;
const RST: u16 = 8;

const HEADER_BYTES: usize = 12;

/// What either side may send before the other grants more: the protocol's own.
const WINDOW_BYTES: u32 = 256 << 10;

/// Of one data frame of ours: well below half a window, after which the host grants more.
const CHUNK_BYTES: usize = 16 << 10;

/// Streams of one host at a time: it needs one, and one more for each that it dials.
const MAX_STREAMS: usize = 64;

/// Frames on their way out, and streams that nobody has taken yet.
const QUEUE: usize = 64;

/// Starts a session on `io` and hands out the streams that the host opens, until it ends.
pub(super) fn serve(
    io: impl AsyncRead + AsyncWrite + Send + 'static,
) -> mpsc::Receiver<DuplexStream> {
    let (opened, streams) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let (reader, mut writer) = tokio::io::split(io);
        let (frames, mut outgoing) = mpsc::channel::<Frame>(QUEUE);
        let session = Session {
            streams: HashMap::new(),
            frames,
            opened,
        };
        let write = async {
            while let Some(frame) = outgoing.recv().await {
                writer.write_all(&frame.to_bytes()).await?;
            }
            Ok(())
        };
        let ended: io::Result<()> = tokio::select! {
            ended = session.read(reader) => ended,
            ended = write => ended,
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a multiplexed connection ended");
        }
    });
    streams
}

/// What travels.
#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u16,
    stream: u32,
    length: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn control(kind: u8, flags: u16, stream: u32, length: u32) -> Self {
        Self {
            kind,
            flags,
            stream,
            length,
            payload: Vec::new(),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        bytes.extend([0, self.kind]);
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// The next frame; nothing is kept before its length has been checked.
    async fn read(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let version = reader.read_u8().await?;
        let kind = reader.read_u8().await?;
        let flags = reader.read_u16().await?;
        let stream = reader.read_u32().await?;
        let length = reader.read_u32().await?;
        if version != 0 {
            return Err(io::Error::other("not yamux"));
        }
        let mut payload = Vec::new();
        if kind == DATA {
            if length > WINDOW_BYTES {
                return Err(io::Error::other("a frame larger than its window"));
            }
            let wanted = u64::from(length);
            let read = reader.take(wanted).read_to_end(&mut payload).await?;
            if u64::try_from(read) != Ok(wanted) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(Self {
            kind,
            flags,
            stream,
            length,
            payload,
        })
    }
}

/// One stream, as the session sees it.
struct Stream {
    /// Bytes for its reader; `None` once the host sends no more.
    incoming: Option<mpsc::UnboundedSender<Vec<u8>>>,
    /// What the host may still send.
    granted: Arc<Semaphore>,
    /// What we may still send.
    credit: Arc<Semaphore>,
    task: JoinHandle<()>,
}

struct Session {
    streams: HashMap<u32, Stream>,
    frames: mpsc::Sender<Frame>,
    opened: mpsc::Sender<DuplexStream>,
}

impl Session {
    async fn read(mut self, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
        loop {
            let frame = Frame::read(&mut reader).await?;
            match frame.kind {
                DATA | WINDOW_UPDATE => self.stream_frame(frame).await?,
                PING if frame.flags & SYN != 0 => {
                    self.send(Frame::control(PING, ACK, 0, frame.length))
                        .await?;
                }
                PING => {}
                GO_AWAY => return Ok(()),
                _ => return Err(io::Error::other("an unknown frame")),
            }
        }
    }

    async fn send(&self, frame: Frame) -> io::Result<()> {
        let sent = self.frames.send(frame).await;
        sent.map_err(|_gone| io::ErrorKind::BrokenPipe.into())
    }

    async fn stream_frame(&mut self, frame: Frame) -> io::Result<()> {
        let id = frame.stream;
        if frame.flags & SYN != 0 && !self.open(id).await? {
            return self.send(Frame::control(WINDOW_UPDATE, RST, id, 0)).await;
        }
        // What follows a stream's end is late, not wrong.
        let Some(stream) = self.streams.get_mut(&id) else {
            return Ok(());
        };
        if frame.kind == WINDOW_UPDATE {
            let room = Semaphore::MAX_PERMITS.saturating_sub(stream.credit.available_permits());
            let more = usize::try_from(frame.length).unwrap_or(room).min(room);
            stream.credit.add_permits(more);
        } else if !frame.payload.is_empty() {
            let taken = stream.granted.try_acquire_many(frame.length);
            taken
                .map_err(|_none| io::Error::other("more data than the window allows"))?
                .forget();
            if let Some(incoming) = &stream.incoming {
                // A reader that is gone reads no more.
                let _gone = incoming.send(frame.payload);
            }
        }
        if frame.flags & FIN != 0 {
            stream.incoming = None;
        }
        if frame.flags & RST != 0
            && let Some(stream) = self.streams.remove(&id)
        {
            stream.task.abort();
        }
        Ok(())
    }

    /// Whether a stream that the host opens is taken.
    async fn open(&mut self, id: u32) -> io::Result<bool> {
        self.streams
            .retain(|_id, stream| !stream.task.is_finished());
        // The host is the client and its ids are odd.
        if id.is_multiple_of(2) || self.streams.contains_key(&id) {
            return Err(io::Error::other("a stream that cannot be opened"));
        }
        if self.streams.len() >= MAX_STREAMS {
            return Ok(false);
        }
        let (ours, theirs) = tokio::io::duplex(CHUNK_BYTES);
        let window = usize::try_from(WINDOW_BYTES).unwrap_or_default();
        let granted = Arc::new(Semaphore::new(window));
        let credit = Arc::new(Semaphore::new(window));
        let (incoming, arrived) = mpsc::unbounded_channel();
        let (reader, writer) = tokio::io::split(ours);
        let inward = inward(
            id,
            writer,
            arrived,
            Arc::clone(&granted),
            self.frames.clone(),
        );
        let outward = outward(id, reader, Arc::clone(&credit), self.frames.clone());
        let task = tokio::spawn(async move {
            tokio::join!(inward, outward);
        });
        let stream = Stream {
            incoming: Some(incoming),
            granted,
            credit,
            task,
        };
        self.streams.insert(id, stream);
        self.send(Frame::control(WINDOW_UPDATE, ACK, id, 0)).await?;
        Ok(self.opened.send(theirs).await.is_ok())
    }
}

/// Hands what arrived to the stream's reader, and grants the host as much again.
async fn inward(
    id: u32,
    mut writer: WriteHalf<DuplexStream>,
    mut arrived: mpsc::UnboundedReceiver<Vec<u8>>,
    granted: Arc<Semaphore>,
    frames: mpsc::Sender<Frame>,
) {
    while let Some(bytes) = arrived.recv().await {
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
        // No longer than a window: a frame's own limit.
        let length = u32::try_from(bytes.len()).unwrap_or_default();
        granted.add_permits(bytes.len());
        let update = Frame::control(WINDOW_UPDATE, 0, id, length);
        if frames.send(update).await.is_err() {
            return;
        }
    }
    // The reader sees the end; nobody is left to tell of a failure.
    let _gone = writer.shutdown().await;
}

/// Sends what the stream's writer writes, as far as the host's window allows.
async fn outward(
    id: u32,
    mut reader: ReadHalf<DuplexStream>,
    credit: Arc<Semaphore>,
    frames: mpsc::Sender<Frame>,
) {
    loop {
        let mut payload = vec![0; CHUNK_BYTES];
        let read = reader.read(&mut payload).await.unwrap_or(0);
        payload.truncate(read);
        let length = u32::try_from(read).unwrap_or_default();
        let frame = match read {
            0 => Frame::control(WINDOW_UPDATE, FIN, id, 0),
            _ => {
                let Ok(spent) = credit.acquire_many(length).await else {
                    return;
                };
                spent.forget();
                Frame {
                    kind: DATA,
                    flags: 0,
                    stream: id,
                    length,
                    payload,
                }
            }
        };
        if frames.send(frame).await.is_err() || read == 0 {
            return;
        }
    }
}

#[cfg(test)]
#[path = "mux_test.rs"]
mod tests;

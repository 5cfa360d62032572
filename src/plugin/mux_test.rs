//! The session against a host written here, frame by frame.

use super::*;

/// The other end of a session.
struct Host {
    io: DuplexStream,
    streams: mpsc::Receiver<DuplexStream>,
}

impl Host {
    fn new() -> Self {
        let (ours, theirs) = tokio::io::duplex(4 << 20);
        Self {
            streams: serve(theirs),
            io: ours,
        }
    }

    async fn send(&mut self, kind: u8, flags: u16, stream: u32, length: u32, payload: &[u8]) {
        let frame = Frame {
            kind,
            flags,
            stream,
            length,
            payload: payload.to_vec(),
        };
        self.io.write_all(&frame.to_bytes()).await.unwrap();
    }

    async fn data(&mut self, stream: u32, flags: u16, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap();
        self.send(DATA, flags, stream, length, payload).await;
    }

    async fn receive(&mut self) -> Frame {
        Frame::read(&mut self.io).await.unwrap()
    }

    async fn open(&mut self, stream: u32) -> DuplexStream {
        self.send(WINDOW_UPDATE, SYN, stream, 0, &[]).await;
        let ack = self.receive().await;
        assert_eq!(
            (ack.kind, ack.flags, ack.stream),
            (WINDOW_UPDATE, ACK, stream)
        );
        self.streams.recv().await.unwrap()
    }

    /// Whether the session has hung up.
    async fn is_over(&mut self) -> bool {
        let mut rest = Vec::new();
        self.io.read_to_end(&mut rest).await.unwrap();
        self.streams.recv().await.is_none()
    }
}

#[tokio::test]
async fn bytes_travel_both_ways_and_windows_are_given_back() {
    let mut host = Host::new();
    let mut stream = host.open(1).await;
    host.data(1, 0, b"hello").await;
    let mut read = [0; 5];
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"hello");
    let grant = host.receive().await;
    assert_eq!(
        (grant.kind, grant.flags, grant.length),
        (WINDOW_UPDATE, 0, 5)
    );
    stream.write_all(b"world").await.unwrap();
    let answer = host.receive().await;
    assert_eq!((answer.kind, answer.stream), (DATA, 1));
    assert_eq!(answer.payload, b"world");
}

#[tokio::test]
async fn each_side_closes_its_own_half() {
    let mut host = Host::new();
    let mut stream = host.open(1).await;
    host.data(1, FIN, b"last").await;
    let mut read = Vec::new();
    stream.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"last");
    assert_eq!(host.receive().await.kind, WINDOW_UPDATE);
    stream.write_all(b"still here").await.unwrap();
    assert_eq!(host.receive().await.payload, b"still here");
    stream.shutdown().await.unwrap();
    assert_eq!(host.receive().await.flags, FIN);
}

#[tokio::test]
async fn a_window_that_is_spent_stops_the_writer_until_more_is_granted() {
    let mut host = Host::new();
    let mut stream = host.open(1).await;
    let window = WINDOW_BYTES as usize;
    let writer = tokio::spawn(async move {
        stream.write_all(&vec![7; window + 1]).await.unwrap();
        stream
    });
    let mut received = 0;
    while received < window {
        received += host.receive().await.payload.len();
    }
    assert_eq!(received, window);
    // What answers the ping has overtaken nothing: there is no more data yet.
    host.send(PING, SYN, 0, 77, &[]).await;
    let pong = host.receive().await;
    assert_eq!((pong.kind, pong.flags, pong.length), (PING, ACK, 77));
    host.send(WINDOW_UPDATE, 0, 1, 1, &[]).await;
    assert_eq!(host.receive().await.payload, [7]);
    drop(writer.await.unwrap());
}

#[tokio::test]
async fn streams_are_separate_and_a_reset_ends_one() {
    let mut host = Host::new();
    let mut one = host.open(1).await;
    let mut two = host.open(3).await;
    host.send(WINDOW_UPDATE, RST, 1, 0, &[]).await;
    host.data(3, 0, b"x").await;
    assert_eq!(two.read_u8().await.unwrap(), b'x');
    assert!(one.read_u8().await.is_err());
    host.data(1, 0, b"late").await;
    host.data(3, 0, b"y").await;
    assert_eq!(two.read_u8().await.unwrap(), b'y');
}

#[tokio::test]
async fn more_streams_than_a_host_needs_are_refused() {
    let mut host = Host::new();
    let mut open = Vec::new();
    for n in 0..u32::try_from(MAX_STREAMS).unwrap() {
        open.push(host.open(2 * n + 1).await);
    }
    host.send(WINDOW_UPDATE, SYN, 9999, 0, &[]).await;
    assert_eq!(host.receive().await.flags, RST);
}

#[tokio::test]
async fn what_breaks_the_protocol_ends_the_session() {
    let too_long = WINDOW_BYTES + 1;
    for (kind, flags, stream, length) in [
        (DATA, SYN, 1, too_long),
        (DATA, SYN, 1, u32::MAX),
        (WINDOW_UPDATE, SYN, 2, 0),
        (9, 0, 0, 0),
        (GO_AWAY, 0, 0, 0),
    ] {
        let mut host = Host::new();
        host.send(kind, flags, stream, length, &[]).await;
        assert!(host.is_over().await, "{kind} {flags} {stream} {length}");
    }
    let mut host = Host::new();
    host.io.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    assert!(host.is_over().await);
}

#[tokio::test]
async fn more_data_than_was_granted_ends_the_session() {
    let mut host = Host::new();
    let _unread = host.open(1).await;
    // The stream's own buffer takes a chunk without a reader, and grants it again.
    let all = vec![0; WINDOW_BYTES as usize];
    host.data(1, 0, &all).await;
    host.data(1, 0, &all).await;
    assert!(host.is_over().await);
}

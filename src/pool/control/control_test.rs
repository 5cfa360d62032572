//! The socket against callers that are late, long, strange or gone, and against a dead process's.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream as Caller;

use super::super::client::{self, Peer};
use super::*;

async fn done(request: Request) -> Response {
    Response::Done {
        text: format!("{request:?}"),
    }
}

fn open(dir: &Path) -> Server {
    Server::open(dir, "g", done).unwrap()
}

fn peer(dir: &Path) -> Peer {
    let mut peers = client::peers(dir).unwrap();
    assert_eq!(peers.len(), 1);
    peers.remove(0)
}

/// Off the runtime's thread, as the tool is another process.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn ask(peer: Peer, request: Request) -> Option<Response> {
    blocking(move || peer.ask(&request).unwrap()).await
}

async fn say(path: PathBuf, bytes: Vec<u8>) -> Vec<String> {
    blocking(move || {
        let mut caller = Caller::connect(path).unwrap();
        caller.write_all(&bytes).unwrap();
        caller.shutdown(std::net::Shutdown::Write).unwrap();
        let lines = BufReader::new(caller).lines();
        // A caller that is cut off may lose what it had still to read.
        lines.map_while(Result::ok).collect()
    })
    .await
}

#[tokio::test]
async fn a_request_is_answered_and_the_socket_is_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let server = open(dir.path());
    let path = dir.path().join("g.sock");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let peer = peer(dir.path());
    assert_eq!(peer.group, "g");
    let answer = ask(peer.clone(), Request::Refresh).await;
    let text = "Refresh".to_owned();
    assert_eq!(answer, Some(Response::Done { text }));
    drop(server);
    assert!(!path.exists(), "a closed socket leaves no file");
    assert_eq!(ask(peer, Request::Status).await, None);
}

#[tokio::test]
async fn a_dead_process_s_socket_is_no_pool_and_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("g.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let dead = peer(dir.path());
    assert_eq!(ask(dead.clone(), Request::Status).await, None);
    let _server = open(dir.path());
    assert!(ask(dead, Request::Status).await.is_some());
}

#[tokio::test]
async fn strange_requests_are_answered_by_an_error_and_long_ones_end_the_talk() {
    let dir = tempfile::tempdir().unwrap();
    let _server = open(dir.path());
    let path = dir.path().join("g.sock");
    let mixed = b"{\"request\":\"fly\"}\nno json\n{\"request\":\"status\",\"more\":1}\n";
    let answers = say(path.clone(), mixed.to_vec()).await;
    assert_eq!(answers.len(), 3);
    assert!(answers[0].contains("not a request of this version"));
    assert!(answers[1].contains("not a request of this version"));
    assert!(answers[2].contains("Status"));
    let unended = say(path.clone(), b"{\"request\":\"status\"}".to_vec()).await;
    assert_eq!(unended.len(), 1);
    assert!(unended[0].contains("within 4096 bytes"));
    let endless = blocking({
        let path = path.clone();
        move || {
            let mut caller = Caller::connect(path).unwrap();
            let flood = vec![b' '; 1 << 20];
            // Cut off while it still writes.
            caller
                .write_all(&flood)
                .and_then(|()| caller.write_all(&flood))
        }
    })
    .await;
    assert!(endless.is_err(), "two MiB were read");
    assert!(ask(peer(dir.path()), Request::Status).await.is_some());
}

#[tokio::test]
async fn callers_that_say_nothing_keep_nobody_out_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let _server = open(dir.path());
    let path = dir.path().join("g.sock");
    let silent: Vec<Caller> = (0..MAX_CONNECTIONS)
        .map(|_| Caller::connect(&path).unwrap())
        .collect();
    let asked = tokio::spawn(ask(peer(dir.path()), Request::Status));
    // The pool's patience ends before the tool's.
    assert!(asked.await.unwrap().is_some());
    drop(silent);
}

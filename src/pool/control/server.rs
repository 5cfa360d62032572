//! The pool's end of its socket: a task that accepts, and one for each connection.
//!
//! Opened while the group's name is locked, so a socket that is there already is of a dead
//! process and is replaced. The folder is root's alone, the socket is 0600, and a caller of
//! another user is sent away besides. A caller that is slow, silent or too long is cut off.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::{MAX_REQUEST_BYTES, Request, Response, SUFFIX};

/// Connections that are served at once; more wait.
const MAX_CONNECTIONS: usize = 8;
/// How long a caller may be silent, and how long it may take to read an answer.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 10_000 });
/// After an accept that failed, for want of descriptors as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The open socket; gone when dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        // The group's lock is still held, so it is ours.
        let _gone_already = fs::remove_file(&self.path);
    }
}

impl Server {
    /// Opens the socket of `group` in a folder that only this user can write; `answer` is called
    /// for each request.
    pub fn open<F, A>(run_dir: &Path, group: &str, answer: F) -> io::Result<Self>
    where
        F: Fn(Request) -> A + Send + Sync + 'static,
        A: Future<Output = Response> + Send + 'static,
    {
        let path = run_dir.join(format!("{group}{SUFFIX}"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let task = tokio::spawn(accept(listener, Arc::new(answer)));
        Ok(Self { path, task })
    }
}

async fn accept<F, A>(listener: UnixListener, answer: Arc<F>)
where
    F: Fn(Request) -> A + Send + Sync + 'static,
    A: Future<Output = Response> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _unnamed)) => stream,
            Err(error) => {
                tracing::warn!("status socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let answer = Arc::clone(&answer);
        tokio::spawn(async move {
            // A caller that breaks off has its answer: none.
            let _broken = serve(stream, &*answer).await;
            drop(place);
        });
    }
}

async fn serve<F, A>(stream: UnixStream, answer: &F) -> io::Result<()>
where
    F: Fn(Request) -> A + Sync,
    A: Future<Output = Response> + Send,
{
    let caller = stream.peer_cred()?.uid();
    if caller != 0 && caller != rustix::process::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let mut bounded = (&mut reader).take(MAX_REQUEST_BYTES);
        let count = timeout(bounded.read_until(b'\n', &mut line)).await?;
        if count == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            let text = format!("a request ends in a line break within {MAX_REQUEST_BYTES} bytes");
            return reply(&mut writer, &Response::Failed { text }).await;
        }
        let response = match serde_json::from_slice(&line) {
            Ok(request) => answer(request).await,
            Err(error) => Response::Failed {
                text: format!("not a request of this version: {error}"),
            },
        };
        reply(&mut writer, &response).await?;
    }
}

async fn reply(writer: &mut (impl AsyncWriteExt + Unpin), response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    timeout(writer.write_all(&line)).await
}

async fn timeout<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
#[path = "control_test.rs"]
mod tests;

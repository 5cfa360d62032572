//! The tool's end: finds the sockets of running pools and asks them. Blocks.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{MAX_RESPONSE_BYTES, Request, Response, SUFFIX};

/// How long an answer may take: a status looks at every machine's memory.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a pool gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot look for running plugins in {}; hint: this takes root", path.display())]
    RunDirectory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "cannot ask the plugin of group {group}; hint: this takes root, and a plugin that is not stopped"
    )]
    Ask {
        group: String,
        #[source]
        source: io::Error,
    },
    #[error("the plugin of group {group} gave an answer of another version")]
    Answer { group: String },
}

/// The socket of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub group: String,
    path: PathBuf,
}

/// The sockets in a run folder, by group. Some may be of dead processes: see [`Peer::ask`].
pub fn peers(run_dir: &Path) -> Result<Vec<Peer>, ControlError> {
    let fail = |source| ControlError::RunDirectory {
        path: run_dir.to_owned(),
        source,
    };
    let entries = match fs::read_dir(run_dir) {
        Ok(entries) => entries,
        // Nothing of ours ever ran since the host started.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(e)),
    };
    let mut peers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(group) = name.strip_suffix(SUFFIX) {
            peers.push(Peer {
                group: group.to_owned(),
                path: entry.path(),
            });
        }
    }
    peers.sort_by(|a, b| a.group.cmp(&b.group));
    Ok(peers)
}

impl Peer {
    /// Sends a request and waits for the answer; `None` if the process is gone.
    pub fn ask(&self, request: &Request) -> Result<Option<Response>, ControlError> {
        let fail = |source| ControlError::Ask {
            group: self.group.clone(),
            source,
        };
        let stream = match UnixStream::connect(&self.path) {
            Ok(stream) => stream,
            Err(e) if is_dead(&e) => return Ok(None),
            Err(e) => return Err(fail(e)),
        };
        let line = match exchange(stream, request) {
            Ok(line) => line,
            Err(e) if is_dead(&e) => return Ok(None),
            Err(e) => return Err(fail(e)),
        };
        match serde_json::from_str(&line) {
            Ok(response) => Ok(Some(response)),
            // It went while it was asked.
            Err(_cut) if !line.ends_with('\n') => Ok(None),
            Err(_other) => Err(ControlError::Answer {
                group: self.group.clone(),
            }),
        }
    }
}

fn is_dead(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    [BrokenPipe, ConnectionRefused, ConnectionReset, NotFound].contains(&error.kind())
}

fn exchange(mut stream: UnixStream, request: &Request) -> io::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_RESPONSE_BYTES)).read_line(&mut answer)?;
    Ok(answer)
}

//! The host's end of the agent channel: one tokio task of the pool for each machine.
//!
//! The guest is an attacker. It can be silent (the caller's deadline ends the wait), lie about
//! phases (they are only logged) or send garbage (an error for that machine alone).

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::proto::{self, Identity, PROTOCOL, Ready, ToGuest, ToHost};

/// Longest text of a guest that reaches a log line, in characters.
const MAX_REASON_CHARS: usize = 512;

/// Why a machine could not be brought up over its channel.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("agent channel closed before {waiting_for}")]
    Closed { waiting_for: &'static str },
    #[error("agent channel failed while waiting for {waiting_for}")]
    Channel {
        waiting_for: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("agent message of more than {} bytes", proto::MAX_MESSAGE)]
    TooLong,
    #[error("agent message is not one of ours")]
    Malformed(#[source] serde_json::Error),
    #[error("agent said something else than {waiting_for}")]
    OutOfOrder { waiting_for: &'static str },
    #[error(
        "agent speaks protocol {guest}, this program {PROTOCOL}; hint: the image was built by another version, rebuild it"
    )]
    Protocol { guest: u32 },
    #[error("agent could not apply its identity: {reason}")]
    Failed { reason: String },
}

/// An open channel to one agent.
#[derive(Debug)]
pub struct AgentLink {
    stream: UnixStream,
}

impl AgentLink {
    /// Takes the host's end of a VM's agent channel; needs a tokio runtime.
    pub fn new(stream: std::os::unix::net::UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: UnixStream::from_std(stream)?,
        })
    }

    /// Waits for the agent to say hello, which it does once when it starts.
    pub async fn hello(&mut self) -> Result<(), AgentError> {
        const WAIT: &str = "hello";
        match self.receive(WAIT).await? {
            ToHost::Hello { protocol } if proto::speaks(protocol) => Ok(()),
            ToHost::Hello { protocol } => Err(AgentError::Protocol { guest: protocol }),
            other => Err(unexpected(other, WAIT)),
        }
    }

    /// Tells the machine who it is and waits until it has applied that.
    pub async fn identify(&mut self, identity: Identity) -> Result<(), AgentError> {
        const WAIT: &str = "applied";
        self.send(&ToGuest::Identify(Box::new(identity)), WAIT)
            .await?;
        match self.receive(WAIT).await? {
            ToHost::Applied => Ok(()),
            other => Err(unexpected(other, WAIT)),
        }
    }

    /// Waits until the machine answers on its address; the link must be up by now.
    pub async fn ready(&mut self) -> Result<Ready, AgentError> {
        const WAIT: &str = "ready";
        match self.receive(WAIT).await? {
            ToHost::Ready(ready) => Ok(ready),
            other => Err(unexpected(other, WAIT)),
        }
    }

    /// Steps the guest's wall clock.
    pub async fn set_clock(&mut self, wall_clock_ns: i64) -> Result<(), AgentError> {
        self.send(&ToGuest::SetClock { wall_clock_ns }, "set_clock")
            .await
    }

    async fn send(
        &mut self,
        message: &ToGuest,
        waiting_for: &'static str,
    ) -> Result<(), AgentError> {
        let body = serde_json::to_vec(message).map_err(AgentError::Malformed)?;
        let framed = proto::frame(&body).ok_or(AgentError::TooLong)?;
        self.stream
            .write_all(&framed)
            .await
            .map_err(|source| channel(source, waiting_for))
    }

    async fn receive(&mut self, waiting_for: &'static str) -> Result<ToHost, AgentError> {
        let mut prefix = [0; 4];
        self.stream
            .read_exact(&mut prefix)
            .await
            .map_err(|source| channel(source, waiting_for))?;
        let len = proto::body_len(prefix).ok_or(AgentError::TooLong)?;
        let mut body = vec![0; len];
        self.stream
            .read_exact(&mut body)
            .await
            .map_err(|source| channel(source, waiting_for))?;
        serde_json::from_slice(&body).map_err(AgentError::Malformed)
    }
}

fn channel(source: io::Error, waiting_for: &'static str) -> AgentError {
    match source.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe => {
            AgentError::Closed { waiting_for }
        }
        _ => AgentError::Channel {
            waiting_for,
            source,
        },
    }
}

fn unexpected(message: ToHost, waiting_for: &'static str) -> AgentError {
    match message {
        ToHost::Failed { reason } => AgentError::Failed {
            reason: printable(&reason),
        },
        _ => AgentError::OutOfOrder { waiting_for },
    }
}

/// A guest's text, cut and without control characters, so that it cannot forge log lines.
fn printable(text: &str) -> String {
    text.chars()
        .take(MAX_REASON_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
#[path = "host_test.rs"]
mod tests;

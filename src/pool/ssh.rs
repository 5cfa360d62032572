//! A small SSH client: proves that a machine is what ConnectInfo says before it is called
//! Running, and runs commands for `fleetingd try`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use russh::client::{self, AuthResult, Handle};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{ChannelMsg, Disconnect};

/// Output kept of one command, in bytes; the guest could send for ever.
const MAX_OUTPUT: usize = 1 << 20;

/// How to log in.
#[derive(Debug, Clone)]
pub enum Credential {
    Key(Arc<PrivateKey>),
    Password(String),
}

/// Whom to log in as, where.
#[derive(Debug, Clone)]
pub struct SshTarget {
    pub address: SocketAddr,
    pub username: String,
    pub credential: Credential,
    /// The machine's host key as one line, if it is known: then any other key is refused.
    pub host_key: Option<String>,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// `None` if a signal ended it or the guest did not say.
    pub status: Option<u32>,
    /// Both streams, in the order they came.
    pub text: String,
}

#[derive(Debug, thiserror::Error)]
pub enum SshError {
    #[error("ssh to {address} failed")]
    Session {
        address: SocketAddr,
        #[source]
        source: russh::Error,
    },
    #[error("ssh to {address}: host key is not the one we gave the machine")]
    HostKey { address: SocketAddr },
    #[error("ssh to {address}: {username} may not log in with the credentials of ConnectInfo")]
    Refused {
        address: SocketAddr,
        username: String,
    },
}

struct Verifier {
    expected: Option<String>,
    mismatch: Arc<std::sync::atomic::AtomicBool>,
}

impl client::Handler for Verifier {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        key: &PublicKeyOrCertificate,
    ) -> Result<bool, Self::Error> {
        let known = match key {
            PublicKeyOrCertificate::PublicKey { key, .. } => key.to_openssh().ok(),
            PublicKeyOrCertificate::Certificate(_) => None,
        };
        let matches = match &self.expected {
            Some(expected) => known.is_some_and(|line| same_key(&line, expected)),
            None => true,
        };
        if !matches {
            self.mismatch
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(matches)
    }
}

/// Equal but for the comment.
fn same_key(a: &str, b: &str) -> bool {
    a.split_whitespace()
        .take(2)
        .eq(b.split_whitespace().take(2))
}

/// A logged-in session.
pub struct SshSession {
    handle: Handle<Verifier>,
    address: SocketAddr,
}

impl SshSession {
    /// Connects and logs in; the caller bounds the time.
    pub async fn open(target: &SshTarget) -> Result<Self, SshError> {
        let address = target.address;
        let mismatch = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let verifier = Verifier {
            expected: target.host_key.clone(),
            mismatch: Arc::clone(&mismatch),
        };
        let config = Arc::new(client::Config {
            inactivity_timeout: Some(Duration::from_secs(600)),
            nodelay: true,
            ..client::Config::default()
        });
        let session = |source| SshError::Session { address, source };
        let mut handle = client::connect(config, address, verifier)
            .await
            .map_err(|source| {
                if mismatch.load(std::sync::atomic::Ordering::Relaxed) {
                    SshError::HostKey { address }
                } else {
                    session(source)
                }
            })?;
        let user = target.username.clone();
        let result = match &target.credential {
            Credential::Key(key) => {
                let hash = handle
                    .best_supported_rsa_hash()
                    .await
                    .map_err(session)?
                    .flatten();
                let key = PrivateKeyWithHashAlg::new(Arc::clone(key), hash);
                handle.authenticate_publickey(user, key).await
            }
            Credential::Password(password) => {
                handle.authenticate_password(user, password.clone()).await
            }
        };
        match result.map_err(session)? {
            AuthResult::Success => Ok(Self { handle, address }),
            AuthResult::Failure { .. } => Err(SshError::Refused {
                address,
                username: target.username.clone(),
            }),
        }
    }

    /// Runs one command to its end.
    pub async fn run(&mut self, command: &str) -> Result<Output, SshError> {
        let address = self.address;
        let session = |source| SshError::Session { address, source };
        let mut channel = self.handle.channel_open_session().await.map_err(session)?;
        channel.exec(true, command).await.map_err(session)?;
        let mut output = Vec::new();
        let mut status = None;
        while let Some(message) = channel.wait().await {
            match message {
                ChannelMsg::Data { data } | ChannelMsg::ExtendedData { data, .. } => {
                    let room = MAX_OUTPUT.saturating_sub(output.len());
                    output.extend(data.iter().take(room));
                }
                ChannelMsg::ExitStatus { exit_status } => status = Some(exit_status),
                _ => {}
            }
        }
        Ok(Output {
            status,
            text: String::from_utf8_lossy(&output).into_owned(),
        })
    }

    /// Says goodbye; a machine that is gone already is no failure.
    pub async fn close(self) {
        let _gone = self
            .handle
            .disconnect(Disconnect::ByApplication, "", "en")
            .await;
    }
}

//! `connector_config`: how the runner means to log in, and what it gets passed back.

use super::super::generated::fleeting::ConnectorConfig;
use crate::pool::keys::KeyPair;
use crate::pool::{FixedCredential, Login};

/// Ubuntu's own.
const DEFAULT_USERNAME: &str = "ubuntu";

/// The longest user name that useradd takes.
const USERNAME_MAX: usize = 32;

/// The connector as ConnectInfo needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connector {
    pub login: Login,
    /// The password of static credentials, passed back beside a key too.
    pub password: String,
    /// Nanoseconds, passed through; 0 leaves it to the runner.
    pub keepalive: i64,
    /// Nanoseconds, passed through; 0 leaves it to the runner.
    pub timeout: i64,
}

impl Connector {
    /// Checks what the runner sent; every problem is one line.
    pub(super) fn check(sent: &ConnectorConfig) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        for (key, value, only) in [
            ("protocol", &sent.protocol, "ssh"),
            ("os", &sent.os, "linux"),
            ("arch", &sent.arch, "amd64"),
        ] {
            if !value.is_empty() && value != only {
                problems.push(format!(
                    "connector_config.{key} = {value:?}: expected {only:?} or nothing"
                ));
            }
        }
        if ![0, 22].contains(&sent.protocol_port) {
            problems.push(format!(
                "connector_config.protocol_port = {}: expected 22 or nothing",
                sent.protocol_port
            ));
        }
        let username = match sent.username.as_str() {
            "" => DEFAULT_USERNAME,
            name => name,
        };
        if !is_username(username) {
            problems.push(format!(
                "connector_config.username = {username:?}: expected a lower-case letter or _ and up to {} of a-z, 0-9, _ and -",
                USERNAME_MAX - 1
            ));
        }
        let fixed = if sent.use_static_credentials {
            fixed(sent).map_err(|problem| problems.push(problem)).ok()
        } else {
            None
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Self {
            login: Login {
                username: username.to_owned(),
                fixed,
            },
            password: if sent.use_static_credentials {
                sent.password.clone()
            } else {
                String::new()
            },
            keepalive: sent.keepalive,
            timeout: sent.timeout,
        })
    }
}

fn fixed(sent: &ConnectorConfig) -> Result<FixedCredential, String> {
    if !sent.key.is_empty() {
        let pem = std::str::from_utf8(&sent.key)
            .map_err(|_binary| "connector_config.key_path: not a PEM file".to_owned())?;
        KeyPair::from_pem(pem).map_err(|error| format!("connector_config.key_path: {error}"))?;
        return Ok(FixedCredential::Key(pem.to_owned()));
    }
    if sent.password.is_empty() {
        return Err(
            "connector_config.use_static_credentials = true: expected a password or a key beside it; hint: set key_path, or leave it out: then every machine gets a key of its own"
                .to_owned(),
        );
    }
    if sent.password.contains(['\n', '\r', '\0']) {
        return Err("connector_config.password: expected a single line".to_owned());
    }
    Ok(FixedCredential::Password(sent.password.clone()))
}

/// `[a-z_][a-z0-9_-]{0,31}`.
fn is_username(name: &str) -> bool {
    let first = |b: u8| b.is_ascii_lowercase() || b == b'_';
    name.len() <= USERNAME_MAX
        && name.bytes().next().is_some_and(first)
        && name
            .bytes()
            .all(|b| first(b) || b.is_ascii_digit() || b == b'-')
}

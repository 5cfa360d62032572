//! go-plugin's handshake: what the environment asks for, the socket, and the one line on stdout.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use tokio::net::UnixListener;

/// Tells a plugin from an operator's command: the host sets it, people do not.
pub const COOKIE: (&str, &str) = (
    "FLEETING_INSTANCE_GROUP_PLUGIN",
    "4c6410b1-cb78-4962-8c76-ab936d0ea908",
);

/// Of go-plugin itself.
pub(super) const CORE_PROTOCOL: u32 = 1;

/// Of fleeting.
pub(super) const APP_PROTOCOL: u32 = 0;

/// Bytes of a path in a `sockaddr_un`, without its final zero.
const SOCKET_PATH_MAX: usize = 107;

/// Beside the socket's owner, its group may connect; without one, nobody else.
const MODE_WITH_GROUP: u32 = 0o660;
const MODE_ALONE: u32 = 0o600;

/// The handshake failed; nothing was printed on stdout.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error(
        "the socket's path {path} has {length} bytes, at most {SOCKET_PATH_MAX} work; hint: set TMPDIR or PLUGIN_UNIX_SOCKET_DIR to a shorter directory"
    )]
    PathTooLong { path: PathBuf, length: usize },
    #[error("cannot listen at {path}")]
    Bind {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("PLUGIN_UNIX_SOCKET_GROUP: no group {group}")]
    NoGroup { group: String },
    #[error("cannot give the socket {path} to its group")]
    Permit {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot print the handshake line")]
    Print(#[source] io::Error),
}

/// What the host asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) socket_dir: PathBuf,
    pub(super) socket_group: Option<String>,
    /// PEM; the host wants AutoMTLS.
    pub(super) client_certificate: Option<String>,
    /// The host understands a seventh field.
    pub(super) asks_multiplex: bool,
    /// The host wants one connection that carries all of its own.
    pub(super) multiplex: bool,
    /// Whether the host's protocols include ours.
    pub(super) speaks_ours: bool,
}

/// Whether a host that speaks go-plugin started this process.
pub fn started_by_host() -> bool {
    std::env::var(COOKIE.0).is_ok_and(|value| value == COOKIE.1)
}

impl Wishes {
    pub(super) fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let multiplex = set("PLUGIN_MULTIPLEX_GRPC");
        Self {
            socket_dir: set("PLUGIN_UNIX_SOCKET_DIR")
                .map_or_else(std::env::temp_dir, PathBuf::from),
            socket_group: set("PLUGIN_UNIX_SOCKET_GROUP"),
            client_certificate: set("PLUGIN_CLIENT_CERT"),
            asks_multiplex: multiplex.is_some(),
            multiplex: multiplex.is_some_and(|value| is_true(&value)),
            speaks_ours: set("PLUGIN_PROTOCOL_VERSIONS").is_none_or(|versions| {
                versions
                    .split(',')
                    .any(|version| version.trim().parse() == Ok(APP_PROTOCOL))
            }),
        }
    }
}

/// As Go's `strconv.ParseBool` has it.
fn is_true(text: &str) -> bool {
    ["1", "t", "T", "true", "TRUE", "True"].contains(&text)
}

/// A listening socket whose file goes when it is dropped.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: Arc<UnixListener>,
    path: PathBuf,
}

impl Socket {
    /// Listens at a fresh name in the host's directory; must run inside the runtime.
    pub(super) fn open(wishes: &Wishes) -> Result<Self, HandshakeError> {
        let name = format!(
            "fleetingd-{}-{:08x}.sock",
            std::process::id(),
            rand::random::<u32>()
        );
        let path = wishes.socket_dir.join(name);
        let length = path.as_os_str().as_bytes().len();
        if length > SOCKET_PATH_MAX {
            return Err(HandshakeError::PathTooLong { path, length });
        }
        let listener = UnixListener::bind(&path).map_err(|source| HandshakeError::Bind {
            path: path.clone(),
            source,
        })?;
        let socket = Self {
            listener: Arc::new(listener),
            path,
        };
        socket.permit(wishes.socket_group.as_deref())?;
        Ok(socket)
    }

    fn permit(&self, group: Option<&str>) -> Result<(), HandshakeError> {
        let failed = |source| HandshakeError::Permit {
            path: self.path.clone(),
            source,
        };
        let mode = match group {
            None => MODE_ALONE,
            Some(group) => {
                let database = fs::read_to_string("/etc/group").unwrap_or_default();
                let id = group_id(group, &database).ok_or_else(|| HandshakeError::NoGroup {
                    group: group.to_owned(),
                })?;
                std::os::unix::fs::chown(&self.path, None, Some(id)).map_err(failed)?;
                MODE_WITH_GROUP
            }
        };
        fs::set_permissions(&self.path, fs::Permissions::from_mode(mode)).map_err(failed)
    }

    /// Prints the handshake: from here on the host connects.
    pub(super) fn announce(
        &self,
        certificate: Option<&[u8]>,
        wishes: &Wishes,
    ) -> Result<(), HandshakeError> {
        let line = line(&self.path, certificate, wishes);
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(line.as_bytes())
            .and_then(|()| stdout.flush())
            .map_err(HandshakeError::Print)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The host may have removed it with its directory.
        let _gone = fs::remove_file(&self.path);
    }
}

fn line(path: &Path, certificate: Option<&[u8]>, wishes: &Wishes) -> String {
    let certificate = certificate.map_or_else(String::new, |der| STANDARD_NO_PAD.encode(der));
    // Old hosts take a seventh field for a part of the sixth.
    let multiplex = if wishes.asks_multiplex { "|true" } else { "" };
    format!(
        "{CORE_PROTOCOL}|{APP_PROTOCOL}|unix|{}|grpc|{certificate}{multiplex}\n",
        path.display()
    )
}

/// A group's number by its name or digits, from the text of /etc/group.
fn group_id(group: &str, database: &str) -> Option<u32> {
    database
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let id = fields.nth(1)?;
            (name == group).then(|| id.parse().ok())?
        })
        .next()
        .or_else(|| group.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(variables: &[(&str, &str)]) -> Wishes {
        Wishes::from_variables(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_line_has_a_seventh_field_only_for_hosts_that_know_it() {
        let path = Path::new("/tmp/a.sock");
        let old = wishes(&[]);
        assert_eq!(line(path, None, &old), "1|0|unix|/tmp/a.sock|grpc|\n");
        let new = wishes(&[("PLUGIN_MULTIPLEX_GRPC", "false")]);
        assert!(!new.multiplex);
        assert_eq!(
            line(path, Some(b"cert"), &new),
            "1|0|unix|/tmp/a.sock|grpc|Y2VydA|true\n"
        );
        assert!(wishes(&[("PLUGIN_MULTIPLEX_GRPC", "true")]).multiplex);
    }

    #[test]
    fn empty_variables_ask_for_nothing() {
        let empty = wishes(&[
            ("PLUGIN_CLIENT_CERT", ""),
            ("PLUGIN_MULTIPLEX_GRPC", ""),
            ("PLUGIN_UNIX_SOCKET_GROUP", ""),
            ("PLUGIN_UNIX_SOCKET_DIR", ""),
        ]);
        assert_eq!(empty, wishes(&[]));
        assert_eq!(empty.socket_dir, std::env::temp_dir());
    }

    #[test]
    fn hosts_of_other_protocols_are_noticed() {
        let speaks = |versions| wishes(&[("PLUGIN_PROTOCOL_VERSIONS", versions)]).speaks_ours;
        assert!(speaks("0"));
        assert!(speaks("2,0"));
        assert!(!speaks("1,2"));
        assert!(wishes(&[]).speaks_ours);
    }

    #[test]
    fn groups_have_names_or_numbers() {
        let database = "root:x:0:\nbad\ndocker:x:998:me\n";
        assert_eq!(group_id("docker", database), Some(998));
        assert_eq!(group_id("1234", database), Some(1234));
        assert_eq!(group_id("nobody-such", database), None);
    }

    #[tokio::test]
    async fn a_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let mut wishes = wishes(&[]);
        wishes.socket_dir = dir.path().to_owned();
        let socket = Socket::open(&wishes).unwrap();
        let path = socket.path.clone();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
        wishes.socket_dir = dir.path().join("d".repeat(100));
        let error = Socket::open(&wishes).unwrap_err().to_string();
        assert!(error.contains("hint:"), "{error}");
        wishes.socket_dir = dir.path().to_owned();
        wishes.socket_group = Some("no-such-group".to_owned());
        assert!(matches!(
            Socket::open(&wishes),
            Err(HandshakeError::NoGroup { .. })
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

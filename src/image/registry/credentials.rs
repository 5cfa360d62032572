//! The login for a registry, from the files that `docker login` and `podman login` write.
//!
//! Only what stands in the file itself is used (`auths`). Programs that keep passwords elsewhere
//! (`credsStore`, `credHelpers`) are not run: a plugin has no business starting them. Tokens that
//! must be exchanged first (`identitytoken`) are not supported.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

use super::RegistryError;

const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// The files to look into, by this host's environment; the first that knows the registry counts.
pub fn files() -> Vec<PathBuf> {
    let variable = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty());
        value.map(PathBuf::from)
    };
    if let Some(file) = variable("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let mut files = Vec::new();
    files.extend(variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")));
    let docker = variable("DOCKER_CONFIG");
    let docker = docker.or_else(|| variable("HOME").map(|home| home.join(".docker")));
    files.extend(docker.map(|dir| dir.join("config.json")));
    files
}

/// The login for a registry; anonymous where no file has one.
pub fn find(registry: &str, files: &[PathBuf]) -> Result<RegistryAuth, RegistryError> {
    for path in files {
        let refuse = |reason: String| RegistryError::Credentials {
            path: path.clone(),
            reason,
        };
        let Some(text) = read(path).map_err(|e| refuse(e.to_string()))? else {
            continue;
        };
        let file: File = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
        let entry = file.auths.iter().find(|(key, _)| host(key) == registry);
        if let Some((_, entry)) = entry
            && let Some(auth) = login(entry).map_err(|reason| refuse(reason.to_owned()))?
        {
            return Ok(auth);
        }
        if file.creds_store.is_some() || file.cred_helpers.contains_key(registry) {
            tracing::warn!(
                "{} keeps the login for {registry} with another program, which is not asked",
                path.display()
            );
        }
    }
    Ok(RegistryAuth::Anonymous)
}

fn read(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let file = match std::fs::File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text)?;
    Ok(Some(text))
}

/// The host that a key of `auths` is for: some are written as URLs.
fn host(key: &str) -> &str {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    key.split_once('/').map_or(key, |(host, _)| host)
}

fn login(entry: &Entry) -> Result<Option<RegistryAuth>, &'static str> {
    let packed = entry.auth.as_deref().filter(|auth| !auth.is_empty());
    let (username, password) = match (packed, &entry.username, &entry.password) {
        (Some(packed), _, _) => {
            const WRONG: &str = "`auth` is not the base64 of USER:PASSWORD";
            let text = STANDARD.decode(packed).map_err(|_bad| WRONG)?;
            let text = String::from_utf8(text).map_err(|_bad| WRONG)?;
            let (username, password) = text.split_once(':').ok_or(WRONG)?;
            let password = password.trim_end_matches('\0');
            (username.to_owned(), password.to_owned())
        }
        (None, Some(username), Some(password)) => (username.clone(), password.clone()),
        _ if entry.identitytoken.is_some() => return Err("an identitytoken is not supported"),
        _ => return Ok(None),
    };
    if password.is_empty() && entry.identitytoken.is_some() {
        return Err("an identitytoken is not supported");
    }
    Ok(Some(RegistryAuth::Basic(username, password)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, registry: &str) -> Result<RegistryAuth, RegistryError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        find(registry, &[dir.path().join("not-there"), path])
    }

    #[test]
    fn the_login_of_the_registry_is_found() {
        // ann:s3:cret
        let text = r#"{"auths": {
            "registry.example.org": {"auth": "YW5uOnMzOmNyZXQ="},
            "https://other.example.org:5000/v1/": {"username": "bob", "password": "p"},
            "third.example.org": {}
        }, "unknown": 1}"#;
        let basic = |name: &str, word: &str| RegistryAuth::Basic(name.into(), word.into());
        let all = [
            ("registry.example.org", basic("ann", "s3:cret")),
            ("other.example.org:5000", basic("bob", "p")),
            ("third.example.org", RegistryAuth::Anonymous),
            ("example.org", RegistryAuth::Anonymous),
        ];
        for (registry, expected) in all {
            assert_eq!(found(text, registry).unwrap(), expected, "{registry}");
        }
        assert_eq!(find("a.b", &[]).unwrap(), RegistryAuth::Anonymous);
    }

    #[test]
    fn a_login_that_cannot_be_used_is_told_without_its_secret() {
        let bad = [
            "{",
            r#"{"auths": {"a.b": {"auth": "c2VjcmV0"}}}"#,
            r#"{"auths": {"a.b": {"auth": "*secret*"}}}"#,
            r#"{"auths": {"a.b": {"identitytoken": "secret"}}}"#,
        ];
        for text in bad {
            let error = found(text, "a.b").unwrap_err().to_string();
            assert!(error.contains("config.json"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}

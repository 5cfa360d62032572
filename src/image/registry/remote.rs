//! One repository of a registry over HTTPS, or over plain HTTP where it is on this host.
//!
//! Logging in and writing is `oci_client`'s part. Reading is done here, since what a registry
//! sends must be held against a limit while it comes.

use std::path::PathBuf;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client as OciClient, RegistryOperation};
use reqwest::header::ACCEPT;
use reqwest::{StatusCode, redirect};
use tokio::sync::Mutex;

use super::format::{Blob, Document};
use super::name::{Digest, RegistryName};
use super::{RegistryError, blocking, credentials};
use crate::chain::chain;
use crate::image::SourceError;
use crate::image::source::http::{self, Patience, USER_AGENT};

/// Told how much of one body has come.
pub type Came<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// How this host goes to registries.
#[derive(Debug, Clone)]
pub struct Access {
    credentials: Vec<PathBuf>,
    patience: Patience,
}

impl Access {
    /// With the logins that this host's environment names.
    pub fn of_host() -> Self {
        Self {
            credentials: credentials::files(),
            patience: Patience::LONG,
        }
    }

    #[cfg(test)]
    pub fn with(credentials: Vec<PathBuf>, patience: Patience) -> Self {
        Self {
            credentials,
            patience,
        }
    }
}

/// A repository that is open for reading or writing.
pub struct Remote {
    name: RegistryName,
    operation: RegistryOperation,
    oci: OciClient,
    http: reqwest::Client,
    auth: RegistryAuth,
    token: Mutex<Option<String>>,
    patience: Patience,
}

impl Remote {
    /// Logs in, with what this host knows of the registry.
    pub async fn open(
        name: &RegistryName,
        operation: RegistryOperation,
        access: &Access,
    ) -> Result<Self, RegistryError> {
        let registry = name.reference().resolve_registry().to_owned();
        let local = name.is_local();
        let Access {
            credentials,
            patience,
        } = access.clone();
        let (auth, http, oci) = blocking(move || {
            let auth = credentials::find(&registry, &credentials)?;
            let (http, oci) = clients(&registry, local, patience)?;
            Ok((auth, http, oci))
        })
        .await?;
        let remote = Self {
            name: name.clone(),
            operation,
            oci,
            http,
            auth,
            token: Mutex::default(),
            patience,
        };
        remote.retry(|| remote.log_in()).await?;
        Ok(remote)
    }

    async fn log_in(&self) -> Result<(), RegistryError> {
        let reference = self.name.reference();
        let token = self.oci.auth(reference, &self.auth, self.operation);
        let token = token.await.map_err(|e| self.not_logged_in(e))?;
        *self.token.lock().await = token;
        Ok(())
    }

    fn not_logged_in(&self, error: OciDistributionError) -> RegistryError {
        let registry = self.name.reference().registry().to_owned();
        match error {
            OciDistributionError::RequestError(source) => {
                RegistryError::Unreachable { registry, source }
            }
            source => RegistryError::Login {
                registry,
                source: Box::new(source),
            },
        }
    }

    /// The manifest of this tag or digest, and its own digest.
    pub async fn manifest(
        &self,
        wanted: &str,
        limit: u64,
    ) -> Result<(Vec<u8>, Digest), RegistryError> {
        let what = format!("{}, manifest {wanted}", self.name);
        let path = format!("manifests/{wanted}");
        let bytes = self
            .retry(|| self.get(&path, &what, limit, &|_came| {}))
            .await?;
        let found = Digest::of(&bytes);
        match wanted.parse::<Digest>() {
            Ok(expected) if expected != found => Err(RegistryError::WrongDigest {
                what,
                expected,
                found,
            }),
            _ => Ok((bytes, found)),
        }
    }

    /// A blob, whole and right.
    pub async fn blob(&self, blob: &Blob, came: Came<'_>) -> Result<Vec<u8>, RegistryError> {
        let what = format!("blob {} of {}", blob.digest, self.name);
        let path = format!("blobs/{}", blob.digest);
        self.retry(|| async {
            let bytes = self.get(&path, &what, blob.bytes, came).await?;
            let found = Blob::of(&bytes);
            if found.bytes < blob.bytes {
                return Err(RegistryError::Truncated {
                    what: what.clone(),
                    bytes: found.bytes,
                });
            }
            if found.digest != blob.digest {
                return Err(RegistryError::WrongDigest {
                    what: what.clone(),
                    expected: blob.digest.clone(),
                    found: found.digest,
                });
            }
            Ok(bytes)
        })
        .await
    }

    /// At most `limit` bytes from the registry.
    async fn get(
        &self,
        path: &str,
        what: &str,
        limit: u64,
        came: Came<'_>,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut response = self.ask(path).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            // Tokens live for minutes.
            self.log_in().await?;
            response = self.ask(path).await?;
        }
        let what = || what.to_owned();
        match response.status() {
            status if status.is_success() => {}
            StatusCode::NOT_FOUND => return Err(RegistryError::NotThere { what: what() }),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                let what = what();
                return Err(RegistryError::Denied { what, status });
            }
            status => {
                let what = what();
                return Err(RegistryError::Status { what, status });
            }
        }
        let mut bytes = Vec::new();
        loop {
            let have = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            let piece = response.chunk().await;
            let piece = piece.map_err(|_cut| RegistryError::Truncated {
                what: what(),
                bytes: have,
            })?;
            let Some(piece) = piece else {
                return Ok(bytes);
            };
            let more = u64::try_from(piece.len()).unwrap_or(u64::MAX);
            if more > limit.saturating_sub(have) {
                let what = what();
                return Err(RegistryError::TooLarge { what, limit });
            }
            bytes.extend_from_slice(&piece);
            came(have + more);
        }
    }

    async fn ask(&self, path: &str) -> Result<reqwest::Response, RegistryError> {
        let reference = self.name.reference();
        let scheme = if self.name.is_local() {
            "http"
        } else {
            "https"
        };
        let (registry, repository) = (reference.resolve_registry(), reference.repository());
        let url = format!("{scheme}://{registry}/v2/{repository}/{path}");
        let request = self.http.get(url).header(ACCEPT, Document::media_type());
        let token = self.token.lock().await.clone();
        let request = match (token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(name, password)) => request.basic_auth(name, Some(password)),
            _ => request,
        };
        let response = request.send().await;
        response.map_err(|source| RegistryError::Unreachable {
            registry: registry.to_owned(),
            source: source.without_url(),
        })
    }

    /// Has a blob there; whether it had to be sent.
    pub async fn put_blob(&self, blob: &Blob, bytes: &[u8]) -> Result<bool, RegistryError> {
        let digest = blob.digest.to_string();
        let what = format!("blob {digest} of {}", self.name);
        self.retry(|| async {
            let reference = self.name.reference();
            let not_taken = |e| self.not_taken(&what, e);
            let there = self.oci.blob_exists(reference, &digest).await;
            if there.map_err(not_taken)? {
                return Ok(false);
            }
            let sent = self.oci.push_blob(reference, bytes.to_vec(), &digest).await;
            sent.map_err(not_taken)?;
            Ok(true)
        })
        .await
    }

    /// Puts a manifest there, under the tag of this repository's name.
    pub async fn put_manifest(
        &self,
        name: &RegistryName,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let what = format!("the manifest of {name}");
        self.retry(|| async {
            let kind = reqwest::header::HeaderValue::from_static(Document::media_type());
            let put = self
                .oci
                .push_manifest_raw(name.reference(), bytes.to_vec(), kind);
            put.await.map_err(|e| self.not_taken(&what, e))?;
            Ok(())
        })
        .await
    }

    fn not_taken(&self, what: &str, error: OciDistributionError) -> RegistryError {
        let what = what.to_owned();
        match error {
            OciDistributionError::RequestError(source) if source.status().is_none() => {
                let registry = self.name.reference().registry().to_owned();
                RegistryError::Unreachable { registry, source }
            }
            OciDistributionError::RequestError(source)
                if matches!(
                    source.status(),
                    Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
                ) =>
            {
                let status = source.status().unwrap_or_default();
                RegistryError::Denied { what, status }
            }
            OciDistributionError::UnauthorizedError { .. } => RegistryError::Denied {
                what,
                status: StatusCode::UNAUTHORIZED,
            },
            source => RegistryError::NotTaken {
                what,
                source: Box::new(source),
            },
        }
    }

    /// Does it again, with growing waits, as long as the failure may pass.
    async fn retry<T, F>(&self, mut work: impl FnMut() -> F) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mut tries = 0;
        loop {
            tries += 1;
            match work().await {
                Err(error) if error.is_passing() && tries < self.patience.tries => {
                    tracing::info!("trying again: {}", chain(&error));
                    tokio::time::sleep(self.patience.wait(tries)).await;
                }
                result => return result,
            }
        }
    }
}

/// Two clients of one mind: ours, which reads, and that of `oci_client`, which writes.
fn clients(
    registry: &str,
    local: bool,
    patience: Patience,
) -> Result<(reqwest::Client, OciClient), RegistryError> {
    let failed = |e: reqwest::Error| SourceError::Client(e.into());
    let mut http = http::builder(http::authorities()?, patience)?;
    if local {
        http = http.https_only(false).no_proxy();
        http = http.redirect(redirect::Policy::none());
    }
    // The other client takes the process's own; whoever set it first is right too.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let protocol = match local {
        true => ClientProtocol::HttpsExcept(vec![registry.to_owned()]),
        false => ClientProtocol::Https,
    };
    let config = ClientConfig {
        protocol,
        user_agent: USER_AGENT,
        connect_timeout: Some(patience.connect),
        read_timeout: Some(patience.silence),
        ..ClientConfig::default()
    };
    let oci = OciClient::try_from(config).map_err(|e| SourceError::Client(e.into()))?;
    Ok((http.build().map_err(failed)?, oci))
}

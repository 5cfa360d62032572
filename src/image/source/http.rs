//! The HTTPS client: certificate authorities and proxies of the host, time limits, retries.
//!
//! The proxy comes from HTTPS_PROXY, ALL_PROXY and NO_PROXY, the authorities from the system or,
//! as for other programs, from SSL_CERT_FILE and SSL_CERT_DIR instead. A redirect may lead
//! elsewhere but never away from https.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Client as HttpClient, ClientBuilder, Response, Url, redirect};
use rustls::{ClientConfig, RootCertStore};

use super::SourceError;
use crate::chain::chain;

const MAX_REDIRECTS: usize = 10;
/// What servers see of us.
pub const USER_AGENT: &str = concat!("fleetingd/", env!("CARGO_PKG_VERSION"));

/// How patient a client is.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Tries in a row that bring nothing new.
    pub tries: u32,
    /// Before the second try; each further wait is twice as long.
    pub first_wait: Duration,
    pub connect: Duration,
    /// How long a server may send nothing.
    pub silence: Duration,
}

impl Patience {
    /// Where nothing else can be used.
    pub const LONG: Self = Self {
        tries: 6,
        first_wait: Duration::from_secs(1),
        connect: Duration::from_secs(15),
        silence: Duration::from_secs(30),
    };
    /// Where there is something else.
    pub const SHORT: Self = Self {
        tries: 2,
        ..Self::LONG
    };
    const LONGEST_WAIT: Duration = Duration::from_secs(30);

    /// The wait after this many tries, give or take a quarter so that hosts do not keep step.
    pub fn wait(&self, tries: u32) -> Duration {
        let doublings = 1_u32
            .checked_shl(tries.saturating_sub(1))
            .unwrap_or(u32::MAX);
        let wait = self.first_wait.saturating_mul(doublings);
        wait.min(Self::LONGEST_WAIT)
            .mul_f64(rand::random_range(0.75..1.25))
    }
}

/// Fetches over https.
#[derive(Debug, Clone)]
pub struct Client {
    http: HttpClient,
    pub patience: Patience,
}

impl Client {
    /// With the host's certificate authorities. Blocks while it reads them.
    pub fn new(patience: Patience) -> Result<Self, SourceError> {
        Self::with_roots(authorities()?, patience)
    }

    pub fn with_roots(roots: RootCertStore, patience: Patience) -> Result<Self, SourceError> {
        let http = builder(roots, patience)?
            .build()
            .map_err(|e| SourceError::Client(e.into()))?;
        Ok(Self { http, patience })
    }

    /// One request; anything but success and "not that range" is an error.
    pub async fn request(&self, url: &Url, headers: HeaderMap) -> Result<Response, SourceError> {
        let request = self.http.get(url.clone()).headers(headers);
        let response = request.send().await.map_err(|e| failed(url, e))?;
        let status = response.status();
        if status.is_success() || status == reqwest::StatusCode::RANGE_NOT_SATISFIABLE {
            Ok(response)
        } else {
            let url = url.to_string();
            Err(SourceError::Status { url, status })
        }
    }

    /// The whole of a small file, or of a listing where `page` says that it is a web page.
    pub async fn small(&self, url: &Url, limit: usize, page: bool) -> Result<Vec<u8>, SourceError> {
        self.retry(|| self.small_once(url, limit, page)).await
    }

    async fn small_once(
        &self,
        url: &Url,
        limit: usize,
        page: bool,
    ) -> Result<Vec<u8>, SourceError> {
        let mut response = self.request(url, HeaderMap::new()).await?;
        let is_page = is_web_page(response.headers());
        let mut bytes = Vec::new();
        while let Some(piece) = next_piece(&mut response, url, length(&bytes)).await? {
            if piece.len() > limit.saturating_sub(bytes.len()) {
                return Err(SourceError::TooLarge {
                    url: url.to_string(),
                    limit: u64::try_from(limit).unwrap_or(u64::MAX),
                });
            }
            bytes.extend_from_slice(&piece);
        }
        if !page && (is_page || looks_like_web_page(&bytes)) {
            let url = url.to_string();
            return Err(SourceError::WebPage { url });
        }
        Ok(bytes)
    }

    /// Does it again, with growing waits, as long as the failure may pass.
    async fn retry<T, F>(&self, mut work: impl FnMut() -> F) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        let mut tries = 0;
        loop {
            tries += 1;
            match work().await {
                Err(error) if error.is_passing() => self.back_off(tries, error).await?,
                result => return result,
            }
        }
    }

    /// Waits before the next try, or gives the error back when there were enough.
    pub async fn back_off(&self, tries: u32, error: SourceError) -> Result<(), SourceError> {
        if tries >= self.patience.tries {
            return Err(error);
        }
        let wait = self.patience.wait(tries);
        tracing::info!(
            wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
            "trying again: {}",
            chain(&error)
        );
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// The host's certificate authorities. Blocks while it reads them.
pub fn authorities() -> Result<RootCertStore, SourceError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (usable, _unusable) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let problems = found.errors.iter().map(|e| format!(": {e}"));
        return Err(SourceError::NoAuthorities {
            detail: problems.take(3).collect(),
        });
    }
    for problem in &found.errors {
        tracing::warn!("certificate authorities: {problem}");
    }
    Ok(roots)
}

/// A client that trusts these and goes over https only.
pub fn builder(roots: RootCertStore, patience: Patience) -> Result<ClientBuilder, SourceError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| SourceError::Client(e.into()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(HttpClient::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(USER_AGENT)
        .https_only(true)
        .redirect(redirect::Policy::custom(only_https))
        .connect_timeout(patience.connect)
        .read_timeout(patience.silence))
}

/// The next bytes of a body of which `have` have come.
pub async fn next_piece(
    response: &mut Response,
    url: &Url,
    have: u64,
) -> Result<Option<impl AsRef<[u8]> + std::ops::Deref<Target = [u8]>>, SourceError> {
    response.chunk().await.map_err(|error| {
        if error.is_timeout() {
            return failed(url, error);
        }
        SourceError::Truncated {
            url: url.to_string(),
            bytes: have,
        }
    })
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Whether the server says so.
pub fn is_web_page(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| {
        kind.trim_start()
            .to_ascii_lowercase()
            .starts_with("text/html")
    })
}

/// Whether the bytes say so.
pub fn looks_like_web_page(bytes: &[u8]) -> bool {
    let head = bytes.trim_ascii_start();
    [&b"<!doctype html"[..], b"<html"].iter().any(|start| {
        head.get(..start.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(start))
    })
}

/// Why a redirect is not followed.
#[derive(Debug)]
enum Refusal {
    NotHttps { from: String, to: String },
    TooMany,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotHttps { .. } => "not https",
            Self::TooMany => "too many redirects",
        })
    }
}

impl Error for Refusal {}

fn only_https(attempt: redirect::Attempt<'_>) -> redirect::Action {
    if attempt.url().scheme() != "https" {
        let from = attempt.previous().last().map(Url::to_string);
        let refusal = Refusal::NotHttps {
            from: from.unwrap_or_default(),
            to: attempt.url().to_string(),
        };
        return attempt.error(refusal);
    }
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error(Refusal::TooMany);
    }
    attempt.follow()
}

/// A request's failure by its name.
fn failed(url: &Url, error: reqwest::Error) -> SourceError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        match inner.downcast_ref::<Refusal>() {
            Some(Refusal::NotHttps { from, to }) => {
                return SourceError::RedirectToHttp {
                    from: from.clone(),
                    to: to.clone(),
                };
            }
            Some(Refusal::TooMany) => {
                let url = url.to_string();
                return SourceError::TooManyRedirects { url };
            }
            None => cause = inner.source(),
        }
    }
    SourceError::Unreachable {
        url: url.to_string(),
        source: error.without_url(),
    }
}

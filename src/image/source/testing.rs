//! A vendor for tests: a signing key, and an HTTPS server that can do all that servers do wrong.

use std::collections::HashMap;
use std::io::Cursor;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgp::composed::{
    ArmorOptions, DetachedSignature, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
    SignedSecretKey, SubkeyParamsBuilder, SubpacketConfig,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{PacketTrait, Subpacket, SubpacketData};
use pgp::types::{KeyDetails, Password, SigningKey, Timestamp};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::http::{Client, Patience};

/// Somebody with an OpenPGP key.
pub struct Signer {
    key: SignedSecretKey,
    /// Signs with the key below the primary one.
    by_subkey: bool,
}

impl Signer {
    pub fn new() -> Self {
        Self {
            key: key(true, &[]),
            by_subkey: false,
        }
    }

    /// Whose primary key only certifies; the one below it is for signing or not.
    pub fn with_subkey(signs: bool) -> Self {
        Self {
            key: key(false, &[signs]),
            by_subkey: true,
        }
    }

    /// The same owner, signing with the primary key.
    pub fn by_primary(mut self) -> Self {
        self.by_subkey = false;
        self
    }

    /// The public key, armored.
    pub fn public(&self) -> Vec<u8> {
        let public = SignedPublicKey::from(self.key.clone());
        public.to_armored_bytes(ArmorOptions::default()).unwrap()
    }

    /// The secret key, armored.
    pub fn secret(&self) -> Vec<u8> {
        self.key.to_armored_bytes(ArmorOptions::default()).unwrap()
    }

    /// The public key, with subkeys that somebody else has bound.
    pub fn public_with_subkeys_of(&self, other: &Self) -> Vec<u8> {
        let mut public = SignedPublicKey::from(self.key.clone());
        public.public_subkeys = SignedPublicKey::from(other.key.clone()).public_subkeys;
        public.to_armored_bytes(ArmorOptions::default()).unwrap()
    }

    /// As it stands in messages.
    pub fn fingerprint(&self) -> String {
        self.key.fingerprint().to_string().to_uppercase()
    }

    /// A detached signature as made at this time, armored.
    pub fn sign(&self, content: &[u8], at: u32) -> Vec<u8> {
        self.sign_with(content, at, None)
    }

    /// One that holds for some seconds only.
    pub fn sign_with(&self, content: &[u8], at: u32, life: Option<u32>) -> Vec<u8> {
        let signature = self.signature(content, at, life);
        let armored = signature.to_armored_bytes(ArmorOptions::default());
        armored.unwrap()
    }

    /// One that is not armored.
    pub fn binary(&self, content: &[u8], at: u32) -> Vec<u8> {
        let signature = self.signature(content, at, None).signature;
        let mut bytes = Vec::new();
        signature.to_writer_with_header(&mut bytes).unwrap();
        bytes
    }

    fn signature(&self, content: &[u8], at: u32, life: Option<u32>) -> DetachedSignature {
        match self.key.secret_subkeys.first() {
            Some(sub) if self.by_subkey => sign(&sub.key, content, at, life),
            _ => sign(&self.key.primary_key, content, at, life),
        }
    }
}

fn sign(key: &impl SigningKey, content: &[u8], at: u32, life: Option<u32>) -> DetachedSignature {
    let packet = |data| Subpacket::regular(data).unwrap();
    let at = Timestamp::from_secs(at);
    let mut hashed = vec![
        packet(SubpacketData::IssuerFingerprint(key.fingerprint())),
        packet(SubpacketData::SignatureCreationTime(at)),
    ];
    if let Some(seconds) = life {
        let life = pgp::types::Duration::from_secs(seconds);
        hashed.push(packet(SubpacketData::SignatureExpirationTime(life)));
    }
    let signature = DetachedSignature::sign_binary_data_with_subpackets(
        rand_08::thread_rng(),
        key,
        &Password::empty(),
        HashAlgorithm::Sha512,
        Cursor::new(content),
        SubpacketConfig::UserDefined {
            hashed,
            unhashed: Vec::new(),
        },
    );
    signature.unwrap()
}

fn key(signs: bool, subkeys: &[bool]) -> SignedSecretKey {
    let created = Timestamp::from_secs(1_000_000_000);
    let subkeys = subkeys.iter().map(|signs| {
        let mut params = SubkeyParamsBuilder::default();
        params
            .key_type(KeyType::Ed25519Legacy)
            .created_at(created)
            .can_sign(*signs)
            .can_authenticate(!signs);
        params.build().unwrap()
    });
    let mut params = SecretKeyParamsBuilder::default();
    params
        .key_type(KeyType::Ed25519Legacy)
        .created_at(created)
        .can_certify(true)
        .can_sign(signs)
        .primary_user_id("Test <test@example.org>".into())
        .subkeys(subkeys.collect());
    let params = params.build().unwrap();
    params.generate(rand_08::thread_rng()).unwrap()
}

/// What the server does with one request for a file instead of serving it.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Answers with this status.
    Status(u16),
    /// Sends the right headers and this much of the body, then closes.
    CutAfter(usize),
    /// Says that the file has this size, and sends so much of it.
    Shortened(usize),
    /// Sends the whole file with no size and whatever range was asked for.
    NoSize,
    /// Redirects there.
    Redirect(String),
    /// A page for people, whatever was asked for.
    Page,
    /// The same, not even saying so.
    PageInDisguise,
    /// Sends nothing for good.
    Silence,
}

/// A file of the server.
#[derive(Debug, Clone)]
struct Served {
    body: Arc<[u8]>,
    etag: String,
    /// Taken one by one, each by one request.
    faults: Vec<Fault>,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub path: String,
    pub range: Option<String>,
    pub if_range: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    files: HashMap<String, Served>,
    asked: Vec<Asked>,
}

/// An HTTPS server on this host; ends with its runtime.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    authority: CertificateDer<'static>,
    authority_pem: String,
    shared: Arc<Mutex<Shared>>,
}

impl Server {
    pub async fn start() -> Self {
        let (authority, authority_pem, config) = certificates();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let of_all = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _peer)) = listener.accept().await {
                let (acceptor, shared) = (acceptor.clone(), Arc::clone(&of_all));
                // A client that goes away has its reasons.
                tokio::spawn(async move { serve(stream, acceptor, shared).await });
            }
        });
        Self {
            address,
            authority,
            authority_pem,
            shared,
        }
    }

    pub fn base(&self) -> reqwest::Url {
        format!("https://localhost:{}/", self.address.port())
            .parse()
            .unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// PEM of who signed the server's certificate.
    pub fn authority_pem(&self) -> &str {
        &self.authority_pem
    }

    /// Puts a file there, or another one in its place.
    pub fn put(&self, path: &str, body: impl AsRef<[u8]>) {
        let body = Arc::from(body.as_ref());
        let mut shared = self.shared.lock().unwrap();
        let etag = format!("\"{}\"", shared.asked.len() + shared.files.len());
        let faults = Vec::new();
        let served = Served { body, etag, faults };
        shared.files.insert(format!("/{path}"), served);
    }

    pub fn remove(&self, path: &str) {
        self.shared
            .lock()
            .unwrap()
            .files
            .remove(&format!("/{path}"));
    }

    /// What happens to the next requests for a file.
    pub fn spoil(&self, path: &str, faults: &[Fault]) {
        let mut shared = self.shared.lock().unwrap();
        let served = shared.files.get_mut(&format!("/{path}")).unwrap();
        served.faults = faults.to_vec();
    }

    /// The requests for a file so far, or for all.
    pub fn asked(&self, path: &str) -> Vec<Asked> {
        let shared = self.shared.lock().unwrap();
        let asked = shared.asked.iter();
        let wanted = |asked: &&Asked| asked.path.ends_with(path);
        asked.filter(wanted).cloned().collect()
    }

    /// A client that trusts this server and soon loses patience.
    pub fn client(&self) -> Client {
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.clone()).unwrap();
        Client::with_roots(roots, QUICK).unwrap()
    }
}

/// Retries at once, and few.
pub const QUICK: Patience = Patience {
    tries: 3,
    first_wait: Duration::from_millis(1),
    connect: Duration::from_secs(5),
    silence: Duration::from_millis(500),
};

fn certificates() -> (CertificateDer<'static>, String, ServerConfig) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "images.example".to_owned()];
    let leaf = CertificateParams::new(names).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    (authority.der().clone(), authority.pem(), config)
}

async fn serve(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    shared: Arc<Mutex<Shared>>,
) -> std::io::Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    while let Some(head) = read_head(&mut stream).await? {
        let asked = parse(&head);
        let found = {
            let mut shared = shared.lock().unwrap();
            shared.asked.push(asked.clone());
            shared.files.get_mut(&asked.path).map(|served| {
                let fault = (!served.faults.is_empty()).then(|| served.faults.remove(0));
                (served.clone(), fault)
            })
        };
        let goes_on = match found {
            Some((served, fault)) => answer(&mut stream, &asked, &served, fault).await?,
            None => {
                respond(&mut stream, 404, "text/html", b"<html>not here</html>").await?;
                true
            }
        };
        if !goes_on {
            break;
        }
    }
    stream.shutdown().await
}

async fn read_head(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Option<String>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    Ok(Some(String::from_utf8(head).unwrap()))
}

fn parse(head: &str) -> Asked {
    let mut lines = head.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap();
    let header = |name: &str| {
        let mut lines = head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "));
        let found = lines.find(|(found, _)| found.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_owned())
    };
    Asked {
        path: path.to_owned(),
        range: header("range"),
        if_range: header("if-range"),
    }
}

/// Answers one request; whether the connection goes on.
async fn answer(
    stream: &mut (impl AsyncWrite + Unpin),
    asked: &Asked,
    served: &Served,
    fault: Option<Fault>,
) -> std::io::Result<bool> {
    let page = b"<!DOCTYPE html>\n<html>log in first</html>";
    let octets = "application/octet-stream";
    match fault {
        Some(Fault::Status(status)) => respond(stream, status, octets, b"").await?,
        Some(Fault::Page) => respond(stream, 200, "text/html; charset=utf-8", page).await?,
        Some(Fault::PageInDisguise) => respond(stream, 200, octets, page).await?,
        Some(Fault::Shortened(len)) => respond(stream, 200, octets, &served.body[..len]).await?,
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::Redirect(to)) => {
            let head = format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
        }
        Some(Fault::NoSize) => {
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&served.body).await?;
            return Ok(false);
        }
        Some(Fault::CutAfter(len)) => return content(stream, asked, served, len).await,
        None => return content(stream, asked, served, usize::MAX).await,
    }
    Ok(true)
}

/// The file or the range of it that was asked for, but at most `most` bytes.
async fn content(
    stream: &mut (impl AsyncWrite + Unpin),
    asked: &Asked,
    served: &Served,
    most: usize,
) -> std::io::Result<bool> {
    let all = served.body.len();
    let same = asked
        .if_range
        .as_ref()
        .is_none_or(|tag| *tag == served.etag);
    let from = asked.range.as_deref().filter(|_| same).map(|range| {
        let from = range.strip_prefix("bytes=").unwrap();
        from.strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    let etag = &served.etag;
    let (head, body) = match from {
        Some(from) if from >= all => {
            let range = format!("content-range: bytes */{all}");
            (format!("416 Gone\r\n{range}\r\ncontent-length: 0"), &[][..])
        }
        Some(from) => {
            let range = format!("content-range: bytes {from}-{}/{all}", all - 1);
            let len = all - from;
            let head = format!("206 Part\r\n{range}\r\netag: {etag}\r\ncontent-length: {len}");
            (head, &served.body[from..])
        }
        None => {
            let head = format!("200 OK\r\netag: {etag}\r\ncontent-length: {all}");
            (head, &served.body[..])
        }
    };
    stream
        .write_all(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes())
        .await?;
    let sent = &body[..body.len().min(most)];
    stream.write_all(sent).await?;
    stream.flush().await?;
    Ok(sent.len() == body.len())
}

async fn respond(
    stream: &mut (impl AsyncWrite + Unpin),
    status: u16,
    kind: &str,
    body: &[u8],
) -> std::io::Result<()> {
    let len = body.len();
    let head = format!(
        "HTTP/1.1 {status} Status\r\ncontent-type: {kind}\r\ncontent-length: {len}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await
}

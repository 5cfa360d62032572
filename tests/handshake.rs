//! The built executable under the eyes of a host: handshake, AutoMTLS, signals and its end.
//!
//! `tests/fleeting/` does the same with GitLab's and HashiCorp's own libraries; what is here needs
//! no Go and looks at what those do not show.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may stop at the first surprise"
)]
#![expect(clippy::print_stdout, reason = "what was measured is told")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use fleetingd::plugin::COOKIE;
use fleetingd::plugin::client::PluginClient;
use fleetingd::plugin::config::Source;
use fleetingd::plugin::generated::fleeting::ConnectorConfig;
use fleetingd::plugin::generated::go_plugin;
use fleetingd::plugin::generated::go_plugin::conn_info::Knock;
use fleetingd::plugin::generated::go_plugin::grpc_broker_client::GrpcBrokerClient;
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

const PLUGIN: &str = env!("CARGO_BIN_EXE_fleeting-plugin-fleetingd");

/// DESIGN's budget for a release build on an idle machine; here the best of a few starts counts.
const HANDSHAKE_BUDGET: Duration = Duration::from_millis(100);

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A started plugin and the fields of its line; killed when dropped.
struct Started {
    child: Child,
    fields: Vec<String>,
    took: Duration,
}

impl Started {
    fn with(variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(PLUGIN);
        command
            .env(COOKIE.0, COOKIE.1)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().unwrap();
        let fields = fields(child.stdout.take().unwrap());
        Self {
            took: begun.elapsed(),
            child,
            fields,
        }
    }

    fn socket(&self) -> PathBuf {
        PathBuf::from(&self.fields[3])
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
        let _gone = std::fs::remove_file(self.socket());
    }
}

fn fields(stdout: impl Read) -> Vec<String> {
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).unwrap();
    line.trim_end_matches('\n')
        .split('|')
        .map(str::to_owned)
        .collect()
}

async fn plain(socket: PathBuf) -> Channel {
    try_plain(socket).await.unwrap()
}

async fn try_plain(socket: PathBuf) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
}

async fn health(channel: Channel) -> Result<ServingStatus, tonic::Status> {
    let service = "plugin".to_owned();
    HealthClient::new(channel)
        .check(HealthCheckRequest { service })
        .await
        .map(|answer| answer.into_inner().status())
}

/// Waits for the end of a process that is no child of ours.
fn gone(pid: u32) -> bool {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let mut fds = [rustix::event::PollFd::new(
        &fd,
        rustix::event::PollFlags::IN,
    )];
    let limit = rustix::event::Timespec::try_from(PATIENCE).unwrap();
    rustix::event::poll(&mut fds, Some(&limit)).unwrap() == 1
}

#[test]
fn the_line_is_the_protocols_and_comes_in_time() {
    let starts: Vec<Started> = (0..5).map(|_| Started::with(&[])).collect();
    for started in &starts {
        let [core, app, network, socket, protocol, certificate] = started.fields.as_slice() else {
            panic!("{:?}", started.fields)
        };
        assert_eq!(
            [core, app, network, protocol, certificate],
            ["1", "0", "unix", "grpc", ""]
        );
        let mode = Path::new(socket).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let best = starts.iter().map(|started| started.took).min().unwrap();
    println!("handshake line after {best:?}");
    assert!(best < HANDSHAKE_BUDGET, "{best:?}");
}

#[test]
fn the_socket_lies_where_the_host_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let started = Started::with(&[
        ("PLUGIN_UNIX_SOCKET_DIR", path),
        ("PLUGIN_UNIX_SOCKET_GROUP", "root"),
        ("PLUGIN_MULTIPLEX_GRPC", "false"),
    ]);
    assert_eq!(started.socket().parent().unwrap(), dir.path());
    let mode = started.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    assert_eq!(started.fields[6], "true");
}

#[test]
fn a_socket_that_cannot_be_made_is_told_as_a_log_line() {
    let output = Command::new(PLUGIN)
        .env(COOKIE.0, COOKIE.1)
        .env("PLUGIN_UNIX_SOCKET_DIR", "/no/such/directory")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stdout, b"");
    let line: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let error = line["error"].as_str().unwrap();
    assert!(
        error.contains("cannot listen at /no/such/directory/"),
        "{error}"
    );
}

#[test]
fn a_person_is_told_what_this_is() {
    let output = Command::new(PLUGIN).env_remove(COOKIE.0).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(output.stdout, b"");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("gitlab-runner starts it") && text.contains("--help"),
        "{text}"
    );
}

#[tokio::test]
async fn signals_that_end_other_processes_are_ignored_while_the_host_lives() {
    let started = Started::with(&[]);
    for signal in [Signal::INT, Signal::TERM, Signal::QUIT, Signal::HUP] {
        started.signal(signal);
        let status = health(plain(started.socket()).await).await.unwrap();
        assert_eq!(status, ServingStatus::Serving, "{signal:?}");
    }
}

#[test]
fn the_end_of_whoever_started_it_is_its_own() {
    let mut host = Command::new("sh")
        .args(["-c", "\"$0\" & echo $!; wait", PLUGIN])
        .env(COOKIE.0, COOKIE.1)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(host.stdout.take().unwrap()).lines();
    let both = [
        lines.next().unwrap().unwrap(),
        lines.next().unwrap().unwrap(),
    ];
    // The shell's line and the plugin's come in either order.
    let socket = both.iter().find_map(|line| line.split('|').nth(3)).unwrap();
    let pid: u32 = both.iter().find_map(|line| line.parse().ok()).unwrap();
    assert!(Path::new(socket).exists());
    host.kill().unwrap();
    host.wait().unwrap();
    assert!(gone(pid), "the plugin outlives its host");
    assert!(!Path::new(socket).exists());
}

#[tokio::test]
async fn a_host_that_ends_it_sees_a_clean_end() {
    let client = PluginClient::start(Path::new(PLUGIN), |_line| {})
        .await
        .unwrap();
    assert_eq!(
        health(client.channel()).await.unwrap(),
        ServingStatus::Serving
    );
    let begun = Instant::now();
    let status = client.end().await.unwrap();
    assert!(ExitStatus::success(&status), "{status}");
    println!("ended after {:?}", begun.elapsed());
}

#[tokio::test]
async fn every_problem_of_a_config_arrives_and_is_logged_as_the_host_reads_lines() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&lines);
    let client = PluginClient::start(Path::new(PLUGIN), move |line| {
        seen.lock().unwrap().push(line.to_owned());
    })
    .await
    .unwrap();
    let config = br#"{"vm_imag": "/x", "vm_memory_mb": 1}"#;
    let source = Source::from_json(config, ConnectorConfig::default()).unwrap();
    let error = client.init(&source).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::InvalidArgument));
    let text = error.to_string();
    for part in ["nearest known one is vm_image", "vm_memory_mb = 1:"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(
        client.increase(1).await.unwrap_err().code(),
        Some(Code::FailedPrecondition)
    );
    // Another attempt is another chance.
    assert_eq!(
        client.init(&source).await.unwrap_err().code(),
        Some(Code::InvalidArgument)
    );
    client.shutdown().await.unwrap();
    assert_eq!(
        client.init(&source).await.unwrap_err().code(),
        Some(Code::FailedPrecondition)
    );
    client.end().await.unwrap();
    let lines = lines.lock().unwrap();
    assert!(lines.len() >= 6, "{lines:?}");
    for line in lines.iter() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["@message", "@level", "@timestamp", "@module"] {
            assert!(line[key].is_string(), "{key} of {line}");
        }
    }
}

#[tokio::test]
async fn services_describe_themselves() {
    let client = PluginClient::start(Path::new(PLUGIN), |_line| {})
        .await
        .unwrap();
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(client.channel())
        .server_reflection_info(tokio_stream::iter([ask]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers
        .message()
        .await
        .unwrap()
        .unwrap()
        .message_response
        .unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for name in [
        "proto.InstanceGroup",
        "plugin.GRPCBroker",
        "plugin.GRPCController",
        "plugin.GRPCStdio",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ] {
        assert!(
            names.iter().any(|n| n == name),
            "{name} is not in {names:?}"
        );
    }
    client.end().await.unwrap();
}

#[tokio::test]
async fn a_knock_is_answered_and_streams_end_with_the_plugin() {
    let client = PluginClient::start(Path::new(PLUGIN), |_line| {})
        .await
        .unwrap();
    let mut stdio = go_plugin::grpc_stdio_client::GrpcStdioClient::new(client.channel())
        .stream_stdio(())
        .await
        .unwrap()
        .into_inner();
    let knock = go_plugin::ConnInfo {
        service_id: 7,
        knock: Some(Knock {
            knock: true,
            ..Knock::default()
        }),
        ..go_plugin::ConnInfo::default()
    };
    let (ours, stream) = tokio::sync::mpsc::channel(1);
    ours.send(knock).await.unwrap();
    let mut broker = GrpcBrokerClient::new(client.channel())
        .start_stream(tokio_stream::wrappers::ReceiverStream::new(stream))
        .await
        .unwrap()
        .into_inner();
    let answer = broker.message().await.unwrap().unwrap();
    let knock = answer.knock.unwrap();
    assert!(answer.service_id == 7 && knock.ack && !knock.error.is_empty());
    client.end().await.unwrap();
    // Either an end or a broken connection; what counts is that nobody waits for ever.
    let _ended = tokio::time::timeout(PATIENCE, stdio.message())
        .await
        .unwrap();
    let _ended = tokio::time::timeout(PATIENCE, broker.message())
        .await
        .unwrap();
}

/// A certificate as go-plugin's host makes it: P-521, self-signed, a CA.
fn client_certificate() -> (rcgen::Certificate, rcgen::KeyPair) {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    (params.self_signed(&key).unwrap(), key)
}

/// A health check over TLS, with that certificate or none.
async fn over_tls(
    started: &Started,
    identity: Option<(&rcgen::Certificate, &rcgen::KeyPair)>,
    version: &'static rustls::SupportedProtocolVersion,
) -> Result<ServingStatus, tonic::Status> {
    let der = STANDARD_NO_PAD.decode(&started.fields[5]).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(der)).unwrap();
    let signer = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(&signer))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        // Unlike the builder's own, this does not ask whether the key is the certificate's.
        Some((certificate, key)) => {
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            let key = signer.key_provider.load_private_key(key).unwrap();
            let pair = CertifiedKey::new(vec![certificate.der().clone()], key);
            config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(pair)))
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config));
    let socket = started.socket();
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let (socket, tls) = (socket.clone(), tls.clone());
            async move {
                let stream = UnixStream::connect(socket).await?;
                let name = ServerName::try_from("localhost").unwrap();
                tls.connect(name, stream).await.map(TokioIo::new)
            }
        }))
        .await
        .map_err(|error| tonic::Status::unauthenticated(error.to_string()))?;
    health(channel).await
}

#[tokio::test]
async fn auto_mtls_lets_in_the_hosts_certificate_and_no_other() {
    let (ours, key) = client_certificate();
    let (stranger, stranger_key) = client_certificate();
    let started = Started::with(&[("PLUGIN_CLIENT_CERT", &ours.pem())]);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let status = over_tls(&started, Some((&ours, &key)), version).await;
        assert_eq!(status.unwrap(), ServingStatus::Serving);
        assert!(
            over_tls(&started, Some((&stranger, &stranger_key)), version)
                .await
                .is_err()
        );
        assert!(over_tls(&started, None, version).await.is_err());
        // Who has the certificate, which is no secret, still lacks its key.
        let thief = over_tls(&started, Some((&ours, &stranger_key)), version).await;
        assert!(thief.is_err());
    }
    let without_tls = try_plain(started.socket()).await;
    if let Ok(channel) = without_tls {
        assert!(health(channel).await.is_err());
    }
}

#[test]
fn a_certificate_that_is_none_is_told_as_a_log_line() {
    let output = Command::new(PLUGIN)
        .env(COOKIE.0, COOKIE.1)
        .env("PLUGIN_CLIENT_CERT", "nonsense")
        .output()
        .unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("PLUGIN_CLIENT_CERT holds no PEM certificate"),
        "{text}"
    );
}

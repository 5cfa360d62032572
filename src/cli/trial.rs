//! `fleetingd try`: the main job with no GitLab at all.
//!
//! Starts this very executable as a plugin and drives it through its own handshake and socket as
//! gitlab-runner would: Init, Increase, Update until Running, ConnectInfo, commands over SSH,
//! Decrease, Shutdown. Then looks whether anything is left. Nothing here knows the pool.
#![expect(clippy::print_stdout, reason = "a command shows what it does")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::net;
use crate::plugin::client::PluginClient;
use crate::plugin::config::Source;
use crate::plugin::generated::fleeting::ConnectInfoResponse;
use crate::plugin::generated::fleeting::update_response::State;
use crate::pool::keys::KeyPair;
use crate::pool::ssh::{Credential, SshSession, SshTarget};

/// Polls of Update, as our example config has it.
const POLL: Duration = Duration::from_millis(100);
const SSH_PORT: u16 = 22;
/// An outbound connection counts if it is made within this time.
const OUTBOUND_SECONDS: u32 = 60;

/// What to try.
#[derive(Debug, clap::Args)]
pub struct TrialArgs {
    /// TOML with the keys of plugin_config, or gitlab-runner's config.toml, whose first
    /// [[runners]] with this plugin is taken
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/gitlab-runner/config.toml"
    )]
    config: PathBuf,
    /// Machines to start
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    machines: u32,
    /// Where each machine makes a TCP connection to
    #[arg(long, value_name = "HOST:PORT", default_value = "deb.debian.org:80")]
    outbound: String,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
}

/// Runs the trial; exit code 0 if all of it worked and nothing is left.
pub fn run(args: &TrialArgs) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => return super::fail(&e.into(), ExitCode::FAILURE),
    };
    let deadline = Duration::from_secs(args.timeout);
    let result = runtime.block_on(async {
        match tokio::time::timeout(deadline, trial(args)).await {
            Ok(result) => result,
            Err(_elapsed) => bail!("not done after {} s; hint: --timeout", args.timeout),
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => super::fail(&error, ExitCode::FAILURE),
    }
}

async fn trial(args: &TrialArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}; hint: --config FILE", args.config.display()))?;
    let source = Source::from_toml(&text)?;
    let (host, port) = args
        .outbound
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
        .with_context(|| format!("--outbound {:?} is not HOST:PORT", args.outbound))?;
    ensure!(
        host.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-'),
        "--outbound {host:?} is no host name"
    );
    let before = net::taps_present();
    let screen = Screen::new();
    let plugin = executable()?;
    let started = Instant::now();
    let client = {
        let screen = screen.clone();
        PluginClient::start(&plugin, move |line| screen.log(line)).await?
    };
    screen.line(
        "plugin",
        &format!("{}, handshake in {}", plugin.display(), ms(started)),
    );
    let result = drive(&client, &source, args.machines, (host, port), &screen).await;
    let ending = Instant::now();
    let shutdown = client.shutdown().await;
    let ended = client.end().await;
    screen.done();
    result?;
    shutdown?;
    ensure!(ended?.success(), "the plugin did not end cleanly");
    screen.line("shutdown", &format!("in {}", ms(ending)));
    let left: Vec<String> = net::taps_present().difference(&before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {}", left.join(", "));
    screen.line("left behind", "nothing");
    Ok(())
}

/// This executable, which is the plugin too.
fn executable() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find our own executable")
}

async fn drive(
    client: &PluginClient,
    source: &Source,
    machines: u32,
    outbound: (&str, u16),
    screen: &Screen,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let init = client.init(source).await?;
    screen.line(
        "init",
        &format!(
            "group {}, room for {} machines, in {}",
            init.id,
            init.max_size,
            ms(begun)
        ),
    );
    let asked = Instant::now();
    let accepted = client.increase(machines).await?;
    ensure!(
        accepted == machines,
        "only {accepted} of {machines} machines were accepted"
    );
    let ids = wait_until_running(client, machines, asked, screen).await?;
    for id in &ids {
        let info = client.connect_info(id).await?;
        use_machine(id, &info, outbound, screen).await?;
        client.heartbeat(id).await?;
    }
    let ending = Instant::now();
    let going = client.decrease(ids.clone()).await?;
    ensure!(going.len() == ids.len(), "only {going:?} of {ids:?} go");
    loop {
        let states = client.update().await?;
        if states
            .iter()
            .all(|instance| instance.state == State::Deleted)
        {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    screen.line(
        "deleted",
        &format!("{} machines in {}", ids.len(), ms(ending)),
    );
    Ok(())
}

/// Polls as the provisioner does and tells when each machine came up.
async fn wait_until_running(
    client: &PluginClient,
    machines: u32,
    asked: Instant,
    screen: &Screen,
) -> anyhow::Result<Vec<String>> {
    let mut running = BTreeMap::new();
    loop {
        for instance in client.update().await? {
            match instance.state {
                State::Running => {
                    running.entry(instance.id.clone()).or_insert_with(|| {
                        screen.line("running", &format!("{} after {}", instance.id, ms(asked)));
                        asked.elapsed()
                    });
                }
                State::Creating => {}
                state => bail!(
                    "{} is {}; hint: the log lines above say why",
                    instance.id,
                    state.as_str_name()
                ),
            }
        }
        if u32::try_from(running.len()).is_ok_and(|count| count == machines) {
            return Ok(running.into_keys().collect());
        }
        screen.tick();
        tokio::time::sleep(POLL).await;
    }
}

/// Three things a job does: run a command, reach the internet, become root.
async fn use_machine(
    id: &str,
    info: &ConnectInfoResponse,
    (host, port): (&str, u16),
    screen: &Screen,
) -> anyhow::Result<()> {
    let connector = info
        .connector
        .clone()
        .context("ConnectInfo without a connector")?;
    let address: Ipv4Addr = info
        .internal_addr
        .split(':')
        .next()
        .unwrap_or_default()
        .parse()
        .with_context(|| format!("{id} has the address {:?}", info.internal_addr))?;
    let credential = match connector.key.is_empty() {
        true => Credential::Password(connector.password),
        false => Credential::Key(KeyPair::from_pem(std::str::from_utf8(&connector.key)?)?.private),
    };
    let target = SshTarget {
        address: SocketAddr::from((address, SSH_PORT)),
        username: connector.username,
        credential,
        host_key: None,
    };
    let begun = Instant::now();
    let mut session = SshSession::open(&target).await?;
    screen.line("ssh", &format!("{id} at {address}, login in {}", ms(begun)));
    let connect = format!(
        "timeout {OUTBOUND_SECONDS} bash -c 'exec 3<>/dev/tcp/{host}/{port}' && echo connected to {host}:{port}"
    );
    for command in ["uname -a", &connect, "sudo -n id -un"] {
        let begun = Instant::now();
        let output = session.run(command).await?;
        let text = output.text.trim_end();
        ensure!(
            output.status == Some(0),
            "{id}: {command:?} ended with {:?}: {text}",
            output.status
        );
        screen.line("", &format!("{text} ({})", ms(begun)));
    }
    session.close().await;
    Ok(())
}

fn ms(since: Instant) -> String {
    let elapsed = since.elapsed();
    if elapsed < Duration::from_secs(10) {
        format!("{} ms", elapsed.as_millis())
    } else {
        format!("{:.1} s", elapsed.as_secs_f64())
    }
}

/// The line that shows what the plugin is at.
const STATUS: &str = "{spinner} {elapsed_precise} {wide_msg}";
const DOWNLOAD: &str =
    "{spinner} {elapsed_precise} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}";

/// What the operator sees: finished steps as lines, the plugin's last log line as a status.
#[derive(Debug, Clone)]
struct Screen {
    bar: ProgressBar,
    last: Arc<Mutex<String>>,
    begun: Instant,
}

impl Screen {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let screen = Self {
            bar,
            last: Arc::default(),
            begun: Instant::now(),
        };
        screen.show_download(None, None);
        screen
    }

    fn line(&self, what: &str, text: &str) {
        let since = self.begun.elapsed().as_secs();
        self.bar
            .suspend(|| println!("{since:>5} s  {what:<12} {text}"));
    }

    /// A JSON log line of the plugin: warnings and progress are shown, the rest is the status.
    fn log(&self, line: &str) {
        let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let field = |name: &str| parsed.get(name).and_then(serde_json::Value::as_str);
        let Some(message) = field("@message") else {
            self.line("log", line);
            return;
        };
        let level = field("@level").unwrap_or("info");
        if ["debug", "trace"].contains(&level) {
            return;
        }
        let instance = field("instance")
            .map(|id| format!("{id}: "))
            .unwrap_or_default();
        let text = format!("{instance}{message}");
        let number = |name: &str| parsed.get(name).and_then(serde_json::Value::as_u64);
        self.show_download(number("done_bytes"), number("total_bytes"));
        if level == "info" && !self.bar.is_hidden() {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = text;
            self.tick();
        } else {
            self.line(level, &text);
        }
    }

    /// A bar while bytes come, a line again as soon as the plugin is at something else.
    fn show_download(&self, done: Option<u64>, total: Option<u64>) {
        let template = match (done, total) {
            (Some(done), Some(total)) => {
                self.bar.set_length(total);
                self.bar.set_position(done);
                DOWNLOAD
            }
            _ => STATUS,
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }

    fn tick(&self) {
        let last = self
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        self.bar.set_message(last);
        self.bar.tick();
    }

    fn done(&self) {
        self.bar.finish_and_clear();
    }
}

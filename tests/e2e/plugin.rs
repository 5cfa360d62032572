//! A plugin process as its runner sees it, and machines as their jobs do.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use fleetingd::plugin::client::PluginClient;
use fleetingd::plugin::config::Source;
use fleetingd::plugin::generated::fleeting::update_response::State;
use fleetingd::pool::keys::KeyPair;
use fleetingd::pool::ssh::{Credential, SshSession, SshTarget};

use crate::host::{self, Process};
use crate::{BOOT_PATIENCE, PATIENCE, say};

/// As the example config has it.
const POLL: Duration = Duration::from_millis(100);
const SSH_PORT: u16 = 22;

/// A plugin after its Init.
pub struct Plugin {
    pub client: PluginClient,
    /// What began the handshake: the plugin, or what started it.
    pub started: Process,
    pub group: String,
    log: Log,
}

/// What a plugin said, each line as level and message.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn take(&self, name: &str, line: &str) {
        let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let field = |key: &str| parsed.get(key).and_then(serde_json::Value::as_str);
        let text = field("@message").unwrap_or(line).to_owned();
        let instance = field("instance").unwrap_or_default();
        if ["warn", "error"].contains(&field("@level").unwrap_or("error")) {
            say(format_args!("  {name} says: {instance} {text}"));
        }
        self.lines().push(text);
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plugin {
    /// Starts `executable`, which is the plugin or starts it, and initialises it.
    pub async fn start(
        name: &'static str,
        executable: &Path,
        source: &Source,
    ) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let log = Log::default();
        let client = {
            let log = log.clone();
            PluginClient::start(executable, move |line| log.take(name, line)).await?
        };
        let handshake = begun.elapsed();
        let started = Process(client.id().context("the plugin ended at once")?);
        let init = client.init(source).await?;
        say(format_args!(
            "  {name}: handshake in {} ms, init in {} ms, group {}, room for {}",
            handshake.as_millis(),
            (begun.elapsed() - handshake).as_millis(),
            init.id,
            init.max_size
        ));
        Ok(Self {
            client,
            started,
            group: init.id,
            log,
        })
    }

    /// The name of its nftables tables; its group has the same number.
    pub fn table(&self) -> String {
        let digits = self.group.trim_start_matches(|c: char| !c.is_ascii_digit());
        format!("fleetingd_{digits}")
    }

    /// Asks for machines and waits until each is logged in to.
    pub async fn machines(&self, n: u32) -> anyhow::Result<Vec<Machine>> {
        let asked = Instant::now();
        let known = self.ids(State::Running).await?;
        let accepted = self.client.increase(n).await?;
        ensure!(accepted == n, "{accepted} of {n} machines were accepted");
        let ids = loop {
            let mut running = self.ids(State::Running).await?;
            running.retain(|id| !known.contains(id));
            if running.len() == usize::try_from(n)? {
                break running;
            }
            let gone = self.ids(State::Deleted).await?;
            ensure!(gone.is_empty(), "{gone:?} did not come up");
            ensure!(asked.elapsed() < BOOT_PATIENCE, "only {running:?} came up");
            tokio::time::sleep(POLL).await;
        };
        say(format_args!(
            "  {ids:?} Running after {:.1} s",
            asked.elapsed().as_secs_f64()
        ));
        let mut machines = Vec::new();
        for id in ids {
            machines.push(Machine::open(&self.client, &id).await?);
        }
        Ok(machines)
    }

    async fn ids(&self, state: State) -> anyhow::Result<Vec<String>> {
        let known = self.client.update().await?.into_iter();
        let wanted = known.filter(|instance| instance.state == state);
        Ok(wanted.map(|instance| instance.id).collect())
    }

    /// Polls until each machine was told of as Deleted; none may be anything but Running before.
    pub async fn wait_until_deleted(&self, ids: &[String]) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut waiting = ids.to_vec();
        while !waiting.is_empty() {
            ensure!(begun.elapsed() < PATIENCE, "{waiting:?} are still there");
            let known = self.client.update().await?;
            for id in std::mem::take(&mut waiting) {
                match known.iter().find(|one| one.id == id).map(|one| one.state) {
                    Some(State::Deleted) => say(format_args!(
                        "  {id} is Deleted after {:.1} s",
                        begun.elapsed().as_secs_f64()
                    )),
                    Some(State::Running) => waiting.push(id),
                    other => bail!("{id} is {other:?}"),
                }
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Waits for a line of the log that holds `text`, and returns it.
    pub async fn log_line(&self, text: &str, within: Duration) -> anyhow::Result<String> {
        let begun = Instant::now();
        loop {
            if let Some(line) = self.log.lines().iter().find(|line| line.contains(text)) {
                return Ok(line.clone());
            }
            ensure!(begun.elapsed() < within, "no {text:?} in the log");
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks the process to end, as a runner does after Shutdown.
    pub async fn end(self) -> anyhow::Result<()> {
        let status = self.client.end().await?;
        ensure!(status.success(), "the plugin ended with {status}");
        Ok(())
    }

    /// Kills it, and returns when it is reaped.
    pub async fn kill(self) -> anyhow::Result<()> {
        self.started.kill()?;
        // Nobody is left to answer: this only waits.
        self.client.end().await?;
        Ok(())
    }
}

/// A running machine and a session in it.
pub struct Machine {
    pub id: String,
    pub address: Ipv4Addr,
    /// The host's end of its link.
    pub gateway: Ipv4Addr,
    /// The host's interface of its link.
    pub tap: String,
    pub target: SshTarget,
    session: SshSession,
}

impl Machine {
    async fn open(client: &PluginClient, id: &str) -> anyhow::Result<Self> {
        let info = client.connect_info(id).await?;
        let connector = info.connector.context("no connector in ConnectInfo")?;
        let address: Ipv4Addr = info.internal_addr.parse()?;
        let gateway = Ipv4Addr::from(u32::from(address) - 1);
        let key = KeyPair::from_pem(std::str::from_utf8(&connector.key)?)?;
        let target = SshTarget {
            address: SocketAddr::from((address, SSH_PORT)),
            username: connector.username,
            credential: Credential::Key(key.private),
            host_key: None,
        };
        Ok(Self {
            id: id.to_owned(),
            address,
            gateway,
            tap: host::interface_of(gateway)?,
            session: tokio::time::timeout(PATIENCE, SshSession::open(&target))
                .await
                .with_context(|| format!("{id}: its login takes too long"))??,
            target,
        })
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub async fn run(&mut self, command: &str) -> anyhow::Result<String> {
        let output = tokio::time::timeout(PATIENCE, self.session.run(command))
            .await
            .with_context(|| format!("{}: {command:?} takes too long", self.id))??;
        ensure!(
            output.status == Some(0),
            "{}: {command:?} ended with {:?}: {}",
            self.id,
            output.status,
            output.text
        );
        Ok(output.text.trim_end().to_owned())
    }

    /// Runs a Python program as root.
    pub async fn python(&mut self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let arguments = arguments.join(" ");
        self.run(&format!(
            "sudo -n python3 - {arguments} <<'PROGRAM'\n{program}\nPROGRAM"
        ))
        .await
    }
}

//! The one task that feeds the brain and carries out what it decides.
//!
//! It never waits for a machine, a file or a child: that is done by tasks of their own, which
//! report back by messages. So each call of the runner is answered from memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::brain::{self, Action, Answer, Event, Limits, MemoryLevel, Pause, State, Why};
use super::builder::{BuildError, Current};
use super::control::server::Server;
use super::host::Host;
use super::ids::IdSource;
use super::machine;
use super::memory;
use super::metrics;
use super::operator;
use super::refresh;
use super::spec::{ConnectInfo, InstanceId, InstanceState, PoolError};
use super::status::{GroupStatus, InstanceStatus};
use super::view::{Glance, MachineView};
use crate::chain::chain;

/// How often the host's rules and idle slots are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// What reaches the driver.
#[derive(Debug)]
pub enum Message {
    Ask {
        event: Event,
        reply: oneshot::Sender<Answer>,
    },
    Tell(Event),
    ConnectInfo {
        id: String,
        reply: oneshot::Sender<Result<ConnectInfo, PoolError>>,
    },
    /// A machine answers over SSH.
    Ready {
        id: InstanceId,
        info: ConnectInfo,
    },
    /// `None` where machines need no image.
    ImageCurrent(Option<Arc<Current>>),
    /// What the driver knows for a status, and a look at each machine for what it does not.
    Status {
        reply: oneshot::Sender<(GroupStatus, Vec<Option<Glance>>)>,
    },
    Housekeeping,
    Close {
        reply: oneshot::Sender<()>,
    },
}

/// The driver's own memory: what the brain need not know.
pub struct Driver {
    state: State,
    host: Arc<Host>,
    current: Option<Arc<Current>>,
    machines: HashMap<InstanceId, Machine>,
    begun: Instant,
    inbox: mpsc::UnboundedReceiver<Message>,
    /// Weak, so that the pool ends with its last handle.
    outbox: mpsc::WeakUnboundedSender<Message>,
    closing: watch::Sender<bool>,
    waiting_for_close: Vec<oneshot::Sender<()>>,
    /// The operator's socket, open as long as the driver lives.
    control: Option<Server>,
}

struct Machine {
    stop: watch::Sender<bool>,
    info: Option<ConnectInfo>,
    view: Arc<MachineView>,
    generation: Option<String>,
}

impl Driver {
    /// Starts the task; it ends after `Close` or when the last sender is gone.
    pub fn spawn(host: Host) -> mpsc::UnboundedSender<Message> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let limits = Limits {
            max_size: host.max_size(),
            boot_timeout: host.spec().boot_timeout,
            refresh: host.spec().image_policy.refresh,
        };
        let host = Arc::new(host);
        metrics::start(&host, &sender.downgrade());
        let control = operator::open(&host, &sender.downgrade());
        let driver = Self {
            state: State::new(limits, IdSource::new(host.group())),
            host,
            current: None,
            machines: HashMap::new(),
            begun: Instant::now(),
            inbox,
            outbox: sender.downgrade(),
            closing: watch::channel(false).0,
            waiting_for_close: Vec::new(),
            control,
        };
        tokio::spawn(driver.run());
        sender
    }

    async fn run(mut self) {
        self.build();
        self.every(HOUSEKEEPING, || Message::Housekeeping);
        memory::watch(&self.host, self.outbox.clone(), self.closing.subscribe());
        while let Some(message) = self.inbox.recv().await {
            self.handle(message);
            if self.may_end() {
                break;
            }
        }
        self.end().await;
    }

    /// Closing, and nothing of the host is held any more.
    fn may_end(&self) -> bool {
        *self.closing.borrow() && self.state.occupied() == 0
    }

    async fn end(mut self) {
        // Reached by a lost last handle too: then nobody asked for a close yet.
        self.close();
        while self.state.occupied() > 0 {
            // Machine tasks keep a strong sender until they have released what they hold.
            let Some(message) = self.inbox.recv().await else {
                break;
            };
            self.handle(message);
        }
        self.host.close().await;
        // Whoever looks after the close finds no socket.
        drop(self.control.take());
        for waiting in self.waiting_for_close {
            // Whoever asked may have stopped waiting.
            let _gone = waiting.send(());
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Ask { event, reply } => {
                let answer = self.step(event);
                // The runner may have cancelled its call.
                let _cancelled = reply.send(answer);
            }
            Message::Tell(event) => {
                self.step(event);
            }
            Message::ConnectInfo { id, reply } => {
                let _cancelled = reply.send(self.connect_info(&id));
            }
            Message::Ready { id, info } => {
                if let Some(machine) = self.machines.get_mut(&id) {
                    machine.info = Some(info);
                    self.step(Event::Ready { id });
                }
            }
            Message::ImageCurrent(current) => {
                self.current = current;
                self.step(Event::ImageCurrent);
            }
            Message::Status { reply } => {
                let _cancelled = reply.send(self.status());
            }
            Message::Housekeeping => self.housekeeping(),
            Message::Close { reply } => {
                self.waiting_for_close.push(reply);
                self.close();
            }
        }
    }

    fn close(&mut self) {
        if !self.closing.send_replace(true) {
            self.step(Event::Shutdown);
        }
    }

    fn step(&mut self, event: Event) -> Answer {
        if let Event::Released { id, .. } = &event {
            self.machines.remove(id);
        }
        let asked = match &event {
            Event::Increase { n, .. } => *n,
            _ => 0,
        };
        let outcome = brain::step(&mut self.state, self.begun.elapsed(), event);
        for action in outcome.actions {
            self.act(action);
        }
        if let Answer::Accepted(accepted) = outcome.answer {
            self.host.counters.increase(asked, accepted);
        }
        outcome.answer
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Start { id, within } => self.start(id, within),
            Action::StartAfter { id, pause } => {
                self.after(jittered(pause), Message::Tell(Event::RetryDue { id }));
            }
            Action::Stop { id, why } => {
                if why == Why::OutOfMemory {
                    tracing::error!(
                        instance = %id,
                        "host is out of memory: ending the youngest machine; hint: a smaller vm_memory_mb or max_instances"
                    );
                }
                if let Some(machine) = self.machines.get(&id) {
                    machine.stop.send_replace(true);
                }
            }
            Action::Build => self.build(),
            Action::BuildAfter { pause, ticket, why } => {
                let pause = jittered(pause);
                if why == Pause::Failure {
                    tracing::warn!("next try to build the image in {} s", pause.as_secs());
                }
                self.after(pause, Message::Tell(Event::BuildDue { ticket }));
            }
            Action::GaveUp { id, attempts } => {
                tracing::error!(instance = %id, attempts, "giving up: the machine did not come up");
            }
            Action::Forget { id } => {
                self.machines.remove(&id);
            }
        }
    }

    fn start(&mut self, id: InstanceId, within: Duration) {
        let (stop, stopped) = watch::channel(false);
        let view = Arc::new(MachineView::default());
        let current = self.current.clone();
        let machine = Machine {
            stop,
            info: None,
            view: Arc::clone(&view),
            generation: current.as_ref().map(|c| c.generation.key.to_string()),
        };
        self.machines.insert(id.clone(), machine);
        let host = Arc::clone(&self.host);
        let Some(sender) = self.outbox.upgrade() else {
            return;
        };
        tokio::spawn(async move {
            let ready = {
                let (id, sender) = (id.clone(), sender.clone());
                move |info| {
                    // The driver outlives every machine task.
                    let _ended = sender.send(Message::Ready { id, info });
                }
            };
            let task = {
                let id = id.clone();
                tokio::spawn(async move {
                    let start = machine::Start {
                        id: id.as_str(),
                        within,
                        view: &view,
                    };
                    machine::run(&host, current.as_deref(), start, stopped, ready).await;
                })
            };
            if let Err(panic) = task.await {
                tracing::error!(instance = %id, "machine task failed: {panic}");
            }
            let _ended = sender.send(Message::Tell(Event::Released { id, retry: true }));
        });
    }

    /// Starts the image task. It tells what serves as soon as something does, and its end.
    fn build(&self) {
        let (host, closing) = (Arc::clone(&self.host), self.closing.subscribe());
        let outbox = self.outbox.clone();
        let serves = self.current.is_some();
        tokio::spawn(async move {
            let task = {
                let (host, outbox) = (Arc::clone(&host), outbox.clone());
                let serve = move |current| tell(&outbox, Message::ImageCurrent(current));
                tokio::spawn(async move { refresh::run(&host, serves, closing, &serve).await })
            };
            let failure = match task.await {
                Ok(Ok(())) => None,
                Ok(Err(BuildError::Closing)) => return,
                Ok(Err(error)) => Some(chain(&error)),
                Err(panic) => Some(format!("the task failed: {panic}")),
            };
            if let Some(reason) = &failure {
                tracing::error!("no new image: {reason}");
            }
            let (outcome, event) = match failure {
                Some(_) => ("failed", Event::ImageFailed),
                None => ("good", Event::ImageChecked),
            };
            host.counters.image(outcome);
            host.image.done(failure);
            tell(&outbox, Message::Tell(event));
        });
    }

    fn connect_info(&self, id: &str) -> Result<ConnectInfo, PoolError> {
        let unknown = || PoolError::Unknown { id: id.to_owned() };
        let state = self.state.state_of(id).ok_or_else(unknown)?;
        let machine = self.machines.get(&InstanceId(id.to_owned()));
        match (state, machine.and_then(|machine| machine.info.clone())) {
            (super::InstanceState::Running, Some(info)) => Ok(info),
            _ => Err(PoolError::NotRunning {
                id: id.to_owned(),
                state: format!("{state:?}").to_lowercase(),
            }),
        }
    }

    fn status(&self) -> (GroupStatus, Vec<Option<Glance>>) {
        let now = self.begun.elapsed();
        let mut instances = Vec::new();
        let mut glances = Vec::new();
        for (id, state, born) in self.state.instances() {
            let machine = self.machines.get(id);
            let glance = machine.map(|machine| machine.view.glance());
            let phase = glance.as_ref().map_or("queued", |glance| glance.phase);
            instances.push(InstanceStatus {
                id: id.to_string(),
                state: format!("{state:?}").to_lowercase(),
                phase: match state {
                    InstanceState::Deleted => String::new(),
                    _ => phase.to_owned(),
                },
                age_s: now.saturating_sub(born).as_secs(),
                address: glance.as_ref().and_then(|glance| glance.address),
                generation: machine.and_then(|machine| machine.generation.clone()),
                disk_delta_bytes: 0,
                memory_bytes: 0,
            });
            glances.push(glance);
        }
        let status = GroupStatus {
            group: self.host.group().to_owned(),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: now.as_secs(),
            store: self.host.spec().image_directory.clone(),
            max_size: self.host.max_size(),
            occupied: self.state.occupied(),
            host_memory: match self.state.memory_level() {
                MemoryLevel::Enough => "enough",
                MemoryLevel::Low => "low",
                MemoryLevel::Critical => "critical",
            }
            .to_owned(),
            image: self.host.image.get(),
            instances,
            counters: self.host.counters.get(),
            dropped_packets: BTreeMap::new(),
        };
        (status, glances)
    }

    fn housekeeping(&self) {
        let host = Arc::clone(&self.host);
        tokio::spawn(async move { host.look_after_network().await });
    }

    fn after(&self, pause: Duration, message: Message) {
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            tell(&outbox, message);
        });
    }

    fn every(&self, period: Duration, message: impl Fn() -> Message + Send + 'static) {
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(sender) = outbox.upgrade() else {
                    return;
                };
                if sender.send(message()).is_err() {
                    return;
                }
            }
        });
    }
}

/// Tells the driver, if it still lives.
fn tell(outbox: &mpsc::WeakUnboundedSender<Message>, message: Message) {
    if let Some(sender) = outbox.upgrade() {
        let _ended = sender.send(message);
    }
}

/// Up to a quarter longer, so that machines that failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(1.0 + rand::random::<f64>() / 4.0)
}

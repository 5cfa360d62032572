//! The one task that feeds the brain and carries out what it decides.
//!
//! It never waits for a machine, a file or a child: that is done by tasks of their own, which
//! report back by messages. So each call of the runner is answered from memory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

use super::brain::{self, Action, Answer, Event, Limits, State, Why};
use super::builder::{self, Current};
use super::host::Host;
use super::ids::IdSource;
use super::machine;
use super::memory;
use super::spec::{ConnectInfo, InstanceId, PoolError};

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
    Build,
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
}

struct Machine {
    stop: watch::Sender<bool>,
    info: Option<ConnectInfo>,
}

impl Driver {
    /// Starts the task; it ends after `Close` or when the last sender is gone.
    pub fn spawn(host: Host) -> mpsc::UnboundedSender<Message> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let limits = Limits {
            max_size: host.max_size(),
            boot_timeout: host.spec().boot_timeout,
        };
        let driver = Self {
            state: State::new(limits, IdSource::new(host.group())),
            host: Arc::new(host),
            current: None,
            machines: HashMap::new(),
            begun: Instant::now(),
            inbox,
            outbox: sender.downgrade(),
            closing: watch::channel(false).0,
            waiting_for_close: Vec::new(),
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
            Message::Build => self.build(),
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
        let outcome = brain::step(&mut self.state, self.begun.elapsed(), event);
        for action in outcome.actions {
            self.act(action);
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
            Action::BuildAfter { pause } => {
                tracing::warn!("next try to build the image in {} s", pause.as_secs());
                self.after(pause, Message::Build);
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
        let machine = Machine { stop, info: None };
        self.machines.insert(id.clone(), machine);
        let host = Arc::clone(&self.host);
        let current = self.current.clone();
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
                    machine::run(&host, current.as_deref(), &id, within, stopped, ready).await;
                })
            };
            if let Err(panic) = task.await {
                tracing::error!(instance = %id, "machine task failed: {panic}");
            }
            let _ended = sender.send(Message::Tell(Event::Released { id, retry: true }));
        });
    }

    fn build(&self) {
        let (host, closing) = (Arc::clone(&self.host), self.closing.subscribe());
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let built = tokio::spawn(async move { builder::obtain(&host, closing).await }).await;
            let message = match built {
                Ok(Ok(current)) => Message::ImageCurrent(current.map(Arc::new)),
                Ok(Err(builder::BuildError::Closing)) => return,
                Ok(Err(error)) => {
                    tracing::error!("no image: {}", super::host::chain(&error));
                    Message::Tell(Event::ImageFailed)
                }
                Err(panic) => {
                    tracing::error!("build task failed: {panic}");
                    Message::Tell(Event::ImageFailed)
                }
            };
            if let Some(sender) = outbox.upgrade() {
                let _ended = sender.send(message);
            }
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

    fn housekeeping(&self) {
        let host = Arc::clone(&self.host);
        tokio::spawn(async move { host.look_after_network().await });
    }

    fn after(&self, pause: Duration, message: Message) {
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            if let Some(sender) = outbox.upgrade() {
                let _ended = sender.send(message);
            }
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

/// Up to a quarter longer, so that machines that failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(1.0 + rand::random::<f64>() / 4.0)
}

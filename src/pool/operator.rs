//! What the operator's tool may ask of a running pool, each request answered by a task of its own.
//!
//! The driver gives what it knows at once; what takes time (a walk of the machines' memory, nft) is
//! done here, off its task.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::brain::{Answer, Event};
use super::builder::{self, BuildError};
use super::control::server::Server;
use super::control::{Request, Response};
use super::driver::Message;
use super::host::Host;
use super::refresh;
use super::status::GroupStatus;
use crate::agent;
use crate::chain::chain;
use crate::image::Lineage;

/// The operator's socket; a pool without one works, so that is a warning.
pub fn open(host: &Arc<Host>, outbox: &mpsc::WeakUnboundedSender<Message>) -> Option<Server> {
    let run_dir = host.run_directory()?;
    let carry_out = {
        let (host, outbox) = (Arc::downgrade(host), outbox.clone());
        move |request: Request| {
            let (host, outbox) = (host.upgrade(), outbox.upgrade());
            async move {
                let gone = || Response::Failed {
                    text: "the pool has ended".to_owned(),
                };
                match (host, outbox) {
                    (Some(host), Some(outbox)) => {
                        answer(&host, &outbox, request).await.unwrap_or_else(gone)
                    }
                    _ => gone(),
                }
            }
        }
    };
    Server::open(run_dir, host.group(), carry_out)
        .inspect_err(|e| tracing::warn!("no status socket in {}: {e}", run_dir.display()))
        .ok()
}

/// Carries a request out; `None` if the pool ends meanwhile.
pub async fn answer(
    host: &Arc<Host>,
    driver: &mpsc::UnboundedSender<Message>,
    request: Request,
) -> Option<Response> {
    match request {
        Request::Status => status(host, driver)
            .await
            .map(|status| Response::Status(Box::new(status))),
        Request::Refresh => look_now(driver).await,
        Request::Pin { .. } | Request::Unpin | Request::RollBack => {
            let ends = request == Request::Unpin;
            let changed = match change(host, driver, request).await {
                Ok(text) => Response::Done { text },
                Err(error) => Response::Failed {
                    text: chain(&error),
                },
            };
            // What is newest may have been built or missed meanwhile.
            if ends && matches!(changed, Response::Done { .. }) {
                look_now(driver).await?;
            }
            Some(changed)
        }
    }
}

/// Has the group serve another generation. Machines that run keep theirs.
async fn change(
    host: &Arc<Host>,
    driver: &mpsc::UnboundedSender<Message>,
    request: Request,
) -> Result<String, BuildError> {
    let _turn = host.serving.lock().await;
    let lineage = builder::inputs(host).map(|inputs| inputs.lineage());
    let lineage = lineage.ok_or(BuildError::Closing)?;
    let of_use =
        move |other: &Lineage| other.same_login(&lineage) && agent::speaks(other.agent_protocol);
    let (found, pinned) = refresh::with_store(host, move |store, group| match request {
        Request::Pin { generation } => {
            let generation = store.resolve(&generation)?;
            if !of_use(&generation.lineage) {
                return Err(BuildError::OtherLogin {
                    generation: generation.key.to_string(),
                });
            }
            store.pin(group, Some(&generation))?;
            Ok((Some(generation), true))
        }
        Request::RollBack => Ok((Some(store.roll_back(group, &of_use)?), true)),
        _ => {
            let record = store.pin(group, None)?;
            let serving = store.serving(&record)?;
            Ok((serving.filter(|g| of_use(&g.lineage)), false))
        }
    })
    .await?;
    let mut text = "no image is pinned any more".to_owned();
    if let Some(generation) = found {
        let name = generation.key.to_string();
        host.image.serves(&name, pinned);
        let current = refresh::open(generation)?;
        // A driver that is gone serves nothing any more.
        let _gone = driver.send(Message::ImageCurrent(Some(current)));
        text.push_str(&format!("; new machines start from {name}"));
        if pinned {
            text = format!("new machines start from {name} until `fleetingd images pin --off`");
        }
        tracing::info!(generation = name, pinned, "the operator chose an image");
    }
    Ok(text)
}

/// All of a pool's status.
pub async fn status(
    host: &Arc<Host>,
    driver: &mpsc::UnboundedSender<Message>,
) -> Option<GroupStatus> {
    let (reply, answer) = oneshot::channel();
    driver.send(Message::Status { reply }).ok()?;
    let (mut status, glances) = answer.await.ok()?;
    let measured = tokio::task::spawn_blocking(move || {
        for (instance, glance) in status.instances.iter_mut().zip(glances) {
            if let Some(stats) = glance.and_then(|glance| glance.stats()) {
                instance.memory_bytes = stats.resident_bytes;
                instance.disk_delta_bytes = stats.disk_delta_bytes;
            }
        }
        status
    });
    status = measured.await.ok()?;
    if let Some(machines) = host.machines() {
        // Made under the lock, run without it: starts wait for that lock.
        let drops = machines.net.lock().await.as_ref().map(|net| net.drops());
        if let Some(drops) = drops {
            status.dropped_packets = drops.await;
        }
    }
    Some(status)
}

async fn look_now(driver: &mpsc::UnboundedSender<Message>) -> Option<Response> {
    let (reply, answer) = oneshot::channel();
    let event = Event::RefreshNow;
    driver.send(Message::Ask { event, reply }).ok()?;
    let text = match answer.await.ok()? {
        Answer::Refresh(true) => "looking for a newer image",
        _ => "the image is being looked after already",
    };
    Some(Response::Done {
        text: text.to_owned(),
    })
}

//! What the operator's tool may ask of a running pool, each request answered by a task of its own.
//!
//! The driver gives what it knows at once; what takes time (a walk of the machines' memory, nft) is
//! done here, off its task.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::brain::{Answer, Event};
use super::control::server::Server;
use super::control::{Request, Response};
use super::driver::Message;
use super::host::Host;
use super::status::GroupStatus;

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
        Request::Refresh => refresh(driver).await,
    }
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

async fn refresh(driver: &mpsc::UnboundedSender<Message>) -> Option<Response> {
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

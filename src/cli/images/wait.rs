//! Waits for image tasks of running plugins and shows what they are at.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;

use super::Asked;
use crate::cli::progress::Progress;
use crate::cli::status::short;
use crate::pool::control::{Request, Response};
use crate::pool::status::{GroupStatus, IDLE};

/// How often a plugin is asked.
const POLL: Duration = Duration::from_millis(500);

/// Waits until each plugin's image task is over; an error if one failed or went away.
pub fn until_over(asked: &[Asked]) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for (peer, before) in asked {
        let progress = Progress::new(&format!("group {}", peer.group));
        let over = loop {
            let Some(Response::Status(now)) = peer.ask(&Request::Status)? else {
                bail!("the plugin of group {} has ended", peer.group);
            };
            if now.image.phase == IDLE && tasks(&now) > tasks(before) {
                break now;
            }
            progress.show(&now.image.phase, &now.image.detail);
            std::thread::sleep(POLL);
        };
        let serves = over.image.generation.as_deref().map_or("nothing", short);
        match (
            &over.image.last_error,
            over.image.generation == before.image.generation,
        ) {
            (Some(error), _) => failed.push(format!("group {}: {}", peer.group, error.text)),
            (None, true) => progress.line(&format!("nothing newer: {serves} goes on serving")),
            (None, false) => progress.line(&format!("new machines start from {serves}")),
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{}", failed.join("\n")),
    }
}

/// Image tasks that are over.
fn tasks(status: &GroupStatus) -> u64 {
    let images: &BTreeMap<String, u64> = &status.counters.images;
    let over = ["good", "failed"].iter();
    over.filter_map(|outcome| images.get(*outcome)).sum()
}

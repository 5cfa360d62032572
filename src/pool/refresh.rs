//! The image task: looks after what machines start from, once.
//!
//! ```text
//!  pinned? ──yes──> it serves, and that is all
//!     │ no
//!     ├─> nothing serves yet: the last generation that may stand in does, at once
//!     v
//!  in a registry? ──yes──> fetched, unless it is here ────────────────┐
//!     │ no                                                             v
//!  source ─> local file ─> key ─> sealed? ──no──> whose turn is it? ─> build
//!                                   │ yes                                │
//!                                   v                                    v
//!                           tested? ──no──> a worker must come up from it and answer
//!                                   │ yes                                │
//!                                   └──────> promoted: serves from now on, is remembered
//! ```
//!
//! Every step may fail and leaves what serves as it is; the brain decides when to try again. What
//! a group serves changes in one place, under one lock, so a promotion and an operator's pin never
//! overtake each other.

use std::sync::Arc;

use tokio::sync::watch;

use super::builder::{self, BuildError, Current};
use super::host::Host;
use super::spec::OnChange;
use super::status::epoch;
use super::{registry, vendor};
use crate::agent;
use crate::chain::chain;
use crate::image::{BuildInputs, Generation, ImageName, SourceError};

/// Is told what machines start from; `None` where they need no image.
pub type Serve<'a> = &'a (dyn Fn(Option<Arc<Current>>) + Send + Sync);

/// Looks after the image once. `serves` says whether machines have something to start from.
pub async fn run(
    host: &Arc<Host>,
    serves: bool,
    mut closing: watch::Receiver<bool>,
    serve: Serve<'_>,
) -> Result<(), BuildError> {
    let Some(mut inputs) = builder::inputs(host) else {
        serve(None);
        return Ok(());
    };
    host.image.enter("checking");
    if stand_in(host, &inputs, serves, serve).await? {
        return Ok(());
    }
    let (generation, outdated) = newest(host, &mut inputs, &mut closing).await?;
    promote(host, generation, serve).await?;
    tidy(host).await;
    // It serves what there is; that there may be something newer is to be seen, and tried again.
    match outdated {
        Some(reason) => Err(BuildError::Outdated(reason)),
        None => Ok(()),
    }
}

/// The tested generation of what there is newest, and why that may not be the newest of all.
pub async fn newest(
    host: &Arc<Host>,
    inputs: &mut BuildInputs,
    closing: &mut watch::Receiver<bool>,
) -> Result<(Generation, Option<SourceError>), BuildError> {
    if let ImageName::Registry(name) = &host.spec().image.image {
        let generation = registry::fetch(host, name, inputs, closing).await?;
        return Ok((proven(host, generation, closing).await?, None));
    }
    // Held until the build is done: its file stays that long.
    let mut image = vendor::local_image(host, closing).await?;
    inputs.image.clone_from(&image.path);
    let generation = obtain(host, &Arc::new(inputs.clone()), closing).await?;
    Ok((generation, image.outdated.take()))
}

/// Has serve what can at once; whether that is what the operator pinned.
async fn stand_in(
    host: &Arc<Host>,
    inputs: &BuildInputs,
    serves: bool,
    serve: Serve<'_>,
) -> Result<bool, BuildError> {
    let _turn = host.serving.lock().await;
    let lineage = inputs.lineage();
    let any_config = host.spec().image_policy.on_change == OnChange::Serve;
    let looked = with_store(host, move |store, group| {
        let record = store.group(group)?;
        if let Some(generation) = store.pinned(&record, &lineage, &agent::speaks)? {
            return Ok((Some(generation), true));
        }
        if let Some(name) = &record.pinned {
            tracing::warn!(
                "the pinned image {name} is not there or of no use; hint: fleetingd images pin"
            );
        }
        let standby = match serves {
            true => None,
            false => store.standby(&record, &lineage, any_config, &agent::speaks)?,
        };
        Ok((standby, false))
    })
    .await;
    let (found, pinned) = match looked {
        Ok(found) => found,
        // What may stand in is a help; without it machines wait for the build.
        Err(error) => {
            tracing::warn!("no image stands in: {}", chain(&error));
            return Ok(false);
        }
    };
    if let Some(generation) = found {
        let current = open(generation)?;
        host.image.serves(current.generation.key.as_str(), pinned);
        serve(Some(current));
    }
    Ok(pinned)
}

/// The tested generation of these inputs, found or made.
async fn obtain(
    host: &Arc<Host>,
    inputs: &Arc<BuildInputs>,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    let find = |inputs: &Arc<BuildInputs>| {
        let inputs = Arc::clone(inputs);
        with_store(host, move |store, _group| {
            let key = inputs.key(store)?;
            Ok(store.find(&key)?)
        })
    };
    let generation = match find(inputs).await? {
        Some(generation) => generation,
        None => {
            let lock = builder::turn(host, closing).await?;
            // Whoever had the turn before may have built just this.
            match find(inputs).await? {
                Some(generation) => generation,
                None => builder::build(host, lock, inputs, closing).await?,
            }
        }
    };
    proven(host, generation, closing).await
}

/// The same generation once a worker has come up from it.
async fn proven(
    host: &Arc<Host>,
    mut generation: Generation,
    closing: &mut watch::Receiver<bool>,
) -> Result<Generation, BuildError> {
    if !generation.tested {
        host.image.enter("testing");
        let current = open(generation)?;
        builder::smoke_test(host, &current, closing).await?;
        generation = current.generation.clone();
        generation.tested = true;
        let tested = generation.clone();
        with_store(host, move |store, _group| Ok(store.mark_tested(&tested)?)).await?;
    }
    Ok(generation)
}

/// It serves from now on, unless the operator pinned another one meanwhile.
async fn promote(
    host: &Arc<Host>,
    generation: Generation,
    serve: Serve<'_>,
) -> Result<(), BuildError> {
    let _turn = host.serving.lock().await;
    let keep = host.spec().image_policy.keep;
    let promoted = generation.clone();
    let record = with_store(host, move |store, group| {
        Ok(store.promote(group, &promoted, keep, epoch())?)
    })
    .await?;
    let key = generation.key.as_str();
    if record.serving() != Some(key) {
        tracing::info!(generation = key, "image is ready; another one is pinned");
        return Ok(());
    }
    if host.image.get().generation.as_deref() != Some(key) {
        tracing::info!(generation = key, "image is ready");
        for warning in &generation.warnings {
            tracing::warn!("prebuild: {warning}");
        }
    }
    host.image.serves(key, false);
    serve(Some(open(generation)?));
    Ok(())
}

/// Removes generations that nobody uses or keeps.
async fn tidy(host: &Arc<Host>) {
    let removed = with_store(host, |store, _group| {
        let lock = store.try_build_lock()?;
        Ok(store.collect_garbage(lock.as_ref(), epoch())?)
    });
    match removed.await {
        Ok(names) if names.is_empty() => {}
        Ok(names) => tracing::info!("removed what no machine uses: {}", names.join(", ")),
        Err(e) => tracing::warn!("tidy the image store: {}", chain(&e)),
    }
}

/// A generation as machines use it: its disk open, once for all of them.
pub fn open(generation: Generation) -> Result<Arc<Current>, BuildError> {
    let base = Arc::new(generation.open_disk()?);
    Ok(Arc::new(Current { generation, base }))
}

/// Works with the store on a thread that may block; the closure also gets the group's name.
pub async fn with_store<T: Send + 'static>(
    host: &Arc<Host>,
    work: impl FnOnce(&crate::image::Store, &str) -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    let host = Arc::clone(host);
    builder::blocking(move || {
        let store = host.store().ok_or(BuildError::Closing)?;
        work(store, host.group())
    })
    .await
}

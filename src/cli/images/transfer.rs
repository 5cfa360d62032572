//! `fleetingd images push` and `pull`: images to and from registries.
#![expect(clippy::print_stdout, reason = "this is the answer")]

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, bail};

use super::{ImagesArgs, Wanted, directories, directories_text, open, running};
use crate::cli::progress::Progress;
use crate::cli::status::short;
use crate::image::registry::{
    self, Access, Expected, Pulled, RegistryName, TransferProgress, Trust,
};
use crate::image::{Generation, Store};
use crate::pool::status::epoch;

/// Puts an image into a registry.
pub fn push(
    args: &ImagesArgs,
    name: &RegistryName,
    image: Option<&str>,
    sign_key: Option<&Path>,
) -> anyhow::Result<()> {
    let (store, wanted) = only_store(args)?;
    let generation = match image {
        Some(prefix) => store.resolve(prefix)?,
        None => serving(&store, wanted.group.as_deref())?,
    };
    let what = format!("image {}", short(generation.key.as_str()));
    let pushed = shown(&what, "sending", |tell| {
        let access = Access::of_host();
        runtime()?.block_on(async {
            Ok(registry::push(name, &generation, sign_key, &access, tell).await?)
        })
    })?;
    let (sent, there) = (pushed.sent_bytes >> 20, pushed.there_bytes >> 20);
    println!("{what} is {name} now: {sent} MiB sent, {there} MiB were there");
    println!("digest: {}", pushed.digest);
    if sign_key.is_none() {
        println!("it is not signed: other hosts need its digest in vm_image");
    }
    Ok(())
}

/// Fetches an image into the store.
pub fn pull(args: &ImagesArgs, name: &RegistryName, group: Option<&str>) -> anyhow::Result<()> {
    let (store, wanted) = only_store(args)?;
    let group = group.or(wanted.group.as_deref());
    let group = match group {
        Some(group) => Some(group.to_owned()),
        None => only_group(&store)?,
    };
    let pulled = shown(&name.to_string(), "fetching", |tell| {
        let (access, expected) = (Access::of_host(), Expected::of_host());
        runtime()?.block_on(async {
            Ok(registry::pull(name, &store, Trust::Later, &expected, &access, tell).await?)
        })
    })?;
    let (generation, how) = match pulled {
        Pulled::Present(generation) => (*generation, "was here already"),
        Pulled::Fetched(fetched) => (fetched.adopt_unasked(&store)?, "is here now"),
    };
    println!("image {} {how}", generation.key);
    match group {
        Some(group) => {
            store.keep_prebuilt(&group, &generation, epoch())?;
            println!("it stays for group {group}");
        }
        None => println!("the next tidying removes it, unless a group keeps it: --group"),
    }
    Ok(())
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Runtime::new().context("cannot start")
}

/// The one store in question, which is there already.
fn only_store(args: &ImagesArgs) -> anyhow::Result<(Store, Wanted)> {
    let wanted = Wanted::read(args.config.as_deref())?;
    let stores = directories(&wanted, &running(args)?);
    match &stores[..] {
        [directory] => Ok((open(directory)?, wanted)),
        several => bail!(
            "which images: those in {}? hint: --config FILE",
            directories_text(several)
        ),
    }
}

/// What the group's machines start from, by its record.
fn serving(store: &Store, group: Option<&str>) -> anyhow::Result<Generation> {
    let mut found: Vec<Generation> = Vec::new();
    for record in store.groups()? {
        if group.is_none_or(|group| group == record.group)
            && let Some(generation) = store.serving(&record)?
            && found.iter().all(|other| other.key != generation.key)
        {
            found.push(generation);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(generation), true) => Ok(generation),
        (None, _) => bail!("no image serves; hint: name one of `fleetingd images list`"),
        (Some(_), false) => {
            bail!("several images serve; hint: name one of `fleetingd images list`")
        }
    }
}

/// The group that keeps images here, if there is just one.
fn only_group(store: &Store) -> anyhow::Result<Option<String>> {
    let mut groups = store.groups()?;
    let only = groups.pop().filter(|_last| groups.is_empty());
    Ok(only.map(|record| record.group))
}

/// Does something that tells how far it is, and shows that.
fn shown<T>(
    what: &str,
    phase: &str,
    work: impl FnOnce(registry::Tell<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let progress = Mutex::new(Progress::new(what));
    let tell = |now: TransferProgress| {
        if let Ok(progress) = progress.lock() {
            let (done, total) = (now.done_bytes >> 20, now.total_bytes >> 20);
            progress.show(phase, &format!("{done} of {total} MiB"));
        }
    };
    work(&tell)
}

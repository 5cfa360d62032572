//! `fleetingd images`: what was prepared, what serves, and how to change that.
//!
//! What a running plugin serves is changed by asking it over its socket; everything else is done
//! on the store, under its locks, whether or not a plugin runs.
#![expect(clippy::print_stdout, reason = "this is the answer")]

mod list;
mod transfer;
mod wait;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

use super::status::ask_all;
use crate::image::Store;
use crate::image::registry::RegistryName;
use crate::net;
use crate::plugin::config::Source;
use crate::pool::control::client::{Peer, peers};
use crate::pool::control::{Request, Response};
use crate::pool::status::{GroupStatus, epoch};

/// Where images lie if neither a configuration nor a running plugin says so.
const DEFAULT_DIRECTORY: &str = "/var/lib/fleetingd";

/// See and change the images that machines start from
///
/// Exit codes: 0 done, 1 failed, 2 usage.
#[derive(Debug, clap::Args)]
pub struct ImagesArgs {
    #[command(subcommand)]
    command: Command,
    /// Take the image directory from this file, as for `try`; else it is that of the running
    /// plugins, else /var/lib/fleetingd
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Where the plugins' sockets are
    #[arg(long, value_name = "DIR", default_value = net::RUN_DIR, hide = true, global = true)]
    run_directory: PathBuf,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List prepared images and who uses them
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Have running plugins look for a newer image now, and wait for the outcome
    Refresh {
        /// Only this group
        #[arg(long)]
        group: Option<String>,
        /// Do not wait
        #[arg(long)]
        no_wait: bool,
    },
    /// Go back to the image that served before, and stay there
    Rollback {
        /// Which group, where there are several
        #[arg(long)]
        group: Option<String>,
    },
    /// Stay on one image whatever is newer
    Pin {
        /// The image, by the first digits of its name
        #[arg(required_unless_present = "off", conflicts_with = "off")]
        image: Option<String>,
        /// Follow the newest image again
        #[arg(long)]
        off: bool,
        /// Which group, where there are several
        #[arg(long)]
        group: Option<String>,
    },
    /// Remove images that no machine uses and nobody wants back
    Gc,
    /// Put an image into a registry, for other hosts
    Push {
        /// REGISTRY/NAME:TAG
        name: RegistryName,
        /// The image, by the first digits of its name; else the one that serves
        image: Option<String>,
        /// Sign it with the OpenPGP secret key in this file, which has no passphrase
        #[arg(long, value_name = "FILE")]
        sign_key: Option<PathBuf>,
    },
    /// Fetch an image from a registry, for `vm_image = "oci://...@sha256:..."`
    Pull {
        /// REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST
        name: RegistryName,
        /// Keep it for this group, where there are several
        #[arg(long)]
        group: Option<String>,
    },
}

/// Runs the command.
pub fn run(args: &ImagesArgs) -> ExitCode {
    let result = match &args.command {
        Command::List { json } => list(args, *json),
        Command::Refresh { group, no_wait } => refresh(args, group.as_deref(), !no_wait),
        Command::Rollback { group } => change(args, group.as_deref(), &Request::RollBack),
        Command::Pin { image, group, .. } => {
            let request = match image.clone() {
                Some(generation) => Request::Pin { generation },
                None => Request::Unpin,
            };
            change(args, group.as_deref(), &request)
        }
        Command::Gc => collect(args),
        Command::Push {
            name,
            image,
            sign_key,
        } => transfer::push(args, name, image.as_deref(), sign_key.as_deref()),
        Command::Pull { name, group } => transfer::pull(args, name, group.as_deref()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => super::fail(&error, ExitCode::FAILURE),
    }
}

/// What of a configuration file is of use here.
#[derive(Debug, Default)]
struct Wanted {
    directory: Option<PathBuf>,
    group: Option<String>,
}

impl Wanted {
    fn read(config: Option<&Path>) -> anyhow::Result<Self> {
        let Some(path) = config else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let source = Source::from_toml(&text)?;
        let keys = ["image_directory", "vm_disk_directory"];
        let directory = keys.iter().find_map(|key| source.text(key));
        Ok(Self {
            directory: Some(directory.unwrap_or(DEFAULT_DIRECTORY).into()),
            group: source.text("group_name").map(str::to_owned),
        })
    }
}

/// The stores in question: the configuration's, else those of running plugins, else the default.
fn directories(wanted: &Wanted, running: &[GroupStatus]) -> Vec<PathBuf> {
    if let Some(directory) = &wanted.directory {
        return vec![directory.clone()];
    }
    let mut stores: Vec<PathBuf> = running.iter().map(|group| group.store.clone()).collect();
    stores.sort();
    stores.dedup();
    if stores.is_empty() {
        stores.push(DEFAULT_DIRECTORY.into());
    }
    stores
}

/// Opens a store that is there; one that is not is not made.
fn open(directory: &Path) -> anyhow::Result<Store> {
    ensure!(
        directory.is_dir(),
        "no images in {}: it is not there; hint: --config FILE",
        directory.display()
    );
    Ok(Store::open(directory)?)
}

fn running(args: &ImagesArgs) -> anyhow::Result<Vec<GroupStatus>> {
    let (groups, failures) = ask_all(&args.run_directory)?;
    for failure in &failures {
        super::fail(failure, ExitCode::FAILURE);
    }
    Ok(groups)
}

fn list(args: &ImagesArgs, json: bool) -> anyhow::Result<()> {
    let running = running(args)?;
    let wanted = Wanted::read(args.config.as_deref())?;
    let mut images = Vec::new();
    for directory in directories(&wanted, &running) {
        images.extend(list::images(&open(&directory)?, &running)?);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&images)?);
    } else if images.is_empty() {
        println!("no image is prepared yet");
    } else {
        print!("{}", list::table(&images, epoch()));
    }
    Ok(())
}

fn refresh(args: &ImagesArgs, group: Option<&str>, wait: bool) -> anyhow::Result<()> {
    let mut asked = Vec::new();
    for peer in peers(&args.run_directory)? {
        if group.is_some_and(|group| group != peer.group) {
            continue;
        }
        let Some(Response::Status(before)) = peer.ask(&Request::Status)? else {
            continue;
        };
        if let Some(response) = peer.ask(&Request::Refresh)? {
            println!("group {}: {}", peer.group, done(&peer.group, response)?);
            asked.push((peer, before));
        }
    }
    match (asked.is_empty(), group) {
        (true, None) => bail!(
            "no plugin runs on this host; hint: fleetingd prebuild prepares an image without one"
        ),
        (true, Some(group)) => bail!("no plugin of group {group} runs; hint: fleetingd status"),
        (false, _) if wait => wait::until_over(&asked),
        _ => Ok(()),
    }
}

/// Changes what a group serves: by its plugin where one runs, else in its record.
fn change(args: &ImagesArgs, group: Option<&str>, request: &Request) -> anyhow::Result<()> {
    let running = running(args)?;
    let wanted = Wanted::read(args.config.as_deref())?;
    let directories = directories(&wanted, &running);
    let mut candidates: Vec<String> = running.iter().map(|status| status.group.clone()).collect();
    if candidates.is_empty() {
        for directory in &directories {
            candidates.extend(open(directory)?.groups()?.into_iter().map(|r| r.group));
        }
    }
    let group = match (group.or(wanted.group.as_deref()), &candidates[..]) {
        (Some(group), _) => group.to_owned(),
        (None, [only]) => only.clone(),
        (None, []) => bail!(
            "no group has an image in {}",
            directories_text(&directories)
        ),
        (None, several) => bail!("which group: {}? hint: --group", several.join(", ")),
    };
    let mut all = peers(&args.run_directory)?;
    all.retain(|peer| peer.group == group);
    for peer in all {
        if let Some(response) = peer.ask(request)? {
            println!("group {group}: {}", done(&group, response)?);
            return Ok(());
        }
    }
    let [directory] = &directories[..] else {
        bail!("no plugin of group {group} runs; hint: --config FILE says whose images these are");
    };
    println!(
        "group {group}: {}",
        change_record(&open(directory)?, &group, request)?
    );
    Ok(())
}

/// For a group whose plugin does not run: what it will serve from its next start.
fn change_record(store: &Store, group: &str, request: &Request) -> anyhow::Result<String> {
    let pinned = match request {
        Request::Pin { generation } => {
            let generation = store.resolve(generation)?;
            store.pin(group, Some(&generation))?;
            generation
        }
        Request::RollBack => store.roll_back(group, &|_lineage| true)?,
        _ => {
            store.pin(group, None)?;
            return Ok("no image is pinned any more".to_owned());
        }
    };
    Ok(format!(
        "its machines will start from {} when its plugin runs, until `fleetingd images pin --off`",
        pinned.key
    ))
}

fn collect(args: &ImagesArgs) -> anyhow::Result<()> {
    let wanted = Wanted::read(args.config.as_deref())?;
    for directory in directories(&wanted, &running(args)?) {
        let store = open(&directory)?;
        let lock = store.try_build_lock()?;
        if lock.is_none() {
            println!("an image is being built: what builds left behind stays for now");
        }
        let removed = store.collect_garbage(lock.as_ref(), epoch())?;
        for name in &removed {
            println!(
                "removed {}",
                directory.join("generations").join(name).display()
            );
        }
        if removed.is_empty() {
            println!("nothing to remove in {}", directory.display());
        }
    }
    Ok(())
}

fn done(group: &str, response: Response) -> anyhow::Result<String> {
    match response {
        Response::Done { text } => Ok(text),
        Response::Failed { text } => bail!("group {group}: {text}"),
        Response::Status(_) => bail!("group {group}: an answer to another question"),
    }
}

fn directories_text(directories: &[PathBuf]) -> String {
    let names: Vec<String> = directories
        .iter()
        .map(|d| d.display().to_string())
        .collect();
    names.join(", ")
}

/// A running plugin and its status before it was asked.
type Asked = (Peer, Box<GroupStatus>);

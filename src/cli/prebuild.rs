//! `fleetingd prebuild`: prepares the image of a configuration without a runner.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command shows what it does"
)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::boot::terminal::{self, RawTerminal};
use super::progress::Progress;
use super::table::duration;
use crate::image::RunnerSource;
use crate::plugin::config::{Host, Source};
use crate::plugin::installed_runner;
use crate::pool::{Onlooker, PoolSpec, PrebuildError, Prebuilt};
use crate::vmm::VmHandle;

/// Exit code of a configuration or a host with which no build can begin.
const SETUP_FAILED: u8 = 3;

/// Prepare the image of a configuration, as a plugin's first start would
///
/// It is built in a machine and proven by another one, unless it is there already. A plugin of the
/// same configuration then starts at once.
///
/// Exit codes: 0 the image is there, 1 the build failed, 2 usage, 3 set-up.
#[derive(Debug, clap::Args)]
pub struct PrebuildArgs {
    /// TOML with the keys of plugin_config, or gitlab-runner's config.toml, whose first
    /// [[runners]] with this plugin is taken
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/gitlab-runner/config.toml"
    )]
    config: PathBuf,
    /// Have the machine's console on this terminal; what is typed goes to the machine
    #[arg(long)]
    console: bool,
}

/// Runs the command.
pub fn run(args: &PrebuildArgs) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => return super::fail(&e.into(), ExitCode::from(SETUP_FAILED)),
    };
    let setup = ExitCode::from(SETUP_FAILED);
    let begun = Instant::now();
    let spec = match runtime.block_on(configured(args)) {
        Ok(spec) => spec,
        Err(error) => return super::fail(&error, setup),
    };
    let directory = spec.image_directory.display().to_string();
    match runtime.block_on(prepare(spec, args.console)) {
        Ok(prebuilt) => {
            let spent = duration(begun.elapsed().as_secs());
            let how = match prebuilt.built {
                true => format!("built in {spent}"),
                false => "was there already".to_owned(),
            };
            println!("image {} in {directory}: {how}", prebuilt.generation.key);
            for warning in &prebuilt.generation.warnings {
                eprintln!("warning: prebuild: {warning}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            let of_host = matches!(
                error.downcast_ref::<PrebuildError>(),
                Some(PrebuildError::Host(_))
            );
            super::fail(&error, if of_host { setup } else { ExitCode::FAILURE })
        }
    }
}

/// The configuration as a plugin that a runner starts would have it.
async fn configured(args: &PrebuildArgs) -> anyhow::Result<PoolSpec> {
    let path = args.config.display();
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {path}; hint: --config FILE"))?;
    let source = Source::from_toml(&text)?;
    let runner = match source.sets("vm_runner_binary") {
        true => None,
        false => installed_runner().await,
    };
    let config = source.check(&Host {
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        runner: runner.map_or(RunnerSource::Package, RunnerSource::Binary),
    })?;
    for warning in config.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(config.pool)
}

async fn prepare(spec: PoolSpec, console: bool) -> anyhow::Result<Prebuilt> {
    let (close, closing) = watch::channel(false);
    let close = Arc::new(close);
    end_on_signals(&close)?;
    let terminal = console.then(|| Arc::new(Terminal::default()));
    let onlooker = terminal.map(|terminal| terminal as Arc<dyn Onlooker>);
    // The machine has the terminal for itself.
    let progress = (!console).then(|| Progress::new("image"));
    let prebuilt = crate::pool::prebuild(spec, onlooker, closing, |image| {
        if let Some(progress) = &progress {
            progress.show(&image.phase, &image.detail);
        }
    });
    Ok(prebuilt.await?)
}

/// The first of these signals ends the build; the files of it go.
fn end_on_signals(close: &Arc<watch::Sender<bool>>) -> anyhow::Result<()> {
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ] {
        let mut caught = signal(kind).context("cannot catch signals")?;
        let close = Arc::clone(close);
        tokio::spawn(async move {
            caught.recv().await;
            close.send_replace(true);
        });
    }
    Ok(())
}

/// This terminal, lent to the prebuild's machine.
#[derive(Debug, Default)]
struct Terminal {
    raw: Mutex<Option<RawTerminal>>,
}

impl Onlooker for Terminal {
    /// A pipe whose other end is copied to the log and to the terminal.
    fn console(&self, log: File) -> io::Result<File> {
        let (reader, writer) = io::pipe()?;
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || copy(reader, log))?;
        Ok(File::from(std::os::fd::OwnedFd::from(writer)))
    }

    fn started(&self, vm: &VmHandle) {
        let attached = terminal::attach(vm);
        *self.raw.lock().unwrap_or_else(PoisonError::into_inner) = Some(attached);
    }

    fn ended(&self) {
        // Itself again before anything else is printed.
        drop(
            self.raw
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }
}

fn copy(mut reader: impl Read, mut log: File) {
    /// The console's log may not fill the host's disk.
    const MAX_LOG_BYTES: usize = 256 << 20;
    let mut logged = 0_usize;
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        logged = logged.saturating_add(count);
        if logged <= MAX_LOG_BYTES {
            // A log that cannot be written is no reason to take the console away.
            let _full = log.write_all(bytes);
        }
        let mut out = io::stdout().lock();
        let _closed = out.write_all(bytes).and_then(|()| out.flush());
    }
}

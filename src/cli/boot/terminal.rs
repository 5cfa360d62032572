//! The operator's terminal while a machine runs on it: raw, with one key that is not the guest's.
//!
//! One thread copies what is typed to the guest, one waits for signals; both live as long as the
//! process.
#![expect(clippy::print_stderr, reason = "a command says what happened")]

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::vmm::{SaveError, VmHandle};

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// How often to look whether the terminal has another size.
const RESIZE_LOOK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// SIGINT, SIGTERM and SIGHUP, caught from here on; SIGUSR2 too if it saves the machine.
pub struct Signals {
    runtime: Runtime,
    ending: [Signal; 3],
    snapshot: Option<(Signal, PathBuf)>,
}

impl Signals {
    /// Catches them; SIGUSR2 if there is a directory to save to.
    pub fn catch(directory: Option<PathBuf>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let inside = runtime.enter();
        let ending = [
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ];
        let snapshot = match directory {
            Some(directory) => Some((signal(SignalKind::user_defined2())?, directory)),
            None => None,
        };
        drop(inside);
        Ok(Self {
            runtime,
            ending,
            snapshot,
        })
    }

    /// The first of those that end it ends the machine, and with it this command.
    pub fn serve(mut self, handle: &VmHandle) {
        let handle = handle.clone();
        std::thread::spawn(move || {
            while let Some(directory) = self.next_snapshot() {
                save(&handle, directory);
            }
            handle.kill();
        });
    }

    /// Waits for the next signal; where to save, or `None` if it is one that ends the machine.
    fn next_snapshot(&mut self) -> Option<&Path> {
        let [int, term, hup] = &mut self.ending;
        let snapshot = &mut self.snapshot;
        self.runtime.block_on(async {
            let wanted = async {
                match snapshot {
                    Some((signal, directory)) => {
                        signal.recv().await;
                        directory.as_path()
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = int.recv() => None,
                _ = term.recv() => None,
                _ = hup.recv() => None,
                directory = wanted => Some(directory),
            }
        })
    }
}

/// Saves the machine, which goes on afterwards, and says what came of it. The terminal may be raw.
fn save(handle: &VmHandle, directory: &Path) {
    let saved = handle
        .pause()
        .map_err(SaveError::from)
        .and_then(|()| handle.save(directory));
    match saved {
        Ok(()) => eprint!("saved to {}\r\n", directory.display()),
        Err(error) => {
            let error = anyhow::Error::from(error);
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            eprint!("error: not saved: {}\r\n", causes.join(": "));
        }
    }
    // A machine that has ended says so elsewhere.
    let _ended = handle.resume();
}

/// The terminal in raw mode; itself again when dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Option<Termios>,
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _hung_up = tcsetattr(io::stdin(), OptionalActions::Flush, before);
        }
    }
}

/// Copies what is typed to the guest, on a thread that lives as long as the process.
pub fn attach(handle: &VmHandle) -> RawTerminal {
    let mut before = None;
    if isatty(io::stdin())
        && let Ok(cooked) = tcgetattr(io::stdin())
    {
        eprintln!("press Ctrl-] to end the machine");
        let mut raw = cooked.clone();
        raw.make_raw();
        if tcsetattr(io::stdin(), OptionalActions::Now, &raw).is_ok() {
            before = Some(cooked);
        }
    }
    let handle = handle.clone();
    let escape = before.is_some();
    std::thread::spawn(move || {
        // An error is the end of input.
        let _ended = copy_input(&handle, escape);
    });
    RawTerminal { before }
}

fn copy_input(handle: &VmHandle, escape: bool) -> io::Result<()> {
    let mut input = io::stdin().lock();
    let mut size = (0, 0);
    let mut buffer = [0; 1024];
    while handle.end().is_none() {
        if let Ok(now) = tcgetwinsize(io::stdin())
            && (now.ws_col, now.ws_row) != size
        {
            size = (now.ws_col, now.ws_row);
            handle.console_size(now.ws_col, now.ws_row);
        }
        let stdin = io::stdin();
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        if poll(&mut fds, Some(&RESIZE_LOOK))? == 0 {
            continue;
        }
        let count = input.read(&mut buffer)?;
        let typed = buffer.get(..count).unwrap_or_default();
        if typed.is_empty() {
            break;
        }
        if escape && typed.contains(&ESCAPE) {
            handle.kill();
            break;
        }
        handle.console_input(typed);
    }
    io::stderr().flush()
}

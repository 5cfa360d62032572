//! What goes on for long: a spinner with the last word on a terminal, a line for each new phase
//! elsewhere.
#![expect(clippy::print_stdout, reason = "a command shows what it does")]

use std::cell::RefCell;

use indicatif::{ProgressBar, ProgressStyle};

use super::table::printable;

/// The progress of one thing.
#[derive(Debug)]
pub struct Progress {
    what: String,
    bar: ProgressBar,
    last: RefCell<String>,
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Progress {
    pub fn new(what: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {wide_msg}") {
            bar.set_style(style);
        }
        Self {
            what: what.to_owned(),
            bar,
            last: RefCell::default(),
        }
    }

    /// It is at this; the detail may change often.
    pub fn show(&self, phase: &str, detail: &str) {
        let new = *self.last.borrow() != phase;
        if new {
            phase.clone_into(&mut self.last.borrow_mut());
        }
        if self.bar.is_hidden() {
            if new {
                self.line(phase);
            }
            return;
        }
        let detail = printable(detail);
        self.bar
            .set_message(format!("{}: {phase} {detail}", self.what));
        self.bar.tick();
    }

    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.bar
            .suspend(|| println!("{}: {}", self.what, printable(text)));
    }
}

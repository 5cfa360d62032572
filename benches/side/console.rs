//! A guest's console as it is written: a thread reads it, the bench waits for words in it.

use std::io::Read;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::bail;

/// The nested rig is some 60 times slower than hardware.
const PATIENCE: Duration = Duration::from_secs(300);

pub struct Console {
    chunks: Receiver<(Instant, Vec<u8>)>,
    text: String,
}

impl Console {
    /// Reads `from` to its end on a thread of its own.
    pub fn of(mut from: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                if sender.send((Instant::now(), bytes)).is_err() {
                    break;
                }
            }
        });
        Self {
            chunks,
            text: String::new(),
        }
    }

    /// When `words` had been written.
    pub fn wait_for(&mut self, words: &str) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok((when, bytes)) = self.chunks.recv_timeout(left) else {
                bail!("the console never said {words:?}, but:\n{}", self.text);
            };
            self.text.push_str(&String::from_utf8_lossy(&bytes));
            if self.text.contains(words) {
                return Ok(when);
            }
        }
    }

    /// Everything so far.
    pub fn text(&self) -> &str {
        &self.text
    }
}

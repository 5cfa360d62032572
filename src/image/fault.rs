//! Where a test may end the process: before every change that the store makes on disk.
//!
//! Nothing in a build that is no test. [`super::dir`] calls [`point`] in each of its acts that
//! change something, so no step can be forgotten.

#[cfg(not(test))]
pub fn point() {}

#[cfg(test)]
pub use armed::{AT, point};

#[cfg(test)]
mod armed {
    use std::sync::atomic::{AtomicU64, Ordering};

    /// The variable with the number of the point, counted from 1, that kills the process.
    pub const AT: &str = "FLEETINGD_FAULT_AT";

    static REACHED: AtomicU64 = AtomicU64::new(0);

    pub fn point() {
        let Some(at) = std::env::var(AT).ok().and_then(|at| at.parse::<u64>().ok()) else {
            return;
        };
        if REACHED.fetch_add(1, Ordering::Relaxed) + 1 == at {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
        }
    }
}

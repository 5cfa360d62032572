//! Removes what nobody uses and nobody wants back.
//!
//! A generation goes when no group's record keeps it and no process holds it: whoever runs a
//! machine from one, or is about to, has a shared lock on its folder by an open descriptor.

use rustix::fs::FlockOperation;

use super::store::{BUILD_PREFIX, OLD_PREFIX};
use super::{BuildLock, ImageError, Store};

/// What is on its way out: each by its name and the one under which it waits.
#[derive(Debug, Default)]
struct Aside {
    doomed: Vec<(String, String)>,
    first_error: Option<ImageError>,
}

impl Store {
    /// Removes what may go; `now` is in seconds since the epoch. What dead builders left goes
    /// only with the lock, which says that nobody builds. Returns the names that went. Goes on
    /// after a failure and reports the first.
    pub fn collect_garbage(
        &self,
        lock: Option<&BuildLock>,
        now: u64,
    ) -> Result<Vec<String>, ImageError> {
        if let Some(lock) = lock {
            self.check_lock(lock)?;
        }
        let Aside {
            doomed,
            mut first_error,
        } = self.set_aside(lock.is_some(), now)?;
        let mut removed = Vec::new();
        for (name, aside) in doomed {
            let gone = self.generations.remove_tree(&aside);
            match gone.and_then(|()| self.generations.sync()) {
                Ok(()) => removed.push(name),
                Err(e) => {
                    first_error.get_or_insert(e);
                }
            }
        }
        match first_error {
            Some(e) => Err(e),
            None => Ok(removed),
        }
    }

    /// Takes what goes out of sight, so that whoever looks for it finds nothing rather than half
    /// of it. Records stand still meanwhile: nobody pins or promotes what is leaving.
    fn set_aside(&self, builds: bool, now: u64) -> Result<Aside, ImageError> {
        let _records = self.lock_records()?;
        // A record that cannot be read may keep anything: the error ends this here.
        let groups = self.groups()?;
        self.remove_unfinished_records()?;
        let mut aside = Aside::default();
        for name in self.generations.names()? {
            let kept = groups.iter().any(|group| group.keeps(&name, now));
            if kept || (name.starts_with(BUILD_PREFIX) && !builds) {
                continue;
            }
            match self.set_one_aside(&name) {
                Ok(Some(under)) => aside.doomed.push((name, under)),
                Ok(None) => {}
                Err(e) => {
                    aside.first_error.get_or_insert(e);
                }
            }
        }
        Ok(aside)
    }

    /// The name under which it waits for its end; `None` if somebody holds it.
    fn set_one_aside(&self, name: &str) -> Result<Option<String>, ImageError> {
        let Some(dir) = self.generations.existing(name)? else {
            return Ok(None);
        };
        if !dir.try_lock(FlockOperation::NonBlockingLockExclusive)? {
            return Ok(None);
        }
        if name.starts_with(OLD_PREFIX) {
            return Ok(Some(name.to_owned()));
        }
        let aside = self.free_old_name(name)?;
        self.generations.rename(name, &aside)?;
        Ok(Some(aside))
    }
}

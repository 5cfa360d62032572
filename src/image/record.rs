//! What each group has served, so that the last ones stay, can be gone back to, and can be pinned.
//!
//! One small file a group, `groups/<group>.json`, replaced whole under one lock of the store. It
//! decides nothing about what a configuration needs: that is the key's matter.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::dir::is_plain_name;
use super::{Generation, GenerationKey, ImageError, Lineage, Store};

const LOCK: &str = ".lock";
const SUFFIX: &str = ".json";
const VERSION: u32 = 1;
const MAX_RECORD: u64 = 64 << 10;
/// Served generations that are remembered at most; `image_keep` is no greater.
const MAX_HISTORY: usize = 10;
/// A group that was not seen for this long keeps nothing any more: its configuration is gone.
const FORGOTTEN_AFTER_S: u64 = 30 * 24 * 60 * 60;

/// What is remembered of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    version: u32,
    pub group: String,
    /// Names of generations that served, the last first.
    pub history: Vec<String>,
    /// The one that serves whatever is newer.
    pub pinned: Option<String>,
    /// One that was prepared for it without a runner and has not served yet.
    #[serde(default)]
    pub prebuilt: Option<String>,
    /// `image_keep`, as the group last said.
    pub keep: u32,
    /// When the group last looked after its image, in seconds since the epoch.
    pub seen: u64,
}

impl GroupRecord {
    fn new(group: &str) -> Self {
        Self {
            version: VERSION,
            group: group.to_owned(),
            keep: 1,
            ..Self::default()
        }
    }

    /// What machines start from: the pinned one, else the last that served.
    pub fn serving(&self) -> Option<&str> {
        self.pinned
            .as_deref()
            .or(self.history.first().map(String::as_str))
    }

    /// Whether a generation must stay for this group.
    pub fn keeps(&self, name: &str, now: u64) -> bool {
        let keep = usize::try_from(self.keep).unwrap_or(usize::MAX);
        let recent = self.history.iter().take(keep).any(|kept| kept == name);
        let forgotten = now.saturating_sub(self.seen) > FORGOTTEN_AFTER_S;
        let prebuilt = self.prebuilt.as_deref() == Some(name);
        self.pinned.as_deref() == Some(name) || ((recent || prebuilt) && !forgotten)
    }

    /// Those that served before what serves now, the last first.
    fn before(&self) -> &[String] {
        let serving = self.serving().unwrap_or_default();
        let place = self.history.iter().position(|name| name == serving);
        let older = place.and_then(|place| self.history.get(place + 1..));
        older.unwrap_or_default()
    }
}

/// A change of records in progress; nobody else changes one meanwhile.
#[derive(Debug)]
pub(super) struct RecordsLock(File);

impl Drop for RecordsLock {
    fn drop(&mut self) {
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl Store {
    /// Waits for whoever changes records; that takes milliseconds.
    pub(super) fn lock_records(&self) -> Result<RecordsLock, ImageError> {
        let file = self.groups.open_or_create(LOCK)?;
        flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| ImageError::file("lock", &self.groups.at(LOCK))(e.into()))?;
        Ok(RecordsLock(file))
    }

    /// What is remembered of a group; a new record if there is none. One that this version cannot
    /// read is an error, so that nothing is lost for it.
    pub fn group(&self, group: &str) -> Result<GroupRecord, ImageError> {
        let name = record_name(group);
        if !is_plain_name(&name) {
            return Err(ImageError::NoGroup {
                group: group.to_owned(),
            });
        }
        let damaged = || ImageError::Record {
            path: self.groups.at(&name),
        };
        if self.groups.open(&name)?.is_none() {
            return Ok(GroupRecord::new(group));
        }
        let bytes = self.groups.read_small(&name, MAX_RECORD)?;
        let bytes = bytes.ok_or_else(damaged)?;
        let record: GroupRecord = serde_json::from_slice(&bytes).map_err(|_bad| damaged())?;
        match record.version {
            VERSION => Ok(record),
            _ => Err(damaged()),
        }
    }

    /// Every group that has a record.
    pub fn groups(&self) -> Result<Vec<GroupRecord>, ImageError> {
        let mut names = self.groups.names()?;
        names.sort();
        names
            .iter()
            .filter(|name| !name.starts_with('.'))
            .filter_map(|name| name.strip_suffix(SUFFIX))
            .map(|group| self.group(group))
            .collect()
    }

    /// A tested generation serves a group from now on, unless another one is pinned; returns what
    /// is remembered then.
    pub fn promote(
        &self,
        group: &str,
        generation: &Generation,
        keep: u32,
        now: u64,
    ) -> Result<GroupRecord, ImageError> {
        self.change(group, |record| {
            let name = generation.key.as_str();
            record.history.retain(|served| served != name);
            record.history.insert(0, name.to_owned());
            record.history.truncate(MAX_HISTORY);
            record.prebuilt.take_if(|prebuilt| prebuilt == name);
            record.keep = keep;
            record.seen = now;
            Ok(())
        })
    }

    /// A generation that nobody serves yet stays for a group.
    pub fn keep_prebuilt(
        &self,
        group: &str,
        generation: &Generation,
        now: u64,
    ) -> Result<GroupRecord, ImageError> {
        self.change(group, |record| {
            record.prebuilt = Some(generation.key.to_string());
            record.seen = record.seen.max(now);
            Ok(())
        })
    }

    /// Has a group serve this generation whatever is newer; `None` ends that.
    pub fn pin(
        &self,
        group: &str,
        generation: Option<&Generation>,
    ) -> Result<GroupRecord, ImageError> {
        self.change(group, |record| {
            record.pinned = generation.map(|generation| generation.key.to_string());
            Ok(())
        })
    }

    /// Pins the last generation that served before the one that serves now, and is of use.
    pub fn roll_back(
        &self,
        group: &str,
        of_use: &dyn Fn(&Lineage) -> bool,
    ) -> Result<Generation, ImageError> {
        let mut found = None;
        self.change(group, |record| {
            for name in record.before() {
                found = self.tested(name)?.filter(|g| of_use(&g.lineage));
                if found.is_some() {
                    break;
                }
            }
            let generation = found.as_ref().ok_or_else(|| ImageError::NothingBefore {
                group: group.to_owned(),
            })?;
            record.pinned = Some(generation.key.to_string());
            Ok(())
        })?;
        found.ok_or_else(|| ImageError::NothingBefore {
            group: group.to_owned(),
        })
    }

    /// What a writer that was killed left; call it with the records locked.
    pub(super) fn remove_unfinished_records(&self) -> Result<(), ImageError> {
        for name in self.groups.names()? {
            if name.starts_with('.') && name != LOCK {
                self.groups.remove(&name)?;
            }
        }
        Ok(())
    }

    fn change(
        &self,
        group: &str,
        change: impl FnOnce(&mut GroupRecord) -> Result<(), ImageError>,
    ) -> Result<GroupRecord, ImageError> {
        let _lock = self.lock_records()?;
        let mut record = self.group(group)?;
        change(&mut record)?;
        let name = record_name(group);
        let text = serde_json::to_vec_pretty(&record)
            .map_err(|e| ImageError::file("encode", &self.groups.at(&name))(e.into()))?;
        self.groups.write_atomic(&name, &text)?;
        Ok(record)
    }

    /// What machines of a group start from by its record, if it is there.
    pub fn serving(&self, record: &GroupRecord) -> Result<Option<Generation>, ImageError> {
        match record.serving() {
            Some(name) => self.tested(name),
            None => Ok(None),
        }
    }

    /// The generation of this name, if a worker has come up from it.
    fn tested(&self, name: &str) -> Result<Option<Generation>, ImageError> {
        let Some(key) = GenerationKey::from_name(name) else {
            return Ok(None);
        };
        Ok(self.find(&key)?.filter(|generation| generation.tested))
    }

    /// Every sealed and intact generation, the newest first; each held until dropped.
    pub fn sealed(&self) -> Result<Vec<Generation>, ImageError> {
        let mut found = Vec::new();
        for name in self.generations.names()? {
            if let Some(key) = GenerationKey::from_name(&name)
                && let Some(generation) = self.find(&key)?
            {
                found.push(generation);
            }
        }
        found.sort_by(|a, b| (b.sealed_at, &b.key).cmp(&(a.sealed_at, &a.key)));
        Ok(found)
    }

    /// The tested generation whose name begins so.
    pub fn resolve(&self, prefix: &str) -> Result<Generation, ImageError> {
        let mut matching = self.sealed()?;
        matching.retain(|generation| generation.key.as_str().starts_with(prefix));
        let refuse = |what| ImageError::NoGeneration {
            name: prefix.to_owned(),
            what,
        };
        match (matching.pop(), matching.is_empty()) {
            (None, _) => Err(refuse("is no image of this store")),
            (Some(_), false) => Err(refuse("begins the names of several images")),
            (Some(generation), true) if !generation.tested => {
                Err(refuse("is an image from which no machine has come up yet"))
            }
            (Some(generation), true) => Ok(generation),
        }
    }

    /// The generation that a group's operator pinned, if it is there and machines of it can be
    /// reached.
    pub fn pinned(
        &self,
        record: &GroupRecord,
        lineage: &Lineage,
        speaks: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Generation>, ImageError> {
        let Some(name) = &record.pinned else {
            return Ok(None);
        };
        let found = self.tested(name)?;
        Ok(found.filter(|g| g.lineage.same_login(lineage) && speaks(g.lineage.agent_protocol)))
    }

    /// What can serve while the right generation is not there: the last one of the same
    /// configuration, or with `any_config` the last that served this group.
    pub fn standby(
        &self,
        record: &GroupRecord,
        lineage: &Lineage,
        any_config: bool,
        speaks: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Generation>, ImageError> {
        let fits = |g: &Generation| {
            let config = g.lineage.same_config(lineage);
            g.tested && config && speaks(g.lineage.agent_protocol)
        };
        let mut served = Vec::new();
        for name in &record.history {
            served.extend(self.tested(name)?);
        }
        if let Some(found) = served.iter().find(|g| fits(g)) {
            return Ok(Some(found.clone()));
        }
        // A group whose name is a number may have another one today.
        if let Some(found) = self.sealed()?.into_iter().find(fits) {
            return Ok(Some(found));
        }
        let reachable =
            |g: &Generation| g.lineage.same_login(lineage) && speaks(g.lineage.agent_protocol);
        Ok(served.into_iter().find(|g| any_config && reachable(g)))
    }
}

fn record_name(group: &str) -> String {
    format!("{group}{SUFFIX}")
}

#[cfg(test)]
#[path = "record_test.rs"]
mod tests;

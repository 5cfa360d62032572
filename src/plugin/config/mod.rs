//! The configuration as it reaches us, checked whole into a [`PoolSpec`].
//!
//! A [`Source`] is what an operator wrote, from GitLab's JSON or from TOML; [`Source::check`] turns
//! it into a [`Config`] or into every problem at once. `keys.rs` is the table of all keys. What
//! depends on the host (interfaces, routes, room) is the pool's preflight, not here.

mod connector;
mod keys;
mod kind;
mod reference;
mod toml;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::generated::fleeting::ConnectorConfig;
use crate::image::{ImageName, ImageSource, RunnerSource};
use crate::net::NetSpec;
use crate::pool::{PoolSpec, Shape};
use keys::{Default, Draft, KEYS, Key};

pub use connector::Connector;
pub use reference::reference_markdown;

/// vCPUs that machines may have for each of the host's.
const VCPUS_PER_CPU: usize = 4;

/// How much of a value an error shows.
const SHOWN_CHARS: usize = 80;

/// What an operator wrote: not checked yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// `plugin_config`.
    values: BTreeMap<String, Value>,
    /// Where each key stands, if its file had lines.
    lines: BTreeMap<String, usize>,
    /// `connector_config`, as the runner hands it over.
    connector: ConnectorConfig,
}

/// What of the host a check needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub cpus: usize,
    /// What machines get as gitlab-runner if the configuration names none.
    pub runner: RunnerSource,
}

/// A configuration that holds.
#[derive(Debug, Clone)]
pub struct Config {
    pub pool: PoolSpec,
    pub connector: Connector,
    /// What an operator should know and may ignore.
    pub warnings: Vec<String>,
}

/// Everything that is wrong with a configuration, one line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems(Vec<String>);

impl Problems {
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl From<Vec<String>> for Problems {
    fn from(lines: Vec<String>) -> Self {
        Self(lines)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl Source {
    /// From Init: the JSON of `plugin_config`, and `connector_config`.
    pub fn from_json(json: &[u8], connector: ConnectorConfig) -> Result<Self, Problems> {
        let problem = |text: String| Err(Problems(vec![text]));
        let values = match serde_json::from_slice(json) {
            Ok(Value::Object(values)) => values.into_iter().collect(),
            Ok(Value::Null) => BTreeMap::new(),
            Ok(_other) => {
                return problem("plugin_config is not a table of keys and values".to_owned());
            }
            Err(_empty) if json.is_empty() => BTreeMap::new(),
            Err(error) => return problem(format!("plugin_config is not JSON: {error}")),
        };
        Ok(Self {
            values,
            lines: BTreeMap::new(),
            connector,
        })
    }

    /// From a file: TOML with the keys of `plugin_config` at its top and, if wanted, a
    /// `[connector_config]`; or gitlab-runner's own `config.toml`, of which the first `[[runners]]`
    /// that uses this plugin is taken. Relative to nothing: `key_path` is read here.
    pub fn from_toml(text: &str) -> Result<Self, Problems> {
        toml::read(text)
    }

    /// The JSON that a runner would send for this `plugin_config`.
    pub fn plugin_config(&self) -> Vec<u8> {
        serde_json::to_vec(&self.values).unwrap_or_default()
    }

    /// The `connector_config` that a runner would send.
    pub fn connector_config(&self) -> &ConnectorConfig {
        &self.connector
    }

    /// Whether the operator set this key.
    pub fn sets(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// What the operator wrote for a key that takes a string.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.as_str()
    }

    /// Checks every key and the connector; all problems at once.
    pub fn check(&self, host: &Host) -> Result<Config, Problems> {
        let mut problems = Vec::new();
        let mut draft = defaults();
        for (name, value) in &self.values {
            match KEYS.iter().find(|key| key.name == name) {
                None => problems.push(self.at(name, &unknown(name))),
                Some(key) => {
                    if let Err(detail) = key.kind.apply(&mut draft, value) {
                        problems.push(self.at(name, &mismatch(key, value, &detail)));
                    }
                }
            }
        }
        let most = host.cpus.saturating_mul(VCPUS_PER_CPU);
        if usize::try_from(draft.vcpus).is_ok_and(|vcpus| vcpus > most) {
            let text = format!(
                "vm_num_cpu_cores = {}: expected at most {most}, {VCPUS_PER_CPU} times the host's {} CPUs",
                draft.vcpus, host.cpus
            );
            problems.push(self.at("vm_num_cpu_cores", &text));
        }
        if let Some(text) = checksum_out_of_place(&draft) {
            problems.push(self.at("vm_image_sha256", text));
        }
        if let Some((key, text)) = registry_out_of_place(&draft) {
            problems.push(self.at(key, text));
        }
        let connector = Connector::check(&self.connector);
        match (connector, problems.is_empty()) {
            (Ok(connector), true) => match assemble(draft, connector, host) {
                Some(config) => Ok(config),
                // Defaults fill what the checks above did not: a gap is a hole in the table.
                None => Err(Problems(vec!["the configuration is incomplete".to_owned()])),
            },
            (Ok(_), false) => Err(Problems(problems)),
            (Err(more), _) => {
                problems.extend(more);
                Err(Problems(problems))
            }
        }
    }

    /// A problem with the line of its key, where that is known.
    fn at(&self, key: &str, text: &str) -> String {
        match self.lines.get(key) {
            Some(line) => format!("line {line}: {text}"),
            None => text.to_owned(),
        }
    }
}

fn defaults() -> Draft {
    let mut draft = Draft::default();
    for key in KEYS {
        if let Default::Is(json) = key.default
            && let Ok(value) = serde_json::from_str(json)
        {
            // The table's own values fit its own kinds: a test applies each.
            let _fits = key.kind.apply(&mut draft, &value);
        }
    }
    draft
}

/// A checksum belongs to an image by URL, and the other way round.
fn checksum_out_of_place(draft: &Draft) -> Option<&'static str> {
    let by_url = matches!(draft.image, Some(ImageName::Url(_)));
    match (by_url, &draft.image_sha256) {
        (true, None) => {
            Some("vm_image_sha256 is missing: an image by URL needs it; hint: sha256sum prints it")
        }
        (false, Some(_)) => Some("vm_image_sha256 goes with a URL as vm_image only"),
        _ => None,
    }
}

/// An image of a registry is believed for a reason, and is not changed.
fn registry_out_of_place(draft: &Draft) -> Option<(&'static str, &'static str)> {
    let Some(ImageName::Registry(name)) = &draft.image else {
        return None;
    };
    if name.digest().is_none() && draft.image_keyring.is_none() {
        return Some((
            "vm_image",
            "vm_image names a tag, which anybody who can write there moves; hint: NAME@sha256:DIGEST, or vm_image_keyring with the keys that may sign it",
        ));
    }
    (!draft.extra_commands.is_empty()).then_some((
        "vm_prebuild_cloudinit_extra_cmds",
        "vm_prebuild_cloudinit_extra_cmds goes with an image that is built here; hint: set it where the image is prepared and pushed",
    ))
}

fn assemble(draft: Draft, connector: Connector, host: &Host) -> Option<Config> {
    let warnings = draft
        .disk_directory
        .starts_with("/tmp")
        .then(|| {
            format!(
                "vm_disk_directory = {}: a directory under /tmp may be emptied by the system; hint: /var/lib/fleetingd",
                shown(&Value::from(draft.disk_directory.to_string_lossy()))
            )
        })
        .into_iter()
        .collect();
    let pool = PoolSpec {
        net: NetSpec {
            subnet: draft.subnet?,
            egress_interface: draft.egress_interface,
            dns: draft.dns,
            allow_private: draft.allow_private,
            allow_host: draft.allow_host,
        },
        group: draft.group,
        shape: Shape {
            vcpus: u8::try_from(draft.vcpus).ok()?,
            memory_mib: draft.memory_mib,
        },
        image: ImageSource {
            image: draft.image?,
            sha256: draft.image_sha256,
            mirror: draft.image_mirror,
            keyring: draft.image_keyring,
        },
        image_directory: draft
            .image_directory
            .unwrap_or_else(|| draft.disk_directory.clone()),
        disk_directory: draft.disk_directory,
        disk_gib: draft.disk_gib,
        extra_commands: draft.extra_commands,
        on_command_error: draft.on_command_error,
        runner: match draft.runner {
            Some(path) => RunnerSource::Binary(path),
            None => host.runner.clone(),
        },
        keep_consoles: draft.keep_consoles,
        memory_overcommit: draft.memory_overcommit,
        build_timeout: draft.build_timeout,
        boot_timeout: draft.boot_timeout,
        ssh_key_type: draft.ssh_key_type,
        login: connector.login.clone(),
        vmm: draft.vmm,
        image_policy: draft.image_policy,
        metrics_file: draft.metrics_file,
        run_directory: draft.run_directory,
    };
    Some(Config {
        pool,
        connector,
        warnings,
    })
}

fn mismatch(key: &Key, value: &Value, detail: &str) -> String {
    let (name, kind) = (key.name, &key.kind);
    let value = shown(value);
    match detail {
        "" => format!("{name} = {value}: expected {kind}"),
        detail => format!("{name} = {value}: expected {kind}; {detail}"),
    }
}

/// A value as an error shows it: JSON on one line, its length bounded.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}

fn unknown(name: &str) -> String {
    let nearest = KEYS
        .iter()
        .map(|key| key.name)
        .min_by_key(|known| distance(name, known))
        .unwrap_or_default();
    format!(
        "unknown key {}; hint: the nearest known one is {nearest}",
        shown(&Value::from(name))
    )
}

/// Edit distance (Levenshtein), of the first characters of overlong names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(SHOWN_CHARS).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(SHOWN_CHARS).enumerate() {
        let mut next = Vec::with_capacity(row.len());
        let mut left = i + 1;
        next.push(left);
        for (pair, cb) in row.windows(2).zip(&b) {
            let [diagonal, above] = pair else { continue };
            let replaced = diagonal + usize::from(ca != *cb);
            left = replaced.min(above + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

/// Whether a path names this plugin: `/usr/bin/fleeting-plugin-fleetingd`, `fleetingd:latest`.
fn is_this_plugin(plugin: &str) -> bool {
    let name = Path::new(plugin)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let name = name.split(':').next().unwrap_or_default();
    name == "fleetingd" || name.ends_with("-fleetingd")
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;

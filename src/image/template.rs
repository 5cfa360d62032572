//! The files that a prebuild guest is given, rendered from `templates/`.
//!
//! `{{ name }}` with a lower-case name is a placeholder and must be known; anything else between
//! braces stays as it is. Values are single lines of harmless characters, checked by who makes
//! them, so they need no quoting in YAML or shell.

use std::net::Ipv4Addr;

use super::{BuildInputs, ImageError, PrebuildOnError, RunnerSource};

pub const AGENT_UNIT: &str = include_str!("../../templates/fleetingd-agent.service");
pub const SSHD: &str = include_str!("../../templates/sshd.conf");
pub const COMMANDS: &str = include_str!("../../templates/prebuild-commands.sh");
pub const CLOUD_INIT_STATUS: &str = include_str!("../../templates/cloud-init-status.sh");
const USER_DATA: &str = include_str!("../../templates/user-data-prebuild.tpl");
const NETWORK_CONFIG: &str = include_str!("../../templates/network-config.tpl");

/// The prebuild guest's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedNet {
    pub address: Ipv4Addr,
    pub prefix_len: u8,
    pub gateway: Ipv4Addr,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub dns: Vec<Ipv4Addr>,
}

/// What cloud-init of the prebuild does. Depends on the inputs alone.
pub fn user_data(inputs: &BuildInputs) -> Result<String, ImageError> {
    let on_error = match inputs.on_command_error {
        PrebuildOnError::Fail => "fail",
        PrebuildOnError::Continue => "continue",
    };
    let runner = match inputs.runner {
        RunnerSource::Binary(_) => "binary",
        RunnerSource::Package => "package",
    };
    render(
        "user-data-prebuild.tpl",
        USER_DATA,
        &[
            ("username", &inputs.username),
            ("on_error", on_error),
            ("runner", runner),
            ("commands", &inputs.extra_commands.len().to_string()),
        ],
    )
}

/// sshd's settings; `yes` to passwords only where the operator gave one.
pub fn sshd(inputs: &BuildInputs) -> Result<String, ImageError> {
    let password = inputs.password.is_some();
    let root = if password { "yes" } else { "prohibit-password" };
    render(
        "sshd.conf",
        SSHD,
        &[
            ("password", if password { "yes" } else { "no" }),
            ("root", root),
        ],
    )
}

/// Version 2 network configuration. The MAC is quoted: one of digits alone is a number to YAML.
pub fn network_config(net: &SeedNet) -> Result<String, ImageError> {
    let mac: Vec<String> = net.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let dns: Vec<String> = net.dns.iter().map(Ipv4Addr::to_string).collect();
    render(
        "network-config.tpl",
        NETWORK_CONFIG,
        &[
            ("mac", &mac.join(":")),
            ("address", &format!("{}/{}", net.address, net.prefix_len)),
            ("gateway", &net.gateway.to_string()),
            ("mtu", &net.mtu.to_string()),
            ("dns", &dns.join(", ")),
        ],
    )
}

/// Everything of `templates/` that goes into a guest, for the generation's key.
pub fn fingerprint_texts(inputs: &BuildInputs) -> Result<[String; 6], ImageError> {
    Ok([
        user_data(inputs)?,
        sshd(inputs)?,
        NETWORK_CONFIG.to_owned(),
        AGENT_UNIT.to_owned(),
        COMMANDS.to_owned(),
        CLOUD_INIT_STATUS.to_owned(),
    ])
}

fn render(
    name: &'static str,
    template: &str,
    values: &[(&str, &str)],
) -> Result<String, ImageError> {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        text.push_str(before);
        let placeholder = after.split_once("}}").and_then(|(inner, tail)| {
            let key = inner.trim();
            let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            plain.then_some((key, tail))
        });
        match placeholder {
            Some((key, tail)) => {
                let value = values.iter().find(|(known, _)| *known == key);
                let (_, value) = value.ok_or_else(|| ImageError::Template {
                    name,
                    what: format!(
                        "has an unknown placeholder {key:?}; hint: it knows {}",
                        values
                            .iter()
                            .map(|(k, _)| *k)
                            .collect::<Vec<_>>()
                            .join(", ")
                    ),
                })?;
                text.push_str(value);
                rest = tail;
            }
            None => {
                text.push_str("{{");
                rest = after;
            }
        }
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
#[path = "template_test.rs"]
mod tests;

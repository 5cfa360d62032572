//! The operator's extra commands: each one a YAML item, all of them one shell script.
//!
//! The predecessor pasted each text into cloud-init's `runcmd` list, so a quoted scalar, a block
//! scalar and a flow list mean here what they meant there. Everything else is shell as it stands.
//! Pure.

use saphyr::{LoadableYamlNode, Scalar, Yaml};

/// One command as /bin/sh will read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShellCommand(String);

impl ShellCommand {
    /// Reads one item of `vm_prebuild_cloudinit_extra_cmds`. Text that is no YAML string or list
    /// of strings is taken literally, so this never fails.
    pub fn parse(item: &str) -> Self {
        let text = item.trim();
        let yaml = match text.chars().next() {
            // A plain scalar is its own text; asking YAML would only cut it at ` #` or `: `.
            Some('"' | '\'' | '[' | '|' | '>') => parse_yaml_item(item.trim_start()),
            _ => None,
        };
        Self(yaml.unwrap_or_else(|| text.to_owned()))
    }

    pub fn script(&self) -> &str {
        &self.0
    }

    /// Its first line, short enough for a log.
    pub fn summary(&self) -> String {
        const MAX: usize = 120;
        let line = self.0.lines().next().unwrap_or_default();
        let mut short: String = line.chars().take(MAX).collect();
        if short.len() < self.0.trim_end().len() {
            short.push_str(" ...");
        }
        short
    }
}

/// The shell text of an item that is a YAML string or a list of scalars.
fn parse_yaml_item(item: &str) -> Option<String> {
    let documents = Yaml::load_from_str(&format!("- {item}\n")).ok()?;
    let [Yaml::Sequence(items)] = documents.as_slice() else {
        return None;
    };
    match items.as_slice() {
        [Yaml::Value(Scalar::String(text))] => Some(text.to_string()),
        [Yaml::Sequence(words)] if !words.is_empty() => {
            let words: Option<Vec<String>> = words.iter().map(word).collect();
            Some(words?.join(" "))
        }
        _ => None,
    }
}

/// A list's element as a quoted word; what is neither text nor number makes the list no command.
fn word(element: &Yaml<'_>) -> Option<String> {
    match element {
        Yaml::Value(Scalar::String(text)) => Some(quote(text)),
        Yaml::Value(Scalar::Integer(number)) => Some(quote(&number.to_string())),
        Yaml::Value(Scalar::FloatingPoint(number)) => Some(quote(&number.to_string())),
        Yaml::Value(Scalar::Boolean(value)) => Some(quote(&value.to_string())),
        _ => None,
    }
}

/// One word that the shell takes as it stands.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
#[path = "commands_test.rs"]
mod tests;

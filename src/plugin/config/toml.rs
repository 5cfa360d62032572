//! A configuration file: our keys on their own, or the runner's `config.toml`.

use std::collections::BTreeMap;

use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::kind::parse_duration;
use super::{Problems, Source, is_this_plugin};
use crate::plugin::generated::fleeting::ConnectorConfig;

/// Values deeper than this are no configuration of ours.
const MAX_DEPTH: usize = 16;

pub(super) fn read(text: &str) -> Result<Source, Problems> {
    let one = |problem: String| Problems(vec![problem]);
    let document = DeTable::parse(text).map_err(|error| {
        let line = line_of(text, error.span().map_or(0, |span| span.start));
        one(format!("line {line}: not TOML: {}", error.message()))
    })?;
    let document = document.get_ref();
    let (plugin, connector) = match document.get("runners") {
        Some(runners) => of_runner(runners).map_err(one)?,
        None => (Some(document), table(document, "connector_config")),
    };
    let mut values = BTreeMap::new();
    let mut lines = BTreeMap::new();
    let mut problems = Vec::new();
    let keys = plugin.into_iter().flat_map(|table| table.iter());
    for (key, value) in keys {
        let name = key.get_ref().as_ref();
        if name == "connector_config" && document.get("runners").is_none() {
            continue;
        }
        let line = line_of(text, key.span().start);
        match json(value.get_ref(), MAX_DEPTH) {
            Ok(value) => {
                values.insert(name.to_owned(), value);
                lines.insert(name.to_owned(), line);
            }
            Err(problem) => problems.push(format!("line {line}: {name}: {problem}")),
        }
    }
    let connector = connector
        .map(|table| read_connector(text, table, &mut problems))
        .unwrap_or_default();
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    Ok(Source {
        values,
        lines,
        connector,
    })
}

type Table<'d, 'i> = &'d DeTable<'i>;

/// `plugin_config` and `connector_config` of the first runner that uses this plugin.
fn of_runner<'d, 'i>(
    runners: &'d Spanned<DeValue<'i>>,
) -> Result<(Option<Table<'d, 'i>>, Option<Table<'d, 'i>>), String> {
    let autoscaler = runners
        .get_ref()
        .as_array()
        .into_iter()
        .flat_map(|runners| runners.iter())
        .filter_map(|runner| table(runner.get_ref().as_table()?, "autoscaler"))
        .find(|autoscaler| string(autoscaler, "plugin").is_some_and(is_this_plugin))
        .ok_or_else(|| {
            "no [[runners]] whose autoscaler.plugin is fleetingd; hint: plugin = \"fleeting-plugin-fleetingd\" stands under [runners.autoscaler]"
                .to_owned()
        })?;
    Ok((
        table(autoscaler, "plugin_config"),
        table(autoscaler, "connector_config"),
    ))
}

fn table<'d, 'i>(table: Table<'d, 'i>, key: &str) -> Option<Table<'d, 'i>> {
    table.get(key)?.get_ref().as_table()
}

fn string<'d>(table: Table<'d, '_>, key: &str) -> Option<&'d str> {
    table.get(key)?.get_ref().as_str()
}

/// As the runner reads it: keys it does not know are none of our business either.
fn read_connector(text: &str, table: Table<'_, '_>, problems: &mut Vec<String>) -> ConnectorConfig {
    let mut connector = ConnectorConfig::default();
    for (key, value) in table.iter() {
        let line = line_of(text, key.span().start);
        let name = key.get_ref().as_ref();
        if let Err(expected) = set_connector(&mut connector, name, value.get_ref()) {
            problems.push(format!("line {line}: connector_config.{name}: {expected}"));
        }
    }
    connector
}

fn set_connector(
    connector: &mut ConnectorConfig,
    name: &str,
    value: &DeValue<'_>,
) -> Result<(), String> {
    let text = || {
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| "expected a string".to_owned())
    };
    match name {
        "os" => connector.os = text()?,
        "arch" => connector.arch = text()?,
        "protocol" => connector.protocol = text()?,
        "username" => connector.username = text()?,
        "password" => connector.password = text()?,
        "key_path" => {
            let path = text()?;
            connector.key = std::fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
        }
        "use_static_credentials" => {
            connector.use_static_credentials = value
                .as_bool()
                .ok_or_else(|| "expected true or false".to_owned())?;
        }
        "keepalive" => connector.keepalive = nanoseconds(value)?,
        "timeout" => connector.timeout = nanoseconds(value)?,
        "protocol_port" => {
            connector.protocol_port = integer(value)
                .and_then(|number| number.as_i64())
                .ok_or_else(|| "expected a port".to_owned())?;
        }
        _ => {}
    }
    Ok(())
}

fn nanoseconds(value: &DeValue<'_>) -> Result<i64, String> {
    let nanos = match value.as_str() {
        Some(text) => parse_duration(text).and_then(|d| i64::try_from(d.as_nanos()).ok()),
        // What the runner makes of a bare number.
        None => integer(value).and_then(|number| number.as_i64()),
    };
    nanos.ok_or_else(|| "expected a duration such as \"30s\"".to_owned())
}

fn integer(value: &DeValue<'_>) -> Option<Number> {
    let integer = value.as_integer()?;
    let (digits, radix) = (integer.as_str(), integer.radix());
    i64::from_str_radix(digits, radix)
        .map(Number::from)
        .or_else(|_| u64::from_str_radix(digits, radix).map(Number::from))
        .ok()
}

/// The value as the runner would send it.
fn json(value: &DeValue<'_>, depth: usize) -> Result<Value, String> {
    let depth = depth.checked_sub(1).ok_or("nested too deeply")?;
    Ok(match value {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Boolean(on) => Value::from(*on),
        DeValue::Integer(_) => Value::Number(integer(value).ok_or("the number is too large")?),
        DeValue::Float(number) => {
            let parsed: Option<f64> = number.as_str().parse().ok();
            Value::Number(
                parsed
                    .and_then(Number::from_f64)
                    .ok_or("not a finite number")?,
            )
        }
        DeValue::Datetime(time) => Value::from(time.to_string()),
        DeValue::Array(items) => items
            .iter()
            .map(|item| json(item.get_ref(), depth))
            .collect::<Result<_, _>>()?,
        DeValue::Table(entries) => {
            let mut map = Map::new();
            for (key, value) in entries.iter() {
                map.insert(key.get_ref().to_string(), json(value.get_ref(), depth)?);
            }
            Value::Object(map)
        }
    })
}

/// Lines count from 1.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|byte| **byte == b'\n').count() + 1
}

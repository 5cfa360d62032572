//! What kinds of value a key takes: their types and ranges, checked and spelled out in one place.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::keys::Draft;

/// Every duration of the configuration lies here.
const DURATIONS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 60 * 60);

/// A type and range, and where its value goes.
pub(super) enum Kind {
    Integer(RangeInclusive<u32>, fn(&mut Draft, u32)),
    Number(RangeInclusive<f64>, fn(&mut Draft, f64)),
    Flag(fn(&mut Draft, bool)),
    Duration(fn(&mut Draft, Duration)),
    /// A duration, or none where it says `off`.
    DurationOrOff(fn(&mut Draft, Option<Duration>)),
    /// An absolute path; need not exist.
    Path(fn(&mut Draft, PathBuf)),
    /// An absolute path of an existing file.
    File(fn(&mut Draft, PathBuf)),
    /// A string with rules of its own, named by the text.
    Text(&'static str, fn(&mut Draft, &str) -> Result<(), String>),
    /// A list of such strings; called for one after the other.
    List(&'static str, fn(&mut Draft, &str) -> Result<(), String>),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(range, _) => {
                write!(f, "an integer from {} to {}", range.start(), range.end())
            }
            Self::Number(range, _) => {
                write!(f, "a number from {:?} to {:?}", range.start(), range.end())
            }
            Self::Flag(_) => f.write_str("true or false"),
            Self::Duration(_) => f.write_str(
                "a duration from 1s to 168h: a string such as \"90s\", \"5m\" or \"1h30m\", or whole seconds",
            ),
            Self::DurationOrOff(_) => f.write_str(
                "a duration from 1s to 168h such as \"90s\" or \"24h\", or whole seconds, or `off`",
            ),
            Self::Path(_) => f.write_str("an absolute path"),
            Self::File(_) => f.write_str("the absolute path of a file"),
            Self::Text(what, _) => f.write_str(what),
            Self::List(what, _) => write!(f, "a list of {what}"),
        }
    }
}

impl Kind {
    /// Stores `value`; the error says what else is wrong beside not being of this kind, or
    /// nothing.
    pub(super) fn apply(&self, draft: &mut Draft, value: &Value) -> Result<(), String> {
        let mismatch = String::new;
        match self {
            Self::Integer(range, set) => {
                let number = value
                    .as_u64()
                    .and_then(|n| u32::try_from(n).ok())
                    .filter(|n| range.contains(n))
                    .ok_or_else(mismatch)?;
                set(draft, number);
            }
            Self::Number(range, set) => {
                let number = value
                    .as_f64()
                    .filter(|n| range.contains(n))
                    .ok_or_else(mismatch)?;
                set(draft, number);
            }
            Self::Flag(set) => set(draft, value.as_bool().ok_or_else(mismatch)?),
            Self::Duration(set) => {
                let duration = duration(value)
                    .filter(|d| DURATIONS.contains(d))
                    .ok_or_else(mismatch)?;
                set(draft, duration);
            }
            Self::DurationOrOff(set) if value.as_str() == Some("off") => set(draft, None),
            Self::DurationOrOff(set) => {
                let duration = duration(value)
                    .filter(|d| DURATIONS.contains(d))
                    .ok_or_else(mismatch)?;
                set(draft, Some(duration));
            }
            Self::Path(set) => set(draft, absolute(value).ok_or_else(mismatch)?),
            Self::File(set) => {
                let path = absolute(value).ok_or_else(mismatch)?;
                existing(&path)?;
                set(draft, path);
            }
            Self::Text(_, set) => set(draft, value.as_str().ok_or_else(mismatch)?)?,
            Self::List(_, set) => {
                for (index, item) in value.as_array().ok_or_else(mismatch)?.iter().enumerate() {
                    let item_of_list = |detail: String| match detail.as_str() {
                        "" => format!("item {} is not one", index + 1),
                        detail => format!("item {}: {detail}", index + 1),
                    };
                    let text = item.as_str().ok_or_else(|| item_of_list(String::new()))?;
                    set(draft, text).map_err(item_of_list)?;
                }
            }
        }
        Ok(())
    }
}

fn absolute(value: &Value) -> Option<PathBuf> {
    let text = value.as_str().filter(|text| !text.contains('\0'))?;
    let path = Path::new(text);
    path.is_absolute().then(|| path.to_owned())
}

pub(super) fn existing(path: &Path) -> Result<(), String> {
    match path.metadata() {
        Ok(found) if found.is_file() => Ok(()),
        Ok(_other) => Err("that is not a file".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn duration(value: &Value) -> Option<Duration> {
    match value {
        Value::Number(seconds) => seconds.as_u64().map(Duration::from_secs),
        Value::String(text) => parse_duration(text),
        _ => None,
    }
}

/// `90s`, `1h30m`, `250ms`: whole numbers with units, largest first or not, nothing between.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let (unit, after) = after.split_at(
            after
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(after.len()),
        );
        let number: u64 = number.parse().ok()?;
        let piece = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            _ => return None,
        };
        sum = sum.checked_add(piece)?;
        rest = after;
    }
    (!text.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_numbers_with_units() {
        for (text, seconds) in [("90s", 90), ("5m", 300), ("24h", 86400), ("1h30m5s", 5405)] {
            assert_eq!(parse_duration(text), Some(Duration::from_secs(seconds)));
        }
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for text in [
            "",
            "s",
            "5",
            "5d",
            "-5s",
            "5 s",
            "1.5h",
            "99999999999999999h",
            "9é",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}

//! The reference of all keys as Markdown, for `docs/CONFIG.md`.

use std::fmt::Write as _;

use super::keys::{Default, KEYS};

/// A table of every key: type, range, default, meaning.
pub fn reference_markdown() -> String {
    let mut text = String::from(
        "| key | value | default | new build | meaning |\n| --- | --- | --- | --- | --- |\n",
    );
    for key in KEYS.iter().filter(|key| !key.meaning.is_empty()) {
        let default = match key.default {
            Default::Is(json) => format!("`{json}`"),
            Default::Found(words) => words.to_owned(),
        };
        let rebuilds = if key.rebuilds { "yes" } else { "no" };
        let _infallible = writeln!(
            text,
            "| `{}` | {} | {default} | {rebuilds} | {} |",
            key.name, key.kind, key.meaning
        );
    }
    text
}

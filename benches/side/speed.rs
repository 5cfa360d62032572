//! The medians that criterion left of `speed` and `musl`, as rows of the report.

use std::path::{Path, PathBuf};

use anyhow::Context;

use super::guest::Guest;
use super::report::{Better, Budget, Row};

/// Criterion's name, the row's, and the budget in milliseconds.
const PROMISES: [(&str, &str, f64); 4] = [
    ("executable/handshake", "handshake after exec", 100.0),
    ("executable/update-1000", "Update with 1000 instances", 1.0),
    ("executable/increase-100", "Increase(100)", 10.0),
    ("executable/decrease-100", "Decrease(100)", 10.0),
];
/// What is measured on two allocators.
const POOL: [(&str, &str); 2] = [
    ("update-1000", "pool: Update with 1000 instances"),
    ("update-1000-by-8", "pool: the same, 8 callers at once"),
];
const OVERLAY: [(&str, &str); 2] = [
    ("overlay/lookup-4k", "overlay: look up 4 KiB"),
    (
        "overlay/lookup-1m-fragmented",
        "overlay: look up 1 MiB in 256 pieces",
    ),
];

pub fn rows(_guest: &Guest) -> anyhow::Result<Vec<Row>> {
    let home =
        std::env::var_os("CRITERION_HOME").context("no CRITERION_HOME; hint: ./dev bench")?;
    let home = PathBuf::from(home);
    let mut rows = Vec::new();
    for (path, name, budget) in PROMISES {
        let row = Row::new(name, "ms", Better::Lower).budget(Budget::Value(budget));
        rows.push(row.value(nanoseconds(&home, path)? / 1e6));
    }
    for (path, name) in POOL {
        let ours = nanoseconds(&home, &format!("pool-mimalloc/{path}"))?;
        let musl = nanoseconds(&home, &format!("pool-musl/{path}"))?;
        let row = Row::new(name, "us", Better::Lower);
        rows.push(row.value(ours / 1e3).peer("musl's malloc", musl / 1e3));
    }
    let row = Row::new("pool: resident with 1000 instances", "KiB", Better::Lower);
    let resident = |name: &str| -> anyhow::Result<f64> {
        Ok(read(&home.join(name).join("resident-kib"))?
            .trim()
            .parse()?)
    };
    rows.push(
        row.value(resident("pool-mimalloc")?)
            .peer("musl's malloc", resident("pool-musl")?),
    );
    for (path, name) in OVERLAY {
        rows.push(Row::new(name, "ns", Better::Lower).value(nanoseconds(&home, path)?));
    }
    Ok(rows)
}

fn nanoseconds(home: &Path, name: &str) -> anyhow::Result<f64> {
    let path = home.join(name).join("new/estimates.json");
    let estimates: serde_json::Value = serde_json::from_str(&read(&path)?)?;
    let median = estimates.pointer("/median/point_estimate");
    median
        .and_then(serde_json::Value::as_f64)
        .with_context(|| format!("no median in {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}; hint: ./dev bench", path.display()))
}

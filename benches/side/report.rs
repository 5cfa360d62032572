//! What was measured, beside what a peer does and what is promised.

use std::fmt::Write;

/// Which way is good.
#[derive(Clone, Copy)]
pub enum Better {
    Lower,
    Higher,
}

/// What is promised.
#[derive(Clone, Copy)]
pub enum Budget {
    /// A value of ours, no worse than this.
    Value(f64),
    /// Ours divided by the peer's, no worse than this.
    Ratio(f64),
}

/// One thing that is measured.
pub struct Row {
    name: String,
    unit: &'static str,
    better: Better,
    value: Option<f64>,
    peer: Option<(&'static str, f64)>,
    budget: Option<Budget>,
}

impl Row {
    pub fn new(name: &str, unit: &'static str, better: Better) -> Self {
        Self {
            name: name.to_owned(),
            unit,
            better,
            value: None,
            peer: None,
            budget: None,
        }
    }

    /// A part that could not be measured.
    pub fn failed(name: &str) -> Self {
        Self::new(name, "", Better::Lower)
    }

    pub fn value(mut self, value: f64) -> Self {
        self.value = Some(value);
        self
    }

    pub fn peer(mut self, name: &'static str, value: f64) -> Self {
        self.peer = Some((name, value));
        self
    }

    pub fn budget(mut self, budget: Budget) -> Self {
        self.budget = Some(budget);
        self
    }

    fn ratio(&self) -> Option<f64> {
        let (_name, theirs) = self.peer?;
        self.value.map(|ours| ours / theirs)
    }

    fn verdict(&self) -> &'static str {
        if self.value.is_none() {
            return "not measured";
        }
        let (number, limit) = match self.budget {
            None => return "",
            Some(Budget::Value(limit)) => (self.value, limit),
            Some(Budget::Ratio(limit)) => (self.ratio(), limit),
        };
        let Some(number) = number else {
            return "not measured";
        };
        let met = match self.better {
            Better::Lower => number <= limit,
            Better::Higher => number >= limit,
        };
        if met { "met" } else { "missed" }
    }

    fn budget_text(&self) -> String {
        let sign = match self.better {
            Better::Lower => "<=",
            Better::Higher => ">=",
        };
        match self.budget {
            None => String::new(),
            Some(Budget::Value(limit)) => format!("{sign} {limit} {}", self.unit),
            Some(Budget::Ratio(limit)) => format!("{sign} {limit} x"),
        }
    }

    fn cells(&self) -> [String; 8] {
        let (peer, theirs) = self.peer.unzip();
        [
            self.name.clone(),
            self.value.map_or_else(String::new, number),
            self.unit.to_owned(),
            peer.unwrap_or_default().to_owned(),
            theirs.map_or_else(String::new, number),
            self.ratio()
                .map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            self.budget_text(),
            self.verdict().to_owned(),
        ]
    }
}

const HEADINGS: [&str; 8] = [
    "what", "ours", "unit", "peer", "peer's", "ratio", "budget", "verdict",
];

/// A table that is Markdown too.
pub fn table(rows: &[Row]) -> String {
    let mut lines = vec![HEADINGS.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let mut widths = [3; 8];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.len().max(*width);
        }
    }
    lines.insert(1, widths.map(|width| "-".repeat(width)));
    let mut text = String::new();
    for line in &lines {
        for (width, cell) in widths.iter().zip(line) {
            // Writing to a string does not fail.
            let _ok = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
    }
    text
}

/// One object a line.
pub fn json_lines(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let (peer, theirs) = row.peer.unzip();
        let object = serde_json::json!({
            "name": row.name,
            "value": row.value,
            "unit": row.unit,
            "peer": peer,
            "peer_value": theirs,
            "ratio": row.ratio(),
        });
        text.push_str(&object.to_string());
        text.push('\n');
    }
    text
}

/// The middle one, or between the two middle ones; NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.len() / 2;
    let lower = sorted.len().saturating_sub(1) / 2;
    match (sorted.get(lower), sorted.get(upper)) {
        (Some(low), Some(high)) => f64::midpoint(*low, *high),
        _ => f64::NAN,
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        large if large >= 100.0 => 0,
        medium if medium >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

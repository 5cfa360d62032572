//! Aligned columns, and numbers as people read them.

use std::fmt::Write as _;

/// Lines of cells under a heading, each column as wide as its widest cell.
pub fn aligned(heading: &[&str], lines: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let mut text = String::new();
    for line in std::iter::once(&heading).chain(lines) {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _infallible = write!(row, "{cell:width$}  ");
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

/// `0`, `512 KiB`, `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut left = count;
    // Tenths of a unit, so that no float rounds up to 1024.0.
    let mut tenths = count.saturating_mul(10);
    while left >= 1024 && unit + 1 < UNITS.len() {
        left >>= 10;
        tenths >>= 10;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    match (count, unit, left) {
        (0, ..) => "0".to_owned(),
        (_, 0, _) => format!("{left} {name}"),
        (_, _, 0..10) => format!("{}.{} {name}", tenths / 10, tenths % 10),
        _ => format!("{left} {name}"),
    }
}

/// `45s`, `12m`, `3h12m`, `2d5h`.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// A guest's or another process's text on one line without what a terminal would act upon.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_in_no_blank() {
        let lines = [
            vec!["a".to_owned(), "running".to_owned(), "x".to_owned()],
            vec!["größer".to_owned(), "r".to_owned(), String::new()],
        ];
        let text = aligned(&["ID", "STATE", "Z"], &lines);
        assert_eq!(text, "ID      STATE    Z\na       running  x\ngrößer  r\n");
    }

    #[test]
    fn numbers_are_short() {
        let sizes = [
            (0, "0"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536 << 20, "1.5 GiB"),
            ((10 << 30) - 1, "9.9 GiB"),
            (64 << 30, "64 GiB"),
            (u64::MAX, "16777215 TiB"),
        ];
        for (count, text) in sizes {
            assert_eq!(bytes(count), text);
        }
        let times = [(0, "0s"), (61, "1m1s"), (3 * 3600 + 720, "3h12m")];
        for (seconds, text) in times {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(2 * 86_400 + 5 * 3600), "2d5h");
    }
}

use std::fmt::Write;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

/// What a command prints: the same as text and as JSON.
pub(crate) struct Output {
    text: String,
    json: Value,
    bad: bool,
}

impl Output {
    pub(crate) fn new(text: impl Into<String>, json: impl Serialize) -> Self {
        Self { text: text.into(), json: serde_json::to_value(json).unwrap_or_default(), bad: false }
    }

    /// Something was found to be wrong: the exit code is 1.
    pub(crate) fn bad(mut self, bad: bool) -> Self {
        self.bad = bad;
        self
    }

    pub(crate) fn is_bad(&self) -> bool {
        self.bad
    }

    pub(crate) fn print(&self, json: bool) -> String {
        if json { format!("{:#}\n", self.json) } else { self.text.clone() }
    }
}

/// Columns as wide as their widest cell; the last one, which may be long, ends with its text.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    rows.iter().fold(String::new(), |mut text, row| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{:width$}", plain(cell)));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        text
    })
}

/// In one line, and without what a terminal would obey.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

pub(crate) fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S").to_string()
}

pub(crate) fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_a_terminal_obeys_nothing() {
        let text = table(["a", "long cell"], [["wide", "x\u{1b}[2J\ny"].map(String::from)]);
        assert_eq!(text, "a     long cell\nwide  x [2J y\n");
    }
}

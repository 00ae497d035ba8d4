use std::{error::Error, fmt::Write};

/// The text in one line: what would begin a new one, or control a terminal, is written as an escape (`\n`, `\u{1b}`), so
/// that a foreign text cannot pretend to be a line of the log.
///
/// ```
/// assert_eq!(outbox_core::one_line("no\n2026-01-01 all is well".to_owned()), r"no\n2026-01-01 all is well");
/// ```
#[must_use]
pub fn one_line(text: String) -> String {
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    if !text.contains(breaks) {
        return text;
    }
    text.chars().fold(String::with_capacity(text.len() + 8), |mut line, c| {
        // Writing to a string does not fail.
        let _ = if breaks(c) { write!(line, "{}", c.escape_default()) } else { line.write_char(c) };
        line
    })
}

/// The texts of an error and its causes, joined by `: `, in [one line](one_line).
#[must_use]
pub fn error_text(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    one_line(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_foreign_text_begins_no_line_and_controls_no_terminal() {
        let text = one_line("a\r\nb\tc\u{1b}[2J\u{85}\u{2028}d\0 ü".to_owned());
        assert_eq!(text, r"a\r\nb\tc\u{1b}[2J\u{85}\u{2028}d\u{0} ü");
        assert_eq!(one_line("plain „ü“ \\ text".to_owned()), "plain „ü“ \\ text");
    }

    proptest! {
        #[test]
        fn any_text_is_one_line(text in any::<String>()) {
            let line = one_line(text);
            prop_assert!(!line.contains(char::is_control) && line.lines().count() <= 1);
        }
    }
}

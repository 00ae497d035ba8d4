use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// How many failed attempts of a delivery are remembered with error and time.
const REMEMBERED: usize = 20;

/// The failed attempts of a delivery, the oldest first: the last twenty.
///
/// It also decides whether a delivery has killed its worker. Before an attempt that may do so, an entry is stored whose
/// [end is not known](LoggedAttempt::milliseconds); the end replaces nothing, it goes on from there. So an entry without
/// an end that is still the last when the delivery is leased again is the trace of a crash.
///
/// ```
/// use outbox_core::{AttemptLog, LoggedAttempt};
///
/// let mut log = AttemptLog::parse(r#"[{"attempt": 1, "counted": 1, "error": "503", "milliseconds": 12}]"#);
/// log.push(LoggedAttempt { attempt: 2, milliseconds: None, ..LoggedAttempt::default() });
/// assert!(log.last().is_some_and(|last| last.milliseconds.is_none()));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct AttemptLog(Vec<LoggedAttempt>);

/// An attempt in an [`AttemptLog`].
///
/// Other versions and operators write into logs too. What is missing in an entry says nothing against its delivery: the
/// attempt has ended, after 0 ms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoggedAttempt {
    /// Which attempt it was: 1 for the first.
    pub attempt: u32,
    /// How many attempts count until then, this one included: those that were lost in a crash together with others do
    /// not.
    pub counted: u32,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// Who tried.
    pub worker: String,
    /// What went wrong.
    pub error: String,
    /// How long it took; `None` if it was about to begin, and its end is not known.
    pub milliseconds: Option<u64>,
    /// With how many others it was tried at once, itself included, if its end is not known and it was not alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
}

impl Default for LoggedAttempt {
    fn default() -> Self {
        Self {
            attempt: 0,
            counted: 0,
            at: DateTime::UNIX_EPOCH,
            worker: String::new(),
            error: String::new(),
            milliseconds: Some(0),
            group: None,
        }
    }
}

impl AttemptLog {
    /// Reads a log as the store has it: a JSON array. An entry that nobody can read is left out.
    #[must_use]
    pub fn parse(json: &str) -> Self {
        let entries: Vec<serde_json::Value> = serde_json::from_str(json).unwrap_or_default();
        Self(entries.into_iter().filter_map(|entry| serde_json::from_value(entry).ok()).collect())
    }

    /// As the store has it; `None` if it is empty.
    #[must_use]
    pub fn to_json(&self) -> Option<String> {
        // Numbers and texts: that cannot fail.
        (!self.0.is_empty()).then(|| serde_json::to_string(&self.0).unwrap_or_default())
    }

    /// Adds an attempt; the oldest is forgotten if there are too many.
    pub fn push(&mut self, attempt: LoggedAttempt) {
        if self.0.len() >= REMEMBERED {
            self.0.remove(0);
        }
        self.0.push(attempt);
    }

    /// The last attempt.
    #[must_use]
    pub fn last(&self) -> Option<&LoggedAttempt> {
        self.0.last()
    }

    /// The attempts, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &LoggedAttempt> {
        self.0.iter()
    }

    /// Whether nothing has failed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(number: u32) -> LoggedAttempt {
        LoggedAttempt { attempt: number, counted: number, error: "no".to_owned(), ..LoggedAttempt::default() }
    }

    #[test]
    fn only_null_says_that_an_end_is_not_known() {
        let ends = |json: &str| AttemptLog::parse(json).last().map(|last| (last.milliseconds, last.group));
        assert_eq!(ends(r#"[{"attempt":1,"milliseconds":null}]"#), Some((None, None)));
        assert_eq!(ends(r#"[{"attempt":1,"milliseconds":null,"group":32}]"#), Some((None, Some(32))));
        assert_eq!(ends(r#"[{"attempt":1,"error":"written by hand"}]"#), Some((Some(0), None)));
        assert_eq!(ends(r#"[{"attempt":1,"milliseconds":7,"group":null,"later":true}]"#), Some((Some(7), None)));
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        for damaged in ["", "null", "{}", "7", "[", "[7]", r#"["x", null]"#, r#"[{"attempt":"x"}]"#] {
            assert!(AttemptLog::parse(damaged).is_empty(), "{damaged}");
        }
        let log = AttemptLog::parse(r#"[{"attempt":1}, 7, {"attempt":2}]"#);
        assert_eq!(log.iter().map(|entry| entry.attempt).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut log = AttemptLog::default();
        assert_eq!(log.to_json(), None);
        (1..=25).for_each(|number| log.push(attempt(number)));
        assert_eq!(log.iter().map(|entry| entry.attempt).collect::<Vec<_>>(), (6..=25).collect::<Vec<_>>());
    }

    #[test]
    fn a_log_is_read_as_it_was_written() {
        let mut log = AttemptLog::default();
        log.push(attempt(1));
        log.push(LoggedAttempt { milliseconds: None, group: Some(3), ..attempt(2) });
        log.push(LoggedAttempt { milliseconds: None, ..attempt(3) });
        let json = log.to_json().unwrap();
        assert_eq!(AttemptLog::parse(&json), log);
        assert_eq!(json.matches(r#""milliseconds":null"#).count(), 2);
        assert_eq!(json.matches("group").count(), 1);
    }
}

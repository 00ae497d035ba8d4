//! Which delivery has killed its worker: suspects are tried apart from all others, and that is stored before they begin.

use std::time::Duration;

use chrono::{DateTime, Utc};
use outbox_core::{AttemptLog, LoggedAttempt};

/// How many suspects are tried as a group at most: few, so that a crash leaves few to be tried alone, and enough to keep
/// the worker busy. A thousand of them are some thirty notes, and as many waits for the last of a group.
const GROUP: usize = 32;

/// Up to so many are tried alone from the start: that is soon done, and if one of them kills the worker, it needs no
/// crash of a group to be found.
const FEW: usize = 6;

/// Why a head may have killed its worker: its last attempt has left no result. In the order in which suspects are tried:
/// the crashes are as many in any order, and so those that are probably innocent do not wait for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Suspicion {
    /// It was leased, among up to all that its worker had.
    Leased,
    /// It was tried in a small group.
    Grouped,
    /// It was tried alone.
    Alone,
}

/// The delivery that a lane is at, as far as its attempts go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Its attempts, the one under way included.
    pub(crate) attempts: u32,
    /// As `attempts`, without those that were lost in a crash together with others.
    pub(crate) counted: u32,
    pub(crate) suspicion: Option<Suspicion>,
    /// It stands in the stored log that this suspect is tried.
    pub(crate) noted: bool,
    pub(crate) log: AttemptLog,
}

impl Head {
    /// One that has not been tried.
    pub(crate) fn fresh() -> Self {
        Self { attempts: 1, counted: 1, suspicion: None, noted: false, log: AttemptLog::default() }
    }

    /// One that was claimed for this attempt, after those of the log.
    ///
    /// An attempt that was begun alone and is not over has killed its worker, and counts by itself. Any number of attempts
    /// that were lost together with others count as one; that of a group is in its entry.
    pub(crate) fn claimed(attempts: u32, log: AttemptLog) -> Self {
        let last = log.last();
        let suspicion = match last {
            Some(LoggedAttempt { milliseconds: None, group: None, .. }) => Some(Suspicion::Alone),
            Some(LoggedAttempt { milliseconds: None, .. }) => Some(Suspicion::Grouped),
            _ => (last.map_or(0, |last| last.attempt).saturating_add(1) < attempts).then_some(Suspicion::Leased),
        };
        let lost = u32::from(suspicion == Some(Suspicion::Leased));
        let counted = last.map_or(0, |last| last.counted).saturating_add(1).saturating_add(lost);
        Self { attempts, counted, suspicion, noted: false, log }
    }

    /// Whether it has spent all its attempts, and killed its worker with the last. Losses together with others cost no
    /// delivery its last attempt: only those alone are certainly its own.
    pub(crate) fn killed_its_worker(&self, most: u32) -> bool {
        self.suspicion == Some(Suspicion::Alone) && self.counted > most
    }

    /// Whether it must not begin before it is noted.
    pub(crate) fn waits_for_its_note(&self, trial: bool) -> bool {
        !self.noted && (trial || self.suspicion.is_some())
    }

    /// The log with the attempt that has failed.
    pub(crate) fn failed(mut self, at: DateTime<Utc>, worker: &str, error: &str, took: Duration) -> AttemptLog {
        self.log.push(LoggedAttempt {
            attempt: self.attempts,
            counted: self.counted,
            at,
            worker: worker.to_owned(),
            error: error.to_owned(),
            milliseconds: Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
            group: None,
        });
        self.log
    }

    /// The log with the attempt of a suspect that is about to begin, in a group of this size. Nobody knows yet how long it
    /// takes, and if it is lost in a group, nothing more is counted than before.
    pub(crate) fn begun(&self, at: DateTime<Utc>, worker: &str, group: usize) -> AttemptLog {
        let alone = group == 1;
        let how = if alone { "alone".to_owned() } else { format!("in a group of {group}") };
        let mut log = self.log.clone();
        log.push(LoggedAttempt {
            attempt: self.attempts,
            counted: self.counted - u32::from(!alone),
            at,
            worker: worker.to_owned(),
            error: format!("tried {how} after a crash; its end is not known"),
            milliseconds: None,
            group: (!alone).then(|| u32::try_from(group).unwrap_or(u32::MAX)),
        });
        log
    }
}

/// How many of these suspects are tried at once, in the order of their suspicion: in a group those that were leased when
/// their worker was killed, alone those that were in such a group. So a crash is put down to those that were tried, and
/// counts only for one that was alone.
pub(crate) fn group(suspicions: impl Iterator<Item = Suspicion>) -> usize {
    let leased = suspicions.filter(|suspicion| *suspicion == Suspicion::Leased).count();
    if leased > FEW { leased.min(GROUP) } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimed(attempts: u32, log: &str) -> (u32, Option<Suspicion>) {
        let head = Head::claimed(attempts, AttemptLog::parse(log));
        (head.counted, head.suspicion)
    }

    #[test]
    fn what_was_never_tried_or_has_only_failed_is_no_suspect() {
        assert_eq!(claimed(1, ""), (1, None));
        assert_eq!(claimed(3, r#"[{"attempt":1,"counted":1},{"attempt":2,"counted":2}]"#), (3, None));
        assert_eq!(
            claimed(3, r#"[{"attempt":2,"counted":1}]"#),
            (2, None),
            "one was lost with others, and not counted"
        );
    }

    #[test]
    fn an_attempt_without_an_end_makes_a_suspect() {
        assert_eq!(claimed(2, ""), (2, Some(Suspicion::Leased)));
        assert_eq!(claimed(20, ""), (2, Some(Suspicion::Leased)), "any number of losses with others is one");
        let group = r#"[{"attempt":2,"counted":1,"milliseconds":null,"group":32}]"#;
        assert_eq!(claimed(3, group), (2, Some(Suspicion::Grouped)));
        assert_eq!(claimed(9, group), (2, Some(Suspicion::Grouped)));
        let alone = r#"[{"attempt":3,"counted":2,"milliseconds":null}]"#;
        assert_eq!(claimed(4, alone), (3, Some(Suspicion::Alone)));
    }

    #[test]
    fn an_entry_of_somebody_else_condemns_nobody() {
        assert_eq!(claimed(2, r#"[{"attempt":1,"error":"put back by hand"}]"#), (1, None));
    }

    #[test]
    fn only_those_that_were_alone_are_given_up_for_a_crash() {
        let head = |log| Head::claimed(5, AttemptLog::parse(log));
        assert!(head(r#"[{"attempt":3,"counted":3,"milliseconds":null}]"#).killed_its_worker(3));
        assert!(!head(r#"[{"attempt":3,"counted":2,"milliseconds":null}]"#).killed_its_worker(3));
        assert!(!head(r#"[{"attempt":3,"counted":3,"milliseconds":null,"group":2}]"#).killed_its_worker(3));
        assert!(!head("").killed_its_worker(1));
    }

    #[test]
    fn what_is_noted_is_read_back_as_it_was_meant() {
        let at = DateTime::UNIX_EPOCH;
        let head = Head::claimed(2, AttemptLog::default());
        let grouped = Head::claimed(3, head.begun(at, "w", 9));
        assert_eq!((grouped.counted, grouped.suspicion), (2, Some(Suspicion::Grouped)), "its loss is not counted");
        let alone = Head::claimed(4, grouped.begun(at, "w", 1));
        assert_eq!((alone.counted, alone.suspicion), (3, Some(Suspicion::Alone)));
        let failed = Head::claimed(5, alone.clone().failed(at, "w", "no", Duration::from_millis(3)));
        assert_eq!((failed.counted, failed.suspicion), (4, None));
    }

    #[test]
    fn few_are_tried_alone_and_many_in_groups() {
        let leased = |n: usize| std::iter::repeat_n(Suspicion::Leased, n);
        assert_eq!([1, 6, 7, 32, 1000].map(|n| group(leased(n))), [1, 1, 7, 32, 32]);
        assert_eq!(group(leased(3).chain(std::iter::repeat_n(Suspicion::Grouped, 20))), 1);
        assert_eq!(group(leased(7).chain([Suspicion::Alone])), 7, "those that are grouped or alone come later");
    }
}

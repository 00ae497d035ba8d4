//! What becomes of a delivery after an attempt.

use outbox_core::{DeliveryError, Outcome, Reason};

use super::circuit::Blame;
use crate::destination::End;

/// What becomes of a delivery.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It is delivered, which is to be stored.
    Delivered,
    /// It is delivered, and stored together with its effect.
    Settled,
    /// The lease is lost, or perhaps: whatever came of the attempt does not count.
    Void,
    /// The attempt was not made: it is given back, and the lane to whoever comes next, or after a wait.
    NotMade(Option<Pause>),
    /// The destination is gone for good: the subscription is paused.
    Gone(DeliveryError),
    /// The destination is down: the attempt is given back.
    Down(DeliveryError),
    /// The attempt counts, and there is another.
    Retry(DeliveryError),
    /// The attempt counts, and it was the last; true if another could not have helped.
    Dead(DeliveryError, bool),
}

/// How long a lane is left alone, and why.
#[derive(Debug)]
pub(crate) struct Pause {
    pub(crate) length: PauseLength,
    pub(crate) error: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PauseLength {
    /// As after a first failure.
    Retry,
    /// As long as for events that this worker does not know.
    Unknown,
}

impl Pause {
    pub(crate) fn new(length: PauseLength, error: impl std::fmt::Display) -> Option<Self> {
        Some(Self { length, error: format!("{error}; no attempt was spent") })
    }
}

/// Judges an attempt that has ended. `blame` says whose fault a failure is; `is_last` that no other attempt is left.
pub(crate) fn judge(
    end: End,
    event: impl std::fmt::Display,
    blame: impl FnOnce(&DeliveryError) -> Blame,
    is_last: bool,
) -> Verdict {
    match end {
        End::Outcome(Outcome::Delivered) => Verdict::Delivered,
        End::Outcome(Outcome::Retry(error) | Outcome::Permanent(error)) => failed(error, blame, is_last),
        End::Settled => Verdict::Settled,
        End::Cancelled => Verdict::NotMade(None),
        End::Unknown => {
            Verdict::NotMade(Pause::new(PauseLength::Unknown, format_args!("no handler in this worker for {event}")))
        }
        End::Unavailable(error) => Verdict::NotMade(Pause::new(PauseLength::Retry, error)),
        // `Outcome` may grow; a future kind is an unknown end.
        End::Superseded | End::Outcome(_) => Verdict::Void,
    }
}

fn failed(error: DeliveryError, blame: impl FnOnce(&DeliveryError) -> Blame, is_last: bool) -> Verdict {
    match error.reason() {
        Reason::NotBegun => return Verdict::NotMade(Pause::new(PauseLength::Retry, error)),
        Reason::Gone => return Verdict::Gone(error),
        _ => {}
    }
    match blame(&error) {
        Blame::Destination => Verdict::Down(error),
        Blame::Event => Verdict::Dead(error, true),
        Blame::Unclear if is_last => Verdict::Dead(error, false),
        Blame::Unclear => Verdict::Retry(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(end: End, blame: Blame, is_last: bool) -> String {
        let verdict = judge(end, "note.noted version 2", |_| blame, is_last);
        format!("{verdict:?}").split(['(', ' ']).next().unwrap_or_default().to_owned()
    }

    fn retry() -> End {
        End::Outcome(Outcome::Retry(DeliveryError::retry("no")))
    }

    #[test]
    fn a_failure_counts_unless_the_destination_is_to_blame() {
        assert_eq!(verdict(retry(), Blame::Unclear, false), "Retry");
        assert_eq!(verdict(retry(), Blame::Unclear, true), "Dead");
        assert_eq!(verdict(retry(), Blame::Event, false), "Dead");
        assert_eq!(verdict(retry(), Blame::Destination, true), "Down");
    }

    #[test]
    fn an_attempt_that_was_not_made_spends_nothing() {
        for end in [End::Cancelled, End::Unknown, End::Unavailable(DeliveryError::retry("away"))] {
            assert_eq!(verdict(end, Blame::Event, true), "NotMade");
        }
        let Verdict::NotMade(Some(pause)) = judge(End::Unknown, "note.noted version 2", |_| Blame::Event, true) else {
            panic!("a pause");
        };
        assert_eq!(pause.error, "no handler in this worker for note.noted version 2; no attempt was spent");
    }

    #[test]
    fn a_lost_lease_is_void_and_what_is_stored_stays() {
        assert_eq!(verdict(End::Superseded, Blame::Unclear, true), "Void");
        assert_eq!(verdict(End::Settled, Blame::Unclear, true), "Settled");
        assert_eq!(verdict(End::Outcome(Outcome::Delivered), Blame::Unclear, true), "Delivered");
    }
}

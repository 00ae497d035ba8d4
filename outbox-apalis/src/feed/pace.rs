//! How soon one attempt may follow another: at the pace of this process, and at that of all workers together.

use std::time::{Duration, Instant};

/// How much is reserved at once.
const CHUNK: Duration = Duration::from_millis(500);

/// When to ask again after others had reserved for long enough.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// Attempts that come late may follow one another faster for so long.
const LATE: Duration = Duration::from_millis(50);

/// What was reserved and is not used for so long is void: it would come on top of what others have reserved since.
const UNUSED: Duration = Duration::from_secs(1);

/// The shortest times between two attempts; zero if there is none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Every {
    pub(crate) here: Duration,
    pub(crate) fleet: Duration,
}

#[derive(Debug)]
pub(crate) struct Pace {
    every: Every,
    next: Instant,
    /// Attempts that are reserved, and when the next of them may begin.
    reserved: u32,
    next_reserved: Instant,
    /// When to reserve again; `None` while that is under way.
    ask_at: Option<Instant>,
}

impl Pace {
    pub(crate) fn new(every: Every, now: Instant) -> Self {
        Self { every, next: now, reserved: 0, next_reserved: now, ask_at: Some(now) }
    }

    /// When the next attempt may begin, if not now. Without an attempt reserved nobody knows.
    pub(crate) fn waits_until(&self, now: Instant) -> Option<Instant> {
        let here = (!self.every.here.is_zero()).then_some(self.next);
        let fleet = (!self.every.fleet.is_zero() && self.reserved > 0).then_some(self.next_reserved);
        here.max(fleet).filter(|next| *next > now)
    }

    /// Whether an attempt may begin now.
    pub(crate) fn may_begin(&self, now: Instant) -> bool {
        self.waits_until(now).is_none() && (self.every.fleet.is_zero() || self.reserved > 0)
    }

    /// An attempt begins.
    pub(crate) fn begun(&mut self, now: Instant) {
        self.next = self.next.max(now) + self.every.here;
        self.reserved = self.reserved.saturating_sub(1);
        self.next_reserved = self.next_reserved.max(now.checked_sub(LATE).unwrap_or(now)) + self.every.fleet;
    }

    /// When to reserve more, if that is needed.
    pub(crate) fn reserves_at(&self, now: Instant) -> Option<Instant> {
        let is_void = self.reserved == 0 || now > self.next_reserved + self.every.fleet + UNUSED;
        self.ask_at.filter(|_| !self.every.fleet.is_zero() && is_void)
    }

    /// So many attempts are asked for, at this pace.
    pub(crate) fn asks(&mut self) -> (u32, Duration) {
        (self.reserved, self.ask_at) = (0, None);
        let attempts = (CHUNK.as_secs_f64() / self.every.fleet.as_secs_f64()).ceil();
        (attempts.clamp(1.0, 1e6) as u32, self.every.fleet)
    }

    /// So many attempts are reserved, from this moment on.
    pub(crate) fn reserved(&mut self, attempts: u32, from: Instant, now: Instant) {
        (self.reserved, self.next_reserved, self.ask_at) = (attempts, from, Some(now));
    }

    /// Others have reserved for long enough.
    pub(crate) fn waits(&mut self, now: Instant) {
        self.ask_at = Some(now + ASK_AGAIN);
    }

    /// Nothing is known to be reserved.
    pub(crate) fn failed(&mut self, now: Instant, wait: Duration) {
        self.ask_at = Some(now + wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn attempts_follow_one_another_at_their_pace_and_what_was_not_used_is_not_made_up_for() {
        let now = Instant::now();
        let mut pace = Pace::new(Every { here: SECOND, ..Every::default() }, now);
        assert!(pace.may_begin(now) && pace.reserves_at(now).is_none());
        pace.begun(now);
        assert_eq!(pace.waits_until(now), Some(now + SECOND));
        assert_eq!(pace.waits_until(now + SECOND), None);
        pace.begun(now + 10 * SECOND);
        assert_eq!(pace.waits_until(now + 10 * SECOND), Some(now + 11 * SECOND));
    }

    #[test]
    fn without_a_pace_nothing_waits() {
        let now = Instant::now();
        let mut pace = Pace::new(Every::default(), now);
        pace.begun(now);
        assert!(pace.may_begin(now) && pace.reserves_at(now).is_none());
    }

    #[test]
    fn what_all_workers_share_begins_as_it_is_reserved() {
        let (now, every) = (Instant::now(), SECOND / 10);
        let mut pace = Pace::new(Every { fleet: every, ..Every::default() }, now);
        assert!(!pace.may_begin(now));
        assert_eq!((pace.waits_until(now), pace.reserves_at(now)), (None, Some(now)));
        assert_eq!(pace.asks(), (5, every));
        assert_eq!(pace.reserves_at(now), None, "it is under way");
        pace.waits(now);
        assert_eq!(pace.reserves_at(now), Some(now + ASK_AGAIN));
        pace.asks();
        let from = now + SECOND;
        pace.reserved(5, from, now);
        assert!(!pace.may_begin(now));
        assert_eq!(pace.waits_until(now), Some(from));
        let mut begun = Vec::new();
        for tenth in 0..20 {
            let now = from + tenth * every;
            if pace.may_begin(now) {
                pace.begun(now);
                begun.push(tenth);
            }
        }
        assert_eq!(begun, [0, 1, 2, 3, 4]);
        assert_eq!(pace.reserves_at(from + every), Some(now));
    }

    #[test]
    fn what_was_reserved_and_is_not_used_is_void_after_a_second() {
        let (now, every) = (Instant::now(), SECOND / 10);
        let mut pace = Pace::new(Every { fleet: every, ..Every::default() }, now);
        pace.asks();
        pace.reserved(5, now, now);
        assert_eq!(pace.reserves_at(now + SECOND), None);
        assert_eq!(pace.reserves_at(now + 2 * SECOND), Some(now));
        pace.asks();
        assert!(!pace.may_begin(now + 2 * SECOND));
    }

    /// A timer that comes late by some milliseconds each time does not lower the rate.
    #[test]
    fn a_late_attempt_is_followed_sooner() {
        let (now, every) = (Instant::now(), SECOND / 100);
        let mut pace = Pace::new(Every { fleet: every, ..Every::default() }, now);
        pace.asks();
        pace.reserved(50, now, now);
        let late = now + SECOND / 50;
        assert_eq!(
            (0..9)
                .filter(|_| pace.may_begin(late) && {
                    pace.begun(late);
                    true
                })
                .count(),
            3
        );
    }
}

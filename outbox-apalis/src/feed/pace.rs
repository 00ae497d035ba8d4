//! How soon one attempt may follow another.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Pace {
    /// The shortest time between two attempts; zero if there is none.
    every: Duration,
    next: Instant,
}

impl Pace {
    pub(crate) fn new(every: Duration, now: Instant) -> Self {
        Self { every, next: now }
    }

    /// When the next attempt may begin, if not now.
    pub(crate) fn waits_until(&self, now: Instant) -> Option<Instant> {
        (!self.every.is_zero() && self.next > now).then_some(self.next)
    }

    /// An attempt begins.
    pub(crate) fn begun(&mut self, now: Instant) {
        self.next = self.next.max(now) + self.every;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_follow_one_another_at_their_pace_and_what_was_not_used_is_not_made_up_for() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(second, now);
        assert_eq!(pace.waits_until(now), None);
        pace.begun(now);
        assert_eq!(pace.waits_until(now), Some(now + second));
        assert_eq!(pace.waits_until(now + second), None);
        pace.begun(now + 10 * second);
        assert_eq!(pace.waits_until(now + 10 * second), Some(now + 11 * second));
    }

    #[test]
    fn without_a_pace_nothing_waits() {
        let now = Instant::now();
        let mut pace = Pace::new(Duration::ZERO, now);
        pace.begun(now);
        assert_eq!(pace.waits_until(now), None);
    }
}

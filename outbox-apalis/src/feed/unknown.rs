//! Events of types that this worker does not know: another one may.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// How long an event of an unknown type is left alone at first, and at most.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How much later than others a worker looks that has met unknown events lately: those who know them come first.
const LAG: Duration = Duration::from_millis(150);

/// How many keys are remembered, so that their wait grows.
const REMEMBERED: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Unknown {
    /// How often the next event of these keys was of an unknown type.
    times: HashMap<String, u32>,
    /// Until when such events come back.
    until: Instant,
}

impl Unknown {
    pub(crate) fn new(now: Instant) -> Self {
        Self { times: HashMap::new(), until: now }
    }

    /// How long to leave alone a key whose next event is unknown.
    pub(crate) fn wait(&mut self, key: &str, now: Instant, chance: f64) -> Duration {
        if self.times.len() >= REMEMBERED {
            self.times.clear();
        }
        let times = self.times.entry(key.to_owned()).or_default();
        let wait = FIRST_WAIT * 2_u32.pow((*times / 4).min(10));
        *times += 1;
        let wait = wait.min(LONGEST_WAIT).mul_f64(chance.mul_add(0.5, 0.5));
        self.until = self.until.max(now + wait + 2 * LAG);
        wait
    }

    /// How much later than others to look.
    pub(crate) fn lag(&self, now: Instant) -> Duration {
        if now < self.until { LAG } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_waits_longer_each_fourth_time_and_a_minute_at_most() {
        let now = Instant::now();
        let mut unknown = Unknown::new(now);
        let waits: Vec<u64> = (0..40).map(|_| unknown.wait("k", now, 1.0).as_secs()).collect();
        assert_eq!(waits[..9], [1, 1, 1, 1, 2, 2, 2, 2, 4]);
        assert_eq!(waits[39], 60);
        assert_eq!(unknown.wait("other", now, 0.0), FIRST_WAIT / 2);
    }

    #[test]
    fn others_come_first_as_long_as_unknown_events_come_back() {
        let now = Instant::now();
        let mut unknown = Unknown::new(now);
        assert_eq!(unknown.lag(now), Duration::ZERO);
        let wait = unknown.wait("k", now, 1.0);
        assert_eq!(unknown.lag(now + wait), LAG);
        assert_eq!(unknown.lag(now + wait + 2 * LAG), Duration::ZERO);
    }
}

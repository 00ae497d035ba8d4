//! Whether the destination of a subscription is down.
//!
//! The truth is in the database, where every process finds it: an open circuit lets nobody claim, and when its time has
//! come one process gets one lane. Here stands what this process has seen since.

use std::collections::HashSet;

/// So many keys have to fail in a row, without a success, before a destination that answers counts as down.
const FAILING_KEYS: usize = 5;

#[derive(Debug)]
pub(crate) struct Circuit {
    open: bool,
    /// How often in a row the destination was found down.
    failures: u32,
    /// The keys that have failed since the last success because the destination had trouble.
    failing: HashSet<String>,
    /// How many deliveries may be under way: after an outage first one, then twice as many after each success.
    ramp: usize,
}

impl Circuit {
    pub(crate) fn new() -> Self {
        Self { open: false, failures: 0, failing: HashSet::new(), ramp: usize::MAX }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// How often the destination was found down, with this time.
    pub(crate) fn times_down(&self) -> u32 {
        self.failures + 1
    }

    /// How many deliveries may be under way, of `concurrency` at other times.
    pub(crate) fn limit(&self, concurrency: usize) -> usize {
        self.ramp.min(concurrency)
    }

    /// A delivery of this key failed because the destination had trouble. True if it counts as down.
    pub(crate) fn failed(&mut self, key: &str) -> bool {
        self.failing.insert(key.to_owned());
        self.open || self.failing.len() >= FAILING_KEYS
    }

    /// The destination is down. True if that is news.
    pub(crate) fn opened(&mut self) -> bool {
        self.failing.clear();
        let news = !std::mem::replace(&mut self.open, true);
        self.failures += u32::from(news);
        news
    }

    /// The probe told nothing new: the next failure counts again.
    pub(crate) fn probing(&mut self) {
        self.open = false;
    }

    /// A delivery had an answer.
    pub(crate) fn succeeded(&mut self) {
        self.failing.clear();
        self.failures = 0;
        self.ramp = self.ramp.saturating_mul(2);
    }

    /// The database says that the circuit is open, or closed.
    pub(crate) fn seen(&mut self, circuit: Option<u32>) {
        match circuit {
            Some(failures) => (self.open, self.failures) = (true, failures),
            None if self.open => self.closed(),
            None => {}
        }
    }

    /// The destination is back.
    pub(crate) fn closed(&mut self) {
        *self = Self { ramp: 1, ..Self::new() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_keys_that_fail_in_a_row_are_a_destination_that_is_down() {
        let mut circuit = Circuit::new();
        assert!((0..4).all(|key| !circuit.failed(&key.to_string())));
        assert!(!circuit.failed("0"), "the same key again is no evidence");
        circuit.succeeded();
        assert!((0..4).all(|key| !circuit.failed(&key.to_string())));
        assert!(circuit.failed("4") && circuit.opened() && !circuit.opened());
        assert_eq!(circuit.times_down(), 2);
    }

    #[test]
    fn after_an_outage_the_load_grows_with_each_success() {
        let mut circuit = Circuit::new();
        assert_eq!(circuit.limit(10), 10);
        circuit.opened();
        circuit.closed();
        let mut limits = vec![circuit.limit(10)];
        limits.extend((0..5).map(|_| {
            circuit.succeeded();
            circuit.limit(10)
        }));
        assert_eq!(limits, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn what_another_process_found_counts_here_too() {
        let mut circuit = Circuit::new();
        circuit.seen(Some(3));
        assert!(circuit.is_open() && circuit.times_down() == 4);
        circuit.seen(None);
        assert!(!circuit.is_open() && circuit.limit(10) == 1);
        circuit.seen(None);
        circuit.succeeded();
        assert_eq!(circuit.limit(10), 2);
    }
}

//! Whether the destination of a subscription is down, and whose fault a failure is.
//!
//! The truth is in the database, where every process finds it: an open circuit lets nobody claim, and when its time has
//! come one process gets one lane. Here stands what this process has seen since.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use outbox_core::Reason;

/// So many keys have to fail in a row, without a success, before a destination that answers counts as down.
const FAILING_KEYS: usize = 5;

/// An event that is older than this spends its attempts also on a destination that refuses everything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3 * 24 * 3600);

/// How many keys are remembered that were refused.
const REMEMBERED: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Circuit {
    open: bool,
    /// How often in a row the destination was found down.
    failures: u32,
    /// The keys that have failed since the last success, and when they were refused for good, if they were.
    failing: HashMap<String, Option<Instant>>,
    /// The keys that were refused for good, a few at most at a time, before another was taken.
    refused: HashSet<String>,
    /// How many deliveries may be under way: after an outage first one, then twice as many after each success.
    ramp: usize,
}

/// A failed attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    pub(crate) reason: Reason,
    /// Of a destination outside of this process. A handler knows what it says of its event: it is this process itself,
    /// and the circuit is that of all.
    pub(crate) outside: bool,
    /// Of the one delivery that was to find out.
    pub(crate) probe: bool,
    /// Its event is older than [`PATIENCE`].
    pub(crate) old: bool,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    /// The destination's: it is down, and the attempt is given back.
    Destination,
    /// Nobody knows, or the event's: the attempt counts.
    Unclear,
    /// The event's for certain: another attempt cannot help.
    Event,
}

impl Circuit {
    pub(crate) fn new() -> Self {
        Self { open: false, failures: 0, failing: HashMap::new(), refused: HashSet::new(), ramp: usize::MAX }
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

    /// A delivery of this key has failed.
    ///
    /// One key that fails says nothing about the others, several in a row and nothing else in between are about the
    /// destination, whatever it answers. So a refusal is believed only if the destination has taken something else since
    /// the key was first refused.
    pub(crate) fn failed(&mut self, key: &str, failure: Failure, now: Instant) -> Blame {
        let Failure { reason, outside, probe, old } = failure;
        let for_good = reason == Reason::Permanent;
        match reason {
            Reason::Unreachable => return Blame::Destination,
            Reason::Unavailable => {}
            _ if !outside && for_good => return Blame::Event,
            _ if !outside => return Blame::Unclear,
            _ => {}
        }
        if self.failing.len() < REMEMBERED || self.failing.contains_key(key) {
            self.failing.insert(key.to_owned(), for_good.then_some(now));
        }
        let says_so = reason == Reason::Unavailable && probe;
        match self.open || self.failing.len() >= FAILING_KEYS || says_so {
            // Three days are as good as for ever: what nobody will ever take must come to an end.
            true if probe && old && reason != Reason::Unavailable => Blame::Unclear,
            true => Blame::Destination,
            false if for_good && self.refused.remove(key) => {
                // No evidence against the destination.
                self.failing.remove(key);
                Blame::Event
            }
            false => Blame::Unclear,
        }
    }

    /// The destination is down, as a probe has found out or another delivery. True if that is news: what a probe finds always
    /// is, also if the database was asked meanwhile and has said that the circuit is open.
    pub(crate) fn opened(&mut self, probe: bool) -> bool {
        let news = !std::mem::replace(&mut self.open, true) || probe;
        self.failures += u32::from(news);
        news
    }

    /// The probe told nothing new: the next failure counts again.
    pub(crate) fn probing(&mut self) {
        self.open = false;
    }

    /// A delivery of this key, begun at that time, was taken, or answered by a handler.
    pub(crate) fn succeeded(&mut self, key: &str, begun: Instant) {
        self.refused.remove(key);
        let failing = std::mem::take(&mut self.failing);
        // Many that fail together are no evidence against any of them.
        if failing.len() < FAILING_KEYS {
            let before = |refused: Option<Instant>| refused.is_some_and(|at| at < begun);
            if self.refused.len() >= REMEMBERED {
                self.refused.clear();
            }
            self.refused.extend(failing.into_iter().filter(|(_, at)| before(*at)).map(|(key, _)| key));
        }
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
        let refused = std::mem::take(&mut self.refused);
        *self = Self { ramp: 1, refused, ..Self::new() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(reason: Reason) -> Failure {
        Failure { reason, outside: true, probe: false, old: false }
    }

    /// How these keys fare that fail one after another.
    fn fail(circuit: &mut Circuit, keys: impl IntoIterator<Item = u32>, failure: Failure) -> Vec<Blame> {
        keys.into_iter().map(|key| circuit.failed(&key.to_string(), failure, Instant::now())).collect()
    }

    #[test]
    fn five_keys_that_fail_in_a_row_are_a_destination_that_is_down() {
        for reason in [Reason::Unavailable, Reason::Failed, Reason::Permanent] {
            let mut circuit = Circuit::new();
            assert_eq!(fail(&mut circuit, 0..4, outside(reason)), [Blame::Unclear; 4]);
            assert_eq!(fail(&mut circuit, [0], outside(reason)), [Blame::Unclear], "the same key is no evidence");
            circuit.succeeded("x", Instant::now() - Duration::from_secs(1));
            assert_eq!(fail(&mut circuit, 10..14, outside(reason)), [Blame::Unclear; 4]);
            assert_eq!(fail(&mut circuit, [14], outside(reason)), [Blame::Destination]);
            assert!(circuit.opened(false) && !circuit.opened(false));
            assert_eq!(circuit.times_down(), 2);
        }
    }

    #[test]
    fn whatever_the_answers_are_they_count_together() {
        let mut circuit = Circuit::new();
        let reasons = [Reason::Failed, Reason::Permanent, Reason::Unavailable, Reason::Permanent, Reason::Failed];
        let verdicts: Vec<_> =
            (0..).zip(reasons).flat_map(|(n, reason)| fail(&mut circuit, [n], outside(reason))).collect();
        assert_eq!(verdicts[..4], [Blame::Unclear; 4]);
        assert_eq!(verdicts[4], Blame::Destination);
    }

    #[test]
    fn a_refusal_is_final_once_another_was_taken_since() {
        let (mut circuit, refused) = (Circuit::new(), outside(Reason::Permanent));
        assert_eq!(fail(&mut circuit, [1, 1, 1], refused), [Blame::Unclear; 3]);
        // This one was under way already.
        circuit.succeeded("2", Instant::now() - Duration::from_secs(1));
        assert_eq!(fail(&mut circuit, [1], refused), [Blame::Unclear]);
        circuit.succeeded("2", Instant::now());
        assert_eq!(fail(&mut circuit, [3, 1], refused), [Blame::Unclear, Blame::Event]);
        // The next event of the key is another one.
        assert_eq!(fail(&mut circuit, [1], refused), [Blame::Unclear]);
    }

    #[test]
    fn what_a_destination_refused_while_it_was_down_is_no_evidence() {
        let (mut circuit, refused) = (Circuit::new(), outside(Reason::Permanent));
        fail(&mut circuit, 0..8, refused);
        circuit.opened(false);
        circuit.probing();
        circuit.succeeded("9", Instant::now());
        circuit.closed();
        assert_eq!(fail(&mut circuit, 0..4, refused), [Blame::Unclear; 4]);
    }

    #[test]
    fn a_probe_that_is_refused_leaves_the_destination_down() {
        for reason in [Reason::Failed, Reason::Permanent] {
            let mut circuit = Circuit::new();
            fail(&mut circuit, 0..5, outside(reason));
            for times in 1..100 {
                assert!(circuit.opened(times > 1) && circuit.times_down() == times + 1);
                circuit.probing();
                let probe = Failure { probe: true, ..outside(reason) };
                assert_eq!(fail(&mut circuit, [times % 3], probe), [Blame::Destination]);
            }
            // Not for ever.
            circuit.probing();
            let old = Failure { probe: true, old: true, ..outside(reason) };
            assert_eq!(fail(&mut circuit, [1], old), [Blame::Unclear]);
        }
    }

    #[test]
    fn a_probe_spends_its_attempt_while_few_keys_have_failed() {
        let mut circuit = Circuit::new();
        circuit.seen(Some(2));
        circuit.probing();
        let probe = |reason| Failure { probe: true, ..outside(reason) };
        assert_eq!(fail(&mut circuit, [1], probe(Reason::Failed)), [Blame::Unclear]);
        assert_eq!(fail(&mut circuit, [1], probe(Reason::Unavailable)), [Blame::Destination]);
    }

    #[test]
    fn what_a_probe_finds_is_news_whatever_was_seen_meanwhile() {
        let mut circuit = Circuit::new();
        circuit.opened(false);
        circuit.probing();
        circuit.seen(Some(1));
        assert!(!circuit.opened(false) && circuit.opened(true));
        assert_eq!(circuit.times_down(), 3);
    }

    #[test]
    fn a_handler_knows_what_is_about_its_event() {
        let mut circuit = Circuit::new();
        let own = |reason| Failure { outside: false, ..outside(reason) };
        assert_eq!(fail(&mut circuit, 0..9, own(Reason::Failed)), [Blame::Unclear; 9]);
        assert_eq!(fail(&mut circuit, 0..9, own(Reason::Permanent)), [Blame::Event; 9]);
        assert_eq!(fail(&mut circuit, 0..5, own(Reason::Unavailable))[4], Blame::Destination);
    }

    #[test]
    fn after_an_outage_the_load_grows_with_each_success() {
        let mut circuit = Circuit::new();
        assert_eq!(circuit.limit(10), 10);
        circuit.opened(false);
        circuit.closed();
        let mut limits = vec![circuit.limit(10)];
        limits.extend((0..5).map(|_| {
            circuit.succeeded("k", Instant::now());
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
        circuit.succeeded("k", Instant::now());
        assert_eq!(circuit.limit(10), 2);
    }
}

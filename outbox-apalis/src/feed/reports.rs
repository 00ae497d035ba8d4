//! What is over and waits to be stored.

use std::time::{Duration, Instant};

use outbox_core::store::LaneReport;

use super::outage::outage_wait;

/// How long results of handlers in this process wait for the end of their lane's run.
const RUN_ON: Duration = Duration::from_millis(50);

/// How long to wait for lanes that a commit holds.
pub(crate) const BUSY_WAIT: Duration = Duration::from_millis(5);

/// From one acknowledgement to the next while this many come together: the load is high, and a few large statements cost
/// less than many small ones.
const COALESCE_LOADED: Duration = Duration::from_millis(10);
pub(crate) const LOADED: usize = 8;

#[derive(Debug)]
pub(crate) struct Reports {
    /// Of a destination outside of this process: its results are stored at once, before the next attempts begin.
    outside: bool,
    /// The last ones of their lanes, the older before the newer.
    over: Vec<LaneReport>,
    /// Those whose storing failed: tried again as they are.
    unstored: Option<Vec<LaneReport>>,
    /// When the oldest result came that waits for the end of its lane's run.
    waiting_since: Option<Instant>,
    /// Something else waits for those results.
    urgent: bool,
    failures: u32,
    not_before: Instant,
}

impl Reports {
    pub(crate) fn new(outside: bool, now: Instant) -> Self {
        Self {
            outside,
            over: Vec::new(),
            unstored: None,
            waiting_since: None,
            urgent: false,
            failures: 0,
            not_before: now,
        }
    }

    /// How many results wait to be stored, without those of lanes whose run goes on.
    #[cfg(test)]
    pub(crate) fn results(&self) -> usize {
        let reports = self.over.iter().chain(self.unstored.iter().flatten());
        reports.map(|report| report.finished.len()).sum()
    }

    /// Whether nothing waits to be stored.
    pub(crate) fn is_empty(&self) -> bool {
        self.unstored.is_none() && self.over.is_empty() && self.waiting_since.is_none()
    }

    /// Whether what was reported last could be stored.
    pub(crate) fn can_be_stored(&self) -> bool {
        self.failures == 0
    }

    /// The last report of a lane.
    pub(crate) fn push(&mut self, report: LaneReport) {
        self.over.push(report);
    }

    /// A lane has a result, and its run goes on.
    pub(crate) fn goes_on(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// Something waits for all results.
    pub(crate) fn hurry(&mut self) {
        self.urgent = true;
    }

    /// When to store. `is_full` says that nothing else can begin before.
    pub(crate) fn due_at(&self, is_full: bool) -> Option<Instant> {
        let ended = self.unstored.is_some() || !self.over.is_empty();
        let at = if ended { Some(self.not_before) } else { self.runs_due_at(is_full) };
        at.map(|at| at.max(self.not_before))
    }

    /// When to store the results of lanes whose run goes on.
    fn runs_due_at(&self, is_full: bool) -> Option<Instant> {
        let waits = !self.urgent && !self.outside && !is_full;
        self.waiting_since.map(|since| if waits { since + RUN_ON } else { since })
    }

    /// What to store now. `gather` adds the results of lanes whose run goes on, if it is time.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        is_full: bool,
        gather: impl FnOnce(&mut Vec<LaneReport>),
    ) -> Vec<LaneReport> {
        if let Some(reports) = self.unstored.take() {
            return reports;
        }
        let mut reports = std::mem::take(&mut self.over);
        if self.runs_due_at(is_full).is_some_and(|at| at <= now) {
            (self.waiting_since, self.urgent) = (None, false);
            gather(&mut reports);
        }
        reports
    }

    /// Nothing could be stored. Returns how long to wait.
    pub(crate) fn failed(&mut self, reports: Vec<LaneReport>, now: Instant, chance: f64) -> Duration {
        self.failures += 1;
        let wait = outage_wait(self.failures, chance);
        self.not_before = now + wait;
        self.unstored = Some(reports);
        wait
    }

    /// So many were answered. Those that a commit holds are given again, before later ones of the same lanes: the last one
    /// says what comes next.
    pub(crate) fn answered(&mut self, answered: usize, busy: Vec<LaneReport>, now: Instant) {
        self.failures = 0;
        // What is outside waits for its results to be stored before the next attempts begin.
        if answered >= LOADED && !self.outside {
            self.not_before = now + COALESCE_LOADED;
        }
        if !busy.is_empty() {
            self.not_before = now + BUSY_WAIT;
            self.over.splice(0..0, busy);
        }
    }
}

#[cfg(test)]
mod tests {
    use outbox_core::store::{LaneRef, Next};

    use super::*;

    fn report(key: &str) -> LaneReport {
        let lane = LaneRef { subscription: 1, key: key.to_owned(), token: 1, worker: "w".to_owned() };
        LaneReport { lane, finished: Vec::new(), next: Next::Yield }
    }

    fn keys(reports: &[LaneReport]) -> Vec<&str> {
        reports.iter().map(|report| report.lane.key.as_str()).collect()
    }

    #[test]
    fn the_results_of_a_run_wait_for_its_end_and_not_for_long() {
        let now = Instant::now();
        let mut reports = Reports::new(false, now);
        assert_eq!(reports.due_at(false), None);
        reports.goes_on(now);
        assert_eq!(reports.due_at(false), Some(now + RUN_ON));
        assert_eq!(reports.due_at(true), Some(now), "nothing else can begin before");
        reports.push(report("a"));
        assert_eq!(reports.due_at(false), Some(now));
        let taken = reports.take(now, false, |_| panic!("too early"));
        assert_eq!(keys(&taken), ["a"]);
        assert!(!reports.is_empty());
        let taken = reports.take(now + RUN_ON, false, |reports| reports.push(report("b")));
        assert_eq!(keys(&taken), ["b"]);
        assert!(reports.is_empty());
    }

    #[test]
    fn what_something_waits_for_is_stored_at_once() {
        let now = Instant::now();
        let mut inside = Reports::new(false, now);
        inside.goes_on(now);
        inside.hurry();
        assert_eq!(inside.due_at(false), Some(now));
        let mut outside = Reports::new(true, now);
        outside.goes_on(now);
        assert_eq!(outside.due_at(false), Some(now));
    }

    #[test]
    fn what_could_not_be_stored_is_given_again_as_it_was() {
        let now = Instant::now();
        let mut reports = Reports::new(false, now);
        let wait = reports.failed(vec![report("a")], now, 1.0);
        reports.push(report("b"));
        assert!(!reports.can_be_stored());
        assert_eq!(reports.due_at(false), Some(now + wait));
        assert_eq!(keys(&reports.take(now + wait, false, |_| {})), ["a"]);
        reports.answered(1, Vec::new(), now);
        assert!(reports.can_be_stored());
        assert_eq!(keys(&reports.take(now, false, |_| {})), ["b"]);
    }

    #[test]
    fn what_a_commit_holds_comes_before_later_reports() {
        let now = Instant::now();
        let mut reports = Reports::new(false, now);
        reports.push(report("b"));
        reports.answered(1, vec![report("a")], now);
        assert_eq!(reports.due_at(false), Some(now + BUSY_WAIT));
        assert_eq!(keys(&reports.take(now + BUSY_WAIT, false, |_| {})), ["a", "b"]);
    }

    #[test]
    fn a_high_load_is_stored_in_large_statements() {
        let now = Instant::now();
        let due = |outside| {
            let mut reports = Reports::new(outside, now);
            reports.answered(LOADED, Vec::new(), now);
            reports.push(report("a"));
            reports.due_at(false)
        };
        assert_eq!((due(false), due(true)), (Some(now + COALESCE_LOADED), Some(now)));
    }
}

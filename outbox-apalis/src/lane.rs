//! A leased lane, as the feed works on it.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_core::{DeliveryError, RecordedEvent};
use outbox_seaorm::{ClaimedLane, Finished, LaneRef};
use tokio_util::sync::CancellationToken;

/// How many failed attempts of a delivery are remembered with error and time.
const LOGGED_ATTEMPTS: usize = 20;

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

pub(crate) struct Lane {
    pub(crate) lane: LaneRef,
    /// Attempts of the head, the one under way included.
    pub(crate) attempts: u32,
    /// As `attempts`, without those that were lost in a crash together with others.
    pub(crate) counted: u32,
    pub(crate) suspicion: Option<Suspicion>,
    /// It stands in the log that this suspect is tried.
    pub(crate) noted: bool,
    pub(crate) log: Option<String>,
    pub(crate) run: VecDeque<Arc<RecordedEvent>>,
    /// Over, and not yet reported.
    pub(crate) finished: Vec<Finished>,
    /// Reported, and not yet stored.
    pub(crate) unsettled: usize,
    pub(crate) running: Option<Running>,
    /// Since when it works on its run without others getting its place.
    pub(crate) turn: Option<Instant>,
    pub(crate) leased_until: Instant,
    pub(crate) cancelled: CancellationToken,
    /// It finds out whether a destination that was down is back.
    pub(crate) probe: bool,
}

/// An attempt that was handed to the worker.
pub(crate) struct Running {
    handed_out: Instant,
    time: Duration,
    /// Set when the attempt begins.
    begun: Arc<AtomicBool>,
}

impl Running {
    pub(crate) fn new(time: Duration) -> Self {
        Self { handed_out: Instant::now(), time, begun: Arc::default() }
    }

    pub(crate) fn begun(&self) -> &Arc<AtomicBool> {
        &self.begun
    }

    /// Whether it should have ended long ago: the attempt does not mind its time, or never got a thread.
    pub(crate) fn is_overdue(&self, margin: Duration) -> bool {
        self.handed_out.elapsed() > self.time.saturating_add(margin)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }
}

impl Lane {
    pub(crate) fn new(claimed: ClaimedLane, leased_until: Instant, probe: bool) -> Self {
        let last = attempt_log(claimed.attempt_log.as_deref()).pop();
        let of_last = |name: &str| last.as_ref().and_then(|entry| entry[name].as_u64()).unwrap_or(0);
        let suspicion = match &last {
            Some(last) if last["milliseconds"].is_null() && last["group"].is_null() => Some(Suspicion::Alone),
            Some(last) if last["milliseconds"].is_null() => Some(Suspicion::Grouped),
            _ => (of_last("attempt") + 1 < u64::from(claimed.attempts)).then_some(Suspicion::Leased),
        };
        // An attempt that was begun alone and is not over has killed its worker, and counts by itself. Any number of
        // attempts that were lost together with others count as one; that of a group is in its entry.
        let counted = of_last("counted") + 1 + u64::from(suspicion == Some(Suspicion::Leased));
        Self {
            lane: claimed.lane,
            attempts: claimed.attempts,
            counted: u32::try_from(counted).unwrap_or(u32::MAX),
            suspicion,
            noted: false,
            log: claimed.attempt_log,
            run: claimed.run.into_iter().map(Arc::new).collect(),
            finished: Vec::new(),
            unsettled: 0,
            running: None,
            turn: None,
            leased_until,
            cancelled: CancellationToken::new(),
            probe,
        }
    }

    /// The first delivery of the run is over.
    pub(crate) fn finish_head(&mut self, attempts: u32, log: Option<String>, error: Option<String>) {
        if let Some(event) = self.run.pop_front() {
            self.finished.push(Finished { position: event.position, attempts, log, error });
        }
        self.next_head();
    }

    /// What comes next in the run has not been tried.
    pub(crate) fn next_head(&mut self) {
        (self.attempts, self.counted, self.log) = (1, 1, None);
        (self.suspicion, self.noted) = (None, false);
    }

    /// The attempt log with one more entry: the attempt that has failed.
    pub(crate) fn logged(&self, worker: &str, error: &DeliveryError, started: Instant) -> String {
        self.log_with(serde_json::json!({
            "attempt": self.attempts,
            "counted": self.counted,
            "at": chrono::Utc::now(),
            "worker": worker,
            "error": error.message(),
            "milliseconds": started.elapsed().as_millis(),
        }))
    }

    /// The attempt log with one more entry: a suspect is about to be tried, in a group of this size. Nobody knows yet how
    /// long it takes, and if it is lost in a group, nothing more is counted than before.
    pub(crate) fn begun(&self, worker: &str, group: usize) -> String {
        let alone = group == 1;
        let how = if alone { "alone".to_owned() } else { format!("in a group of {group}") };
        self.log_with(serde_json::json!({
            "attempt": self.attempts,
            "counted": self.counted - u32::from(!alone),
            "at": chrono::Utc::now(),
            "worker": worker,
            "error": format!("tried {how} after a crash; its end is not known"),
            "milliseconds": null,
            "group": (!alone).then_some(group),
        }))
    }

    fn log_with(&self, entry: serde_json::Value) -> String {
        let mut log = attempt_log(self.log.as_deref());
        if log.len() >= LOGGED_ATTEMPTS {
            log.remove(0);
        }
        log.push(entry);
        serde_json::Value::from(log).to_string()
    }
}

fn attempt_log(log: Option<&str>) -> Vec<serde_json::Value> {
    log.and_then(|log| serde_json::from_str(log).ok()).unwrap_or_default()
}

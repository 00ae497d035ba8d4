//! What attempts lead to.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::{
    AfterDeadLetter, DeliveryError, Outcome, Reason, RecordedEvent,
    store::{CircuitState, Next},
};

use super::{Core, Moment};
use crate::{
    destination::{End, no_result},
    feed::{
        calls::Change,
        circuit::{Failure, PATIENCE},
        told::Told,
        verdict::{Pause, PauseLength, Verdict, judge},
    },
    metrics::Failed,
};

impl Core {
    /// An attempt of this event has ended, which is the head of its lane.
    pub(super) fn judge(&mut self, key: String, event: &Arc<RecordedEvent>, end: End, started: Instant, at: Moment) {
        let Some(lane) = self.table.get(&key) else { return };
        let is_last = lane.head.counted >= self.settings.retry.attempts(event.max_attempts);
        let (outside, probe) = (self.settings.destination.is_outside(), lane.probe);
        let slept = matches!(end, End::Cancelled) && lane.leased_until <= at.now;
        let old = since(event, at) > PATIENCE;
        let what = format_args!("{} version {}", event.event_type, event.schema_version);
        let blame = |error: &DeliveryError| {
            let failure = Failure { reason: error.reason(), outside, probe, old };
            self.circuit.failed(&key, failure, at.now)
        };
        match judge(end, what, blame, is_last) {
            Verdict::Delivered => {
                self.table.finish_head(&key, None);
                self.delivered(&key, event, started, at);
                self.continue_with(key, at.now);
            }
            Verdict::Settled => {
                self.delivered(&key, event, started, at);
                match self.table.head_was_stored(&key) {
                    Some(lane) => self.schedule.yielded(&lane, self.settings.options.lease, at.now),
                    None => self.continue_with(key, at.now),
                }
            }
            Verdict::Void => {
                self.told.push(Told::Superseded(1));
                self.lose(&key, at.now);
            }
            Verdict::NotMade(pause) => {
                // The process slept past its lease: whatever came of the attempt does not count.
                self.told.extend(slept.then_some(Told::Superseded(1)));
                self.not_made(&key, event, pause, at);
            }
            Verdict::Gone(error) => self.destination_is_gone(&key, event, error, at),
            Verdict::Down(error) => self.destination_is_down(&key, event, error, at),
            Verdict::Retry(error) => self.attempt_counts(&key, event, error, started, at),
            Verdict::Dead(error, refused) => self.dies(key, event, error, refused, started, at),
        }
    }

    fn delivered(&mut self, key: &str, event: &Arc<RecordedEvent>, started: Instant, at: Moment) {
        self.told.push(Told::Delivered { event: event.clone(), since_commit: since(event, at) });
        self.destination_answered(key, started, at.now);
    }

    fn not_made(&mut self, key: &str, event: &Arc<RecordedEvent>, pause: Option<Pause>, at: Moment) {
        let wait = pause.map(|Pause { length, error }| {
            let wait = match length {
                PauseLength::Retry => {
                    self.told.push(Told::NotMade { event: event.clone(), error: error.to_string() });
                    self.settings.retry.delay(1, at.chance)
                }
                PauseLength::Unknown => self.unknown.wait(key, at.now, at.chance),
            };
            (wait, error)
        });
        self.give_back(key, wait);
    }

    /// A failed attempt counts, and there will be another.
    fn attempt_counts(
        &mut self,
        key: &str,
        event: &Arc<RecordedEvent>,
        error: DeliveryError,
        started: Instant,
        at: Moment,
    ) {
        let probe = self.failure_answered(key, &error, started, at.now);
        let mut text = error.message().to_owned();
        if error.is_permanent() {
            text.push_str("; tried again until it is known whether it is about this event");
        }
        self.failed(event, Failed::Retry, true, key, &error);
        let took = at.now.saturating_duration_since(started);
        let (retry, worker, message) = (self.settings.retry, self.settings.worker.clone(), error.message().to_owned());
        self.finish_lane(key, |head| {
            let wait = retry.delay(head.counted, at.chance);
            let after = error.wait().map_or(wait, |asked| asked.max(wait));
            let (attempts, log) = (head.attempts, head.failed(at.utc, &worker, &message, took));
            Next::Retry { after, attempts, error: text, log }
        });
        self.probe_has_failed(probe, error, at);
    }

    /// A failed attempt counts, and it was the last. `refused` if another could not have helped.
    fn dies(
        &mut self,
        key: String,
        event: &Arc<RecordedEvent>,
        error: DeliveryError,
        refused: bool,
        started: Instant,
        at: Moment,
    ) {
        let probe = self.failure_answered(&key, &error, started, at.now);
        let how = if error.is_permanent() { Failed::Permanent } else { Failed::Dead };
        self.failed(event, how, !refused, &key, &error);
        let took = at.now.saturating_duration_since(started);
        if let Some(lane) = self.table.get_mut(&key) {
            let head = lane.head.clone();
            lane.head.log = head.failed(at.utc, &self.settings.worker, error.message(), took);
        }
        self.table.finish_head(&key, Some(error.message().to_owned()));
        self.hold_if_wanted(&key, event.position);
        self.continue_with(key, at.now);
        self.probe_has_failed(probe, error, at);
    }

    /// A handler that fails has answered all the same. Returns whether it was a probe that has not found out that the
    /// destination is back.
    fn failure_answered(&mut self, key: &str, error: &DeliveryError, started: Instant, now: Instant) -> bool {
        if !self.settings.destination.is_outside() && error.reason() != Reason::Unavailable {
            self.destination_answered(key, started, now);
        }
        self.takes_probe(key)
    }

    fn failed(&mut self, event: &Arc<RecordedEvent>, how: Failed, counts: bool, key: &str, error: &DeliveryError) {
        let attempts = self.table.get(key).map_or(0, |lane| lane.head.attempts);
        self.told.push(Told::Failed { event: event.clone(), how, counts, attempts, error: error.to_string() });
    }

    /// The head of this lane, at this position, has become a dead letter.
    pub(super) fn hold_if_wanted(&mut self, key: &str, position: i64) {
        if self.settings.after_dead_letter == AfterDeadLetter::Hold {
            self.finish_lane(key, |_| Next::Hold { position });
        }
    }

    /// The destination has answered, whatever: it is not down.
    fn destination_answered(&mut self, key: &str, begun: Instant, now: Instant) {
        if self.takes_probe(key) {
            self.told.push(Told::IsBack);
            self.circuit.closed();
            self.calls.tell(Change::Circuit(CircuitState::Closed));
            self.schedule.look(now);
        } else {
            self.circuit.succeeded(key, begun);
        }
    }

    fn destination_is_gone(&mut self, key: &str, event: &Arc<RecordedEvent>, error: DeliveryError, at: Moment) {
        self.failed(event, Failed::Unavailable, true, key, &error);
        self.calls.tell(Change::Pause);
        let wait = self.settings.retry.delay(1, at.chance);
        self.give_back(key, Some((wait, format!("{error}; the subscription was paused"))));
        self.told.push(Told::IsGone(error));
    }

    fn destination_is_down(&mut self, key: &str, event: &Arc<RecordedEvent>, error: DeliveryError, at: Moment) {
        self.failed(event, Failed::Unavailable, true, key, &error);
        let probe = self.takes_probe(key);
        let wait = self.down_for(&error, at.chance);
        self.give_back(key, Some((wait, format!("{error}; the destination is down, no attempt was spent"))));
        self.open_circuit(error, wait, probe, at.now);
    }

    fn probe_has_failed(&mut self, probe: bool, error: DeliveryError, at: Moment) {
        if probe {
            let wait = self.down_for(&error, at.chance);
            self.open_circuit(error, wait, true, at.now);
        }
    }

    /// Whether the lane was a probe; it is one no more.
    fn takes_probe(&mut self, key: &str) -> bool {
        self.table.get_mut(key).is_some_and(|lane| std::mem::take(&mut lane.probe))
    }

    fn open_circuit(&mut self, error: DeliveryError, wait: Duration, probe: bool, now: Instant) {
        if self.circuit.opened(probe) {
            self.told.push(Told::IsDown { error, wait });
            self.calls.tell(Change::Circuit(CircuitState::Open { wait, failed: true }));
            self.schedule.look(now + wait);
            self.give_back_idle();
        }
    }

    /// How long nobody delivers.
    fn down_for(&self, error: &DeliveryError, chance: f64) -> Duration {
        let wait = self.settings.retry.delay(self.circuit.times_down(), chance);
        error.wait().map_or(wait, |asked| asked.max(wait))
    }

    /// Stops attempts whose lease is about to end, and ends those that do not mind their time.
    pub(super) fn guard_attempts(&mut self, at: Moment) {
        let (margin, timeout) = (self.settings.options.margin(), self.settings.options.timeout());
        self.table.cancel(Some(at.now + margin));
        for (key, running) in self.table.end_overdue(at.now, margin) {
            let Some(event) = self.table.get(&key).and_then(|lane| lane.run.front().cloned()) else { continue };
            if self.settings.destination.settles(&event) {
                // Its commit may be under way: without renewal it is fenced when the lease ends.
                self.lose(&key, at.now);
            } else if running.has_begun() {
                let error = DeliveryError::retry(format!("{}; the handler blocks its thread", no_result(timeout)));
                self.judge(key, &event, End::Outcome(Outcome::Retry(error)), at.now - timeout, at);
            } else {
                self.told.push(Told::NoThread);
                self.give_back(&key, None);
            }
        }
    }
}

/// How long ago an event was committed.
fn since(event: &RecordedEvent, at: Moment) -> Duration {
    at.utc.signed_duration_since(event.recorded_at).to_std().unwrap_or_default()
}

//! Which attempts begin.

use chrono::{DateTime, Utc};
use outbox_core::{
    AttemptLog,
    store::{LaneRef, Next},
};

use super::{Core, Moment, Start};
use crate::feed::{
    calls::Kind,
    table::Lane,
    told::Told,
    trial::{self, Suspicion},
};

/// What becomes of a lane that is ready.
enum Turn {
    Starts(Start),
    /// Something else has to be stored first.
    Waits,
    /// Nothing: it is gone, or given back.
    Over,
}

impl Core {
    /// The attempts that begin now, `most` at most.
    pub(crate) fn start(&mut self, most: usize, at: Moment) -> Vec<Start> {
        self.end_trial();
        let (mut starts, mut waiting) = (Vec::new(), Vec::new());
        let allowed = self.settings.options.of_tenant.unwrap_or(usize::MAX);
        let of_one = self.table.most_of_one(self.concurrency(), allowed, at.now);
        while starts.len() < most && self.may_start(at) {
            let Some(key) = self.table.next_ready(of_one) else { break };
            match self.turn(&key, at) {
                Turn::Starts(start) => starts.push(start),
                Turn::Waits => waiting.push(key),
                Turn::Over => {}
            }
        }
        // Behind those that wait.
        waiting.into_iter().for_each(|key| self.table.is_ready(key));
        starts
    }

    /// Whether an attempt may begin now.
    pub(crate) fn may_start(&self, at: Moment) -> bool {
        self.serves() && self.table.has_ready() && self.free() > 0 && self.can_store() && self.pace.may_begin(at.now)
    }

    /// How many deliveries may start now. What a crash repeats counts as under way, also when its success is about to be
    /// stored; in this process, where a delivery may take no time at all, that may be what was leased ahead.
    fn free(&self) -> usize {
        let (running, open) = (self.table.running(), self.table.open());
        self.concurrency().saturating_sub(running).min(self.may_repeat().saturating_sub(open))
    }

    fn turn(&mut self, key: &str, at: Moment) -> Turn {
        let options = self.settings.options;
        // One that was lost and claimed again may be under way already.
        let Some(lane) = self.table.get(key).filter(|lane| !lane.is_running()) else { return Turn::Over };
        let Some(event) = lane.run.front().cloned() else { return Turn::Over };
        if lane.cancelled.is_cancelled() || at.now + options.margin() >= lane.leased_until {
            self.give_back(key, None);
            return Turn::Over;
        }
        if lane.head.killed_its_worker(self.settings.retry.attempts(event.max_attempts)) {
            self.give_up(key);
            self.continue_with(key.to_owned(), at.now);
            return Turn::Over;
        }
        if lane.head.waits_for_its_note(self.trial) {
            return Turn::Waits;
        }
        // It acknowledges itself in its own transaction: what came before it in the lane must be stored first.
        let settles = self.settings.destination.settles(&event);
        if settles && lane.has_unstored() {
            self.reports.hurry();
            return Turn::Waits;
        }
        let time = if settles { self.settings.effect_time } else { options.timeout() };
        let (lease, number, log) = (lane.lane.clone(), lane.head.attempts, lane.head.log.clone());
        let (last, cancelled) = (lane.run.len() == 1, lane.cancelled.child_token());
        let running = self.table.begin(key, time, at.now);
        self.pace.begun(at.now);
        self.told.push(Told::Attempted(event.clone()));
        Turn::Starts(Start { event, lane: lease, number, log, last, time, running, cancelled })
    }

    /// The attempt before this one was the last, and it was alone when its worker was killed.
    fn give_up(&mut self, key: &str) {
        let Some(lane) = self.table.get_mut(key) else { return };
        lane.head.attempts -= 1;
        let begun = lane.head.attempts;
        let error = format!(
            "attempt {begun} was the last and ended without a result: its worker was killed, or lost its lease"
        );
        if let Some(event) = self.table.finish_head(key, Some(error)) {
            self.told.push(Told::KilledItsWorker { event: event.clone(), attempts: begun });
            self.hold_if_wanted(key, event.position);
        }
    }

    /// Whether nothing is under way, and no result waits to be stored.
    fn has_stored_all(&self) -> bool {
        self.table.open() == 0 && self.reports.is_empty() && self.is_free(Kind::Settle)
    }

    /// A trial is over when no suspect is left that was noted.
    fn end_trial(&mut self) {
        if self.trial && self.is_free(Kind::Note) && self.has_stored_all() {
            self.trial = self.table.ready().any(|lane| lane.head.noted);
        }
    }

    /// Everything else is done: the next suspects are noted, and then tried.
    pub(super) fn suspects_to_try(&mut self, now: DateTime<Utc>) -> Option<Vec<(LaneRef, AttemptLog)>> {
        if self.trial || !self.serves() || !self.can_store() || !self.has_stored_all() {
            return None;
        }
        let suspects: Option<Vec<(Suspicion, &Lane)>> =
            self.table.ready().map(|lane| Some((lane.head.suspicion?, lane))).collect();
        // What is no suspect comes first.
        let mut suspects = suspects.filter(|suspects| !suspects.is_empty())?;
        suspects.sort_by_key(|(suspicion, _)| *suspicion);
        let group = trial::group(suspects.iter().map(|(suspicion, _)| *suspicion));
        let notes = suspects[..group]
            .iter()
            .map(|(_, lane)| (lane.lane.clone(), lane.head.begun(now, &self.settings.worker, group)))
            .collect();
        self.trial = true;
        Some(notes)
    }

    /// With the next delivery of a lane, if there is one.
    pub(super) fn continue_with(&mut self, key: String, now: std::time::Instant) {
        let Some(lane) = self.table.get(&key) else { return };
        if lane.run.is_empty() {
            self.finish_lane(&key, |_| Next::Yield);
            return;
        }
        if self.table.has_finished(&key) {
            self.reports.goes_on(now);
        }
        self.table.go_on(key, now);
    }
}

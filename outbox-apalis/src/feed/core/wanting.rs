//! What a core wants of the store, and when.

use std::time::Instant;

use outbox_core::store::LaneReport;

use super::{Core, Moment, Phase};
use crate::feed::{
    calls::{Call, Kind},
    schedule::SOON,
};

impl Core {
    /// The next call to the store, of a kind that `may` be made now.
    pub(crate) fn next_call(&mut self, at: Moment, may: impl Fn(Kind) -> bool) -> Option<Call> {
        // Only attempts under way go on.
        if !self.serves() {
            self.give_back_idle();
        }
        let call = self.wanted(at, may)?;
        self.calls.begin(call.kind());
        Some(call)
    }

    /// Others claim now: so does this one, if half of its wait is over.
    pub(crate) fn joins(&mut self, at: Moment) -> Option<Call> {
        let is_near = |time: Instant| self.schedule.is_near(time, at.now);
        let looks = self.wants_lanes() && is_near(self.schedule.look_at());
        let asks = self.asks_at(at.now).is_some_and(is_near);
        let call = if looks { self.claim(at.now) } else { asks.then(|| self.ask(at.now))? };
        self.calls.begin(call.kind());
        Some(call)
    }

    fn claim(&mut self, now: Instant) -> Call {
        let lanes = if self.is_full() { 0 } else { self.room().min(self.ahead.most_at_once()) };
        let (others, passed) = (self.room_for_others(), self.table.crowd());
        Call::Claim { lanes, others, passed, all: self.schedule.claims(now), times_down: self.circuit.times_down() }
    }

    fn ask(&mut self, now: Instant) -> Call {
        self.schedule.asked(now);
        let times_down = self.circuit.times_down();
        Call::Claim { lanes: 0, others: 0, passed: Vec::new(), all: false, times_down }
    }

    fn wanted(&mut self, at: Moment, may: impl Fn(Kind) -> bool) -> Option<Call> {
        if may(Kind::Claim) {
            if self.wants_lanes() && self.schedule.look_at() <= at.now && !self.is_full_until(at.now + SOON) {
                return Some(self.claim(at.now));
            }
            if self.asks_at(at.now).is_some_and(|ask_at| ask_at <= at.now) {
                return Some(self.ask(at.now));
            }
        }
        // What has come to a worker that stops is taken over to be given back: only the lease in the database is true, and
        // others need not wait for its end.
        if !self.relayed.arrived.is_empty() && (!self.is_working() || self.takes_jobs()) && self.is_free(Kind::TakeOver)
        {
            return Some(Call::TakeOver(std::mem::take(&mut self.relayed.arrived)));
        }
        if may(Kind::Settle)
            && let Some(reports) = self.reports_due(at.now)
        {
            return Some(Call::Settle(reports));
        }
        if let Some(change) = self.calls.next_change() {
            return Some(Call::Change(change));
        }
        if may(Kind::Check) && self.leases.are_in_doubt() && self.is_free(Kind::Check) {
            return Some(Call::Check { losses: self.leases.losses(), lanes: self.table.refs() });
        }
        let renews = may(Kind::Renew) && self.is_free(Kind::Renew) && !self.table.is_empty();
        if renews && self.leases.renews(at.now) {
            return Some(Call::Renew(self.table.refs()));
        }
        if may(Kind::Reserve) && self.reserves_at(at.now).is_some_and(|reserve_at| reserve_at <= at.now) {
            let (attempts, every) = self.pace.asks();
            return Some(Call::Reserve(attempts, every));
        }
        if may(Kind::Note) { self.suspects_to_try(at.utc).map(Call::Note) } else { None }
    }

    /// When to reserve attempts, for what is ready.
    fn reserves_at(&self, now: Instant) -> Option<Instant> {
        let needs = self.serves() && self.table.has_ready() && self.can_store() && self.is_free(Kind::Reserve);
        self.pace.reserves_at(now).filter(|_| needs)
    }

    fn reports_due(&mut self, now: Instant) -> Option<Vec<LaneReport>> {
        let is_full = self.is_full_of_results();
        if self.calls.is_under_way(Kind::Settle) || self.reports.due_at(is_full).is_none_or(|at| at > now) {
            return None;
        }
        let reports = self.reports.take(now, is_full, |reports| self.table.gather(reports));
        (!reports.is_empty()).then_some(reports)
    }

    /// When time alone changes what it wants, of the kinds of calls that `may` be made.
    pub(crate) fn next_timeout(&self, now: Instant, may: impl Fn(Kind) -> bool) -> Instant {
        let phase_ends = match self.phase {
            Phase::Stopping(end) | Phase::LastTries(end) => Some(end),
            Phase::Working | Phase::Over => None,
        };
        let claims = may(Kind::Claim);
        let look_at = (claims && self.wants_lanes()).then(|| self.schedule.look_at());
        let asks_at = self.asks_at(now).filter(|_| claims);
        let paced = self.pace.waits_until(now).filter(|_| self.is_working() && self.table.has_ready());
        let reserves_at = self.reserves_at(now).filter(|_| may(Kind::Reserve));
        let settles = may(Kind::Settle) && !self.calls.is_under_way(Kind::Settle);
        let report_at = self.reports.due_at(self.is_full_of_results()).filter(|_| settles);
        let others = [phase_ends, look_at, asks_at, paced, report_at, reserves_at].into_iter().flatten();
        others.fold(self.leases.guard_at(), Instant::min)
    }
}

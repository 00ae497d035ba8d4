//! How much there is room for.

use std::time::Instant;

use super::Core;
use crate::{
    assignment::Until,
    desk::Room,
    feed::{
        ahead::{Capacity, MOST_AHEAD},
        calls::Kind,
    },
};

/// How large the payloads of all leased lanes are together when nothing more is leased: each claim adds some MiB.
const MOST_BYTES: usize = 16 << 20;

impl Core {
    /// How many lanes that are new may be leased by routing: as many as would be claimed, unless there are others. Those of
    /// tenants that crowd the others out wait for their turn.
    pub(crate) fn room_for_new(&self) -> Room {
        let takes =
            self.settings.until == Until::Stopped && self.serves() && !self.circuit.is_open() && self.takes_lanes();
        match (self.room(), self.room_for_others()) {
            _ if !takes => Room::default(),
            (lanes @ 1.., _) if !self.schedule.is_behind() && !self.is_full() => Room { lanes, passed: Vec::new() },
            (_, 0) => Room::default(),
            (_, lanes) => Room { lanes, passed: self.table.crowd() },
        }
    }

    /// How many jobs to take from Redis; all, to give them back, once it stops.
    pub(crate) fn room_for_jobs(&self) -> usize {
        match self.is_working() {
            false => usize::MAX,
            true if self.takes_jobs() => self.room().saturating_sub(self.relayed.arrived.len()),
            true => 0,
        }
    }

    /// Whether jobs from Redis are of use now.
    pub(crate) fn takes_jobs(&self) -> bool {
        self.is_free(Kind::TakeOver)
            && self.is_free(Kind::Change)
            && self.can_store()
            && self.room() > 0
            && !self.has_suspects()
    }

    /// How many deliveries may be under way.
    pub(super) fn concurrency(&self) -> usize {
        self.circuit.limit(self.settings.options.concurrency.min(self.share))
    }

    pub(super) fn capacity(&self) -> Capacity {
        let concurrency = self.concurrency();
        // A destination that comes back is not flooded.
        let limited =
            self.settings.destination.is_outside() || concurrency < self.settings.options.concurrency.min(self.share);
        Capacity { concurrency, limited }
    }

    /// How many more lanes to lease.
    pub(super) fn room(&self) -> usize {
        self.ahead.room(self.table.len(), self.capacity())
    }

    /// Long runs fill the memory even when their lanes are few, and large payloads even when they are not long.
    pub(super) fn is_full(&self) -> bool {
        let (waiting, bytes) = self.table.load();
        let enough = self.table.len() >= self.concurrency() && waiting >= self.ahead.most_deliveries();
        enough || bytes >= MOST_BYTES
    }

    /// How many lanes to lease beside those of tenants that crowd the others out, however many these have leased: one that
    /// waits need not wait for them.
    pub(super) fn room_for_others(&self) -> usize {
        let capacity = self.capacity();
        let (_, bytes) = self.table.load();
        let is_huge = bytes >= MOST_BYTES || self.table.len() >= self.ahead.most_deliveries() + capacity.least();
        let is_crowded = !is_huge && !self.table.crowd().is_empty();
        if is_crowded { (capacity.concurrency / 2).max(1) } else { 0 }
    }

    /// Whether there is no room for anybody; if so, it looks again then.
    pub(super) fn is_full_until(&mut self, then: Instant) -> bool {
        let is_full = self.is_full() && self.room_for_others() == 0;
        if is_full {
            self.schedule.look(then);
        }
        is_full
    }

    /// How many deliveries a crash may repeat.
    pub(super) fn may_repeat(&self) -> usize {
        let outside = self.settings.destination.is_outside();
        let spare = if outside { 0 } else { MOST_AHEAD * self.settings.options.batch };
        self.concurrency() + spare
    }

    /// Whether nothing can begin before results are stored.
    pub(super) fn is_full_of_results(&self) -> bool {
        self.table.open() >= self.may_repeat()
    }

    pub(super) fn wants_lanes(&self) -> bool {
        self.is_working()
            && self.share > 0
            && self.is_free(Kind::Claim)
            && !(self.schedule.has_claimed() && self.settings.until == Until::Once)
            && self.takes_lanes()
            && (self.room() > 0 || self.room_for_others() > 0)
    }

    /// When to ask whether the subscription is to be served: while lanes are leased, a claim may not be due for long, and while
    /// lanes come through Redis there is none. Not while the store is silent: it would hold up the next claim.
    pub(super) fn asks_at(&self, now: Instant) -> Option<Instant> {
        let matters = !self.table.is_empty() || !self.schedule.is_served();
        let asks = matters && self.is_working() && self.is_free(Kind::Claim) && self.can_store();
        if asks { self.schedule.asks_at(self.wants_lanes(), now) } else { None }
    }

    /// Whether lanes may come from the database.
    pub(super) fn takes_lanes(&self) -> bool {
        !self.relayed.at_present && self.is_free(Kind::Change) && self.can_store() && !self.has_suspects()
    }

    pub(super) fn is_free(&self, kind: Kind) -> bool {
        !self.calls.is_under_way(kind)
    }

    /// While there are suspects nothing is claimed that a crash could take with it, or could be taken for theirs.
    pub(super) fn has_suspects(&self) -> bool {
        self.trial || self.table.has_suspects()
    }

    /// Nothing is begun while results cannot be stored, or leases are in doubt: it would be repeated.
    pub(super) fn can_store(&self) -> bool {
        self.reports.can_be_stored() && !self.leases.are_in_doubt()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use outbox_core::{
        AfterDeadLetter, RetryPolicy,
        store::{Claim, StoreError},
    };

    use super::*;
    use crate::{
        feed::{
            calls::{Answer, Asked, Call},
            core::{Moment, Settings},
            outage::outage_wait,
            pace::Every,
            told::Told,
        },
        handlers::{Handlers, HandlersDestination},
        options::Options,
    };

    fn core(now: Instant) -> (Core, Moment) {
        let settings = Settings {
            worker: "w".into(),
            retry: RetryPolicy::default(),
            after_dead_letter: AfterDeadLetter::Continue,
            destination: Arc::new(HandlersDestination { outbox: None, handlers: Handlers::new() }),
            options: Options::DEFAULT,
            effect_time: Duration::from_secs(1),
            poll: Duration::from_secs(1),
            every: Every::default(),
            until: Until::Stopped,
            numbered_from: 0,
        };
        (Core::new(settings, 0, now), Moment { now, utc: chrono::Utc::now(), chance: 0.5 })
    }

    fn claimed(asked_at: Instant, lanes: usize, claim: Result<Claim, StoreError>) -> Answer {
        Answer::Claimed { asked_at, asked: Asked { lanes, others: 0 }, times_down: 0, claim }
    }

    #[test]
    fn nobody_asks_about_a_pause_while_the_store_is_silent() {
        let now = Instant::now();
        let (mut core, at) = core(now);
        assert!(matches!(core.next_call(at, |_| true), Some(Call::Claim { lanes: 1.., .. })));
        // It is paused.
        core.answered(claimed(now, 1, Ok(Claim::default())), at);
        core.state_changed(now);
        core.lost_connections(1);
        assert!(matches!(core.next_call(at, |_| true), Some(Call::Check { .. })));
        assert!(core.next_call(at, |_| true).is_none(), "the question would hold up the first claim");
        core.answered(Answer::Checked { losses: 1, asked: Vec::new(), held: Ok(Vec::new()) }, at);
        assert!(matches!(core.next_call(at, |_| true), Some(Call::Claim { lanes: 1.., .. })));
    }

    #[test]
    fn a_question_that_fails_does_not_make_claims_wait_longer() {
        let now = Instant::now();
        let (mut core, at) = core(now);
        assert!(core.next_call(at, |_| true).is_some());
        // It is paused.
        core.answered(claimed(now, 1, Ok(Claim::default())), at);
        core.redis_is_up(true, now);
        core.state_changed(now);
        assert!(matches!(core.next_call(at, |_| true), Some(Call::Claim { lanes: 0, others: 0, .. })));
        let failed_after = |core: &mut Core, lanes| {
            core.answered(claimed(now, lanes, Err(StoreError::new("away"))), at);
            match core.told().as_slice() {
                [Told::CallFailed { wait, .. }] => *wait,
                told => panic!("{} were told", told.len()),
            }
        };
        assert_eq!(failed_after(&mut core, 0), None);
        core.redis_is_up(false, now);
        assert!(matches!(core.next_call(at, |_| true), Some(Call::Claim { lanes: 1.., .. })));
        assert_eq!(failed_after(&mut core, 1), Some(outage_wait(1, at.chance)));
    }
}

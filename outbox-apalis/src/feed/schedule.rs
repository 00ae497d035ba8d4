//! When to look for lanes.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use outbox_core::store::LaneRef;

use super::outage::outage_wait;

/// The shortest wait between two looks that nothing has brought forward.
pub(crate) const SOON: Duration = Duration::from_millis(10);

/// The shortest time from one claim to the next that only a commit has brought forward: many commits are one look.
const COALESCE: Duration = Duration::from_millis(2);

/// The same after a claim that found this many: the load is high, and a few large statements cost less than many small
/// ones.
const COALESCE_LOADED: Duration = Duration::from_millis(10);
const LOADED: usize = 8;

#[derive(Debug)]
pub(crate) struct Schedule {
    poll: Duration,
    /// Whether many commits are one look; not for a worker that is to end.
    coalesces: bool,
    look_at: Instant,
    claimed_at: Instant,
    claimed_once: bool,
    idle_wait: Duration,
    failures: u32,
    woken_at: Option<Instant>,
    /// Whether something has changed about the subscription itself since the last claim.
    asks: bool,
    /// Whether it is served, as the last claim has said: not while it is paused or removed.
    served: bool,
    /// Whether the last claim found many.
    loaded: bool,
    /// Whether it came back full: there are more, which come before what is routed now.
    behind: bool,
    /// Whether a lane is over that may lie behind what the last claim has passed.
    all: bool,
    /// Leased lanes that may have more deliveries than their run.
    long: HashSet<LaneRef>,
    /// Lanes that routing has leased with all that they had. Whatever a lane gets later, the feed is woken for.
    fresh: HashSet<LaneRef>,
}

/// What a claim has found.
#[derive(Debug)]
pub(crate) struct Found {
    /// How many lanes, of how many that could have been leased.
    pub(crate) lanes: usize,
    pub(crate) capacity: usize,
    /// When the next one is due, if that is known.
    pub(crate) next: Option<Duration>,
    /// How much later than others to look for it.
    pub(crate) lag: Duration,
}

impl Schedule {
    pub(crate) fn new(poll: Duration, coalesces: bool, now: Instant) -> Self {
        Self {
            poll,
            coalesces,
            look_at: now,
            claimed_at: now,
            claimed_once: false,
            idle_wait: poll / 8,
            failures: 0,
            woken_at: None,
            asks: false,
            served: true,
            loaded: false,
            behind: false,
            all: false,
            long: HashSet::new(),
            fresh: HashSet::new(),
        }
    }

    pub(crate) fn look_at(&self) -> Instant {
        self.look_at
    }

    /// Whether at least half of the wait for this time is over.
    pub(crate) fn is_near(&self, time: Instant, now: Instant) -> bool {
        let wait = time.saturating_duration_since(self.claimed_at);
        now >= self.claimed_at + wait / 2
    }

    pub(crate) fn has_claimed(&self) -> bool {
        self.claimed_once
    }

    /// Whether more was due than the last claim leased.
    pub(crate) fn is_behind(&self) -> bool {
        self.behind
    }

    /// Looks at this time, whatever was planned.
    pub(crate) fn look(&mut self, at: Instant) {
        self.look_at = at;
    }

    /// Something was committed.
    pub(crate) fn woken(&mut self, now: Instant) {
        self.woken_at = Some(now);
        let coalesce = match self.loaded {
            _ if !self.coalesces => Duration::ZERO,
            true => COALESCE_LOADED,
            false => COALESCE,
        };
        self.look_at = self.look_at.min(now.max(self.claimed_at + coalesce));
        self.idle_wait = self.poll / 8;
    }

    /// The subscription was paused, resumed or removed.
    pub(crate) fn state_changed(&mut self, now: Instant) {
        self.asks = true;
        self.look_at = now;
    }

    /// When to ask for the state of the subscription. `claims` if the next look is a claim, which tells it too.
    pub(crate) fn asks_at(&self, claims: bool, now: Instant) -> Option<Instant> {
        match self.asks {
            true => Some(now),
            false if claims => None,
            false => Some(self.claimed_at + self.poll),
        }
    }

    /// Only that is asked.
    pub(crate) fn asked(&mut self, now: Instant) {
        (self.claimed_at, self.asks) = (now, false);
    }

    /// Whether anything of the subscription may begin.
    pub(crate) fn is_served(&self) -> bool {
        self.served
    }

    /// The store has said so.
    pub(crate) fn set_served(&mut self, served: bool) {
        self.served = served;
    }

    /// A claim begins. Returns whether it is to look at all lanes.
    pub(crate) fn claims(&mut self, now: Instant) -> bool {
        // A wake-up while the claim is under way brings the next look forward again.
        self.asked(now);
        self.look_at = now + self.poll;
        std::mem::take(&mut self.all)
    }

    /// The claim has failed. Returns how long to wait.
    pub(crate) fn failed(&mut self, now: Instant, chance: f64) -> Duration {
        self.failures += 1;
        let wait = outage_wait(self.failures, chance);
        self.look_at = now + wait;
        wait
    }

    /// The claim has ended. Returns whether there is more at once.
    pub(crate) fn claimed(&mut self, found: Found, now: Instant, chance: f64) -> bool {
        self.failures = 0;
        self.claimed_once = true;
        self.loaded = found.lanes >= LOADED;
        self.behind = found.lanes >= found.capacity;
        if found.lanes >= found.capacity {
            self.look_at = now;
            return true;
        }
        let due = if found.lanes == 0 {
            // Due and not claimed: it has just become due, or another worker is at it at this moment.
            found.next.map_or(Duration::MAX, |due| due.max(SOON).saturating_add(found.lag))
        } else {
            self.idle_wait = self.poll / 8;
            SOON
        };
        let idle = self.idle_wait.mul_f64(chance.mul_add(0.2, 0.9));
        self.look_at = self.look_at.min(now + idle.min(due));
        self.idle_wait = (self.idle_wait * 2).min(self.poll);
        false
    }

    /// A lane is leased that may have more deliveries than its run.
    pub(crate) fn leased_long(&mut self, lane: LaneRef) {
        self.long.insert(lane);
    }

    /// A lane was leased by routing.
    pub(crate) fn routed(&mut self, lane: LaneRef) {
        self.fresh.insert(lane);
    }

    /// A lane is over. It may have more: its next delivery, or one that was routed while it was leased for so long.
    pub(crate) fn yielded(&mut self, lane: &LaneRef, lease: Duration, now: Instant) {
        let was_quiet = self.woken_at.is_none_or(|at| now.saturating_duration_since(at) > lease);
        if !(self.fresh.remove(lane) && was_quiet) {
            self.look_again_for(lane, now);
        }
    }

    /// A lease is over. The lane may be due already, and lie behind what was passed: it is as old as its next delivery.
    pub(crate) fn look_again_for(&mut self, lane: &LaneRef, now: Instant) {
        self.fresh.remove(lane);
        self.look_at = now;
        self.all |= self.long.remove(lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: Duration = Duration::from_secs(8);

    fn found(lanes: usize, next: Option<Duration>) -> Found {
        Found { lanes, capacity: 10, next, lag: Duration::ZERO }
    }

    fn lane() -> LaneRef {
        LaneRef { subscription: 1, key: "a".to_owned(), token: 1, worker: "w".to_owned() }
    }

    #[test]
    fn an_idle_feed_looks_less_and_less_often_until_it_is_woken() {
        let now = Instant::now();
        let mut schedule = Schedule::new(POLL, true, now);
        let mut waits = Vec::new();
        for _ in 0..5 {
            schedule.claims(now);
            assert!(!schedule.claimed(found(0, None), now, 0.5));
            waits.push((schedule.look_at() - now).as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 8]);
        let later = now + Duration::from_secs(3);
        schedule.woken(later);
        assert_eq!(schedule.look_at(), later);
    }

    #[test]
    fn what_is_due_next_is_looked_for_when_it_is_due() {
        let now = Instant::now();
        let mut schedule = Schedule::new(POLL, true, now);
        let mut look = |next, lag| {
            schedule.claims(now);
            schedule.claimed(Found { lag, ..found(0, Some(next)) }, now, 0.5);
            schedule.look_at() - now
        };
        let (ms, zero) = (Duration::from_millis(1), Duration::ZERO);
        assert_eq!(look(300 * ms, zero), 300 * ms);
        assert_eq!(look(zero, zero), SOON, "another is at it");
        assert_eq!(look(300 * ms, 150 * ms), 450 * ms);
    }

    #[test]
    fn a_claim_that_came_back_full_is_followed_by_another() {
        let now = Instant::now();
        let mut schedule = Schedule::new(POLL, true, now);
        schedule.claims(now);
        assert!(schedule.claimed(found(10, None), now, 0.5));
        assert!(schedule.is_behind() && schedule.look_at() == now);
        schedule.claims(now);
        assert!(!schedule.claimed(found(3, None), now, 0.5));
        assert!(!schedule.is_behind() && schedule.look_at() == now + SOON);
    }

    #[test]
    fn a_claim_that_failed_is_repeated_after_a_while() {
        let now = Instant::now();
        let mut schedule = Schedule::new(POLL, true, now);
        schedule.claims(now);
        let wait = schedule.failed(now, 0.5);
        assert!(wait >= SOON && schedule.look_at() == now + wait, "{wait:?}");
    }

    #[test]
    fn many_commits_are_one_look() {
        let now = Instant::now();
        let looks_after = |coalesces, lanes| {
            let mut schedule = Schedule::new(POLL, coalesces, now);
            schedule.claims(now);
            schedule.claimed(found(lanes, None), now, 0.5);
            schedule.woken(now);
            schedule.look_at() - now
        };
        assert_eq!(looks_after(true, 0), COALESCE);
        assert_eq!(looks_after(true, LOADED), COALESCE_LOADED);
        assert_eq!(looks_after(false, 0), Duration::ZERO);
    }

    #[test]
    fn a_wake_up_while_a_claim_is_under_way_is_not_lost() {
        let now = Instant::now();
        let mut schedule = Schedule::new(POLL, true, now);
        schedule.claims(now);
        schedule.woken(now);
        let look_at = schedule.look_at();
        schedule.claimed(found(0, None), now, 0.5);
        assert_eq!(schedule.look_at(), look_at);
    }

    #[test]
    fn what_routing_has_leased_whole_is_not_looked_for_again() {
        let (now, lease) = (Instant::now(), Duration::from_secs(30));
        let mut schedule = Schedule::new(POLL, true, now);
        let later = now + Duration::from_secs(1);
        schedule.look(later);
        schedule.routed(lane());
        schedule.yielded(&lane(), lease, now);
        assert_eq!(schedule.look_at(), later);
        schedule.yielded(&lane(), lease, now);
        assert_eq!(schedule.look_at(), now, "any other is");
        schedule.look(later);
        schedule.routed(lane());
        schedule.woken(now - lease / 2);
        schedule.look(later);
        schedule.yielded(&lane(), lease, now);
        assert_eq!(schedule.look_at(), now, "it may have got more meanwhile");
    }
}

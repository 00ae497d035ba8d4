//! What the answers of the store lead to.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use outbox_core::store::{Claim, ClaimedLane, LaneRef, LaneReport, LeaseState, Next, Settled, StoreError};

use super::{Core, Moment};
use crate::feed::{
    calls::{Asked, Taken},
    schedule::Found,
    table::Lane,
    told::Told,
};

impl Core {
    pub(super) fn claimed(
        &mut self,
        asked_at: Instant,
        asked: Asked,
        times_down: u32,
        claim: Result<Claim, StoreError>,
        at: Moment,
    ) {
        let Claim { lanes, probe, next } = match claim {
            Ok(claim) => claim,
            Err(error) => {
                // What was only asked is asked again after the poll interval.
                let wait = (!asked.is_question()).then(|| self.schedule.failed(at.now, at.chance));
                let what = "cannot claim deliveries, trying again";
                self.told.push(Told::CallFailed { what, error, wait });
                return;
            }
        };
        self.schedule.set_served(!lanes.is_empty() || next.is_some());
        if asked.is_question() {
            return;
        }
        let only_others = asked.lanes == 0;
        // The destination was found down while the claim was under way: what it found is old.
        let too_late = self.circuit.is_open() && self.circuit.times_down() != times_down;
        if probe {
            self.circuit.probing();
        } else if !too_late {
            self.circuit.seen(if lanes.is_empty() { next.and_then(|next| next.circuit) } else { None });
        }
        let found = Found {
            lanes: lanes.len(),
            capacity: if only_others { asked.others } else { asked.lanes },
            // Of those that are passed there is always more.
            next: next.and_then(|next| next.after).filter(|_| !only_others),
            lag: self.unknown.lag(at.now),
        };
        if self.schedule.claimed(found, at.now, at.chance) {
            self.ahead.came_full(asked_at, self.capacity());
        }
        if too_late {
            self.schedule.look(at.now + self.settings.retry.delay(1, at.chance));
        }
        for claimed in lanes {
            self.leased(claimed, asked_at, probe, at.now);
        }
        if too_late {
            self.give_back_idle();
        }
    }

    /// Routing has leased these, asked for then.
    pub(crate) fn routed(&mut self, lanes: Vec<(ClaimedLane, Instant)>, now: Instant) {
        for (lane, asked_at) in lanes {
            self.schedule.routed(lane.lane.clone());
            self.leased(lane, asked_at, false, now);
        }
    }

    pub(super) fn taken(&mut self, asked_at: Instant, taken: Result<Taken, StoreError>, at: Moment) {
        let Taken { lanes, busy, void } = match taken {
            Ok(taken) => taken,
            Err(error) => {
                let what = "cannot take over jobs; their leases end by themselves";
                self.told.push(Told::CallFailed { what, error, wait: None });
                return;
            }
        };
        self.told.push(Told::VoidJobs(void));
        self.relayed.arrived.extend(busy);
        for (lane, probe) in lanes {
            if probe {
                self.circuit.probing();
            } else {
                self.circuit.seen(None);
            }
            self.leased(lane, asked_at, probe, at.now);
        }
    }

    /// A lane was leased, asked for then.
    fn leased(&mut self, claimed: ClaimedLane, asked_at: Instant, probe: bool, now: Instant) {
        let (key, unreadable) = (claimed.lane.key.clone(), claimed.unreadable.clone());
        // Only after our own lease had ended without our noticing: the old one is void.
        self.lose(&key, now);
        if claimed.run.len() >= self.settings.options.batch {
            self.schedule.leased_long(claimed.lane.clone());
        }
        self.table.insert(Lane::new(claimed, asked_at + self.settings.options.lease, probe), now);
        match unreadable {
            None => self.table.is_ready(key),
            Some(unreadable) => {
                self.table.finish(&key, unreadable.position, Some(unreadable.error));
                self.told.push(Told::Dead);
                self.hold_if_wanted(&key, unreadable.position);
                self.continue_with(key, now);
            }
        }
    }

    pub(super) fn settled(&mut self, reports: Vec<LaneReport>, settled: Result<Vec<Settled>, StoreError>, at: Moment) {
        let settled = match settled {
            Ok(settled) => settled,
            Err(error) => {
                let wait = Some(self.reports.failed(reports, at.now, at.chance));
                self.told.push(Told::CallFailed { what: "cannot store results, trying again", error, wait });
                return;
            }
        };
        let (answered, mut busy) = (reports.len(), Vec::new());
        for (report, settled) in reports.into_iter().zip(settled) {
            if settled == Settled::Busy {
                busy.push(report);
                continue;
            }
            self.table.reported(&report);
            if settled == Settled::Superseded {
                self.superseded(&report, at.now);
            }
            match report.next {
                Next::Keep => {}
                Next::Yield => self.schedule.yielded(&report.lane, self.settings.options.lease, at.now),
                _ => self.schedule.look_again_for(&report.lane, at.now),
            }
        }
        self.reports.answered(answered, busy, at.now);
    }

    /// A report was dropped: the lease had been taken over.
    fn superseded(&mut self, report: &LaneReport, now: Instant) {
        self.told.push(Told::LostLease("the lease of a lane was lost; its results are dropped"));
        let failed_attempt = usize::from(matches!(report.next, Next::Retry { .. }));
        self.told.push(Told::Superseded(report.finished.len() + failed_attempt));
        // Not the same lane any more if it was lost, and perhaps claimed again, since the report.
        if self.table.held(&report.lane).is_some() {
            self.lose(&report.lane.key, now);
        }
    }

    pub(super) fn noted(&mut self, asked: &[LaneRef], noted: Result<Vec<LeaseState>, StoreError>, now: Instant) {
        let states = match noted {
            Ok(states) => states,
            Err(error) => {
                for lease in asked {
                    if self.table.held(lease).is_some() {
                        self.give_back(&lease.key, None);
                    }
                }
                self.told.push(Told::CallFailed {
                    what: "cannot note attempts, trying again later",
                    error,
                    wait: None,
                });
                return;
            }
        };
        for (lease, state) in asked.iter().zip(states) {
            let Some(lane) = self.table.held(lease) else { continue };
            match state {
                LeaseState::Done => lane.head.noted = true,
                LeaseState::Busy => {}
                LeaseState::Lost => self.lose(&lease.key, now),
            }
        }
    }

    pub(super) fn renewed(
        &mut self,
        asked_at: Instant,
        asked: &[LaneRef],
        renewed: Result<Vec<LeaseState>, StoreError>,
        now: Instant,
    ) {
        let states = match renewed {
            Ok(states) => states,
            Err(error) => {
                self.told.push(Told::CallFailed { what: "cannot renew leases, trying again", error, wait: None });
                self.leases.renew_again(now);
                return;
            }
        };
        let leased_until = asked_at + self.settings.options.lease;
        for (lease, state) in asked.iter().zip(states) {
            match state {
                LeaseState::Done => {
                    if let Some(lane) = self.table.held(lease) {
                        lane.leased_until = leased_until;
                    }
                }
                LeaseState::Busy => self.leases.renew_again(now),
                LeaseState::Lost => self.is_not_held(lease, "the lease of a lane was lost", now),
            }
        }
    }

    pub(super) fn checked(
        &mut self,
        losses: u64,
        asked: &[LaneRef],
        held: Result<Vec<bool>, StoreError>,
        now: Instant,
    ) {
        // Otherwise it is asked again.
        let Ok(held) = held else { return };
        // What came meanwhile may be from before the loss.
        let all: HashSet<&LaneRef> = asked.iter().collect();
        if self.table.lanes().all(|lane| all.contains(&lane.lane)) {
            self.leases.checked(losses);
        }
        for (lease, held) in asked.iter().zip(held) {
            if !held {
                self.is_not_held(lease, "the lease of a lane was lost with the connection", now);
            }
        }
    }

    pub(super) fn reserved(
        &mut self,
        asked_at: Instant,
        attempts: u32,
        after: Result<Option<Duration>, StoreError>,
        at: Moment,
    ) {
        match after {
            Ok(Some(after)) => self.pace.reserved(attempts, asked_at + after, at.now),
            Ok(None) => self.pace.waits(at.now),
            Err(error) => {
                let wait = self.settings.retry.delay(1, at.chance);
                self.pace.failed(at.now, wait);
                self.told.push(Told::CallFailed {
                    what: "cannot reserve attempts, trying again",
                    error,
                    wait: Some(wait),
                });
            }
        }
    }

    /// The store says that a lease is not held any more. An attempt that ends it in its own transaction has perhaps done so
    /// just now; if the lease is lost, its commit fails.
    fn is_not_held(&mut self, lease: &LaneRef, text: &'static str, now: Instant) {
        let Some(lane) = self.table.held(lease) else { return };
        let settles_now = lane.under_way().is_some_and(|event| self.settings.destination.settles(event));
        if !settles_now {
            self.told.push(Told::LostLease(text));
            self.lose(&lease.key, now);
        }
    }
}

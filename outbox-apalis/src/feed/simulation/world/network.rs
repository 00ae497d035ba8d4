//! Calls on their way to the store, and their answers.

use std::{collections::HashMap, time::Instant};

use outbox_core::{
    AfterDeadLetter,
    store::{Holder, LaneRef, LaneReport, LeaseState, Next, Reservation, Settled, StoreError, Wanted},
    testing::Model,
};

use super::{Event, World};
use crate::feed::{
    calls::{Answer, Asked, Call, Change, Taken},
    simulation::plan::{MS, Plan},
    together::Batch,
};

impl World {
    pub(super) fn chance(&mut self, of_thousand: u32) -> bool {
        self.rng.u32(..1000) < of_thousand
    }

    pub(super) fn send(&mut self, place: usize, generation: u32, batch: Batch) {
        let slow = if self.chance(self.plan.late) { self.plan.options.lease.mul_f64(self.rng.f64() * 1.5) } else { MS };
        let (at, asked_at) = (self.now + slow.mul_f64(self.rng.f64()), self.now);
        let (lost, answers) = (self.chance(self.plan.lost), !self.chance(self.plan.lost));
        if lost {
            self.fail(place, generation, batch);
            return;
        }
        if self.chance(self.plan.lost) {
            // It arrives twice; nobody waits for the second answer.
            let later = at + MS.mul_f64(5.0 * self.rng.f64());
            self.schedule(later, u32::MAX, Event::Call { place, batch: batch.clone(), asked_at, answers: false });
        }
        self.schedule(at, generation, Event::Call { place, batch, asked_at, answers });
    }

    /// A call has failed, and the connection with it.
    pub(super) fn fail(&mut self, place: usize, generation: u32, batch: Batch) {
        self.loses_connection(place, generation);
        let kind = batch.kind;
        let answers = batch.calls.into_iter().map(|(index, call)| (index, self.failed(call))).collect();
        let wait = self.plan.options.call_limit().mul_f64(self.rng.f64() / 4.0);
        self.schedule(self.now + wait, generation, Event::Answer { place, kind, answers });
    }

    fn failed(&self, call: Call) -> Answer {
        let away = || StoreError::new("the database is away");
        match call {
            Call::Claim { lanes, others, times_down, .. } => {
                Answer::Claimed { asked_at: self.now, asked: Asked { lanes, others }, times_down, claim: Err(away()) }
            }
            Call::TakeOver(_) => Answer::Taken { asked_at: self.now, taken: Err(away()) },
            Call::Settle(reports) => Answer::Settled { reports, settled: Err(away()) },
            Call::Note(notes) => {
                Answer::Noted { asked: notes.into_iter().map(|(lane, _)| lane).collect(), noted: Err(away()) }
            }
            Call::Renew(asked) => Answer::Renewed { asked_at: self.now, asked, renewed: Err(away()) },
            Call::Check { losses, lanes } => Answer::Checked { losses, asked: lanes, held: Err(away()) },
            Call::Change(_) => Answer::Changed,
            Call::Reserve(attempts, _) => Answer::Reserved { asked_at: self.now, attempts, after: Err(away()) },
        }
    }

    /// Calls reach the store.
    pub(super) fn call(&mut self, place: usize, generation: u32, batch: Batch, asked_at: Instant, answers: bool) {
        if self.away_until > self.now {
            self.fail(place, generation, batch);
            return;
        }
        let (again, kind) = (batch.clone(), batch.kind);
        let mut answer = |(index, call)| (index, self.execute(place, generation, index, call, asked_at));
        let all = batch.calls.into_iter().map(&mut answer).collect();
        if answers {
            let soon = self.now + MS.mul_f64(self.rng.f64());
            self.schedule(soon, generation, Event::Answer { place, kind, answers: all });
        } else {
            self.fail(place, generation, again);
        }
    }

    fn execute(&mut self, place: usize, generation: u32, index: usize, call: Call, asked_at: Instant) -> Answer {
        let (utc, id) = (self.utc(), self.known[place][index]);
        if !matches!(call, Call::Check { .. }) {
            self.unwritten = None;
        }
        match call {
            Call::Claim { lanes, others, passed, times_down, .. } => {
                let name = format!("w{place}.{generation}");
                let wanted = Wanted { others: others as u32, passed, ..wanted(&self.plan, id, lanes) };
                let claim = Ok(self.model.claim(utc, holder(&self.plan, &name), &wanted));
                Answer::Claimed { asked_at, asked: Asked { lanes, others }, times_down, claim }
            }
            Call::Settle(reports) => {
                reports.iter().for_each(|report| self.check_hold(report));
                let settled = Ok(self.settle(&reports));
                Answer::Settled { reports, settled }
            }
            Call::Note(notes) => {
                let asked: Vec<LaneRef> = notes.iter().map(|(lane, _)| lane.clone()).collect();
                let noted = Ok(self.unless_busy(&asked, |model, free| {
                    let notes: Vec<_> = notes.iter().filter(|(lane, _)| free.contains(lane)).cloned().collect();
                    model.note(&notes)
                }));
                Answer::Noted { asked, noted }
            }
            Call::Renew(asked) => {
                let lease = self.plan.options.lease;
                let renewed = Ok(self.unless_busy(&asked, |model, free| model.renew(utc, free, lease)));
                Answer::Renewed { asked_at, asked, renewed }
            }
            Call::Check { losses, lanes } => {
                let held = Ok(self.model.held(&lanes));
                Answer::Checked { losses, asked: lanes, held }
            }
            Call::Change(change) => {
                match change {
                    Change::Circuit(circuit) => self.model.set_circuit(utc, id, circuit),
                    Change::Pause => self.model.set_paused(id, true),
                }
                Answer::Changed
            }
            Call::Reserve(attempts, every) => {
                let after = Ok(self.model.reserve(utc, &Reservation { subscription: id, attempts, every }));
                Answer::Reserved { asked_at, attempts, after }
            }
            Call::TakeOver(jobs) => {
                let name = format!("w{place}.{generation}");
                let lanes: Vec<LaneRef> = jobs.iter().map(|job| job.lane.clone()).collect();
                let wanted = wanted(&self.plan, id, lanes.len());
                let taken = self.model.take_over(utc, holder(&self.plan, &name), &wanted, &lanes);
                Answer::Taken { asked_at, taken: Ok(Taken::sort(jobs, taken)) }
            }
        }
    }

    /// If that is wanted, a dead letter holds its key up.
    pub(super) fn check_hold(&self, report: &LaneReport) {
        let dies = report.finished.iter().any(|delivery| delivery.error.is_some());
        let holds = matches!(report.next, Next::Hold { .. });
        let wants = self.plan.after_dead_letter == AfterDeadLetter::Hold;
        assert!(!dies || holds == wants, "a dead letter, and its key goes on: {report:?}");
    }

    /// Of some lanes nothing can be stored at this moment.
    pub(super) fn settle(&mut self, reports: &[LaneReport]) -> Vec<Settled> {
        let utc = self.utc();
        let mut busy: HashMap<&LaneRef, bool> = HashMap::new();
        for report in reports {
            let chance = self.chance(self.plan.busy) && self.model.held(std::slice::from_ref(&report.lane))[0];
            busy.entry(&report.lane).or_insert(chance);
        }
        let stored: Vec<LaneReport> = reports.iter().filter(|report| !busy[&report.lane]).cloned().collect();
        let mut settled = self.model.settle(utc, &stored).into_iter();
        let answer = |report: &LaneReport| if busy[&report.lane] { None } else { settled.next() };
        reports.iter().map(answer).map(|settled| settled.unwrap_or(Settled::Busy)).collect()
    }

    /// Does something with leases, except those whose lanes a commit has at this moment.
    pub(super) fn unless_busy(
        &mut self,
        lanes: &[LaneRef],
        change: impl FnOnce(&mut Model, &[LaneRef]) -> Vec<LeaseState>,
    ) -> Vec<LeaseState> {
        let busy: Vec<bool> = lanes.iter().map(|_| self.chance(self.plan.busy)).collect();
        let free = lanes.iter().zip(&busy).filter(|(_, busy)| !**busy).map(|(lane, _)| lane.clone());
        let mut states = change(&mut self.model, &free.collect::<Vec<_>>()).into_iter();
        let held = self.model.held(lanes);
        let state = |(busy, held): (&bool, &bool)| match (busy, held) {
            (false, _) => states.next().unwrap_or(LeaseState::Lost),
            (true, true) => LeaseState::Busy,
            (true, false) => LeaseState::Lost,
        };
        busy.iter().zip(&held).map(state).collect()
    }
}

pub(super) fn holder<'a>(plan: &Plan, worker: &'a str) -> Holder<'a> {
    Holder { worker, lease: plan.options.lease }
}

pub(super) fn wanted(plan: &Plan, subscription: i32, lanes: usize) -> Wanted {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Wanted { subscription, lanes: count(lanes), run: count(plan.options.batch), all: true, ..Wanted::default() }
}

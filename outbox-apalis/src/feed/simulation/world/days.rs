//! Commits, operators and bad days.

use chrono::TimeDelta;

use super::{
    Better, Event, World,
    network::{holder, wanted},
};
use crate::feed::simulation::{
    plan::{BadDay, MS},
    process::Process,
    world::NAME,
};

impl World {
    /// `good` if it is certain to succeed.
    pub(super) fn commit(&mut self, good: bool) {
        let utc = self.utc();
        let (key, event) = self.effects.push(&mut self.rng, &self.plan, good, utc);
        self.says(|| format!("commit of {} for {key}", event.position));
        let delay =
            if self.rng.u8(..8) == 0 { TimeDelta::milliseconds(self.rng.i64(0..500)) } else { TimeDelta::zero() };
        self.unwritten = None;
        self.model.add(self.subscription, &key, event, utc + delay);
        let place = self.rng.usize(..self.processes.len());
        if self.rng.bool() && self.route_to(place) {
            return;
        }
        self.wake_all();
    }

    /// Routing leases what is due to one of the workers, if that has room. Returns whether it has.
    pub(super) fn route_to(&mut self, place: usize) -> bool {
        let (now, utc, id) = (self.now, self.utc(), self.subscription);
        let circuit_is_closed = self.model.next_due(utc, id).is_some_and(|next| next.circuit.is_none());
        let knows = self.known[place] == id && self.away_until <= now && circuit_is_closed;
        let Some(process) = self.processes[place].as_mut().filter(|process| knows && process.frozen_until <= now)
        else {
            return false;
        };
        let room = process.core.room_for_new();
        if room == 0 {
            return false;
        }
        let before = self.plan.crashes().then(|| self.model.clone());
        let claim = self.model.claim(utc, holder(&self.plan, &process.name), wanted(&self.plan, id, room));
        self.unwritten = before;
        let lanes = claim.lanes.into_iter().map(|lane| (lane, now)).collect();
        process.core.routed(lanes, now);
        self.act(place);
        true
    }

    pub(super) fn tell_state(&mut self) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = self.processes[place].as_mut().filter(|process| process.core.is_working()) {
                process.core.state_changed(now);
                self.act(place);
            }
        }
    }

    /// Only attempts under way keep their leases while the subscription is paused.
    pub(super) fn check_leases_while_paused(&self) {
        let known = self.paused.filter(|(since, _)| self.now > *since + self.plan.options.lease + 50 * MS);
        if known.is_none() || !self.plan.is_connected() {
            return;
        }
        for (key, lane) in self.model.lanes(self.subscription) {
            let holder =
                self.processes.iter().flatten().find(|process| lane.leased_by.as_deref() == Some(&*process.name));
            let works = |process: &Process| process.attempts.iter().any(|attempt| attempt.start.lane.key == key);
            assert!(holder.is_none_or(works), "{key} is leased by {:?}, and paused", lane.leased_by);
        }
    }

    /// Nothing begins while the subscription is paused, once the workers can know.
    pub(super) fn check_pause(&self) {
        if let Some((since, told)) = self.paused.filter(|_| self.plan.is_connected()) {
            let known = since + if told { 10 * MS } else { self.plan.options.lease + 10 * MS };
            assert!(self.now <= known, "an attempt begins, and the subscription is paused");
        }
    }

    pub(super) fn wake_all(&mut self) {
        for place in 0..self.processes.len() {
            let now = self.now;
            let process = self.processes[place].as_mut().filter(|process| process.frozen_until <= now);
            if let Some(process) = process.filter(|process| process.core.is_working()) {
                process.core.woken(now);
                self.act(place);
            }
        }
    }

    pub(super) fn bad_day(&mut self, day: BadDay) {
        self.says(|| format!("{day:?}"));
        let place = self.rng.usize(..self.processes.len());
        let lease = self.plan.options.lease;
        match day {
            BadDay::Kill => self.kill(place),
            BadDay::Freeze(time) => {
                if let Some(process) = &mut self.processes[place] {
                    process.frozen_until = self.now + time;
                }
            }
            BadDay::Away(time) => self.away_until = self.now + time,
            BadDay::ClockStep(step) => self.skew += step,
            BadDay::Crash => {
                if let Some(before) = self.unwritten.take() {
                    self.model = before;
                }
                self.away_until = self.now + 20 * MS;
                for place in 0..self.processes.len() {
                    if let Some(process) = &mut self.processes[place] {
                        process.losses += 1;
                        self.act(place);
                    }
                }
            }
            BadDay::Down(time) => self.down_until = self.now + time,
            BadDay::Pause(time) => {
                self.model.set_paused(self.subscription, true);
                let told = self.rng.bool();
                self.paused = Some((self.now, told));
                self.schedule(self.now + time, 0, Event::Better(Better::Resume));
                if told {
                    self.tell_state();
                }
            }
            BadDay::Restart => {
                let (now, grace) = (self.now, self.plan.options.grace);
                if let Some(process) = self.processes[place].as_mut().filter(|process| process.frozen_until <= now) {
                    process.core.stop(grace, now);
                    self.act(place);
                }
            }
            BadDay::Remove => {
                self.model.remove(self.subscription);
                self.subscription += 1;
                self.model.subscribe(self.subscription, NAME);
                self.effects.remove_all();
                self.unwritten = None;
                self.paused = None;
                self.tell_state();
                self.schedule(self.now + lease / 4, 0, Event::Better(Better::Beat(self.subscription)));
            }
            BadDay::LetGo => self.model.let_go(self.utc(), self.subscription),
        }
    }

    pub(super) fn kill(&mut self, place: usize) {
        let Some(process) = self.processes[place].take() else { return };
        self.says(|| format!("{} is killed", process.name));
        let wait = self.plan.options.lease.mul_f64(self.rng.f64());
        self.schedule(self.now + wait, process.generation + 1, Event::Starts(place));
    }
}

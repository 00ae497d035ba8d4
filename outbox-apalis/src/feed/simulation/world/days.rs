//! Commits, operators and bad days.

use chrono::TimeDelta;
use outbox_core::store::{Holder, Wanted};

use super::{
    Better, Event, World,
    network::{holder, wanted},
};
use crate::{
    desk::Room,
    feed::{
        core::Core,
        simulation::{
            plan::{BadDay, MS},
            process::Process,
            world::{Subscription, name},
        },
    },
    redis::{Job, RELAY_LEASES},
};

impl World {
    /// `good` if it is certain to succeed.
    pub(super) fn commit(&mut self, good: bool) {
        let utc = self.utc();
        let subscription = self.rng.usize(..self.plan.subscriptions);
        let (key, event) = self.effects.push(&mut self.rng, &self.plan, subscription, good, utc);
        self.says(|| format!("commit of {} for {key}", event.position));
        let delay =
            if self.rng.u8(..8) == 0 { TimeDelta::milliseconds(self.rng.i64(0..500)) } else { TimeDelta::zero() };
        self.unwritten = None;
        self.model.add(self.subscriptions[subscription].id, &key, event, utc + delay);
        let place = self.rng.usize(..self.processes.len());
        if self.rng.bool() && self.route_to(place, subscription) {
            return;
        }
        self.wake_all(subscription);
    }

    /// Routing leases what is due to one of the workers, if that has room. Returns whether it has.
    pub(super) fn route_to(&mut self, place: usize, subscription: usize) -> bool {
        let (now, utc, id) = (self.now, self.utc(), self.subscriptions[subscription].id);
        let circuit_is_closed = self.model.next_due(utc, id).is_some_and(|next| next.circuit.is_none());
        let knows = self.known[place][subscription] == id && self.away_until <= now && circuit_is_closed;
        let Some(process) = self.processes[place].as_mut().filter(|process| knows && process.frozen_until <= now)
        else {
            return false;
        };
        let Room { lanes, passed } = process.dispatch.core(subscription).map(Core::room_for_new).unwrap_or_default();
        if lanes == 0 {
            return false;
        }
        let wanted = match passed.is_empty() {
            true => wanted(&self.plan, id, lanes),
            false => Wanted { others: lanes as u32, passed, ..wanted(&self.plan, id, 0) },
        };
        let before = self.plan.crashes().then(|| self.model.clone());
        let claim = self.model.claim(utc, holder(&self.plan, &process.name), &wanted);
        self.unwritten = before;
        let lanes = claim.lanes.into_iter().map(|lane| (lane, now)).collect();
        process.dispatch.touch(subscription, |core| core.routed(lanes, now));
        self.act(place);
        true
    }

    pub(super) fn tell_state(&mut self, subscription: usize) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = self.processes[place].as_mut() {
                process.dispatch.touch(subscription, |core| core.state_changed(now));
                self.act(place);
            }
        }
    }

    /// Only attempts under way keep their leases while the subscription is paused.
    pub(super) fn check_leases_while_paused(&self, subscription: usize) {
        let Subscription { id, paused } = self.subscriptions[subscription];
        let known = paused.filter(|(since, _)| self.now > *since + self.plan.options.lease + 50 * MS);
        if known.is_none() || !self.plan.is_connected() {
            return;
        }
        for (key, lane) in self.model.lanes(id) {
            let holder =
                self.processes.iter().flatten().find(|process| lane.leased_by.as_deref() == Some(&*process.name));
            let works = |process: &Process| process.attempts.iter().any(|attempt| attempt.start.lane.key == key);
            assert!(holder.is_none_or(works), "{key} is leased by {:?}, and paused", lane.leased_by);
        }
    }

    /// Nothing begins while the subscription is paused, once the workers can know.
    pub(super) fn check_pause(&self, subscription: usize) {
        if let Some((since, told)) = self.subscriptions[subscription].paused.filter(|_| self.plan.is_connected()) {
            let known = since + if told { 10 * MS } else { self.plan.options.lease + 10 * MS };
            assert!(self.now <= known, "an attempt begins, and the subscription is paused");
        }
    }

    pub(super) fn wake_all(&mut self, subscription: usize) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = self.processes[place].as_mut().filter(|process| process.frozen_until <= now) {
                process.dispatch.touch(subscription, |core| core.woken(now));
                self.act(place);
            }
        }
    }

    pub(super) fn bad_day(&mut self, day: BadDay) {
        self.says(|| format!("{day:?}"));
        let place = self.rng.usize(..self.processes.len());
        let (lease, subscription) = (self.plan.options.lease, self.rng.usize(..self.plan.subscriptions));
        let id = self.subscriptions[subscription].id;
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
                    let (generation, _) = self.losses[place];
                    self.loses_connection(place, generation);
                    if self.processes[place].is_some() {
                        self.act(place);
                    }
                }
            }
            BadDay::Down(time) => self.down_until = self.now + time,
            BadDay::RedisAway(time) => {
                self.redis_away_until = self.now + time;
                self.touch_all();
                self.schedule(self.redis_away_until, 0, Event::Better(Better::Redis));
            }
            BadDay::Pause(time) => {
                self.model.set_paused(id, true);
                let told = self.rng.bool();
                self.subscriptions[subscription].paused = Some((self.now, told));
                self.schedule(self.now + time, 0, Event::Better(Better::Resume(subscription)));
                if told {
                    self.tell_state(subscription);
                }
            }
            BadDay::Restart => {
                let (now, grace) = (self.now, self.plan.options.grace);
                if let Some(process) = self.processes[place].as_mut().filter(|process| process.frozen_until <= now) {
                    process.dispatch.touch_all(|core| core.stop(grace, now));
                    self.act(place);
                }
            }
            BadDay::Remove => {
                self.model.remove(id);
                let id = self.subscriptions.iter().map(|subscription| subscription.id).max().unwrap_or(0) + 1;
                self.subscriptions[subscription] = Subscription { id, paused: None };
                self.model.subscribe(id, &name(subscription));
                self.effects.remove_all(subscription);
                self.unwritten = None;
                self.tell_state(subscription);
                self.schedule(self.now + lease / 4, 0, Event::Better(Better::Beat(subscription, id)));
            }
            BadDay::LetGo => self.model.let_go(self.utc(), id),
        }
    }

    pub(super) fn redis_is_up(&self) -> bool {
        self.redis_away_until <= self.now && self.now < self.start + self.plan.end
    }

    pub(super) fn touch_all(&mut self) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = self.processes[place].as_mut().filter(|process| process.frozen_until <= now) {
                process.dispatch.touch_all(|_| {});
                self.act(place);
            }
        }
    }

    /// A relay moves what is due into Redis, which hands it to any process: once, never, or twice.
    pub(super) fn relays(&mut self) {
        let lease = self.plan.options.lease;
        self.schedule(self.now + lease / 20, 0, Event::Relays);
        if !self.redis_is_up() || self.away_until > self.now {
            return;
        }
        let (utc, subscription) = (self.utc(), self.rng.usize(..self.plan.subscriptions));
        let wanted = wanted(&self.plan, self.subscriptions[subscription].id, 3);
        self.unwritten = None;
        let claim = self.model.claim_for_relay(utc, Holder { worker: "relay", lease: lease * RELAY_LEASES }, &wanted);
        for lane in claim.lanes {
            let copies = if self.chance(self.plan.lost) { self.rng.u8(..3) } else { 1 };
            for _ in 0..copies {
                let place = self.rng.usize(..self.processes.len());
                let late = if self.chance(self.plan.late) { lease.mul_f64(self.rng.f64() * 3.0) } else { MS };
                let job = Job { lane: lane.lane.clone(), probe: claim.probe };
                let at = self.now + late.mul_f64(self.rng.f64());
                self.schedule(at, 0, Event::Job { place, subscription, job });
            }
        }
    }

    pub(super) fn kill(&mut self, place: usize) {
        let Some(process) = self.processes[place].take() else { return };
        self.says(|| format!("{} is killed", process.name));
        let wait = self.plan.options.lease.mul_f64(self.rng.f64());
        self.schedule(self.now + wait, process.generation + 1, Event::Starts(place));
    }
}

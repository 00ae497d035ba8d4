//! Time, the store, and what is on its way between store and workers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use fastrand::Rng;
use outbox_core::testing::{FinishedDelivery, Model};

use super::{
    effects::{Behaviour, Effects},
    plan::{BadDay, MS, Plan},
    process::{Process, Running},
};
use crate::{
    feed::{
        calls::{Answer, Call, Kind},
        core::{Core, Moment},
        together::Batch,
        told::Told,
    },
    metrics::Failed,
    redis::Job,
};

mod attempts;
mod days;
mod network;

/// What happens at some time.
#[derive(Debug)]
enum Event {
    Commit,
    Bad(BadDay),
    /// Faults that last are over.
    Better(Better),
    /// A process starts at this place.
    Starts(usize),
    /// A relay moves lanes into Redis.
    Relays,
    /// A job comes out of Redis.
    Job {
        place: usize,
        subscription: usize,
        job: Job,
    },
    /// A process looks at the time.
    Wakes(usize),
    /// A call reaches the store. `answers` unless its answer is lost.
    Call {
        place: usize,
        batch: Batch,
        asked_at: Instant,
        answers: bool,
    },
    Answer {
        place: usize,
        kind: Kind,
        answers: Vec<(usize, Answer)>,
    },
    Begins {
        place: usize,
        id: u64,
    },
    Ends {
        place: usize,
        id: u64,
    },
}

#[derive(Debug)]
enum Better {
    Resume(usize),
    Redis,
    /// Workers look at their subscriptions.
    Beat(usize, i32),
}

pub(super) struct World {
    plan: Plan,
    rng: Rng,
    start: Instant,
    now: Instant,
    /// How far the database's clock is off.
    skew: TimeDelta,
    model: Model,
    /// As it was before the last lease that a crash takes back.
    unwritten: Option<Model>,
    subscriptions: Vec<Subscription>,
    agenda: BinaryHeap<Reverse<(Instant, u64)>>,
    events: HashMap<u64, (u32, Event)>,
    count: u64,
    processes: Vec<Option<Process>>,
    /// How many connections the process at each place has lost, of this generation.
    losses: Vec<(u32, u64)>,
    /// The ids that the processes know their subscriptions by.
    known: Vec<Vec<i32>>,
    effects: Effects,
    away_until: Instant,
    down_until: Instant,
    redis_away_until: Instant,
    /// All workers stop for good.
    is_ending: bool,
    verbose: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Subscription {
    /// Another one if it is removed and registered again.
    id: i32,
    /// Since when it is paused, and whether the workers have been told.
    paused: Option<(Instant, bool)>,
}

fn name(subscription: usize) -> String {
    format!("s{subscription}")
}

impl World {
    pub(super) fn new(plan: Plan) -> Self {
        let start = Instant::now();
        let mut world = Self {
            rng: Rng::with_seed(plan.seed ^ 0x5eed),
            start,
            now: start,
            skew: TimeDelta::zero(),
            model: Model::new(plan.seed as i64),
            unwritten: None,
            subscriptions: (1..).take(plan.subscriptions).map(|id| Subscription { id, paused: None }).collect(),
            agenda: BinaryHeap::new(),
            events: HashMap::new(),
            count: 0,
            processes: (0..plan.workers).map(|_| None).collect(),
            losses: vec![(0, 0); plan.workers],
            known: vec![(1..).take(plan.subscriptions).collect(); plan.workers],
            effects: Effects::default(),
            away_until: start,
            down_until: start,
            redis_away_until: start,
            is_ending: false,
            verbose: std::env::var_os("OUTBOX_SEED").is_some(),
            plan,
        };
        for (index, Subscription { id, .. }) in world.subscriptions.iter().enumerate() {
            world.model.subscribe(*id, &name(index));
        }
        for at in world.plan.commits.clone() {
            world.at(at, 0, Event::Commit);
        }
        for (at, day) in world.plan.bad_days.clone() {
            world.at(at, 0, Event::Bad(day));
        }
        if world.plan.redis {
            world.at(Duration::ZERO, 0, Event::Relays);
        }
        for place in 0..world.plan.workers {
            world.at(Duration::ZERO, 0, Event::Starts(place));
        }
        world
    }

    fn at(&mut self, after_start: Duration, generation: u32, event: Event) {
        self.schedule(self.start + after_start, generation, event);
    }

    fn schedule(&mut self, at: Instant, generation: u32, event: Event) {
        self.count += 1;
        self.agenda.push(Reverse((at, self.count)));
        self.events.insert(self.count, (generation, event));
    }

    fn utc(&self) -> DateTime<Utc> {
        let since = TimeDelta::from_std(self.now - self.start).unwrap_or_default();
        DateTime::UNIX_EPOCH + TimeDelta::days(20_000) + since + self.skew
    }

    fn moment(&mut self) -> Moment {
        Moment { now: self.now, utc: self.utc(), chance: self.rng.f64() }
    }

    /// The process at this place has lost a connection.
    fn loses_connection(&mut self, place: usize, generation: u32) {
        let (of, losses) = &mut self.losses[place];
        *losses += u64::from(*of == generation);
    }

    fn says(&self, text: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>9.3} {}", (self.now - self.start).as_secs_f64() * 1000.0, text());
        }
    }

    /// Lets it all happen, and checks the promises.
    pub(super) fn run(mut self) {
        self.says(|| format!("{:?}", self.plan));
        let (end, calm) = (self.start + self.plan.end, self.plan.is_calm());
        while self.step(end) {}
        self.now = end;
        self.faults_end();
        // The longest wait for an event that is unknown, a few times.
        let limit = end + Duration::from_secs(600);
        let mut good_at = end;
        while let Some(left) = self.left() {
            assert!(self.step(limit), "a key is stuck: {left}");
            // Without any success nobody can know that it is not the destination's fault.
            if self.plan.outside && self.now >= good_at {
                good_at = self.now + self.plan.options.lease;
                self.commit(true);
            }
            for Subscription { id, .. } in self.subscriptions.clone() {
                self.model.let_go(self.utc(), id);
            }
        }
        self.stop_all();
        let finished = self.subscriptions.iter().flat_map(|Subscription { id, .. }| self.model.finished(*id));
        let finished: BTreeMap<i64, FinishedDelivery> =
            finished.map(|(position, finished)| (position, finished.clone())).collect();
        self.effects.check(&finished, &self.plan, calm);
    }

    /// A key that is not done.
    fn left(&self) -> Option<String> {
        let mut lanes = self.subscriptions.iter().flat_map(|Subscription { id, .. }| self.model.lanes(*id));
        lanes.next().map(|lane| format!("{lane:?}"))
    }

    /// From now on all is well.
    fn faults_end(&mut self) {
        (self.plan.lost, self.plan.late, self.plan.busy) = (0, 0, 0);
        (self.away_until, self.down_until) = (self.now, self.now);
        for subscription in &mut self.subscriptions {
            self.model.set_paused(subscription.id, false);
            subscription.paused = None;
        }
        let ids = self.ids();
        self.known.fill(ids);
        for place in 0..self.processes.len() {
            if let Some(process) = &mut self.processes[place] {
                (process.frozen_until, process.wakes_at) = (self.now, None);
                process.dispatch.touch_all(|_| {});
                self.act(place);
            }
        }
    }

    fn ids(&self) -> Vec<i32> {
        self.subscriptions.iter().map(|subscription| subscription.id).collect()
    }

    /// All workers are told to stop, and nothing is left of them.
    fn stop_all(&mut self) {
        self.is_ending = true;
        let grace = self.plan.options.grace;
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = &mut self.processes[place] {
                process.dispatch.touch_all(|core| core.stop(grace, now));
                self.act(place);
            }
        }
        let limit = self.now + grace + self.plan.options.lease + Duration::from_secs(1);
        while self.processes.iter().flatten().any(|process| process.left > 0) {
            assert!(self.step(limit), "a worker does not stop");
        }
    }

    /// The next thing that happens until then; false if there is none.
    fn step(&mut self, until: Instant) -> bool {
        let Some(Reverse((at, number))) = self.agenda.peek().copied().filter(|Reverse((at, _))| *at <= until) else {
            return false;
        };
        self.agenda.pop();
        let Some((generation, event)) = self.events.remove(&number) else { return true };
        self.now = self.now.max(at);
        let place = match &event {
            Event::Wakes(place)
            | Event::Answer { place, .. }
            | Event::Begins { place, .. }
            | Event::Ends { place, .. } => Some(*place),
            _ => None,
        };
        if let Some(place) = place {
            let Some(process) = self.processes[place].as_ref().filter(|process| process.generation == generation)
            else {
                return true;
            };
            if process.frozen_until > self.now {
                self.schedule(process.frozen_until, generation, event);
                return true;
            }
        }
        self.happens(generation, event);
        true
    }

    fn happens(&mut self, generation: u32, event: Event) {
        match event {
            Event::Commit => self.commit(false),
            Event::Bad(day) => self.bad_day(day),
            Event::Better(Better::Resume(subscription)) => {
                self.check_leases_while_paused(subscription);
                self.model.set_paused(self.subscriptions[subscription].id, false);
                self.subscriptions[subscription].paused = None;
                self.wake_all(subscription);
            }
            Event::Better(Better::Redis) => self.touch_all(),
            Event::Better(Better::Beat(subscription, id)) => {
                self.known.iter_mut().for_each(|known| known[subscription] = id);
            }
            Event::Starts(place) => {
                if self.processes[place].is_none() && !self.is_ending {
                    self.processes[place] = Some(Process::new(&self.plan, place, generation, self.now));
                    self.known[place] = self.ids();
                    self.losses[place] = (generation, 0);
                    self.act(place);
                }
            }
            Event::Relays => self.relays(),
            Event::Job { place, subscription, job } => {
                // Nobody gets it if the process is gone: its lease ends.
                let Some(process) = &mut self.processes[place] else { return };
                if process.frozen_until > self.now {
                    let at = process.frozen_until;
                    self.schedule(at, generation, Event::Job { place, subscription, job });
                } else {
                    process.jobs[subscription].push_back(job);
                    process.dispatch.touch(subscription, |_| {});
                    self.act(place);
                }
            }
            Event::Wakes(place) => {
                let Some(process) = &mut self.processes[place] else { return };
                if process.wakes_at.is_some_and(|at| at <= self.now) {
                    process.wakes_at = None;
                    self.act(place);
                }
            }
            Event::Call { place, batch, asked_at, answers } => {
                self.call(place, generation, batch, asked_at, answers);
            }
            Event::Answer { place, kind, answers } => {
                self.says(|| format!("w{place}.{generation} <- {answers:?}"));
                let at = self.moment();
                let Some(process) = &mut self.processes[place] else { return };
                for (index, answer) in &answers {
                    if let Answer::Settled { reports, .. } = answer {
                        process.settling[*index] -= reports.iter().map(|report| report.finished.len()).sum::<usize>();
                    }
                }
                process.dispatch.answered(kind, &[], Some(answers), || at);
                self.act(place);
            }
            Event::Begins { place, id } => self.begins(place, id),
            Event::Ends { place, id } => self.ends(place, id),
        }
    }

    /// As the driver does.
    fn act(&mut self, place: usize) {
        let at = self.moment();
        let Some(mut process) = self.processes[place].take() else { return };
        if process.left == 0 {
            self.processes[place] = Some(process);
            return;
        }
        process.acts(self.now);
        let losses = self.losses[place].1;
        if std::mem::replace(&mut process.known_losses, losses) != losses {
            process.dispatch.touch_all(|_| {});
        }
        process.dispatch.time_passes(self.now);
        while let Some(index) = process.dispatch.next_touched() {
            self.serve(place, &mut process, index);
        }
        for batch in process.dispatch.batches(at) {
            self.says(|| format!("{} -> {batch:?}", process.name));
            for (index, call) in &batch.calls {
                if let Call::Settle(reports) = call {
                    process.settling[*index] += reports.iter().map(|report| report.finished.len()).sum::<usize>();
                }
            }
            self.send(place, process.generation, batch);
        }
        assert_eq!(process.dispatch.broken(), [0_usize; 0], "a core has panicked");
        for attempt in process.attempts.iter_mut().filter(|attempt| attempt.is_to_be_cancelled()) {
            attempt.is_cancelled = true;
            self.schedule(self.now + MS, process.generation, Event::Ends { place, id: attempt.id });
        }
        if let Some(timeout) = process.dispatch.next_timeout()
            && process.wakes_at.is_none_or(|at| at > timeout)
        {
            process.wakes_at = Some(timeout);
            self.schedule(timeout.max(self.now + MS / 1000), process.generation, Event::Wakes(place));
        }
        if process.left == 0 && !self.is_ending {
            self.schedule(self.now, process.generation + 1, Event::Starts(place));
            return;
        }
        self.processes[place] = Some(process);
    }

    fn serve(&mut self, place: usize, process: &mut Process, index: usize) {
        let (at, room, losses) = (self.moment(), process.room(&self.plan, index), process.known_losses);
        let redis = self.plan.redis.then(|| self.redis_is_up());
        let jobs = &mut process.jobs[index];
        let starts = process.dispatch.touch(index, |core| {
            core.lost_connections(losses);
            core.time_passes(false, at);
            if let Some(is_up) = redis {
                core.redis_is_up(is_up, at.now);
                let room = core.room_for_jobs().min(jobs.len());
                core.arrived(jobs.drain(..room).collect(), false, at.now);
            }
            core.start(room, at)
        });
        for start in starts.unwrap_or_default() {
            self.check_pause(index);
            self.count += 1;
            let (id, time) = (self.count, start.time);
            let (position, lease) = (start.event.position, self.plan.options.lease);
            let (behaviour, lasts) = self.effects.attempt(&mut self.rng, position, time, lease);
            self.says(|| {
                format!("{}: attempt {} of {} ({behaviour:?})", process.name, start.number, start.event.position)
            });
            let running =
                Running { id, subscription: index, start, behaviour, lasts, began_at: None, is_cancelled: false };
            process.attempts.push(running);
            let soon = self.now + MS.mul_f64(self.rng.f64());
            self.schedule(soon, process.generation, Event::Begins { place, id });
        }
        process.dispatch.gather(index, at);
        let told = process.dispatch.look(index, Core::told);
        told.into_iter().flatten().for_each(|told| self.told(&process.name, told));
        let Some(core) = process.dispatch.core(index) else { return };
        let gathered = process.dispatch.gathered_results(index);
        core.check(process.settling[index] + gathered);
        if core.is_over() || core.has_given_up() {
            self.check_end(place, process, index);
            process.dispatch.end(index);
            process.left -= 1;
        }
    }

    /// A core that is over has left no leases.
    fn check_end(&self, place: usize, process: &Process, index: usize) {
        let Some(core) = process.dispatch.core(index).filter(|_| !self.is_ending) else { return };
        let id = self.subscriptions[index].id;
        let leaves_none = self.model.lanes(id).all(|(_, lane)| lane.leased_by.as_deref() != Some(&*process.name));
        // What blocks its thread in a transaction may commit at any time: only the end of its lease fences it.
        let blocks = process.attempts.iter().any(|attempt| matches!(attempt.behaviour, Behaviour::Blocks(_)));
        let excused = blocks || self.losses[place].1 > 0 || core.has_given_up() && !self.plan.is_connected();
        assert!(leaves_none || excused, "{} has ended, and not its leases", process.name);
    }

    fn told(&mut self, worker: &str, told: Told) {
        match &told {
            Told::Failed { event, how: Failed::Dead | Failed::Permanent, .. } | Told::KilledItsWorker { event, .. } => {
                self.effects.dies(event.position);
            }
            _ => {}
        }
        self.says(|| format!("{worker}: {told:?}"));
    }
}

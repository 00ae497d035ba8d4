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
        calls::{Answer, Call},
        core::Moment,
        told::Told,
    },
    metrics::Failed,
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
    /// A process looks at the time.
    Wakes(usize),
    /// A call reaches the store. `answers` unless its answer is lost.
    Call {
        place: usize,
        call: Call,
        asked_at: Instant,
        answers: bool,
    },
    Answer {
        place: usize,
        answer: Answer,
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
    Resume,
    /// Workers look at their subscriptions.
    Beat(i32),
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
    subscription: i32,
    agenda: BinaryHeap<Reverse<(Instant, u64)>>,
    events: HashMap<u64, (u32, Event)>,
    count: u64,
    processes: Vec<Option<Process>>,
    /// The ids that the processes know their subscription by.
    known: Vec<i32>,
    effects: Effects,
    /// Since when the subscription is paused, and whether the workers have been told.
    paused: Option<(Instant, bool)>,
    away_until: Instant,
    down_until: Instant,
    /// All workers stop for good.
    is_ending: bool,
    verbose: bool,
}

const NAME: &str = "s";

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
            subscription: 1,
            agenda: BinaryHeap::new(),
            events: HashMap::new(),
            count: 0,
            processes: (0..plan.workers).map(|_| None).collect(),
            known: vec![1; plan.workers],
            effects: Effects::default(),
            paused: None,
            away_until: start,
            down_until: start,
            is_ending: false,
            verbose: std::env::var_os("OUTBOX_SEED").is_some(),
            plan,
        };
        world.model.subscribe(1, NAME);
        for at in world.plan.commits.clone() {
            world.at(at, 0, Event::Commit);
        }
        for (at, day) in world.plan.bad_days.clone() {
            world.at(at, 0, Event::Bad(day));
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
        while self.model.lanes(self.subscription).next().is_some() {
            assert!(self.step(limit), "a key is stuck: {:?}", self.model.lanes(self.subscription).next());
            // Without any success nobody can know that it is not the destination's fault.
            if self.plan.outside && self.now >= good_at {
                good_at = self.now + self.plan.options.lease;
                self.commit(true);
            }
            self.model.let_go(self.utc(), self.subscription);
        }
        self.stop_all();
        let finished: BTreeMap<i64, FinishedDelivery> =
            self.model.finished(self.subscription).map(|(position, finished)| (position, finished.clone())).collect();
        self.effects.check(&finished, &self.plan, calm);
    }

    /// From now on all is well.
    fn faults_end(&mut self) {
        (self.plan.lost, self.plan.late, self.plan.busy) = (0, 0, 0);
        (self.away_until, self.down_until) = (self.now, self.now);
        self.model.set_paused(self.subscription, false);
        self.paused = None;
        self.known.fill(self.subscription);
        for place in 0..self.processes.len() {
            if let Some(process) = &mut self.processes[place] {
                process.frozen_until = self.now;
                self.act(place);
            }
        }
    }

    /// All workers are told to stop, and nothing is left of them.
    fn stop_all(&mut self) {
        self.is_ending = true;
        let grace = self.plan.options.grace;
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = &mut self.processes[place] {
                process.core.stop(grace, now);
                self.act(place);
            }
        }
        let limit = self.now + grace + self.plan.options.lease + Duration::from_secs(1);
        while self.processes.iter().flatten().any(|process| !process.is_over) {
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
            Event::Better(Better::Resume) => {
                self.check_leases_while_paused();
                self.model.set_paused(self.subscription, false);
                self.paused = None;
                self.wake_all();
            }
            Event::Better(Better::Beat(id)) => self.known.fill(id),
            Event::Starts(place) => {
                if self.processes[place].is_none() {
                    self.processes[place] = Some(Process::new(&self.plan, place, generation, self.now));
                    self.known[place] = self.subscription;
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
            Event::Call { place, call, asked_at, answers } => self.call(place, generation, call, asked_at, answers),
            Event::Answer { place, answer } => {
                self.says(|| format!("w{place}.{generation} <- {answer:?}"));
                let at = self.moment();
                let Some(process) = &mut self.processes[place] else { return };
                if let Answer::Settled { reports, .. } = &answer {
                    process.settling -= reports.iter().map(|report| report.finished.len()).sum::<usize>();
                }
                process.core.answered(answer, at);
                self.act(place);
            }
            Event::Begins { place, id } => self.begins(place, id),
            Event::Ends { place, id } => self.ends(place, id),
        }
    }

    /// As the driver of a feed does.
    fn act(&mut self, place: usize) {
        let at = self.moment();
        let Some(mut process) = self.processes[place].take() else { return };
        if process.is_over {
            self.processes[place] = Some(process);
            return;
        }
        process.acts(self.now);
        process.core.lost_connections(process.losses);
        process.core.time_passes(false, at);
        for start in process.core.start(process.room(&self.plan), at) {
            self.check_pause();
            self.count += 1;
            let (id, time) = (self.count, start.time);
            let (position, lease) = (start.event.position, self.plan.options.lease);
            let (behaviour, lasts) = self.effects.attempt(&mut self.rng, position, time, lease);
            self.says(|| {
                format!("{}: attempt {} of {} ({behaviour:?})", process.name, start.number, start.event.position)
            });
            process.attempts.push(Running { id, start, behaviour, lasts, began_at: None, is_cancelled: false });
            let soon = self.now + MS.mul_f64(self.rng.f64());
            self.schedule(soon, process.generation, Event::Begins { place, id });
        }
        while let Some(call) = process.core.next_call(at) {
            self.says(|| format!("{} -> {call:?}", process.name));
            if let Call::Settle(reports) = &call {
                process.settling += reports.iter().map(|report| report.finished.len()).sum::<usize>();
            }
            self.send(place, process.generation, call);
        }
        for told in process.core.told() {
            self.told(&process.name, told);
        }
        process.core.check(process.settling);
        for attempt in process.attempts.iter_mut().filter(|attempt| attempt.is_to_be_cancelled()) {
            attempt.is_cancelled = true;
            self.schedule(self.now + MS, process.generation, Event::Ends { place, id: attempt.id });
        }
        let timeout = process.core.next_timeout(self.now);
        if process.wakes_at.is_none_or(|at| at > timeout) {
            process.wakes_at = Some(timeout);
            self.schedule(timeout.max(self.now + MS / 1000), process.generation, Event::Wakes(place));
        }
        process.is_over = process.core.is_over() || process.core.has_given_up();
        if process.is_over && !self.is_ending {
            let name = &*process.name;
            let leaves_none =
                self.model.lanes(self.subscription).all(|(_, lane)| lane.leased_by.as_deref() != Some(name));
            // What blocks its thread in a transaction may commit at any time: only the end of its lease fences it.
            let blocks = process.attempts.iter().any(|attempt| matches!(attempt.behaviour, Behaviour::Blocks(_)));
            let excused = blocks || process.losses > 0 || process.core.has_given_up() && !self.plan.is_connected();
            assert!(leaves_none || excused, "{name} has ended, and not its leases");
            self.schedule(self.now, process.generation + 1, Event::Starts(place));
            return;
        }
        self.processes[place] = Some(process);
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

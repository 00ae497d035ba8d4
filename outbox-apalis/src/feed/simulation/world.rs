//! Time, the store, and what is on its way between store and workers.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use fastrand::Rng;
use outbox_core::{
    AfterDeadLetter, DeliveryError, Outcome,
    store::{Finished, LaneRef, LaneReport, LeaseState, Next, Settled, StoreError, Wanted},
    testing::{FinishedDelivery, Model},
};

use super::{
    effects::{Behaviour, Effects},
    plan::{BadDay, MS, Plan},
    process::{Process, Running},
};
use crate::{
    destination::{AttemptResult, End, no_result},
    feed::{
        calls::{Answer, Call, Change},
        core::Moment,
        told::Told,
    },
    metrics::Failed,
};

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

    /// `good` if it is certain to succeed.
    fn commit(&mut self, good: bool) {
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
    fn route_to(&mut self, place: usize) -> bool {
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
        let claim = self.model.claim(utc, wanted(&self.plan, id, &process.name.clone(), room));
        self.unwritten = before;
        let lanes = claim.lanes.into_iter().map(|lane| (lane, now)).collect();
        process.core.routed(lanes, now);
        self.act(place);
        true
    }

    fn tell_state(&mut self) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = self.processes[place].as_mut().filter(|process| process.core.is_working()) {
                process.core.state_changed(now);
                self.act(place);
            }
        }
    }

    /// Nothing begins while the subscription is paused, once the workers can know.
    fn check_pause(&self) {
        if let Some((since, told)) = self.paused.filter(|_| self.plan.is_connected()) {
            let known = since + if told { 10 * MS } else { self.plan.options.lease + 10 * MS };
            assert!(self.now <= known, "an attempt begins, and the subscription is paused");
        }
    }

    fn wake_all(&mut self) {
        for place in 0..self.processes.len() {
            let now = self.now;
            if let Some(process) = &mut self.processes[place] {
                if process.frozen_until <= now && process.core.is_working() {
                    process.core.woken(now);
                    self.act(place);
                }
            }
        }
    }

    fn bad_day(&mut self, day: BadDay) {
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

    fn kill(&mut self, place: usize) {
        let Some(process) = self.processes[place].take() else { return };
        self.says(|| format!("{} is killed", process.name));
        let wait = self.plan.options.lease.mul_f64(self.rng.f64());
        self.schedule(self.now + wait, process.generation + 1, Event::Starts(place));
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

    fn chance(&mut self, of_thousand: u32) -> bool {
        self.rng.u32(..1000) < of_thousand
    }

    fn send(&mut self, place: usize, generation: u32, call: Call) {
        let slow = if self.chance(self.plan.late) { self.plan.options.lease.mul_f64(self.rng.f64() * 1.5) } else { MS };
        let (at, asked_at) = (self.now + slow.mul_f64(self.rng.f64()), self.now);
        let (lost, answers) = (self.chance(self.plan.lost), !self.chance(self.plan.lost));
        if lost {
            self.fail(place, generation, call);
            return;
        }
        if self.chance(self.plan.lost) {
            // It arrives twice; nobody waits for the second answer.
            let later = at + MS.mul_f64(5.0 * self.rng.f64());
            self.schedule(later, u32::MAX, Event::Call { place, call: call.clone(), asked_at, answers: false });
        }
        self.schedule(at, generation, Event::Call { place, call, asked_at, answers });
    }

    /// A call has failed, and the connection with it.
    fn fail(&mut self, place: usize, generation: u32, call: Call) {
        if let Some(process) = self.processes[place].as_mut().filter(|process| process.generation == generation) {
            process.losses += 1;
        }
        let away = || StoreError::new("the database is away");
        let answer = match call {
            Call::Claim { lanes, times_down, .. } => {
                Answer::Claimed { asked_at: self.now, capacity: lanes, times_down, claim: Err(away()) }
            }
            Call::TakeOver(_) => Answer::Taken { asked_at: self.now, taken: Err(away()) },
            Call::Settle(reports) => Answer::Settled { reports, settled: Err(away()) },
            Call::Note(notes) => {
                Answer::Noted { asked: notes.into_iter().map(|(lane, _)| lane).collect(), noted: Err(away()) }
            }
            Call::Renew(asked) => Answer::Renewed { asked_at: self.now, asked, renewed: Err(away()) },
            Call::Check { losses, lanes } => Answer::Checked { losses, asked: lanes, held: Err(away()) },
            Call::Change(_) => Answer::Changed,
        };
        let wait = self.plan.options.call_limit().mul_f64(self.rng.f64() / 4.0);
        self.schedule(self.now + wait, generation, Event::Answer { place, answer });
    }

    /// A call reaches the store.
    fn call(&mut self, place: usize, generation: u32, call: Call, asked_at: Instant, answers: bool) {
        if self.away_until > self.now {
            self.fail(place, generation, call);
            return;
        }
        let again = call.clone();
        let answer = self.execute(place, generation, call, asked_at);
        if answers {
            let soon = self.now + MS.mul_f64(self.rng.f64());
            self.schedule(soon, generation, Event::Answer { place, answer });
        } else {
            self.fail(place, generation, again);
        }
    }

    fn execute(&mut self, place: usize, generation: u32, call: Call, asked_at: Instant) -> Answer {
        let (utc, id) = (self.utc(), self.known[place]);
        if !matches!(call, Call::Check { .. }) {
            self.unwritten = None;
        }
        match call {
            Call::Claim { lanes, times_down, .. } => {
                let name = format!("w{place}.{generation}");
                let claim = Ok(self.model.claim(utc, wanted(&self.plan, id, &name, lanes)));
                Answer::Claimed { asked_at, capacity: lanes, times_down, claim }
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
            Call::TakeOver(_) => unreachable!("there is no Redis"),
        }
    }

    /// If that is wanted, a dead letter holds its key up.
    fn check_hold(&self, report: &LaneReport) {
        let dies = report.finished.iter().any(|delivery| delivery.error.is_some());
        let holds = matches!(report.next, Next::Hold { .. });
        let wants = self.plan.after_dead_letter == AfterDeadLetter::Hold;
        assert!(!dies || holds == wants, "a dead letter, and its key goes on: {report:?}");
    }

    /// Of some lanes nothing can be stored at this moment.
    fn settle(&mut self, reports: &[LaneReport]) -> Vec<Settled> {
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
    fn unless_busy(
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

    fn begins(&mut self, place: usize, id: u64) {
        let now = self.now;
        let Some(process) = &mut self.processes[place] else { return };
        let generation = process.generation;
        let Some(attempt) = process.attempts.iter_mut().find(|attempt| attempt.id == id) else { return };
        attempt.began_at = Some(now);
        if attempt.start.cancelled.is_cancelled() {
            self.schedule(now, generation, Event::Ends { place, id });
            return;
        }
        let key = attempt.start.lane.key.clone();
        attempt.start.running.begun().store(true, std::sync::atomic::Ordering::Release);
        let minds_time = !matches!(attempt.behaviour, Behaviour::Blocks(_));
        let lasts = if minds_time { attempt.lasts.min(attempt.start.time) } else { attempt.lasts };
        let under_way = process.attempts.iter().filter(|attempt| attempt.is_under_way());
        let of_key = under_way.clone().filter(|attempt| attempt.start.lane.key == key).count();
        assert!(of_key <= 1, "{key} has {of_key} attempts at once in one process");
        assert!(under_way.count() <= self.plan.options.concurrency, "too many attempts at once");
        self.schedule(now + lasts, generation, Event::Ends { place, id });
        self.act(place);
    }

    fn ends(&mut self, place: usize, id: u64) {
        let Some(process) = &mut self.processes[place] else { return };
        let Some(index) = process.attempts.iter().position(|attempt| attempt.id == id) else { return };
        let attempt = process.attempts.remove(index);
        let never_began = attempt.began_at.is_none();
        let cancelled = attempt.start.cancelled.is_cancelled() && !matches!(attempt.behaviour, Behaviour::Blocks(_));
        if attempt.behaviour == Behaviour::Kills && !never_began && !cancelled {
            self.kill(place);
            return;
        }
        let end = if never_began || cancelled { End::Cancelled } else { self.outcome(place, &attempt) };
        self.says(|| format!("attempt {} of {} ends: {end:?}", attempt.start.number, attempt.start.event.position));
        let at = self.moment();
        let Some(process) = &mut self.processes[place] else { return };
        let lane = &attempt.start.lane;
        let started = attempt.began_at.unwrap_or(self.now);
        process
            .core
            .ended(AttemptResult { key: lane.key.clone(), attempt: attempt.start.running.id(), end, started }, at);
        self.act(place);
    }

    /// What an attempt comes to that has run to its end.
    fn outcome(&mut self, place: usize, attempt: &Running) -> End {
        let retry = |error| End::Outcome(Outcome::Retry(error));
        let outside = self.plan.outside;
        if outside && self.down_until > self.now {
            return retry(DeliveryError::unreachable("the destination is down"));
        }
        match attempt.behaviour {
            Behaviour::Fails => retry(DeliveryError::retry("no")),
            Behaviour::Refused => End::Outcome(Outcome::Permanent(DeliveryError::permanent("never"))),
            Behaviour::Hangs(_) if outside => retry(DeliveryError::unavailable(no_result(attempt.start.time))),
            Behaviour::Hangs(_) => retry(DeliveryError::retry(no_result(attempt.start.time))),
            Behaviour::Unknown if place != 0 => End::Unknown,
            _ if attempt.start.event.event_type == "transactional" => self.commits(attempt),
            _ => {
                self.effect(attempt);
                End::Outcome(Outcome::Delivered)
            }
        }
    }

    fn effect(&mut self, attempt: &Running) {
        let key = &attempt.start.lane.key;
        let held_at =
            self.model.lanes(self.subscription).find(|(lane, _)| lane == key).and_then(|(_, lane)| lane.held_at);
        self.effects.happens(&attempt.start.event, held_at);
    }

    /// An effect and its acknowledgement, in one transaction.
    fn commits(&mut self, attempt: &Running) -> End {
        if self.away_until > self.now {
            return End::Unavailable(DeliveryError::retry("the database is away"));
        }
        let start = &attempt.start;
        let finished =
            Finished { position: start.event.position, attempts: start.number, log: start.log.clone(), error: None };
        let next = if start.last { Next::Yield } else { Next::Keep };
        let report = LaneReport { lane: start.lane.clone(), finished: vec![finished], next };
        self.unwritten = None;
        match self.model.settle(self.utc(), &[report])[..] {
            [Settled::Done] => {
                self.effect(attempt);
                // If the answer is lost, nobody knows.
                if self.chance(self.plan.lost) { End::Superseded } else { End::Settled }
            }
            _ => End::Superseded,
        }
    }
}

fn wanted<'a>(plan: &Plan, subscription: i32, worker: &'a str, lanes: usize) -> Wanted<'a> {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Wanted {
        subscription,
        worker,
        lanes: count(lanes),
        run: count(plan.options.batch),
        lease: plan.options.lease,
        all: true,
        route: false,
    }
}

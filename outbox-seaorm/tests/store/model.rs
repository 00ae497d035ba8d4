//! The same random histories on the database and on the model of a store: each answer, and after each step the whole
//! state, are the same. So what the simulation of workers finds out about the model is true of the database.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};
use fastrand::Rng;
use outbox_core::{
    AttemptLog, Context, Ordering, Subject, Subscription,
    store::{CircuitState, Holder, Store as Trait, Wanted},
    testing::Model,
};
use outbox_seaorm::{By, ClaimedLane, DeadLetterFilter, Finished, LaneRef, LaneReport, Next};
use sea_orm::DbBackend;

use super::{
    database,
    fixture::{LONG, Store, attempt_log, todo},
};

const STEPS: usize = 60;
const DAY: Duration = Duration::from_secs(24 * 3600);
const NAMES: [&str; 2] = ["ordered", "unordered"];
const TENANTS: [&str; 3] = ["a", "b", "c"];

/// A lane as the model and as the database have leased it: their tokens differ.
struct Leased {
    model: ClaimedLane,
    database: ClaimedLane,
}

struct Both {
    rng: Rng,
    store: Store,
    model: Model,
    /// The model's time.
    now: DateTime<Utc>,
    ids: [i32; 2],
    leased: Vec<Leased>,
}

/// What can be seen of a lane.
type Seen = (Vec<i64>, u32, Option<String>, Option<i64>, Option<String>, AttemptLog);

impl Both {
    async fn new(seed: u64) -> Self {
        let store = Store::new().await;
        let ids = [
            store.subscribe(NAMES[0]).await,
            store.register(Subscription::new(NAMES[1]).unwrap().ordering(Ordering::None)).await,
        ];
        let mut model = Model::new(seed as i64);
        ids.iter().zip(NAMES).for_each(|(id, name)| model.subscribe(*id, name));
        let now = DateTime::UNIX_EPOCH + TimeDelta::days(20_000);
        Self { rng: Rng::with_seed(seed), store, model, now, ids, leased: Vec::new() }
    }

    async fn step(&mut self) {
        self.now += TimeDelta::milliseconds(10);
        let index = self.rng.usize(..2);
        let (id, name) = (self.ids[index], NAMES[index]);
        match self.rng.u8(..20) {
            0..=3 => self.commit().await,
            4..=6 => self.claim(id).await,
            7 => self.relay(id).await,
            8..=11 => self.settle().await,
            12 => self.time_passes().await,
            13 => self.renew_or_note().await,
            14 => {
                let circuit = match self.rng.u8(..3) {
                    0 => CircuitState::Closed,
                    n => CircuitState::Open { wait: LONG, failed: n == 1 },
                };
                Trait::set_circuit(&self.store.outbox, id, circuit).await.unwrap();
                self.model.set_circuit(self.now, id, circuit);
            }
            15 => {
                let paused = self.rng.bool();
                if paused { self.store.outbox.pause(name).await } else { self.store.outbox.resume(name).await }
                    .unwrap();
                self.model.set_paused(id, paused);
            }
            16 => {
                let filter = DeadLetterFilter { subscription: Some(name.to_owned()), ..DeadLetterFilter::default() };
                self.store.outbox.discard_dead_letters(&filter, false, &By::new("test")).await.unwrap();
                self.model.discard_dead_letters(self.now, id);
            }
            17 => self.remove(index).await,
            _ => {
                let refs = |of: fn(&Leased) -> &ClaimedLane| self.leased.iter().map(|l| of(l).lane.clone()).collect();
                let (model, database): (Vec<LaneRef>, Vec<LaneRef>) = (refs(|l| &l.model), refs(|l| &l.database));
                let held = Trait::held(&self.store.outbox, &database).await.unwrap();
                assert_eq!(held, self.model.held(&model), "held");
            }
        }
    }

    async fn commit(&mut self) {
        let known: i64 = self.store.value("select coalesce(max(position), 0) from outbox_events").await;
        // The events of one tenant are those of the todo with its name, and some have none.
        let todo_of = *self.rng.choice(&["a", "b", "c", "d", "e"]).unwrap();
        let mut context = Context::default();
        context.tenant = TENANTS.contains(&todo_of).then(|| todo_of.to_owned());
        let events: Vec<_> = (0..self.rng.usize(1..4))
            .map(|_| if self.rng.u8(..6) == 0 { (todo(todo_of).delay(LONG), true) } else { (todo(todo_of), false) })
            .collect();
        let unit = self.store.outbox.begin(context.clone());
        events.iter().for_each(|(event, _)| unit.events().push(event.clone()).map(|_| ()).unwrap());
        unit.commit().await.unwrap();
        self.store.outbox.route_waiting().await.unwrap();
        let positions = format!("select position from outbox_events where position > {known} order by position");
        let positions: Vec<i64> = self.store.column(&positions).await;
        for (position, (event, late)) in positions.into_iter().zip(events) {
            let event = Arc::new(event.into_recorded(position, self.now, &context));
            let due_at = if late { self.now + LONG } else { self.now };
            let subject = Subject::of_recorded(&event);
            for (id, ordering) in self.ids.iter().zip([Ordering::Aggregate, Ordering::None]) {
                self.model.add(*id, &ordering.key(&subject), event.clone(), due_at);
            }
        }
    }

    fn wanted(subscription: i32, run: u32) -> Wanted {
        // All that are due: which of them a smaller claim takes depends on times that differ.
        Wanted { subscription, lanes: 100, run, all: true, ..Wanted::default() }
    }

    /// What a worker wants that has enough of some tenants: perhaps nothing of theirs.
    fn crowded(&mut self, subscription: i32) -> Wanted {
        let run = self.rng.u32(1..5);
        // Of many lanes of one tenant it would depend on times which comes first.
        if subscription == self.ids[1] || self.rng.bool() {
            return Self::wanted(subscription, run);
        }
        let passed = TENANTS.iter().filter(|_| self.rng.bool()).map(|tenant| (*tenant).to_owned()).collect();
        Wanted { lanes: self.rng.u32(..2) * 100, others: 100, passed, ..Self::wanted(subscription, run) }
    }

    /// A claim of one subscription, or of both.
    async fn claim(&mut self, id: i32) {
        let holder = Holder { worker: self.rng.choice(&["w1", "w2"]).unwrap(), lease: LONG };
        let ids = if self.rng.bool() { vec![id] } else { self.ids.to_vec() };
        let wanted: Vec<Wanted> = ids.into_iter().map(|id| self.crowded(id)).collect();
        let database = Trait::claim(&self.store.outbox, holder, &wanted).await.unwrap();
        assert_eq!(database.len(), wanted.len());
        for (wanted, database) in wanted.into_iter().zip(database) {
            let model = self.model.claim(self.now, holder, &wanted);
            assert_eq!(database.probe, model.probe, "probe");
            self.add(model.lanes, database.lanes);
        }
    }

    /// A relay's claim, of which some is taken over.
    async fn relay(&mut self, id: i32) {
        let wanted = Self::wanted(id, 2);
        let model = self.model.claim_for_relay(self.now, Holder { worker: "w1", lease: LONG }, &wanted).lanes;
        let database = self.store.outbox.claim_for_relay(id, "w1", 100, LONG).await.unwrap().lanes;
        let database: BTreeMap<&str, &ClaimedLane> =
            database.iter().map(|lane| (lane.lane.key.as_str(), lane)).collect();
        let keys: Vec<&str> = model.iter().map(|lane| lane.lane.key.as_str()).collect();
        assert_eq!(database.len(), keys.len(), "relayed");
        let taken = self.rng.usize(..=keys.len());
        let of_model: Vec<LaneRef> = model[..taken].iter().map(|lane| lane.lane.clone()).collect();
        let of_database: Vec<LaneRef> = keys[..taken].iter().map(|key| database[key].lane.clone()).collect();
        let holder = Holder { worker: "w2", lease: LONG };
        let model = self.model.take_over(self.now, holder, &wanted, &of_model);
        let database = Trait::take_over(&self.store.outbox, holder, wanted, &of_database).await.unwrap();
        assert_eq!(database.busy.len(), model.busy.len());
        self.add(model.lanes, database.lanes);
    }

    fn add(&mut self, model: Vec<ClaimedLane>, database: Vec<ClaimedLane>) {
        let mut by_key: BTreeMap<String, ClaimedLane> =
            database.into_iter().map(|lane| (lane.lane.key.clone(), lane)).collect();
        for model in model {
            let database = by_key.remove(&model.lane.key).unwrap_or_else(|| panic!("not claimed: {model:?}"));
            let seen = |lane: &ClaimedLane| {
                let run: Vec<i64> = lane.run.iter().map(|event| event.position).collect();
                (lane.attempts, lane.attempt_log.clone(), run, lane.lane.worker.clone())
            };
            assert_eq!(seen(&database), seen(&model), "{}", model.lane.key);
            self.leased.push(Leased { model, database });
        }
        assert!(by_key.is_empty(), "claimed too much: {by_key:?}");
    }

    /// Reports of some leases, also of those that are lost; none has a delivery twice.
    async fn settle(&mut self) {
        let (mut of_model, mut of_database) = (Vec::new(), Vec::new());
        for _ in 0..self.rng.usize(1..4) {
            if self.leased.is_empty() {
                break;
            }
            let index = self.rng.usize(..self.leased.len());
            let lane = &self.leased[index];
            let finished = finished(&mut self.rng, &lane.model);
            let next = next(&mut self.rng, &lane.model, &finished);
            let report = |lane: &ClaimedLane| LaneReport {
                lane: lane.lane.clone(),
                finished: finished.clone(),
                next: next.clone(),
            };
            of_model.push(report(&lane.model));
            of_database.push(report(&lane.database));
            let lane = &mut self.leased[index];
            lane.model.run.drain(..finished.len());
            lane.database.run.drain(..finished.len());
            if !matches!(next, Next::Keep) && self.rng.u8(..4) > 0 {
                self.leased.swap_remove(index);
            }
        }
        // Sometimes the answer is lost, and the same is given again.
        for _ in 0..if self.rng.u8(..4) == 0 { 2 } else { 1 } {
            let settled = Trait::settle(&self.store.outbox, &of_database).await.unwrap();
            assert_eq!(settled, self.model.settle(self.now, &of_model), "settled");
        }
    }

    async fn renew_or_note(&mut self) {
        let some: Vec<&Leased> = self.leased.iter().filter(|_| self.rng.bool()).collect();
        let model: Vec<LaneRef> = some.iter().map(|lane| lane.model.lane.clone()).collect();
        let database: Vec<LaneRef> = some.iter().map(|lane| lane.database.lane.clone()).collect();
        if self.rng.bool() {
            let states = Trait::renew(&self.store.outbox, &database, LONG).await.unwrap();
            assert_eq!(states, self.model.renew(self.now, &model, LONG), "renewed");
        } else {
            let note = |lanes: Vec<LaneRef>| -> Vec<_> {
                lanes.into_iter().map(|lane| (lane, attempt_log("tried alone"))).collect()
            };
            let states = Trait::note(&self.store.outbox, &note(database)).await.unwrap();
            assert_eq!(states, self.model.note(&note(model)), "noted");
        }
    }

    /// What waits is due, leases and circuits are over: all times lie a day back.
    async fn time_passes(&mut self) {
        self.now += DAY;
        let back = |column: &str| format!("{column} = {}", database::before(column, &DAY.as_secs().to_string()));
        for sql in [
            format!("update outbox_lanes set {} where held_at is null", back("due_at")),
            format!("update outbox_deliveries set {}", back("due_at")),
            format!("update outbox_subscriptions set {} where circuit_until is not null", back("circuit_until")),
        ] {
            self.store.execute(&sql).await;
        }
    }

    async fn remove(&mut self, index: usize) {
        if self.rng.u8(..3) > 0 {
            return;
        }
        assert!(self.store.outbox.remove(NAMES[index]).await.unwrap());
        self.model.remove(self.ids[index]);
        let ordering = [Ordering::Aggregate, Ordering::None][index].clone();
        let id = self.store.register(Subscription::new(NAMES[index]).unwrap().ordering(ordering)).await;
        self.ids[index] = id;
        self.model.subscribe(id, NAMES[index]);
    }

    /// Both look the same.
    async fn compare(&self) {
        for id in self.ids {
            let model: BTreeMap<String, Seen> = self
                .model
                .lanes(id)
                .map(|(key, lane)| {
                    let seen = (lane.queue, lane.attempts, lane.leased_by, lane.held_at, lane.last_error, lane.log);
                    (key.to_owned(), seen)
                })
                .collect();
            assert_eq!(self.lanes(id).await, model, "lanes of {id}");
            let over = "select position from outbox_delivered where subscription_id = ";
            let dead = "select position from outbox_dead_letters where subscription_id = ";
            let positions = |dead: bool| -> Vec<i64> {
                let finished = self.model.finished(id).filter(|(_, each)| each.error.is_some() == dead);
                finished.map(|(position, _)| position).collect()
            };
            assert_eq!(
                self.store.column::<i64>(&format!("{over} {id} order by 1")).await,
                positions(false),
                "delivered"
            );
            assert_eq!(self.store.column::<i64>(&format!("{dead} {id} order by 1")).await, positions(true), "dead");
            let due = |next: Option<outbox_seaorm::NextDue>| {
                next.map(|next| (next.after.map(|after| after > LONG / 2), next.circuit))
            };
            let next = self.store.outbox.next_due(id).await.unwrap();
            assert_eq!(due(next), due(self.model.next_due(self.now, id)), "next due");
        }
    }

    async fn lanes(&self, id: i32) -> BTreeMap<String, Seen> {
        let log = database::json("attempt_log");
        let columns = format!("key, attempts, leased_by, held_at, last_error, {log}");
        let mut lanes = BTreeMap::new();
        for row in self.store.arrays(&columns, &format!("from outbox_lanes where subscription_id = {id}")).await {
            let key = row[0].as_str().unwrap().to_owned();
            let queue = format!(
                "select position from outbox_deliveries where subscription_id = {id} and key = '{key}' order by seq"
            );
            let text = |index: usize| row[index].as_str().map(str::to_owned);
            let log = AttemptLog::parse(&row[5].to_string());
            let attempts = u32::try_from(row[1].as_i64().unwrap()).unwrap();
            lanes.insert(key, (self.store.column(&queue).await, attempts, text(2), row[3].as_i64(), text(4), log));
        }
        lanes
    }
}

/// The first deliveries of a run are over; the last of them is perhaps a dead letter.
fn finished(rng: &mut Rng, lane: &ClaimedLane) -> Vec<Finished> {
    let over = rng.usize(..=lane.run.len());
    let dies = rng.u8(..4) == 0;
    let finished = lane.run[..over].iter().enumerate().map(|(index, event)| {
        let error = (dies && index + 1 == over).then(|| "no".to_owned());
        let log = if error.is_some() { attempt_log("no") } else { AttemptLog::default() };
        Finished { position: event.position, attempts: if index == 0 { lane.attempts } else { 1 }, log, error }
    });
    finished.collect()
}

fn next(rng: &mut Rng, lane: &ClaimedLane, finished: &[Finished]) -> Next {
    let attempts = if finished.is_empty() { lane.attempts } else { 1 };
    let dead = finished.last().filter(|last| last.error.is_some());
    match rng.u8(..5) {
        0 => Next::Keep,
        1 if finished.len() < lane.run.len() => {
            let after = if rng.bool() { LONG } else { Duration::ZERO };
            Next::Retry { after, attempts, error: "down".to_owned(), log: attempt_log("down") }
        }
        2 => Next::Release { attempts: attempts - 1, log: AttemptLog::default() },
        3 if dead.is_some() => Next::Hold { position: dead.map_or(0, |dead| dead.position) },
        _ => Next::Yield,
    }
}

/// Says how to repeat a history that fails.
struct Repeat(u64, usize);

impl Drop for Repeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "step {}; repeat: OUTBOX_SEED={} cargo test -p outbox-seaorm --test store model::",
                self.1, self.0
            );
        }
    }
}

#[tokio::test]
async fn the_database_and_the_model_of_a_store_are_the_same() {
    let seed = std::env::var("OUTBOX_SEED").ok().and_then(|seed| seed.parse().ok());
    let is_long = std::env::var_os("OUTBOX_LONG_TESTS").is_some_and(|value| value == "1");
    // SQLite is quick.
    let usual = if database::BACKEND == DbBackend::Sqlite { 20 } else { 3 };
    let seeds = seed.map_or(0..if is_long { 100 * usual } else { usual }, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let mut both = Both::new(seed).await;
        let mut repeat = Repeat(seed, 0);
        for step in 0..STEPS {
            repeat.1 = step;
            both.step().await;
            both.compare().await;
        }
    }
}

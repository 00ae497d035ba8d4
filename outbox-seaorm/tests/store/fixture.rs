use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use outbox_core::{
    AttemptLog, Context, LoggedAttempt, NewEvent, Subscription,
    store::{Claim, Holder, Wanted},
};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{ClaimedLane, Finished, LaneReport, Next, Outbox, Settled};
use sea_orm::{ConnectionTrait, DatabaseConnection, QueryResult, Statement, TryGetable};
use serde_json::{Value, json};

pub(crate) use super::database::SLOW;
use super::database::{self, Place};

/// A lease that ends in no test.
pub(crate) const LONG: Duration = Duration::from_secs(600);

/// A lease that a test waits for.
pub(crate) const SHORT: Duration = Duration::from_millis(30);

pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

/// Creates the tables of the outbox and the table `notes` of an application beside them.
pub(crate) async fn migrate(outbox: &Outbox) {
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    outbox.writer().execute_unprepared("create table notes (text text primary key)").await.unwrap();
}

/// An outbox on a database of its own.
pub(crate) struct Store {
    pub(crate) outbox: Outbox,
    witness: DatabaseConnection,
    pub(crate) place: Place,
}

impl Store {
    pub(crate) async fn new() -> Self {
        let place = Place::migrated().await;
        let outbox = place.connect(2).await;
        let witness = place.witness(&outbox).await;
        Self { outbox, witness, place }
    }

    /// An outbox with connections and a copy of the subscriptions of its own: what another process has.
    pub(crate) async fn another_process(&self) -> Outbox {
        self.place.connect(1).await
    }

    /// Registers a subscription to all events.
    pub(crate) async fn subscribe(&self, name: &str) -> i32 {
        self.register(Subscription::new(name).unwrap()).await
    }

    pub(crate) async fn register(&self, subscription: Subscription) -> i32 {
        self.outbox.register(&subscription).await.unwrap()
    }

    /// Commits events in one unit of work, and routes them.
    pub(crate) async fn record(&self, events: impl IntoIterator<Item = NewEvent>) {
        record(&self.outbox, events).await;
    }

    /// Commits one event for each of these aggregates, in one unit of work.
    pub(crate) async fn record_todos(&self, ids: &[&str]) {
        self.record(ids.iter().map(|id| todo(id))).await;
    }

    pub(crate) async fn claim(&self, subscription: i32) -> Vec<ClaimedLane> {
        self.claim_for(subscription, LONG).await
    }

    pub(crate) async fn claim_for(&self, subscription: i32, lease: Duration) -> Vec<ClaimedLane> {
        self.outbox.route_waiting().await.unwrap();
        self.outbox.claim(subscription, "worker", 100, 100, lease).await.unwrap().lanes
    }

    /// How long until something can be claimed.
    pub(crate) async fn next_due(&self, subscription: i32) -> Option<Duration> {
        self.outbox.next_due(subscription).await.unwrap().and_then(|next| next.after)
    }

    /// Claims the only lane that is due.
    /// From where the last claim has ended.
    pub(crate) async fn claim_on(&self, subscription: i32, lanes: u32) -> Claim {
        let wanted = Wanted { subscription, lanes, run: 1, ..Wanted::default() };
        self.outbox.claim_of(Holder { worker: "worker", lease: LONG }, &[wanted]).await.unwrap().remove(0)
    }

    pub(crate) async fn claim_one(&self, subscription: i32, lease: Duration) -> ClaimedLane {
        let mut lanes = self.claim_for(subscription, lease).await;
        assert_eq!(lanes.len(), 1, "{lanes:?}");
        lanes.remove(0)
    }

    /// The time has come for all that waits: delayed deliveries, failed ones, leases.
    pub(crate) async fn time_passes(&self) {
        let long_ago = database::time("'2000-01-01T00:00:00.000Z'");
        for table in ["outbox_deliveries", "outbox_lanes"] {
            self.execute(&format!("update {table} set due_at = {long_ago} where due_at > {}", database::NOW)).await;
        }
    }

    /// Claims again and again until something is due.
    pub(crate) async fn claim_when_due(&self, subscription: i32) -> Vec<ClaimedLane> {
        eventually("a lane that is due", async || {
            Some(self.claim(subscription).await).filter(|lanes| !lanes.is_empty())
        })
        .await
    }

    /// Claims and delivers until nothing is due, and returns the positions in the order of their delivery.
    pub(crate) async fn deliver_all(&self, subscription: i32) -> Vec<i64> {
        let mut delivered = Vec::new();
        loop {
            let lanes = self.claim(subscription).await;
            if lanes.is_empty() {
                return delivered;
            }
            for lane in lanes {
                delivered.extend(lane.run.iter().map(|event| event.position));
                // A commit that holds the lane at this moment is over soon.
                while self.outbox.settle(&[delivered_run(&lane)]).await.unwrap() == [Settled::Busy] {}
            }
        }
    }

    /// Connections for what a test does to the tables itself.
    pub(crate) fn hand(&self) -> &DatabaseConnection {
        Place::hand(&self.outbox, &self.witness)
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.hand().execute_unprepared(sql).await.unwrap();
    }

    /// Rows as other connections see them.
    pub(crate) async fn rows(&self, sql: &str) -> Vec<QueryResult> {
        self.witness.query_all_raw(Statement::from_string(database::BACKEND, sql)).await.unwrap()
    }

    /// These columns of all rows, each row as a JSON array. What is after them comes as it stands.
    pub(crate) async fn arrays(&self, columns: &str, from: &str) -> Vec<Value> {
        let rows = self.column::<String>(&format!("select {} {from}", database::array(columns))).await;
        rows.iter().map(|row| serde_json::from_str(row).unwrap()).collect()
    }

    /// Waits until no transaction is open.
    pub(crate) async fn quiet(&self) {
        database::quiet(&self.witness).await;
    }

    /// The first column of all rows.
    pub(crate) async fn column<T: TryGetable>(&self, sql: &str) -> Vec<T> {
        self.rows(sql).await.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
    }

    pub(crate) async fn value<T: TryGetable>(&self, sql: &str) -> T {
        let mut values = self.column(sql).await;
        assert_eq!(values.len(), 1, "{sql}");
        values.remove(0)
    }

    pub(crate) async fn count(&self, table: &str) -> i64 {
        self.value(&format!("select count(*) from {table}")).await
    }

    /// Nothing that was begun is stored.
    pub(crate) async fn is_empty(&self) {
        self.quiet().await;
        assert_eq!(self.count("notes").await, 0);
        assert_eq!(self.count("outbox_events").await, 0);
        assert_eq!(self.count("outbox_deliveries").await, 0);
        self.is_whole().await;
    }

    /// What holds at the end of every test: each lane counts its deliveries, each delivery has its lane and its event,
    /// nothing is both finished and unfinished, and the writer's connection is in no transaction.
    pub(crate) async fn is_whole(&self) {
        self.quiet().await;
        for (rule, violations) in [
            (
                "a lane's pending is the number of its deliveries",
                "select key from outbox_lanes l
                  where pending <= 0
                     or pending <> (select count(*) from outbox_deliveries d
                                     where d.subscription_id = l.subscription_id and d.key = l.key)",
            ),
            (
                "every delivery has its lane",
                "select d.key from outbox_deliveries d
                  where not exists (select 1 from outbox_lanes l
                         where l.subscription_id = d.subscription_id and l.key = d.key)",
            ),
            (
                "every delivery has its event",
                "select position from outbox_deliveries where position not in (select position from outbox_events)",
            ),
            (
                "a delivery has one key and is in one state",
                "select subscription_id, position from (
                        select subscription_id, position from outbox_deliveries
                        union all select subscription_id, position from outbox_delivered
                        union all select subscription_id, position from outbox_dead_letters) found
                  group by 1, 2 having count(*) > 1",
            ),
            (
                "a lane that nobody has tried is due with its head",
                &format!(
                    "select l.key from outbox_lanes l
                       join outbox_deliveries d on d.subscription_id = l.subscription_id and d.key = l.key
                        and d.seq = (select min(seq) from outbox_deliveries h
                                      where h.subscription_id = l.subscription_id and h.key = l.key)
                      where l.attempts = 0 and l.last_error is null
                        and l.due_at not between {} and d.due_at",
                    database::before("d.due_at", database::FLUSH_SECONDS)
                ),
            ),
        ] {
            assert_eq!(self.rows(violations).await.len(), 0, "{rule}");
        }
        let name = format!("canary {}", self.count("notes").await);
        self.execute(&format!("insert into notes values ('{name}')")).await;
        assert_eq!(self.count(&format!("notes where text = '{name}'")).await, 1, "the writer is in a transaction");
        self.execute(&format!("delete from notes where text = '{name}'")).await;
    }
}

pub(crate) async fn record(outbox: &Outbox, events: impl IntoIterator<Item = NewEvent>) {
    let unit = outbox.begin(Context::default());
    for event in events {
        unit.events().push(event).unwrap();
    }
    unit.commit().await.unwrap();
    outbox.route_waiting().await.unwrap();
}

/// The event of a todo, `todo/{id}`.
pub(crate) fn todo(id: &str) -> NewEvent {
    of_type("todo.created", id)
}

pub(crate) fn of_type(event_type: &str, id: &str) -> NewEvent {
    NewEvent::dynamic(event_type, "todo", id, &json!({"id": id})).unwrap()
}

/// Whether that is what is left of a long wait. A difference of times is not exact to the microsecond.
pub(crate) fn is_about(left: Duration, wait: Duration) -> bool {
    (wait / 2..wait + Duration::from_millis(1)).contains(&left)
}

/// Keys with the positions of their runs.
pub(crate) fn runs(lanes: &[ClaimedLane]) -> Vec<(&str, Vec<i64>)> {
    lanes.iter().map(|lane| (lane.lane.key.as_str(), lane.run.iter().map(|event| event.position).collect())).collect()
}

/// The report of a worker that has delivered the whole run at its first attempt.
pub(crate) fn delivered_run(lane: &ClaimedLane) -> LaneReport {
    delivered(lane, lane.run.len(), Next::Yield)
}

/// The report of a worker that has delivered the first `n` of a run.
pub(crate) fn delivered(lane: &ClaimedLane, n: usize, next: Next) -> LaneReport {
    let attempts = |index| if index == 0 { lane.attempts } else { 1 };
    let finished = lane.run[..n].iter().enumerate();
    let finished = finished
        .map(|(index, event)| Finished {
            position: event.position,
            attempts: attempts(index),
            log: AttemptLog::default(),
            error: None,
        })
        .collect();
    LaneReport { lane: lane.lane.clone(), finished, next }
}

/// The log of a delivery that has failed once.
pub(crate) fn attempt_log(error: &str) -> AttemptLog {
    let mut log = AttemptLog::default();
    log.push(LoggedAttempt { attempt: 1, counted: 1, error: error.to_owned(), ..LoggedAttempt::default() });
    log
}

/// The report of a worker whose first delivery has failed.
pub(crate) fn failed(lane: &ClaimedLane, after: Duration, error: &str) -> LaneReport {
    let next = Next::Retry { after, attempts: lane.attempts, error: error.to_owned(), log: attempt_log(error) };
    LaneReport { lane: lane.lane.clone(), finished: Vec::new(), next }
}

pub(crate) async fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(pin!(&mut *future).poll(cx))).await
}

/// Polls a future up to `polls` times, each time when it has something to do, then drops it: a client that hangs up.
/// One that waits too long is hung up on as well.
pub(crate) async fn hang_up_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let (mut future, mut polled) = (pin!(future), 0);
    let polled = poll_fn(|cx| {
        if polled == polls {
            return Poll::Ready(None);
        }
        polled += 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if polled == polls => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    });
    tokio::time::timeout(Duration::from_millis(20), polled).await.ok().flatten()
}

/// Asks again and again until there is an answer.
pub(crate) async fn eventually<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what} did not come in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

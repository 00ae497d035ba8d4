use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use outbox_apalis::{Handlers, Worker};
use outbox_core::{Context, Delivery, DeliveryError, Event, NewEvent, RetryPolicy, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{DeliveryRecord, DeliveryState, Outbox};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, QueryResult, Statement, TryGetable,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::{
    sync::{Semaphore, oneshot},
    task::JoinHandle,
};

pub(crate) const MS: Duration = Duration::from_millis(1);

/// How long a busy machine may take for what a quiet one does at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A poll that no test waits for.
pub(crate) const NEVER: Duration = Duration::from_secs(3600);

pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

/// Event number `n` of the aggregate `note` `key`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Noted {
    pub(crate) key: String,
    pub(crate) n: i64,
}

impl Event for Noted {
    const TYPE: &'static str = "note.noted";
    const AGGREGATE_TYPE: &'static str = "note";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

/// Another event of the same aggregate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Counted {
    pub(crate) key: String,
    pub(crate) n: i64,
}

impl Event for Counted {
    const TYPE: &'static str = "note.counted";
    const AGGREGATE_TYPE: &'static str = "note";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

pub(crate) fn noted(key: &str, n: i64) -> NewEvent {
    NewEvent::of(&Noted { key: key.to_owned(), n }).unwrap()
}

pub(crate) fn counted(key: &str, n: i64) -> NewEvent {
    NewEvent::of(&Counted { key: key.to_owned(), n }).unwrap()
}

/// Events 0 to `n` of each of these aggregates, the aggregates in turn.
pub(crate) fn each_noted(keys: &[&str], n: i64) -> Vec<NewEvent> {
    (0..n).flat_map(|n| keys.iter().map(move |key| noted(key, n))).collect()
}

/// A subscription to all events with short waits between attempts.
pub(crate) fn subscription(name: &str) -> Subscription {
    Subscription::new(name).unwrap().retry(policy(5))
}

/// Waits of 5 to 10 ms between attempts.
pub(crate) fn policy(attempts: u32) -> RetryPolicy {
    RetryPolicy::default().max_attempts(attempts).unwrap().backoff(10 * MS, 10 * MS).unwrap()
}

/// A worker with short times on this outbox.
pub(crate) fn worker(outbox: &Outbox) -> Worker {
    Worker::new(outbox.clone()).lease(1000 * MS).unwrap().poll(20 * MS).unwrap().shutdown_grace(1000 * MS)
}

/// An outbox on a file of its own, with the tables of an application beside it.
pub(crate) struct Fixture {
    pub(crate) outbox: Outbox,
    directory: TempDir,
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let outbox = Outbox::connect(&url(&directory), 2).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        let fixture = Self { outbox, directory };
        fixture.execute("create table effects (key text, n integer, attempt integer)").await;
        fixture
    }

    pub(crate) fn url(&self) -> String {
        url(&self.directory)
    }

    /// An outbox with connections of its own: what another process has.
    pub(crate) async fn another_process(&self) -> Outbox {
        Outbox::connect(&self.url(), 2).await.unwrap()
    }

    /// A connection that waits only for a moment for SQLite's lock.
    pub(crate) async fn impatient_connection(&self) -> DatabaseConnection {
        let mut options = ConnectOptions::new(self.url());
        options.max_connections(1).sqlx_logging(false);
        options.map_sqlx_sqlite_opts(|options| options.busy_timeout(100 * MS));
        Database::connect(options).await.unwrap()
    }

    /// An outbox whose reads are a while old when they are answered.
    pub(crate) async fn slowly_reading_outbox(&self) -> Outbox {
        let (writer, mut reader) = (self.impatient_connection().await, self.impatient_connection().await);
        reader.set_metric_callback(|_| std::thread::sleep(10 * MS));
        Outbox::with_connections(writer, reader)
    }

    pub(crate) fn worker(&self) -> Worker {
        worker(&self.outbox)
    }

    /// Commits events in one transaction.
    pub(crate) async fn push(&self, events: impl IntoIterator<Item = NewEvent>) {
        push(&self.outbox, events).await;
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.outbox.writer().execute_unprepared(sql).await.unwrap();
    }

    pub(crate) async fn rows(&self, sql: &str) -> Vec<QueryResult> {
        let statement = Statement::from_string(DbBackend::Sqlite, sql);
        self.outbox.reader().query_all_raw(statement).await.unwrap()
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

    /// The deliveries of a subscription, oldest event first.
    pub(crate) async fn deliveries(&self, subscription: &str) -> Vec<DeliveryRecord> {
        let mut records = self.outbox.deliveries(Some(subscription), None, 0, 10_000).await.unwrap();
        records.reverse();
        records
    }

    /// States and attempts of all deliveries of a subscription, oldest event first.
    pub(crate) async fn states(&self, subscription: &str) -> Vec<(DeliveryState, u32)> {
        self.deliveries(subscription).await.iter().map(|record| (record.state, record.attempts)).collect()
    }

    /// Waits until that many deliveries are in the history.
    pub(crate) async fn delivered(&self, deliveries: i64) {
        eventually("the deliveries", || async { self.count("outbox_delivered").await >= deliveries }).await;
    }

    /// Waits until that many deliveries are dead letters.
    pub(crate) async fn dead(&self, deliveries: i64) {
        eventually("the dead letters", || async { self.count("outbox_dead_letters").await >= deliveries }).await;
    }

    /// What holds when no worker runs: nothing is leased, each lane counts its deliveries, and no delivery is in two
    /// states.
    pub(crate) async fn is_at_rest(&self) {
        for (rule, violations) in [
            ("nothing is leased", "select key from outbox_lanes where leased_by is not null"),
            (
                "a lane counts its deliveries",
                "select l.key from outbox_lanes l
                  where pending <> (select count(*) from outbox_deliveries d
                                     where d.subscription_id = l.subscription_id and d.key = l.key)",
            ),
            (
                "every delivery has its lane",
                "select d.key from outbox_deliveries d
                  where not exists (select 1 from outbox_lanes l
                                     where l.subscription_id = d.subscription_id and l.key = d.key)",
            ),
            (
                "a delivery is in one state",
                "select subscription_id, position from (
                        select subscription_id, position from outbox_deliveries
                        union all select subscription_id, position from outbox_delivered
                        union all select subscription_id, position from outbox_dead_letters)
                  group by 1, 2 having count(*) > 1",
            ),
        ] {
            let violations: Vec<String> = self.column(violations).await;
            assert_eq!(violations, Vec::<String>::new(), "{rule}");
        }
    }
}

fn url(directory: &TempDir) -> String {
    format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display())
}

pub(crate) async fn push(outbox: &Outbox, events: impl IntoIterator<Item = NewEvent>) {
    outbox
        .transaction(Context::default(), |_, collector| async move {
            for event in events {
                collector.push(event)?;
            }
            Ok::<_, outbox_core::PushError>(())
        })
        .await
        .unwrap();
}

/// A worker in a task of its own. It stops when this is dropped.
pub(crate) struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Registers the subscriptions of a worker, then lets it run.
pub(crate) async fn run(worker: Worker) -> Running {
    let started = worker.start().await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(started.run_until(async {
        let _ = stopped.await;
    }));
    Running { stop, task }
}

impl Running {
    /// Asks the worker to stop, and returns how long it took.
    pub(crate) async fn stop(self) -> Duration {
        let asked = Instant::now();
        let _ = self.stop.send(());
        tokio::time::timeout(PATIENCE, self.task).await.expect("the worker stops").unwrap();
        asked.elapsed()
    }

    /// Drops the worker's future.
    pub(crate) async fn drop_future(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

/// What handlers were called with, in the order of the calls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen(Arc<Mutex<Vec<Call>>>);

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) key: String,
    pub(crate) n: i64,
    pub(crate) attempt: u32,
    pub(crate) at: Instant,
}

impl Seen {
    pub(crate) fn add(&self, event: &Noted, delivery: &Delivery) {
        let call = Call { key: event.key.clone(), n: event.n, attempt: delivery.attempt(), at: Instant::now() };
        self.0.lock().unwrap().push(call);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// The numbers of the events of one aggregate.
    pub(crate) fn of(&self, key: &str) -> Vec<i64> {
        self.calls().iter().filter(|call| call.key == key).map(|call| call.n).collect()
    }

    /// A handler that does nothing else.
    pub(crate) fn handlers(&self) -> Handlers {
        let seen = self.clone();
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            async { Ok(()) }
        })
    }

    /// A handler that answers as `answer` says.
    pub(crate) fn answering<F>(&self, answer: F) -> Handlers
    where
        F: Fn(&Noted, u32) -> Result<(), DeliveryError> + Send + Sync + 'static,
    {
        let seen = self.clone();
        Handlers::new().on(move |event: Noted, delivery| {
            seen.add(&event, &delivery);
            std::future::ready(answer(&event, delivery.attempt()))
        })
    }
}

/// A handler that works for a while.
pub(crate) fn working(seen: &Seen, time: Duration) -> Handlers {
    let seen = seen.clone();
    Handlers::new().on(move |event: Noted, delivery| {
        seen.add(&event, &delivery);
        async move {
            tokio::time::sleep(time).await;
            Ok(())
        }
    })
}

/// A handler that works until the gate opens for it.
pub(crate) fn gated(seen: &Seen, gate: &Arc<Semaphore>) -> Handlers {
    let (seen, gate) = (seen.clone(), gate.clone());
    Handlers::new().on(move |event: Noted, delivery| {
        seen.add(&event, &delivery);
        let gate = gate.clone();
        async move {
            gate.acquire().await?.forget();
            Ok(())
        }
    })
}

/// A handler that never ends.
pub(crate) fn hanging(seen: &Seen) -> Handlers {
    working(seen, NEVER)
}

/// Waits until a condition holds.
pub(crate) async fn eventually<Fut: Future<Output = bool>>(what: &str, condition: impl FnMut() -> Fut) {
    within(PATIENCE, what, condition).await;
}

/// Waits until a condition holds, but not longer than `time`.
pub(crate) async fn within<Fut: Future<Output = bool>>(time: Duration, what: &str, mut condition: impl FnMut() -> Fut) {
    let deadline = Instant::now() + time;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: not within {time:?}");
        tokio::time::sleep(3 * MS).await;
    }
}

use std::{future::Future, sync::Arc, time::Duration};

use outbox_core::{
    Publisher, Subscription,
    store::{Store, StoreError},
};
use outbox_seaorm::{Outbox, RegisterError, Retention, SchemaError};

use crate::{
    Deliveries, Handlers, InvalidOption,
    assignment::Until,
    destination::{Destination, PublisherDestination},
    handlers::HandlersDestination,
    options::Options,
    redis::Redis,
};

mod start;
mod started;
mod upkeep;

pub use started::StartedWorker;

/// The longest lease, poll interval and grace.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Delivers the events of an outbox: one apalis worker for each subscription, in this process.
///
/// Start any number of processes with the same subscriptions: they share the work. A process that dies is replaced
/// when its leases end.
pub struct Worker {
    place: Place,
    options: Options,
    subscriptions: Vec<(Subscription, Arc<dyn Destination>)>,
    redis: Option<Redis>,
    retention: Retention,
}

/// Where deliveries are stored.
enum Place {
    Database(Outbox),
    /// Another store: only deliveries are its affair.
    Other(Arc<dyn Store>),
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.subscriptions.iter().map(|(subscription, _)| subscription.name()).collect();
        f.debug_struct("Worker").field("options", &self.options).field("subscriptions", &names).finish()
    }
}

/// Why a worker did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The tables do not fit.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// A subscription could not be stored.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Two subscriptions of this worker have the same name.
    #[error("the subscription {0:?} was added twice; one name is one subscription")]
    Twice(String),
    /// There is nothing to do.
    #[error("the worker has no subscriptions; add one with `.handlers(…)` or `.publisher(…)`")]
    Empty,
    /// The system has no thread left.
    #[error("the worker's thread could not be started")]
    Thread(#[from] std::io::Error),
    /// The database did not answer.
    #[error("the database did not answer")]
    Database(#[from] sea_orm::DbErr),
    /// The store did not take a subscription.
    #[error("the store did not take a subscription")]
    Store(#[from] StoreError),
    /// Something needs a database, and the worker has another store.
    #[error("{0} needs a database; build the worker with `Worker::new`")]
    NeedsDatabase(&'static str),
    /// The connection to Redis could not be set up; a server that is away is no error.
    #[error("the connection to Redis could not be set up")]
    Redis(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Worker {
    /// Starts without subscriptions.
    #[must_use]
    pub fn new(outbox: Outbox) -> Self {
        Self::at(Place::Database(outbox))
    }

    /// Delivers from a store that is no database: for tests, with
    /// [`MemoryStore`](../outbox_core/testing/struct.MemoryStore.html).
    ///
    /// ```no_run
    /// use outbox_apalis::{Handlers, Worker};
    /// # use outbox_core::{Delivery, DeliveryError, Event, Subscription, store::Store};
    /// # async fn example<E: Event>(store: impl Store) -> Result<(), Box<dyn std::error::Error>> {
    /// let handlers = Handlers::new().on(|event: E, delivery: Delivery| async move { Ok(()) });
    /// let done = Worker::with_store(store).handlers(Subscription::new("mails")?, handlers).drain().await?;
    /// assert_eq!(done.dead, 0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Transactional handlers and Redis need a database: with them it does not start.
    #[must_use]
    pub fn with_store(store: impl Store) -> Self {
        Self::at(Place::Other(Arc::new(store)))
    }

    fn at(place: Place) -> Self {
        Self {
            place,
            options: Options::DEFAULT,
            subscriptions: Vec::new(),
            redis: None,
            retention: Retention::default(),
        }
    }

    /// Adds a subscription whose events go to typed functions in this process.
    #[must_use]
    pub fn handlers(mut self, subscription: Subscription, handlers: Handlers) -> Self {
        let outbox = match &self.place {
            Place::Database(outbox) => Some(outbox.clone()),
            Place::Other(_) => None,
        };
        self.subscriptions.push((subscription, Arc::new(HandlersDestination { outbox, handlers })));
        self
    }

    /// Adds a subscription whose events go to a destination outside. Without a [policy](Subscription::retry) of its own it
    /// has that of the publisher.
    #[must_use]
    pub fn publisher(mut self, subscription: Subscription, publisher: impl Publisher) -> Self {
        let subscription = match subscription.retry_policy() {
            Some(_) => subscription,
            None => subscription.retry(publisher.retry_policy()),
        };
        self.subscriptions.push((subscription, Arc::new(PublisherDestination(publisher))));
        self
    }

    /// Sets how long a claimed delivery stays with this process before another may take it. Renewed while the process
    /// lives, so it only decides how long the deliveries of a process that was killed wait. Defaults to 30 s.
    ///
    /// # Errors
    ///
    /// If it is shorter than 100 ms or longer than a day.
    pub fn lease(mut self, lease: Duration) -> Result<Self, InvalidOption> {
        if !(Duration::from_millis(100)..=LONGEST).contains(&lease) {
            return Err(InvalidOption("a lease must be at least 100 ms and at most a day"));
        }
        self.options.lease = lease;
        Ok(self)
    }

    /// Sets how long one attempt may take; then it is cancelled and counts as failed. Defaults to the lease.
    /// Transactional handlers have [less on SQLite](Handlers::on_tx).
    ///
    /// # Errors
    ///
    /// If it is zero.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, InvalidOption> {
        if timeout.is_zero() {
            return Err(InvalidOption("an attempt needs more time than zero"));
        }
        self.options.timeout = Some(timeout);
        Ok(self)
    }

    /// Sets the longest wait between two looks at the database. Defaults to 5 s, and to 500 ms on SQLite, where a look
    /// is a read of a local file.
    ///
    /// Events of this process, retries and delays do not wait for it; events of other processes do. After activity the
    /// looks are eight times as frequent and become rarer again.
    ///
    /// # Errors
    ///
    /// If it is shorter than 10 ms or longer than a day.
    pub fn poll(mut self, poll: Duration) -> Result<Self, InvalidOption> {
        if !(Duration::from_millis(10)..=LONGEST).contains(&poll) {
            return Err(InvalidOption("the poll interval must be at least 10 ms and at most a day"));
        }
        self.options.poll = Some(poll);
        Ok(self)
    }

    /// Sets how many deliveries each subscription has under way in this process. Defaults to 10.
    ///
    /// A crash repeats at most as many: for a publisher, a delivery whose success is not stored yet is still under way.
    /// Handlers in this process, which may take no time at all, may have up to ten [batches](Self::batch) more to store.
    ///
    /// # Errors
    ///
    /// If it is 0 or more than 10,000.
    pub fn concurrency(mut self, deliveries: usize) -> Result<Self, InvalidOption> {
        if !(1..=10_000).contains(&deliveries) {
            return Err(InvalidOption("the concurrency must be between 1 and 10,000"));
        }
        self.options.concurrency = deliveries;
        Ok(self)
    }

    /// Sets how many keys are claimed at once, and how many deliveries of each. Defaults to 100.
    ///
    /// A worker leases twice as many keys as it has deliveries under way; while handlers in this process do them fast, up
    /// to ten batches, and as many at once.
    ///
    /// # Errors
    ///
    /// If it is 0 or more than 10,000.
    pub fn batch(mut self, size: usize) -> Result<Self, InvalidOption> {
        if !(1..=10_000).contains(&size) {
            return Err(InvalidOption("the batch size must be between 1 and 10,000"));
        }
        self.options.batch = size;
        Ok(self)
    }

    /// Sets how long attempts under way may go on after the worker was asked to stop. Defaults to 10 s; more than a day
    /// counts as a day.
    #[must_use]
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.options.grace = grace.min(LONGEST);
        self
    }

    /// Delivers through Redis: this process moves due deliveries into Redis, and takes from Redis what it works on, as any
    /// other process with the same subscriptions does. Without, processes share the work through the database alone.
    ///
    /// While Redis is away, this worker claims from the database. See [`Redis`] for what it needs.
    #[must_use]
    pub fn redis(mut self, redis: Redis) -> Self {
        self.redis = Some(redis);
        self
    }

    /// Sets how long delivered events are kept. Defaults to 7 days.
    ///
    /// While it runs, the worker takes away what is older, in small transactions in the background: every minute, or
    /// after a tenth of the shortest time, but not more than once a second. Any number of workers may do that at once; let
    /// all have the same retention, or the shortest counts. A crash in between leaves the rest for the next time.
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.retention = retention;
        self
    }

    /// Registers the subscriptions and delivers until `shutdown` completes.
    ///
    /// Then nothing new is begun, attempts under way have the grace time to end, and everything else is given back at
    /// once with its attempt. When this returns, no lease of this worker is left, as long as the database answers; it
    /// does not wait for one that is gone longer than the leases last, and 10 s at most.
    ///
    /// # Errors
    ///
    /// [`StartError`]. Once started, it goes on whatever the database does.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is a crash: what is under way is delivered again after its lease.
    pub async fn run_until(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), StartError> {
        self.start().await?.run_until(shutdown).await;
        Ok(())
    }

    /// Delivers what one claim per subscription finds due, and returns: for a job that something else schedules.
    ///
    /// What is claimed is a batch of keys with their due events, see [`batch`](Self::batch); failed deliveries wait for
    /// their time as always. [`drain`](Self::drain) goes on until nothing is due.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    ///
    /// # Cancel safety
    ///
    /// As [`run_until`](Self::run_until).
    pub async fn run_once(self) -> Result<Deliveries, StartError> {
        Ok(self.start().await?.run(Until::Once, std::future::pending()).await)
    }

    /// Delivers until nothing is due, and returns: for tests, and for programs that end.
    ///
    /// What waits for its time, for an operator or for a destination that is down is left for later.
    ///
    /// ```no_run
    /// # use outbox_apalis::{Handlers, Worker};
    /// # use outbox_core::Subscription;
    /// # async fn example(worker: Worker) -> Result<(), Box<dyn std::error::Error>> {
    /// let done = worker.drain().await?;
    /// assert_eq!(done.dead, 0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StartError`].
    ///
    /// # Cancel safety
    ///
    /// As [`run_until`](Self::run_until).
    pub async fn drain(self) -> Result<Deliveries, StartError> {
        Ok(self.start().await?.run(Until::Drained, std::future::pending()).await)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use futures_util::future::BoxFuture;
    use outbox_core::{Context, NewEvent, Outcome, PushError, RecordedEvent};
    use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
    use sea_orm::{ConnectionTrait, DbBackend, Statement};

    use super::*;
    use crate::{destination::End, task::Attempt};

    struct Migrator;

    impl MigratorTrait for Migrator {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            outbox_migrations::all()
        }
    }

    /// Its first use panics in the feed: a bug.
    #[derive(Default)]
    struct Broken(AtomicUsize);

    impl Destination for Broken {
        fn knows(&self, _: &RecordedEvent) -> bool {
            true
        }

        fn is_outside(&self) -> bool {
            false
        }

        fn settles(&self, _: &RecordedEvent) -> bool {
            assert!(self.0.fetch_add(1, SeqCst) > 0, "a bug in the feed");
            false
        }

        fn deliver<'a>(&'a self, _: &'a Arc<RecordedEvent>, _: &'a Attempt) -> BoxFuture<'a, End> {
            Box::pin(std::future::ready(End::Outcome(Outcome::Delivered)))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_feed_that_panics_is_replaced_and_others_know_nothing_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let outbox = Outbox::connect(&url, 1).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        let mut worker = Worker::new(outbox.clone()).lease(Duration::from_millis(500)).unwrap();
        worker.subscriptions.push((Subscription::new("broken").unwrap(), Arc::new(Broken::default())));
        worker.subscriptions.push((Subscription::new("whole").unwrap(), Arc::new(Broken(AtomicUsize::new(1)))));
        let started = worker.start().await.unwrap();
        let pushed = outbox.transaction(Context::default(), |_, events| async move {
            events.push(NewEvent::dynamic("note.noted", "note", "a", &())?).map(|_| ())
        });
        pushed.await.map_err(|error: outbox_seaorm::TransactionError<PushError>| error).unwrap();
        let delivered = async {
            while outbox.status().await.unwrap().subscriptions.iter().any(|each| each.delivered == 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), started.run_until(delivered)).await.unwrap();
        let sql =
            "select s.name, d.attempts from outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id
                    order by s.name";
        let rows = outbox.writer().query_all_raw(Statement::from_string(DbBackend::Sqlite, sql)).await.unwrap();
        let attempts: Vec<i32> = rows.iter().map(|row| row.try_get("", "attempts").unwrap()).collect();
        assert_eq!(attempts, [2, 1], "the lease of the other one went on");
    }
}

use std::{
    collections::HashSet,
    convert::Infallible,
    future::Future,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use ::redis::aio::ConnectionManager;
use apalis::{
    layers::WorkerBuilderExt,
    prelude::{Monitor, WorkerBuilder},
};
use outbox_core::{Outcome, Publisher, Subscription};
use outbox_seaorm::{Instance, Outbox, Purged, RegisterError, Retention, SchemaError};
use sea_orm::DbBackend;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    Handlers, InvalidOption, OutboxBackend,
    assignment::{Assignment, Counts, SubscriptionId, Until},
    clock::DatabaseClock,
    destination::{self, AttemptResult, Destination, End, PublisherDestination},
    handlers::HandlersDestination,
    options::Options,
    redis::{self, Health, Jobs, Queue, RELAY_LEASES, Redis, Transport},
    router,
    task::DeliveryTask,
    thread::FeedThread,
};

/// How often a worker shows that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The longest lease, poll interval and grace.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// How often what is old is taken away.
const SHORTEST_PURGE: Duration = Duration::from_secs(1);
const LONGEST_PURGE: Duration = Duration::from_secs(60);

/// How often the log says again what is wrong with a subscription.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// When a worker that was killed disappears from the dashboards.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Delivers the events of an outbox: one apalis worker for each subscription, in this process.
///
/// Start any number of processes with the same subscriptions: they share the work. A process that dies is replaced
/// when its leases end.
pub struct Worker {
    outbox: Outbox,
    options: Options,
    subscriptions: Vec<(Subscription, Arc<dyn Destination>)>,
    redis: Option<Redis>,
    retention: Retention,
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
    /// The connection to Redis could not be set up; a server that is away is no error.
    #[error("the connection to Redis could not be set up")]
    Redis(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What [`Worker::run_once`] and [`Worker::drain`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deliveries {
    /// Deliveries that succeeded.
    pub delivered: u64,
    /// Attempts that failed, those of dead letters included.
    pub failed: u64,
    /// Deliveries that became dead letters.
    pub dead: u64,
}

impl Worker {
    /// Starts without subscriptions.
    #[must_use]
    pub fn new(outbox: Outbox) -> Self {
        Self {
            outbox,
            options: Options::DEFAULT,
            subscriptions: Vec::new(),
            redis: None,
            retention: Retention::default(),
        }
    }

    /// Adds a subscription whose events go to typed functions in this process.
    #[must_use]
    pub fn handlers(mut self, subscription: Subscription, handlers: Handlers) -> Self {
        let outbox = self.outbox.clone();
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

    /// Registers the subscriptions, so that the events of every commit from now on are theirs, without delivering yet.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start(self) -> Result<StartedWorker, StartError> {
        if self.subscriptions.is_empty() {
            return Err(StartError::Empty);
        }
        let mut names = HashSet::new();
        if let Some((twice, _)) = self.subscriptions.iter().find(|(each, _)| !names.insert(each.name())) {
            return Err(StartError::Twice(twice.name().to_owned()));
        }
        self.outbox.check_schema().await?;
        let worker: Arc<str> = worker_id().into();
        let is_sqlite = self.outbox.writer().get_database_backend() == DbBackend::Sqlite;
        let poll =
            self.options.poll.unwrap_or(if is_sqlite { Duration::from_millis(500) } else { Duration::from_secs(5) });
        let thread = FeedThread::start()?;
        let store = {
            let _entered = thread.runtime().enter();
            self.outbox.with_own_store(self.options.call_limit())
        };
        let connection = {
            let _entered = thread.runtime().enter();
            self.redis.as_ref().map(Redis::connection).transpose().map_err(|error| StartError::Redis(error.into()))?
        };
        let asked_at = Instant::now();
        let Instance { name: instance, now, .. } = self.outbox.instance().await?;
        let (clock, health) = (DatabaseClock::new(now, asked_at), Health::new());
        let stop = CancellationToken::new();
        let counts = Arc::new(Counts::default());
        let (mut assignments, mut registrations) = (Vec::<(Assignment, Option<Transport>)>::new(), Vec::new());
        for (subscription, destination) in self.subscriptions {
            let (concurrency, rate) = subscription.limits();
            let options = Options { concurrency: concurrency.unwrap_or(self.options.concurrency), ..self.options };
            let transport = self.redis.as_ref().zip(connection.clone()).map(|(redis, connection)| {
                let (name, limit) = (subscription.name(), redis.jobs_limit());
                // Handlers in this process may be quick; what is outside leaves jobs to other workers.
                let waiting = if destination.is_outside() { 0 } else { options.batch }.max(options.concurrency);
                let (batch, lease) = (waiting.min(100), options.lease * RELAY_LEASES);
                Transport {
                    health: health.clone(),
                    queue: Queue::new(connection, &instance, name, limit, batch, lease),
                    jobs: Arc::new(Jobs::new(waiting)),
                }
            });
            // While a transactional handler's transaction writes, SQLite lets no lease be renewed.
            let effect_time = if is_sqlite { options.timeout().min(options.lease / 3) } else { options.timeout() };
            let registered = self.outbox.register_as(&subscription, &worker).await?;
            let id = SubscriptionId::new(registered.id);
            let mut registration = Registration { subscription: subscription.clone(), id: id.clone(), said_at: None };
            registration.judge(registered.kept_by.as_deref());
            registrations.push(registration);
            let assignment = Assignment {
                store: Arc::new(store.clone()),
                subscription: id,
                name: subscription.name().into(),
                worker: worker.clone(),
                retry: subscription.retry_policy().unwrap_or_default(),
                destination,
                after_dead_letter: subscription.dead_letter_policy(),
                pace: rate.map(|rate| Duration::try_from_secs_f64(1.0 / rate).unwrap_or(LONGEST)).unwrap_or_default(),
                options,
                effect_time,
                poll,
                stop: stop.clone(),
                runtime: thread.runtime().clone(),
                until: Until::Stopped,
                counts: counts.clone(),
                clock: clock.clone(),
                idle: CancellationToken::new(),
                desk: Arc::default(),
            };
            assignments.push((assignment, transport));
        }
        let redis = connection.map(|connection| (connection, health));
        Ok(StartedWorker {
            store,
            worker,
            assignments,
            registrations,
            stop,
            counts,
            clock,
            thread,
            redis,
            retention: self.retention,
        })
    }
}

/// A worker whose subscriptions are registered.
pub struct StartedWorker {
    /// With connections that live on the thread.
    store: Outbox,
    worker: Arc<str>,
    assignments: Vec<(Assignment, Option<Transport>)>,
    registrations: Vec<Registration>,
    stop: CancellationToken,
    counts: Arc<Counts>,
    clock: DatabaseClock,
    thread: FeedThread,
    redis: Option<(ConnectionManager, Health)>,
    retention: Retention,
}

impl std::fmt::Debug for StartedWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StartedWorker").field("id", &self.worker).finish_non_exhaustive()
    }
}

impl StartedWorker {
    /// Delivers until `shutdown` completes; see [`Worker::run_until`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is a crash: what is under way is delivered again after its lease.
    pub async fn run_until(self, shutdown: impl Future<Output = ()> + Send) {
        self.run(Until::Stopped, shutdown).await;
    }

    pub(crate) async fn run(self, until: Until, shutdown: impl Future<Output = ()> + Send) -> Deliveries {
        let Self { store, worker, mut assignments, registrations, stop, counts, clock, thread, redis, retention } =
            self;
        assignments.iter_mut().for_each(|(assignment, _)| assignment.until = until);
        let names: Vec<String> = assignments.iter().map(|(assignment, _)| assignment.name.to_string()).collect();
        let idle: Vec<CancellationToken> = assignments.iter().map(|(assignment, _)| assignment.idle.clone()).collect();
        tracing::info!(worker = &*worker, subscriptions = ?names, "worker started");
        let mut background = JoinSet::new();
        if until == Until::Stopped
            && let Some((connection, health)) = redis
        {
            background.spawn_on(redis::watch(health, connection), thread.runtime());
            for (assignment, transport) in &assignments {
                if let Some(transport) = transport.clone() {
                    background.spawn_on(redis::run(store.clone(), assignment.clone(), transport), thread.runtime());
                }
            }
        }
        // Drained and once, feeds route for themselves: before each claim.
        if until == Until::Stopped {
            let assignments: Vec<Assignment> = assignments.iter().map(|(assignment, _)| assignment.clone()).collect();
            assignments.iter().for_each(|assignment| assignment.desk.open());
            thread.runtime().spawn(router::run(store.clone(), assignments, stop.clone()));
        }
        let monitor = assignments.into_iter().fold(Monitor::new(), |monitor, (assignment, transport)| {
            register(monitor, store.clone(), assignment, transport)
        });
        background.spawn_on(upkeep(store.clone(), worker.clone(), registrations, clock), thread.runtime());
        background.spawn_on(purging(store.clone(), retention), thread.runtime());
        background.spawn_on(listen(store.clone()), thread.runtime());
        // Feeds stop before apalis does: only they know what is under way and how long it may go on.
        let signal = async {
            tokio::select! {
                () = shutdown => {}
                () = all(&idle) => {}
            }
            tracing::info!(worker = &*worker, "worker is stopping");
            stop.cancel();
            Ok(())
        };
        if let Err(error) = monitor.run_with_signal(signal).await {
            tracing::error!(%error, "a worker did not end cleanly");
        }
        background.shutdown().await;
        let id = worker.clone();
        let last = thread.runtime().spawn(async move {
            if let Err(error) = store.forget_worker(&id).await {
                tracing::debug!(%error, "the heartbeat was not taken back");
            }
        });
        // An error means that the thread has ended, and everything on it.
        let _ = last.await;
        tracing::info!(worker = &*worker, "worker stopped");
        Deliveries {
            delivered: counts.delivered.load(Relaxed),
            failed: counts.failed.load(Relaxed),
            dead: counts.dead.load(Relaxed),
        }
    }
}

async fn all(tokens: &[CancellationToken]) {
    for token in tokens {
        token.cancelled().await;
    }
}

async fn listen(store: Outbox) {
    let never: Infallible = store.listen().await;
    match never {}
}

fn register(monitor: Monitor, outbox: Outbox, assignment: Assignment, transport: Option<Transport>) -> Monitor {
    monitor
        .should_restart(|_, error| {
            tracing::error!(%error, "a worker ended early and is started again");
            true
        })
        .register(move |_| {
            let mut backend = OutboxBackend::working(outbox.clone(), assignment.clone(), transport.clone());
            let results = backend.results();
            let destination = assignment.destination.clone();
            WorkerBuilder::new(format!("{}/{}", assignment.worker, assignment.name))
                .backend(backend)
                .enable_tracing()
                .build(move |task: DeliveryTask| run(destination.clone(), results.clone(), task))
        })
}

/// One apalis task: one attempt, whose end goes to the feed. An error is what apalis' layers see of a failure; nothing
/// is tried again here.
async fn run(
    destination: Arc<dyn Destination>,
    results: tokio::sync::mpsc::UnboundedSender<AttemptResult>,
    task: DeliveryTask,
) -> Result<(), AttemptFailed> {
    let Some(attempt) = &task.attempt else { return Ok(()) };
    let (key, attempt, started) = (attempt.lane.key.clone(), attempt.id, Instant::now());
    let end = destination::attempt(destination, task).await;
    let failed = match &end {
        End::Outcome(Outcome::Retry(error) | Outcome::Permanent(error)) => {
            Err(AttemptFailed(error.message().to_owned()))
        }
        _ => Ok(()),
    };
    // The feed ends only after all its tasks.
    let _ = results.send(AttemptResult { key, attempt, end, started });
    failed
}

/// The error text of an attempt, for apalis.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct AttemptFailed(String);

/// Shows that the worker is alive, and mends what only time can tell.
async fn upkeep(outbox: Outbox, worker: Arc<str>, mut registrations: Vec<Registration>, clock: DatabaseClock) {
    let mut interval = tokio::time::interval(HEARTBEAT);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if let Err(error) = beat(&outbox, &worker, &mut registrations, &clock).await {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(error, "heartbeat failed");
        }
    }
}

async fn beat(
    outbox: &Outbox,
    worker: &str,
    registrations: &mut [Registration],
    clock: &DatabaseClock,
) -> Result<(), StartError> {
    let subscriptions: Vec<&Subscription> = registrations.iter().map(|each| &each.subscription).collect();
    let asked_at = Instant::now();
    clock.set(outbox.heartbeat(worker, &subscriptions).await?, asked_at);
    outbox.forget_workers(FORGET_AFTER).await?;
    let stored = outbox.registered(&subscriptions).await?;
    for (registration, stored) in registrations.iter_mut().zip(stored) {
        registration.look_after(outbox, worker, stored).await?;
    }
    outbox.sweep_removed().await?;
    Ok(())
}

/// A subscription as this worker registered it. Others may change it, remove it, and register it again.
struct Registration {
    subscription: Subscription,
    id: SubscriptionId,
    /// When the log last had it that something is wrong.
    said_at: Option<Instant>,
}

impl Registration {
    /// `stored` is the id, and whether it is defined as here.
    async fn look_after(
        &mut self,
        outbox: &Outbox,
        worker: &str,
        stored: Option<(i32, bool)>,
    ) -> Result<(), RegisterError> {
        let name = self.subscription.name();
        let changed = self.id.set(stored.map(|(id, _)| id));
        match stored {
            // Who removed it did not want it back; and what was pushed since then would be missing in it.
            None => self.say(|name| {
                tracing::error!(
                    subscription = name,
                    "the subscription was removed, nothing is delivered; start this worker again to register it anew, or \
                     without it"
                );
            }),
            Some(_) if changed => {
                tracing::warn!(subscription = name, "the subscription was registered anew; this worker goes on with it");
            }
            Some((_, true)) => self.said_at = None,
            Some((_, false)) => {
                let registered = outbox.register_as(&self.subscription, worker).await?;
                self.judge(registered.kept_by.as_deref());
            }
        }
        Ok(())
    }

    /// Says so if another definition stays.
    fn judge(&mut self, kept_by: Option<&str>) {
        match kept_by {
            None => self.said_at = None,
            Some(other) => self.say(|name| {
                tracing::warn!(
                    subscription = name,
                    other,
                    "this worker has an older definition of the subscription than another that is alive; the newer one \
                     counts until its last worker ends"
                );
            }),
        }
    }

    fn say(&mut self, say: impl FnOnce(&str)) {
        if self.said_at.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            self.said_at = Some(Instant::now());
            say(self.subscription.name());
        }
    }
}

/// Takes away what is older than the retention, again and again.
async fn purging(outbox: Outbox, retention: Retention) {
    let interval = (retention.shortest() / 10).clamp(SHORTEST_PURGE, LONGEST_PURGE);
    loop {
        // Workers that start together do not purge together.
        tokio::time::sleep(interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9))).await;
        match outbox.purge(&retention).await {
            Ok(purged) if purged != Purged::default() => tracing::debug!(?purged, "took away what is old"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot take away what is old, trying again later"),
        }
    }
}

/// Host, process and a random part: a restarted process never takes the name of the one before.
fn worker_id() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let host = host.as_deref().map(str::trim).filter(|host| !host.is_empty()).unwrap_or("host").to_owned();
    format!("{host}-{}-{:06x}", std::process::id(), fastrand::u32(..0x100_0000))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use futures_util::future::BoxFuture;
    use outbox_core::{Context, NewEvent, PushError, RecordedEvent};
    use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};

    use super::*;
    use crate::task::Attempt;

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
    async fn a_feed_that_panics_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
        let outbox = Outbox::connect(&url, 1).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        let mut worker = Worker::new(outbox.clone()).lease(Duration::from_millis(200)).unwrap();
        worker.subscriptions.push((Subscription::new("s").unwrap(), Arc::new(Broken::default())));
        let started = worker.start().await.unwrap();
        let pushed = outbox.transaction(Context::default(), |_, events| async move {
            events.push(NewEvent::dynamic("note.noted", "note", "a", &())?).map(|_| ())
        });
        pushed.await.map_err(|error: outbox_seaorm::TransactionError<PushError>| error).unwrap();
        let delivered = async {
            while outbox.status().await.unwrap().subscriptions[0].delivered == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), started.run_until(delivered)).await.unwrap();
    }
}

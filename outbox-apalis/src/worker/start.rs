//! How a worker starts: it checks what it is given, registers its subscriptions, and prepares all that they need.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use ::redis::aio::ConnectionManager;
use outbox_core::{Subscription, store::Store};
use outbox_seaorm::{Instance, Outbox};
use sea_orm::DbBackend;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{LONGEST, Place, StartError, StartedWorker, Worker, started::Database, upkeep::Registration};
use crate::{
    assignment::{Assignment, Share, SubscriptionId, Until},
    clock::DatabaseClock,
    counts::Counts,
    desk::Desk,
    destination::Destination,
    feed::{Every, Served},
    options::Options,
    redis::{Health, Jobs, Queue, RELAY_LEASES, Redis, Transport},
    thread::FeedThread,
};

/// The longest wait between two looks: SQLite tells other processes nothing.
const POLL_SQLITE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_secs(5);

/// What all subscriptions of a worker share.
struct Shared {
    store: Arc<dyn Store>,
    worker: Arc<str>,
    /// Nothing else can be written while a transaction writes.
    one_writer: bool,
    options: Options,
    thread: FeedThread,
    stop: CancellationToken,
    counts: Arc<Counts>,
    clock: DatabaseClock,
    desk: Arc<Desk>,
}

/// What the transports of all subscriptions share.
struct Relayed {
    redis: Redis,
    connection: ConnectionManager,
    health: Health,
    /// The outbox, among others in the same Redis.
    instance: String,
    /// Jobs have arrived, of any subscription.
    arrived: Arc<Notify>,
}

impl Worker {
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
        match &self.place {
            Place::Database(outbox) => {
                let outbox = outbox.clone();
                self.start_on(outbox).await
            }
            Place::Other(store) => {
                let store = store.clone();
                self.start_with(store).await
            }
        }
    }

    async fn start_on(self, outbox: Outbox) -> Result<StartedWorker, StartError> {
        outbox.check_schema().await?;
        let thread = FeedThread::start()?;
        let entered = thread.runtime().enter();
        let own = outbox.with_own_store(self.options.call_limit());
        let connection = self.redis.as_ref().map(Redis::connection).transpose();
        drop(entered);
        let connection = connection.map_err(|error| StartError::Redis(error.into()))?;
        let asked_at = Instant::now();
        let Instance { name: instance, now, .. } = outbox.instance().await?;
        let one_writer = outbox.writer().get_database_backend() == DbBackend::Sqlite;
        let clock = DatabaseClock::new(now, asked_at);
        let shared = Shared::new(Arc::new(own.clone()), one_writer, self.options, thread, clock);
        let relayed = self.redis.zip(connection).map(|(redis, connection)| Relayed {
            redis,
            connection,
            health: Health::new(),
            instance,
            arrived: Arc::default(),
        });
        let (mut served, mut registrations) = (Vec::new(), Vec::new());
        for (subscription, destination) in self.subscriptions {
            let registered = outbox.register_as(&subscription, &shared.worker).await?;
            let id = SubscriptionId::new(registered.id);
            let assignment = shared.assignment(&subscription, id.clone(), destination);
            let transport = relayed.as_ref().map(|relayed| relayed.transport(&assignment));
            let share = assignment.share.clone();
            registrations.push(Registration::new(subscription, id, share, registered.kept_by.as_deref()));
            served.push(Served { assignment, transport });
        }
        let redis = relayed.map(|relayed| (relayed.connection, relayed.health));
        Ok(shared.started(served, Some(Database { outbox: own, registrations, redis, retention: self.retention })))
    }

    async fn start_with(self, store: Arc<dyn Store>) -> Result<StartedWorker, StartError> {
        if self.redis.is_some() {
            return Err(StartError::NeedsDatabase("Redis"));
        }
        if self.subscriptions.iter().any(|(_, destination)| destination.needs_database()) {
            return Err(StartError::NeedsDatabase("a transactional handler"));
        }
        let clock = DatabaseClock::new(chrono::Utc::now(), Instant::now());
        let shared = Shared::new(store.clone(), false, self.options, FeedThread::start()?, clock);
        let mut served = Vec::new();
        for (subscription, destination) in self.subscriptions {
            let id = SubscriptionId::new(store.register(&subscription).await?);
            served.push(Served { assignment: shared.assignment(&subscription, id, destination), transport: None });
        }
        Ok(shared.started(served, None))
    }
}

impl Shared {
    fn new(
        store: Arc<dyn Store>,
        one_writer: bool,
        options: Options,
        thread: FeedThread,
        clock: DatabaseClock,
    ) -> Self {
        Self {
            store,
            worker: worker_id().into(),
            one_writer,
            options,
            thread,
            stop: CancellationToken::new(),
            counts: Arc::default(),
            clock,
            desk: Arc::default(),
        }
    }

    fn assignment(
        &self,
        subscription: &Subscription,
        id: SubscriptionId,
        destination: Arc<dyn Destination>,
    ) -> Assignment {
        let limits = subscription.limits();
        let options = Options {
            concurrency: limits.concurrency.unwrap_or(self.options.concurrency),
            of_tenant: limits.concurrency_per_tenant,
            ..self.options
        };
        let every = |rate: Option<f64>| {
            rate.map(|rate| Duration::try_from_secs_f64(1.0 / rate).unwrap_or(LONGEST)).unwrap_or_default()
        };
        // While a transactional handler's transaction writes, no lease can be renewed.
        let effect_time = if self.one_writer { options.timeout().min(options.lease / 3) } else { options.timeout() };
        Assignment {
            store: self.store.clone(),
            subscription: id,
            name: subscription.name().into(),
            worker: self.worker.clone(),
            retry: subscription.retry_policy().unwrap_or_default(),
            destination,
            after_dead_letter: subscription.dead_letter_policy(),
            every: Every { here: every(limits.rate), fleet: every(limits.fleet_rate) },
            share: Share::new(limits.fleet_concurrency.unwrap_or(usize::MAX), self.desk.clone()),
            poll: options.poll.unwrap_or(if self.one_writer { POLL_SQLITE } else { POLL }),
            options,
            effect_time,
            stop: self.stop.clone(),
            runtime: self.thread.runtime().clone(),
            until: Until::Stopped,
            counts: self.counts.clone(),
            clock: self.clock.clone(),
            idle: CancellationToken::new(),
            desk: self.desk.clone(),
        }
    }

    fn started(self, served: Vec<Served>, database: Option<Database>) -> StartedWorker {
        let Self { worker, thread, stop, counts, clock, .. } = self;
        StartedWorker { worker, served, stop, counts, clock, thread, database }
    }
}

impl Relayed {
    fn transport(&self, assignment: &Assignment) -> Transport {
        let options = assignment.options;
        // Handlers in this process may be quick; what is outside leaves jobs to other workers.
        let waiting = if assignment.destination.is_outside() { 0 } else { options.batch }.max(options.concurrency);
        let (batch, lease) = (waiting.min(100), options.lease * RELAY_LEASES);
        let (connection, limit) = (self.connection.clone(), self.redis.jobs_limit());
        Transport {
            health: self.health.clone(),
            queue: Queue::new(connection, &self.instance, &assignment.name, limit, batch, lease),
            jobs: Arc::new(Jobs::new(waiting, self.arrived.clone())),
        }
    }
}

/// Host, process and a random part: a restarted process never takes the name of the one before.
fn worker_id() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let host = host.as_deref().map(str::trim).filter(|host| !host.is_empty()).unwrap_or("host").to_owned();
    format!("{host}-{}-{:06x}", std::process::id(), fastrand::u32(..0x100_0000))
}

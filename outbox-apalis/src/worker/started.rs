//! A worker that delivers: the apalis workers of its subscriptions, and what goes on beside them.

use std::{convert::Infallible, future::Future, sync::Arc, time::Instant};

use ::redis::aio::ConnectionManager;
use apalis::{
    layers::WorkerBuilderExt,
    prelude::{Monitor, WorkerBuilder},
};
use outbox_core::Outcome;
use outbox_seaorm::{Outbox, Retention};
use tokio::{runtime::Handle, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::upkeep::{Registration, purging, upkeep};
use crate::{
    OutboxBackend,
    assignment::Until,
    clock::DatabaseClock,
    counts::{Counts, Deliveries},
    destination::{self, AttemptResult, Destination, End},
    feed::{Feeds, Line, Served},
    redis::{self, Health},
    router,
    task::DeliveryTask,
    thread::FeedThread,
};

/// A worker whose subscriptions are registered.
pub struct StartedWorker {
    pub(super) worker: Arc<str>,
    pub(super) served: Vec<Served>,
    pub(super) stop: CancellationToken,
    pub(super) counts: Arc<Counts>,
    pub(super) clock: DatabaseClock,
    pub(super) thread: FeedThread,
    pub(super) database: Option<Database>,
}

/// What only a worker of a database has to do: a plain record.
pub(super) struct Database {
    /// With connections that live on the thread.
    pub(super) outbox: Outbox,
    pub(super) registrations: Vec<Registration>,
    pub(super) redis: Option<(ConnectionManager, Health)>,
    pub(super) retention: Retention,
}

impl std::fmt::Debug for StartedWorker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StartedWorker").field("id", &self.worker).finish_non_exhaustive()
    }
}

impl StartedWorker {
    /// Delivers until `shutdown` completes; see [`Worker::run_until`](super::Worker::run_until).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future is a crash: what is under way is delivered again after its lease.
    pub async fn run_until(self, shutdown: impl Future<Output = ()> + Send) {
        self.run(Until::Stopped, shutdown).await;
    }

    pub(crate) async fn run(self, until: Until, shutdown: impl Future<Output = ()> + Send) -> Deliveries {
        let Self { worker, mut served, stop, counts, clock, thread, database } = self;
        served.iter_mut().for_each(|served| served.assignment.until = until);
        let names: Vec<String> = served.iter().map(|served| served.assignment.name.to_string()).collect();
        let idle: Vec<CancellationToken> = served.iter().map(|served| served.assignment.idle.clone()).collect();
        tracing::info!(worker = &*worker, subscriptions = ?names, "worker started");
        let mut background = JoinSet::new();
        let outbox = database.as_ref().map(|database| database.outbox.clone());
        if let Some(database) = database {
            database.start(&mut background, until, &worker, &served, clock, thread.runtime());
        }
        let feeds = Arc::new(Feeds::new(served));
        let monitor = (0..feeds.served().len())
            .fold(Monitor::new(), |monitor, index| register(monitor, outbox.clone(), feeds.clone(), index));
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
        if let Some(outbox) = outbox {
            let id = worker.clone();
            let last = thread.runtime().spawn(async move {
                if let Err(error) = outbox.forget_worker(&id).await {
                    tracing::debug!(%error, "the heartbeat was not taken back");
                }
            });
            // An error means that the thread has ended, and everything on it.
            let _ = last.await;
        }
        tracing::info!(worker = &*worker, "worker stopped");
        counts.until_now()
    }
}

impl Database {
    /// Starts what goes on beside the deliveries. `background` ends with the worker; the router ends by itself, and not in
    /// the middle of a look.
    fn start(
        self,
        background: &mut JoinSet<()>,
        until: Until,
        worker: &Arc<str>,
        served: &[Served],
        clock: DatabaseClock,
        runtime: &Handle,
    ) {
        let Self { outbox, registrations, redis, retention } = self;
        if until == Until::Stopped
            && let Some((connection, health)) = redis
        {
            background.spawn_on(redis::watch(health, connection), runtime);
            for Served { assignment, transport } in served {
                if let Some(transport) = transport.clone() {
                    background.spawn_on(redis::run(outbox.clone(), assignment.clone(), transport), runtime);
                }
            }
        }
        // Drained and once, feeds route for themselves: before each claim.
        if let Some(first) = served.first().filter(|_| until == Until::Stopped) {
            let (desk, stop) = (first.assignment.desk.clone(), first.assignment.stop.clone());
            desk.open();
            let assignments = served.iter().map(|served| served.assignment.clone()).collect();
            runtime.spawn(router::run(outbox.clone(), assignments, desk, stop));
        }
        background.spawn_on(upkeep(outbox.clone(), worker.clone(), registrations, clock), runtime);
        background.spawn_on(purging(outbox.clone(), retention), runtime);
        background.spawn_on(listen(outbox), runtime);
    }
}

async fn all(tokens: &[CancellationToken]) {
    for token in tokens {
        token.cancelled().await;
    }
}

async fn listen(outbox: Outbox) {
    let never: Infallible = outbox.listen().await;
    match never {}
}

fn register(monitor: Monitor, outbox: Option<Outbox>, feeds: Arc<Feeds>, index: usize) -> Monitor {
    monitor
        .should_restart(|_, error| {
            tracing::error!(%error, "a worker ended early and is started again");
            true
        })
        .register(move |_| {
            let assignment = &feeds.served()[index].assignment;
            let (backend, line) = OutboxBackend::working(outbox.clone(), &feeds, index);
            let destination = assignment.destination.clone();
            WorkerBuilder::new(format!("{}/{}", assignment.worker, assignment.name))
                .backend(backend)
                .enable_tracing()
                .build(move |task: DeliveryTask| run(destination.clone(), line.clone(), task))
        })
}

/// One apalis task: one attempt, whose end goes to the feed. An error is what apalis' layers see of a failure; nothing
/// is tried again here.
async fn run(destination: Arc<dyn Destination>, line: Line, task: DeliveryTask) -> Result<(), AttemptFailed> {
    let Some(attempt) = &task.attempt else { return Ok(()) };
    let (key, attempt, started) = (attempt.lane.key.clone(), attempt.id, Instant::now());
    let end = destination::attempt(destination, task).await;
    let failed = match &end {
        End::Outcome(Outcome::Retry(error) | Outcome::Permanent(error)) => {
            Err(AttemptFailed(error.message().to_owned()))
        }
        _ => Ok(()),
    };
    line.ended(AttemptResult { key, attempt, end, started });
    failed
}

/// The error text of an attempt, for apalis.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct AttemptFailed(String);

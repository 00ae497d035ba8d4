//! Through Redis, beside the same worker without it and beside apalis-redis alone: R1, R2.

use std::{
    collections::HashMap,
    convert::Infallible,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use apalis::{layers::WorkerBuilderExt, prelude::WorkerBuilder};
use apalis_core::{
    backend::{TaskSink, ext::BackendExt},
    error::WorkerError,
    task::builder::TaskBuilder,
};
use apalis_redis::{Config, RedisStorage};
use outbox_apalis::Redis;
use outbox_test_servers::Redis as RedisServer;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::{
    Setup,
    child::nanoseconds,
    database::Database,
    drain::EVENTS,
    events::Happened,
    latency::{self, PAUSE, Where},
    measure::{Measurement, Result, percentile, progress, sorted},
    sink::{self, Tuning},
};

/// apalis-redis alone, set up as ours is: jobs of one call, how often Redis is asked, jobs under way.
const BATCH: usize = 100;
const ASK_EVERY: Duration = Duration::from_millis(25);
const CONCURRENCY: usize = 1000;

/// Its scripts fail for ever when 8,000 jobs wait.
const WAITING: usize = 5_000;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut r1 = Measurement::ratio("R1", "tuned worker: through Redis ÷ without", "events/s", 0.4, 0.6);
    let mut default = Measurement::ratio("R1 default", "default worker: through Redis ÷ without", "events/s", 0.4, 0.6);
    let mut alone = Measurement::shown("R1b", "tuned worker through Redis ÷ apalis-redis alone", "events/s");
    let mut p50 = Measurement::shown("R2 p50", "at idle: through Redis ÷ without", "ms");
    let mut p99 = Measurement::at_most("R2 p99", "at idle: through Redis ÷ without", "ms", 100.0, 100.0);
    let mut alone_p50 = Measurement::shown("R2b p50", "at idle: through Redis ÷ apalis-redis alone", "ms");
    let mut alone_p99 = Measurement::shown("R2b p99", "at idle: through Redis ÷ apalis-redis alone", "ms");
    let server = setup.server().await?;
    let redis = tokio::task::block_in_place(|| RedisServer::start(&["maxmemory-policy noeviction"]));
    let (events, single_events) = (setup.scaled(EVENTS), setup.scaled(latency::EVENTS));
    let filled = server.backlog(events, events).await?;
    for round in 0..setup.rounds {
        let without = drain(setup, &filled, events, Tuning::Fast, None).await?;
        let through = drain(setup, &filled, events, Tuning::Fast, Some(&redis)).await?;
        let bare = drain_alone(&redis, events).await?;
        let default_without = drain(setup, &filled, events, Tuning::Default, None).await?;
        let default_through = drain(setup, &filled, events, Tuning::Default, Some(&redis)).await?;
        r1.add(through, without);
        default.add(default_through, default_without);
        alone.add(through, bare);

        let through_redis = Where::ThroughRedis(Box::new(Redis::new(&redis.url())?));
        let single = latency::side(setup, single_events, through_redis).await?;
        let single_without = latency::side(setup, single_events, Where::Here).await?;
        let single_bare = latency_alone(&redis, single_events).await?;
        for (measurement, other, share) in [
            (&mut p50, &single_without, 0.5),
            (&mut p99, &single_without, 0.99),
            (&mut alone_p50, &single_bare, 0.5),
            (&mut alone_p99, &single_bare, 0.99),
        ] {
            measurement.add(percentile(&single, share), percentile(other, share));
        }
        progress(&format!(
            "redis {} of {}: tuned {through:.0}/s, without Redis {without:.0}/s, apalis-redis alone {bare:.0}/s; default \
             {default_through:.0}/s, without Redis {default_without:.0}/s; p99 {:.1} ms",
            round + 1,
            setup.rounds,
            percentile(&single, 0.99),
        ));
    }
    filled.drop().await?;
    Ok(vec![r1, default, alone, p50, p99, alone_p50, alone_p99])
}

/// Deliveries per second of a worker that is up when the first is due.
async fn drain(
    setup: &Setup,
    filled: &Database,
    events: usize,
    tuning: Tuning,
    redis: Option<&RedisServer>,
) -> Result<f64> {
    let database = setup.server().await?.copy(filled).await?;
    let outbox = database.outbox().await?;
    let mut worker = tuning.worker(outbox.clone())?;
    if let Some(redis) = redis {
        empty(redis);
        worker = worker.redis(Redis::new(&redis.url())?);
    }
    let drained = sink::drain_warm(&outbox, events, worker).await?;
    drop(outbox);
    database.drop().await?;
    Ok(drained.rate())
}

/// Jobs per second that do nothing, while somebody pushes them as long as few enough wait.
async fn drain_alone(redis: &RedisServer, events: usize) -> Result<f64> {
    let mut storage = empty_storage(redis).await?;
    let (ended, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let handle = {
        let (ended, all) = (ended.clone(), all.clone());
        move |_| {
            if ended.fetch_add(1, Ordering::Relaxed) + 1 == events {
                all.notify_one();
            }
        }
    };
    let started = Instant::now();
    let push = async {
        for first in (0..events).step_by(BATCH) {
            while first + BATCH > ended.load(Ordering::Relaxed) + WAITING {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            push(&mut storage, first..events.min(first + BATCH)).await?;
        }
        all.notified().await;
        Ok(())
    };
    work_until(storage_of(redis).await?, handle, push).await?;
    Ok(events as f64 / started.elapsed().as_secs_f64())
}

/// Milliseconds from the beginning of a push to the job, sorted: a job may have begun before its push has returned.
async fn latency_alone(redis: &RedisServer, events: usize) -> Result<Vec<f64>> {
    let mut storage = empty_storage(redis).await?;
    let (ended, mut ends) = mpsc::unbounded_channel();
    let handle = move |event: Happened| {
        let _ = ended.send((event.n, nanoseconds()));
    };
    let mut taken = Vec::with_capacity(events);
    let push = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut pushed = HashMap::new();
        for n in 0..events {
            pushed.insert(n, nanoseconds());
            push(&mut storage, n..n + 1).await?;
            tokio::time::sleep(PAUSE).await;
        }
        for _ in 0..events {
            let (n, at) = ends.recv().await.ok_or("the worker ended early")?;
            let pushed = pushed.get(&n).ok_or("a job that was not pushed")?;
            taken.push(at.saturating_sub(*pushed) as f64 / 1e6);
        }
        Ok(())
    };
    work_until(storage_of(redis).await?, handle, push).await?;
    Ok(sorted(taken.into_iter()))
}

async fn empty_storage(redis: &RedisServer) -> Result<RedisStorage<Happened>> {
    empty(redis);
    storage_of(redis).await
}

fn empty(redis: &RedisServer) {
    tokio::task::block_in_place(|| redis.command(&["FLUSHALL"]));
}

async fn storage_of(redis: &RedisServer) -> Result<RedisStorage<Happened>> {
    let config = Config::default().queue("alone").batch_size(BATCH).lock_tasks(false).emit_events(false);
    Ok(RedisStorage::new(apalis_redis::connect(redis.url()).await?).with_config(config))
}

async fn push(storage: &mut RedisStorage<Happened>, numbers: Range<usize>) -> Result<()> {
    let tasks = numbers.map(|n| TaskBuilder::new(Happened::new(n, n)).build());
    Ok(storage.push_all(futures_util::stream::iter(tasks)).await.map_err(|error| error.to_string())?)
}

/// Works on jobs until the other future is done.
async fn work_until(
    storage: RedisStorage<Happened>,
    handle: impl Fn(Happened) + Clone + Send + Sync + 'static,
    until: impl Future<Output = Result<()>>,
) -> Result<()> {
    let worker = WorkerBuilder::new("alone")
        .backend(storage.poll_with_interval(ASK_EVERY))
        .concurrency(CONCURRENCY)
        .build(move |event: Happened| {
            handle(event);
            std::future::ready(Ok::<_, Infallible>(()))
        });
    let (stop, stopped) = oneshot::channel::<()>();
    let work = worker.run_until(async {
        let _ = stopped.await;
        Ok::<_, WorkerError>(())
    });
    let until = async {
        let ended = until.await;
        drop(stop);
        ended
    };
    tokio::try_join!(until, async { Ok(work.await?) })?;
    Ok(())
}

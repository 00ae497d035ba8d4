//! P1: the worker as it comes against another job queue on PostgreSQL, `graphile_worker` with its local queue. It keeps no
//! order of a key and no history.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use graphile_worker::{IntoTaskHandlerResult, JobSpec, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions};
use sea_orm::sqlx::postgres::PgPoolOptions;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    Setup,
    drain::{EVENTS, worker},
    events::Happened,
    measure::{Measurement, Result, progress},
    sink::Tuning,
};

/// As many as our worker has under way.
const CONCURRENCY: usize = 10;
const LOCAL_QUEUE: usize = 1000;
/// Together it acknowledges what is done within this time, as ours does.
const TOGETHER: Duration = Duration::from_millis(10);
const BATCH: usize = 1000;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut p1 = Measurement::ratio("P1", "default worker, unrouted events ÷ graphile_worker", "events/s", 0.8, 1.2);
    let events = setup.scaled(EVENTS);
    let filled = setup.server().await?.backlog(events, events).await?;
    for round in 0..setup.rounds {
        let ours = worker(setup, &filled, events, Tuning::Default).await?.rate;
        let theirs = jobs(setup, events).await?;
        progress(&format!("rival {} of {}: ours {ours:.0}/s, graphile_worker {theirs:.0}/s", round + 1, setup.rounds));
        p1.add(ours, theirs);
    }
    filled.drop().await?;
    Ok(vec![p1])
}

/// The same event as a job.
#[derive(Clone, Serialize, Deserialize)]
struct Job(Happened);

/// What is left to do, and who waits for it.
#[derive(Clone, Debug, Default)]
struct Done {
    jobs: Arc<AtomicUsize>,
    all: Arc<Notify>,
}

impl TaskHandler for Job {
    const IDENTIFIER: &'static str = "happened";

    async fn run(self, context: WorkerContext) -> impl IntoTaskHandlerResult {
        if let Some(done) = context.get_ext::<Done>()
            && done.jobs.fetch_sub(1, Ordering::Relaxed) == 1
        {
            done.all.notify_one();
        }
        Ok::<(), String>(())
    }
}

/// Jobs per second, until all are done and acknowledged.
async fn jobs(setup: &Setup, number: usize) -> Result<f64> {
    let database = setup.server().await?.empty().await?;
    let pool = PgPoolOptions::new().max_connections(16).connect(&database.url).await?;
    let done = Done::default();
    done.jobs.store(number, Ordering::Relaxed);
    let worker = WorkerOptions::default()
        .concurrency(CONCURRENCY)
        .define_job::<Job>()
        .pg_pool(pool.clone())
        .add_extension(done.clone())
        .local_queue(LocalQueueConfig::default().with_size(LOCAL_QUEUE))
        .complete_job_batch_delay(TOGETHER)
        .listen_os_shutdown_signals(false)
        .init()
        .await?;
    let (utils, spec) = (worker.create_utils(), JobSpec::default());
    for first in (0..number).step_by(BATCH) {
        let batch: Vec<_> = (first..number.min(first + BATCH)).map(|n| (Job(Happened::new(n, n)), &spec)).collect();
        utils.add_jobs::<Job>(&batch).await?;
    }
    let began = Instant::now();
    let (ran, ()) = tokio::join!(worker.run(), async {
        done.all.notified().await;
        worker.request_shutdown();
    });
    ran?;
    let rate = number as f64 / began.elapsed().as_secs_f64();
    pool.close().await;
    database.drop().await?;
    Ok(rate)
}

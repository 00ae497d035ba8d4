use std::{sync::Arc, time::Duration};

use apalis::{layers::WorkerBuilderExt, prelude::WorkerBuilder};
use apalis_core::backend::ext::BackendExt;

use super::{Jobs, Transport, job::Readable};
use crate::{assignment::Assignment, metrics};

/// How often an idle worker asks Redis: what a delivery waits there at most.
const ASK_EVERY: Duration = Duration::from_millis(25);

/// How many jobs are handed over at once: Redis is told of each that it is done, in a round trip.
const HAND_OVERS: usize = 32;

/// Before an apalis worker that has ended is built again.
const REBUILD: Duration = Duration::from_millis(100);
const LONGEST_REBUILD: Duration = Duration::from_secs(1);

/// Takes jobs out of Redis, with one apalis worker after another: whatever Redis does, a worker that ends is built
/// again. Until the future is dropped.
pub(crate) async fn consume(assignment: &Assignment, transport: &Transport) {
    let mut wait = REBUILD;
    loop {
        transport.health.wait_for(true).await;
        // Never a name twice: a worker that comes back under its old name is refused.
        let name = format!("{}-{:08x}", assignment.worker, fastrand::u32(..));
        let (jobs, name_of) = (transport.jobs.clone(), assignment.name.clone());
        let worker = WorkerBuilder::new(name.as_str())
            .backend(transport.queue.storage().poll_with_interval(ASK_EVERY))
            .concurrency(HAND_OVERS)
            .build(move |job: Readable| hand_over(name_of.clone(), jobs.clone(), job));
        let started = tokio::time::Instant::now();
        let stop = assignment.stop.clone();
        // When the worker stops, what it has fetched and not handed over goes back into Redis.
        let stopping = async move {
            stop.cancelled().await;
            Ok::<_, apalis_core::error::WorkerError>(())
        };
        tokio::select! {
            ended = worker.run_until(stopping) => {
                tracing::debug!(subscription = &*assignment.name, ?ended, "a Redis worker ended");
            }
            () = transport.health.wait_for(false) => {}
        }
        transport.queue.forget(&name).await;
        if assignment.stop.is_cancelled() {
            return;
        }
        transport.queue.remove_evicted().await;
        wait = if started.elapsed() > LONGEST_REBUILD { REBUILD } else { (wait * 2).min(LONGEST_REBUILD) };
        tokio::time::sleep(wait).await;
    }
}

/// The job is done for Redis when the feed has it: from then on the lease in the database counts.
async fn hand_over(
    subscription: Arc<str>,
    jobs: Arc<Jobs>,
    Readable(job): Readable,
) -> Result<(), std::convert::Infallible> {
    match job {
        Some(job) => jobs.put(job).await,
        None => {
            tracing::warn!(
                subscription = &*subscription,
                "a job was garbled in Redis; its deliveries are due again when its lease ends"
            );
            metrics::dropped_jobs(&subscription, "garbled", 1);
        }
    }
    Ok(())
}

//! Our worker with a typed handler that does nothing but count.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_apalis::{Handlers, Worker};
use outbox_core::Subscription;
use outbox_seaorm::Outbox;
use tokio::sync::Notify;

use crate::{
    events::{Happened, SUBSCRIPTION},
    measure::Result,
};

/// Until a worker has found its Redis and has looked for deliveries.
const WARM_UP: Duration = Duration::from_millis(500);

/// How a worker is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tuning {
    /// As it comes.
    Default,
    /// For rate: many deliveries under way.
    Fast,
}

impl Tuning {
    pub(crate) fn worker(self, outbox: Outbox) -> Result<Worker> {
        let worker = Worker::new(outbox);
        Ok(match self {
            Self::Default => worker,
            Self::Fast => worker.concurrency(1000)?.batch(1000)?,
        })
    }
}

/// When each share of the deliveries was made.
pub(crate) struct Drained {
    events: usize,
    /// Since the start; the last one is when everything was acknowledged too.
    marks: Vec<Duration>,
}

impl Drained {
    /// The rate of everything, per second.
    pub(crate) fn rate(&self) -> f64 {
        self.between(0, self.marks.len())
    }

    /// The rate between two tenths, per second.
    pub(crate) fn between(&self, from: usize, to: usize) -> f64 {
        let start = from.checked_sub(1).map_or(Duration::ZERO, |mark| self.marks[mark]);
        let share = (to - from) as f64 / self.marks.len() as f64;
        self.events as f64 * share / (self.marks[to - 1] - start).as_secs_f64()
    }
}

/// Delivers until this many events have been, and are acknowledged.
pub(crate) async fn drain(outbox: &Outbox, events: usize, tuning: Tuning) -> Result<Drained> {
    deliver(tuning.worker(outbox.clone())?, events, None).await
}

/// As [`drain`], by a worker that has been up for a moment when its subscription may be delivered.
pub(crate) async fn drain_warm(outbox: &Outbox, events: usize, worker: Worker) -> Result<Drained> {
    outbox.pause(SUBSCRIPTION).await?;
    deliver(worker, events, Some(outbox)).await
}

async fn deliver(worker: Worker, events: usize, paused: Option<&Outbox>) -> Result<Drained> {
    const MARKS: usize = 10;
    let started = Arc::new(Mutex::new(Instant::now()));
    let (count, marks, done) =
        (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
    let handlers = Handlers::new().on({
        let (started, marks, done) = (started.clone(), marks.clone(), done.clone());
        move |_: Happened, _| {
            let before = count.fetch_add(1, Ordering::Relaxed);
            // At the end of each tenth.
            if (before + 1) * MARKS / events > before * MARKS / events {
                let elapsed = started.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
                marks.lock().unwrap_or_else(PoisonError::into_inner).push(elapsed);
            }
            if before + 1 == events {
                done.notify_one();
            }
            std::future::ready(Ok(()))
        }
    });
    let worker = worker.handlers(Subscription::new(SUBSCRIPTION)?, handlers).start().await?;
    let begin = || *started.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    begin();
    let mut resumed = Ok(true);
    let finish = async {
        if let Some(outbox) = paused {
            tokio::time::sleep(WARM_UP).await;
            begin();
            resumed = outbox.resume(SUBSCRIPTION).await;
        }
        if resumed.is_ok() {
            done.notified().await;
        }
    };
    worker.run_until(finish).await;
    resumed?;
    let everything = started.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
    let mut marks = std::mem::take(&mut *marks.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(last) = marks.last_mut() {
        *last = everything;
    }
    Ok(Drained { events, marks })
}

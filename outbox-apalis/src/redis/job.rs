use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use outbox_seaorm::ClaimedLane;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

/// What travels through Redis: a leased lane with its run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) lane: ClaimedLane,
    /// It finds out whether a destination that was down is back.
    pub(crate) probe: bool,
}

/// Jobs that came out of Redis and wait for the feed; a few, so that other workers get the others.
#[derive(Debug)]
pub(crate) struct Jobs {
    waiting: Mutex<VecDeque<Job>>,
    room: Semaphore,
    arrived: Notify,
}

impl Jobs {
    pub(crate) fn new(room: usize) -> Self {
        Self { waiting: Mutex::default(), room: Semaphore::new(room), arrived: Notify::new() }
    }

    /// Waits for room.
    pub(crate) async fn put(&self, job: Job) {
        // The semaphore is never closed.
        if let Ok(permit) = self.room.acquire().await {
            permit.forget();
        }
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        self.arrived.notify_one();
    }

    /// Waits until there may be a job.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    pub(crate) fn take(&self, jobs: usize) -> Vec<Job> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.min(waiting.len());
        self.room.add_permits(jobs);
        waiting.drain(..jobs).collect()
    }
}

//! What the core has to tell: to the log, to the metrics, and to whoever has started the worker.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use outbox_core::{DeliveryError, RecordedEvent, store::StoreError};

use crate::{
    assignment::Assignment,
    metrics::{self, Failed},
};

#[derive(Debug)]
pub(crate) enum Told {
    Attempted(Arc<RecordedEvent>),
    Delivered {
        event: Arc<RecordedEvent>,
        since_commit: Duration,
    },
    /// An attempt has failed. `counts` unless it is no failure of the worker's: the destination refused the event.
    Failed {
        event: Arc<RecordedEvent>,
        how: Failed,
        counts: bool,
        attempts: u32,
        error: String,
    },
    NotMade {
        event: Arc<RecordedEvent>,
        error: String,
    },
    /// A delivery has become a dead letter without an attempt that failed.
    Dead,
    KilledItsWorker {
        event: Arc<RecordedEvent>,
        attempts: u32,
    },
    /// Results were dropped: their lease was lost.
    Superseded(usize),
    LostLease(&'static str),
    NoThread,
    IsDown {
        error: DeliveryError,
        wait: Duration,
    },
    IsBack,
    IsGone(DeliveryError),
    VoidJobs(usize),
    /// A call to the store has failed.
    CallFailed {
        what: &'static str,
        error: StoreError,
        wait: Option<Duration>,
    },
    GivenUp,
}

impl Told {
    pub(crate) fn tell(self, assignment: &Assignment) {
        let (subscription, counts) = (&*assignment.name, &assignment.counts);
        match self {
            Self::Attempted(event) => metrics::attempted(subscription, &event),
            Self::Delivered { event, since_commit } => {
                counts.delivered.fetch_add(1, Relaxed);
                metrics::published(subscription, &event, since_commit);
            }
            Self::Failed { event, how, counts: one_more, attempts, error } => {
                counts.failed.fetch_add(u64::from(one_more), Relaxed);
                metrics::failed(subscription, &event, how);
                match how {
                    Failed::Dead | Failed::Permanent => {
                        counts.dead.fetch_add(1, Relaxed);
                        tracing::warn!(subscription, event_id = %event.id, attempts, error, "dead letter");
                    }
                    Failed::Retry | Failed::Unavailable => {
                        tracing::debug!(subscription, event_id = %event.id, attempts, error, "attempt failed");
                    }
                }
            }
            Self::NotMade { event, error } => {
                tracing::warn!(subscription, event_id = %event.id, error, "attempt given back");
            }
            Self::Dead => {
                counts.dead.fetch_add(1, Relaxed);
            }
            Self::KilledItsWorker { event, attempts } => {
                counts.dead.fetch_add(1, Relaxed);
                tracing::warn!(subscription, event_id = %event.id, attempts, "dead letter");
            }
            Self::Superseded(results) => (0..results).for_each(|_| metrics::superseded(subscription)),
            Self::LostLease(how) => tracing::warn!(subscription, "{how}"),
            Self::NoThread => {
                tracing::warn!(subscription, "all threads are blocked; an attempt is given back");
            }
            Self::IsDown { error, wait } => tracing::warn!(subscription, %error, ?wait, "the destination is down"),
            Self::IsBack => tracing::info!(subscription, "the destination is back"),
            Self::IsGone(error) => {
                tracing::error!(subscription, %error, "the destination is gone; the subscription is paused");
            }
            Self::VoidJobs(jobs) => metrics::dropped_jobs(subscription, "void", jobs),
            Self::CallFailed { what, error, wait: Some(wait) } => {
                tracing::warn!(subscription, %error, ?wait, "{what}");
            }
            Self::CallFailed { what, error, wait: None } => tracing::warn!(subscription, %error, "{what}"),
            Self::GivenUp => {
                tracing::warn!(subscription, "results could not be stored; leases end by themselves");
            }
        }
    }
}

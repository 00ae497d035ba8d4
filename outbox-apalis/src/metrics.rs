//! What happens to deliveries, counted through the `metrics` facade: each worker process counts its own. Labels are names,
//! never ids, and bounded.

use std::time::Duration;

use metrics::{counter, histogram};
use outbox_core::RecordedEvent;
use outbox_seaorm::metrics::{aggregate_type, event_type};

/// How a failed attempt ended: the label `outcome`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failed {
    /// It is tried again.
    Retry,
    /// It was the last: a dead letter.
    Dead,
    /// The error was permanent: a dead letter.
    Permanent,
    /// The destination is down; no attempt was spent.
    Unavailable,
}

impl Failed {
    fn label(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Dead => "dead",
            Self::Permanent => "permanent",
            Self::Unavailable => "unavailable",
        }
    }
}

/// An attempt begins.
pub(crate) fn attempted(subscription: &str, event: &RecordedEvent) {
    counter!(
        "outbox_delivery_attempts_total",
        "subscription" => subscription.to_owned(),
        "event_type" => event_type(&event.event_type),
    )
    .increment(1);
}

/// A delivery is stored as delivered, so long after its commit.
pub(crate) fn published(subscription: &str, event: &RecordedEvent, latency: Duration) {
    counter!(
        "outbox_messages_published_total",
        "subscription" => subscription.to_owned(),
        "event_type" => event_type(&event.event_type),
        "aggregate_type" => aggregate_type(&event.aggregate_type),
    )
    .increment(1);
    histogram!("outbox_publish_latency_seconds", "subscription" => subscription.to_owned()).record(latency);
}

/// An attempt has failed.
pub(crate) fn failed(subscription: &str, event: &RecordedEvent, failed: Failed) {
    counter!(
        "outbox_publish_errors_total",
        "subscription" => subscription.to_owned(),
        "event_type" => event_type(&event.event_type),
        "outcome" => failed.label(),
    )
    .increment(1);
}

/// The result of an attempt was dropped: its lease was lost.
pub(crate) fn superseded(subscription: &str) {
    counter!("outbox_superseded_total", "subscription" => subscription.to_owned()).increment(1);
}

/// A job of Redis was dropped: it was not what the database says.
pub(crate) fn dropped_jobs(subscription: &str, reason: &'static str, jobs: usize) {
    if jobs > 0 {
        counter!(
            "outbox_redis_jobs_dropped_total",
            "subscription" => subscription.to_owned(),
            "reason" => reason,
        )
        .increment(jobs as u64);
    }
}

use std::{
    any::Any,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use outbox_core::{DeliveryError, Outcome, Publisher, RecordedEvent};
use tokio::task::{JoinError, JoinHandle};

use crate::task::{Attempt, DeliveryTask};

/// What a subscription delivers to.
pub(crate) trait Destination: Send + Sync {
    /// Whether this process can deliver the event at all.
    fn knows(&self, event: &RecordedEvent) -> bool;

    /// Whether the delivery acknowledges itself, in the transaction of its effect.
    fn settles(&self, event: &RecordedEvent) -> bool;

    /// Whether it is outside of this process, where everything may fail at once without any event being to blame.
    fn is_outside(&self) -> bool;

    /// Whether it writes into the database of the store.
    fn needs_database(&self) -> bool {
        false
    }

    fn deliver<'a>(&'a self, event: &'a Arc<RecordedEvent>, attempt: &'a Attempt) -> BoxFuture<'a, End>;
}

/// How an attempt ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The outcome is to be acknowledged.
    Outcome(Outcome),
    /// It was acknowledged together with its effect.
    Settled,
    /// The lease was lost; nothing was written.
    Superseded,
    /// It was stopped from outside and did not come to an outcome.
    Cancelled,
    /// This process does not know the event's type or version.
    Unknown,
    /// The database did not let the attempt begin, or commit; nothing was written.
    Unavailable(DeliveryError),
}

#[derive(Debug)]
pub(crate) struct PublisherDestination<P>(pub(crate) P);

impl<P: Publisher> Destination for PublisherDestination<P> {
    fn knows(&self, _: &RecordedEvent) -> bool {
        true
    }

    fn settles(&self, _: &RecordedEvent) -> bool {
        false
    }

    fn is_outside(&self) -> bool {
        true
    }

    fn deliver<'a>(&'a self, event: &'a Arc<RecordedEvent>, attempt: &'a Attempt) -> BoxFuture<'a, End> {
        Box::pin(async move { End::Outcome(self.0.publish(&attempt.delivery(event)).await.into()) })
    }
}

/// The result of a task, on its way to the feed.
#[derive(Debug)]
pub(crate) struct AttemptResult {
    pub(crate) key: String,
    pub(crate) attempt: u64,
    pub(crate) end: End,
    pub(crate) started: Instant,
}

/// Runs one attempt in a task of its own, so that a panic is an error and a future that never yields stops nobody
/// else's.
pub(crate) async fn attempt(destination: Arc<dyn Destination>, task: DeliveryTask) -> End {
    let Some(attempt) = task.attempt else { return End::Cancelled };
    if attempt.cancelled.is_cancelled() {
        return End::Cancelled;
    }
    if !destination.knows(&task.event) {
        return End::Unknown;
    }
    let (cancelled, time, event) = (attempt.cancelled.clone(), attempt.time, task.event);
    let (settles, outside) = (destination.settles(&event), destination.is_outside());
    let mut running = AbortOnDrop(tokio::spawn(async move {
        attempt.begun.store(true, Ordering::Release);
        destination.deliver(&event, &attempt).await
    }));
    tokio::select! {
        // An attempt that has ended counts, even if it was cancelled at the same moment.
        biased;
        joined = &mut running.0 => joined.unwrap_or_else(|error| retry(stopped_message(error))),
        // If it is committing just now, it ends its lease or keeps it; giving the lane back is right after both.
        () = cancelled.cancelled() => End::Cancelled,
        // What settles itself minds its time: the waits for its transaction and for its commit do not count.
        () = tokio::time::sleep(time), if !settles => match outside {
            true => End::Outcome(Outcome::Retry(DeliveryError::unavailable(no_result(time)))),
            false => retry(no_result(time)),
        },
    }
}

fn retry(message: String) -> End {
    End::Outcome(Outcome::Retry(DeliveryError::retry(message)))
}

pub(crate) fn no_result(within: Duration) -> String {
    format!("no result within {within:?}")
}

struct AbortOnDrop(JoinHandle<End>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn stopped_message(error: JoinError) -> String {
    error.try_into_panic().map_or_else(|_| "the attempt was stopped".to_owned(), |panic| panic_message(&*panic))
}

pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", text.unwrap_or("no message"))
}

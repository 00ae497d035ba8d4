use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use apalis_core::{
    backend::{Backend, BackendConfig, WireFormatBackend, codec::Codec, finalize::Ephemeral},
    layers::Identity,
    task::Task,
    worker::context::WorkerContext,
};
use futures_util::Sink;
use outbox_seaorm::Outbox;
use sea_orm::DbErr;
use uuid::Uuid;

use crate::{
    destination::{AttemptResult, End},
    feed::{Ends, Feeds, Line},
    task::DeliveryTask,
};

/// The outbox as an apalis backend: deliveries of one subscription as tasks.
///
/// A [`Worker`](crate::Worker) drives it. By itself it lists the deliveries of a subscription with their states for
/// apalis-board; pushing is refused, because deliveries come from committed events only.
///
/// Database errors are no errors to the worker: they are tried again inside, with backoff, because an error would end
/// it.
#[derive(Debug)]
pub struct OutboxBackend {
    /// What is listed. A worker without a database lists nothing.
    outbox: Option<Outbox>,
    pub(crate) subscription: String,
    feed: Feed,
}

/// None if it only lists.
struct Feed(Option<Ends>);

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Running" } else { "None" })
    }
}

/// Why a listing failed, or a push was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The database failed.
    #[error("the deliveries could not be read")]
    Database(#[from] DbErr),
    /// Deliveries are not pushed.
    #[error("deliveries come from committed events; push an event in a transaction instead")]
    PushRefused,
    /// What feeds the worker ended early; the worker is started again.
    #[error("what feeds the worker ended early")]
    FeedEnded,
    /// The worker has no database.
    #[error("the store of this worker lists nothing")]
    NoListing,
    /// The id is not one of a delivery.
    #[error("the id of a delivery is SUBSCRIPTION:EVENT_ID")]
    UnknownId,
}

impl OutboxBackend {
    /// Lists the deliveries of a subscription; yields no tasks.
    #[must_use]
    pub fn listing(outbox: Outbox, subscription: impl Into<String>) -> Self {
        Self { outbox: Some(outbox), subscription: subscription.into(), feed: Feed(None) }
    }

    /// Delivers the subscription that has this index. Also where its attempts report their ends.
    pub(crate) fn working(outbox: Option<Outbox>, feeds: &Feeds, index: usize) -> (Self, Line) {
        let subscription = feeds.served()[index].assignment.name.to_string();
        let ends = feeds.begin(index);
        let line = ends.line().clone();
        (Self { outbox, subscription, feed: Feed(Some(ends)) }, line)
    }

    pub(crate) fn outbox(&self) -> Result<&Outbox, BackendError> {
        self.outbox.as_ref().ok_or(BackendError::NoListing)
    }

    pub(crate) fn event_id(&self, id: &str) -> Result<Uuid, BackendError> {
        let id = id.strip_prefix(&*self.subscription).and_then(|id| id.strip_prefix(':'));
        id.and_then(|id| id.parse().ok()).ok_or(BackendError::UnknownId)
    }
}

impl Backend for OutboxBackend {
    type Task = Task<DeliveryTask>;
    type Error = BackendError;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        worker: &WorkerContext,
    ) -> Poll<Option<Result<Self::Task, Self::Error>>> {
        worker.heartbeat(cx);
        match &mut self.feed.0 {
            // A feed ends before its worker only on a bug: the error has the worker started again.
            Some(ends) => ends.poll_task(cx).map(|task| Some(task.ok_or(BackendError::FeedEnded))),
            None => Poll::Pending,
        }
    }

    /// Gives back what the worker has not begun, and waits until everything is acknowledged.
    fn poll_close(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Self::Error>> {
        if let Some(ends) = &mut self.feed.0 {
            ends.stop();
            // Until the feed has ended: it may hand out one more before it notices.
            while let Some(task) = ready!(ends.poll_task(cx)) {
                give_back(ends.line(), task);
            }
            self.feed.0 = None;
        }
        Poll::Ready(Ok(()))
    }
}

fn give_back(line: &Line, task: Task<DeliveryTask>) {
    if let Some(attempt) = task.args.attempt {
        line.ended(AttemptResult {
            key: attempt.lane.key,
            attempt: attempt.id,
            end: End::Cancelled,
            started: std::time::Instant::now(),
        });
    }
}

impl BackendConfig for OutboxBackend {
    type Args = DeliveryTask;
    type Id = String;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &Self::Config {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Self::Layer {
        Identity::new()
    }
}

/// Tasks travel as they are: the event is stored in the outbox, not in the task.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoCodec;

impl Codec<DeliveryTask> for NoCodec {
    type Error = std::convert::Infallible;
    type Compact = DeliveryTask;

    fn encode(&self, task: &DeliveryTask) -> Result<DeliveryTask, Self::Error> {
        Ok(task.clone())
    }

    fn decode(&self, task: &DeliveryTask) -> Result<DeliveryTask, Self::Error> {
        Ok(task.clone())
    }
}

impl WireFormatBackend for OutboxBackend {
    type Codec = NoCodec;
    type Compact = DeliveryTask;

    fn codec(&self) -> &Self::Codec {
        &NoCodec
    }
}

impl Sink<Task<DeliveryTask>> for OutboxBackend {
    type Error = BackendError;

    fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, _: Task<DeliveryTask>) -> Result<(), Self::Error> {
        Err(BackendError::PushRefused)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, sync::Arc, time::Duration};

    use apalis_core::task::builder::TaskBuilder;
    use outbox_core::RecordedEvent;
    use outbox_seaorm::LaneRef;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{clock::DatabaseClock, feed, task::Attempt};

    fn task(id: u64) -> Task<DeliveryTask> {
        let event: RecordedEvent = serde_json::from_value(serde_json::json!({
            "position": 1, "id": Uuid::nil(), "event_type": "note.noted", "schema_version": 1, "aggregate_type": "note",
            "aggregate_id": "a", "payload": {}, "occurred_at": "2026-11-21T00:00:00Z",
            "recorded_at": "2026-11-21T00:00:00Z",
        }))
        .unwrap();
        let attempt = Attempt {
            id,
            lane: LaneRef { subscription: 1, key: "note/a".to_owned(), token: 1, worker: "w".to_owned() },
            subscription: "s".into(),
            number: 1,
            log: outbox_core::AttemptLog::default(),
            last: true,
            time: Duration::MAX,
            clock: DatabaseClock::new(chrono::Utc::now(), std::time::Instant::now()),
            begun: Arc::default(),
            cancelled: CancellationToken::new(),
        };
        TaskBuilder::new(DeliveryTask { event: Arc::new(event), attempt: Some(attempt) }).build()
    }

    #[tokio::test]
    async fn a_task_that_is_handed_out_while_the_worker_closes_is_given_back() {
        let (ends, mut dispatcher) = feed::ends();
        let handing_out = tokio::spawn(async move {
            assert!(dispatcher.is_told_to_stop().await);
            for id in [1, 2] {
                // By now the backend waits.
                tokio::task::yield_now().await;
                dispatcher.tasks.send(task(id)).await.unwrap();
                let result = dispatcher.result().await;
                assert!(matches!(result.end, End::Cancelled) && result.attempt == id);
            }
        });
        let mut backend = OutboxBackend { outbox: None, subscription: "s".to_owned(), feed: Feed(Some(ends)) };
        let worker = WorkerContext::new("w");
        let closed = poll_fn(|cx| Backend::poll_close(&mut backend, cx, &worker));
        tokio::time::timeout(Duration::from_secs(5), closed).await.unwrap().unwrap();
        handing_out.await.unwrap();
    }
}

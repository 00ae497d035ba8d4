use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use outbox_core::{AttemptLog, Delivery, RecordedEvent, store::LaneRef};
use serde::{Deserialize, Serialize};

use crate::clock::DatabaseClock;

/// The argument of an apalis task: one attempt of one delivery.
///
/// Its serialized form is the event, which is what the dashboard shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "RecordedEvent", into = "RecordedEvent")]
pub struct DeliveryTask {
    pub(crate) event: Arc<RecordedEvent>,
    pub(crate) attempt: Option<Attempt>,
}

/// What the attempt needs besides the event; a task that is only listed has none.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    /// Another one for each attempt in this process. Tokens may come again after a crash of the database server.
    pub(crate) id: u64,
    pub(crate) lane: LaneRef,
    pub(crate) subscription: Arc<str>,
    pub(crate) number: u32,
    /// Failed attempts before this one.
    pub(crate) log: AttemptLog,
    /// Whether the run of the lane ends with this delivery.
    pub(crate) last: bool,
    /// How long the handler or publisher may take.
    pub(crate) time: Duration,
    pub(crate) clock: DatabaseClock,
    /// Set when the attempt begins: until then nothing of it can have happened.
    pub(crate) begun: Arc<AtomicBool>,
    /// Cancelled when the lease is lost or the worker stops.
    pub(crate) cancelled: tokio_util::sync::CancellationToken,
}

impl DeliveryTask {
    pub(crate) fn listed(event: RecordedEvent) -> Self {
        Self { event: Arc::new(event), attempt: None }
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &RecordedEvent {
        &self.event
    }
}

impl Attempt {
    pub(crate) fn delivery(&self, event: &Arc<RecordedEvent>) -> Delivery {
        Delivery::new(event.clone(), self.subscription.clone(), self.number).starting_at(self.clock.now())
    }
}

impl From<RecordedEvent> for DeliveryTask {
    fn from(event: RecordedEvent) -> Self {
        Self::listed(event)
    }
}

impl From<DeliveryTask> for RecordedEvent {
    fn from(task: DeliveryTask) -> Self {
        Arc::unwrap_or_clone(task.event)
    }
}

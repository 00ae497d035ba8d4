//! What a worker serves: one subscription, by whom, to where, and within which limits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use outbox_core::{AfterDeadLetter, RetryPolicy, store::Store};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::DatabaseClock, counts::Counts, desk::Desk, destination::Destination, feed::Every, options::Options,
};

/// The id of a subscription. Another one, if it is removed and registered again while the worker runs; one that no
/// subscription has, if it is gone.
#[derive(Clone, Debug)]
pub(crate) struct SubscriptionId(Arc<AtomicI32>);

impl SubscriptionId {
    pub(crate) fn new(id: i32) -> Self {
        Self(Arc::new(AtomicI32::new(id)))
    }

    pub(crate) fn now(&self) -> i32 {
        self.0.load(Relaxed)
    }

    /// Returns whether it was another one.
    pub(crate) fn set(&self, id: Option<i32>) -> bool {
        let id = id.unwrap_or(0);
        self.0.swap(id, Relaxed) != id
    }
}

/// How many deliveries this process may have under way, of those that all workers may have together.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    deliveries: Arc<AtomicUsize>,
    desk: Arc<Desk>,
}

impl Share {
    pub(crate) fn new(deliveries: usize, desk: Arc<Desk>) -> Self {
        Self { deliveries: Arc::new(AtomicUsize::new(deliveries)), desk }
    }

    pub(crate) fn now(&self) -> usize {
        self.deliveries.load(Relaxed)
    }

    pub(crate) fn set(&self, deliveries: usize) {
        if self.deliveries.swap(deliveries, Relaxed) != deliveries {
            self.desk.tell_all();
        }
    }
}

/// A subscription as this process serves it: a plain record.
#[derive(Clone)]
pub(crate) struct Assignment {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) subscription: SubscriptionId,
    pub(crate) name: Arc<str>,
    pub(crate) worker: Arc<str>,
    pub(crate) retry: RetryPolicy,
    pub(crate) destination: Arc<dyn Destination>,
    pub(crate) after_dead_letter: AfterDeadLetter,
    /// The shortest times between two attempts.
    pub(crate) every: Every,
    /// How many deliveries this process may have under way, of those that all workers may have together.
    pub(crate) share: Share,
    pub(crate) options: Options,
    /// How long a transactional handler may take.
    pub(crate) effect_time: Duration,
    /// The longest wait between two looks at the database.
    pub(crate) poll: Duration,
    /// Cancelled when the worker is asked to stop.
    pub(crate) stop: CancellationToken,
    /// Where the feed runs.
    pub(crate) runtime: Handle,
    pub(crate) until: Until,
    pub(crate) counts: Arc<Counts>,
    pub(crate) clock: DatabaseClock,
    /// Cancelled when the feed has nothing to do any more; see [`Until`].
    pub(crate) idle: CancellationToken,
    /// Where lanes come from that routing has leased; one for all subscriptions of a worker.
    pub(crate) desk: Arc<Desk>,
}

/// When a feed has done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Never; it is told to stop.
    Stopped,
    /// When nothing is due.
    Drained,
    /// After what one claim has leased.
    Once,
}

//! Routing: which subscriptions get an event, in which order. The request only stores events with a mark each.

use std::{sync::Arc, time::Duration};

use sea_orm::DbErr;

use crate::{ClaimedLane, Outbox};

/// Stands for the router where the ids of subscriptions stand: in wake-ups and notifications.
pub(crate) const ROUTER: i32 = 0;

/// What a worker of this process would take at once: lanes that routing creates may be leased to it by the same
/// statement.
#[derive(Clone, Debug)]
pub struct Taker {
    /// The subscription.
    pub subscription: i32,
    /// Who would hold the leases.
    pub worker: Arc<str>,
    /// How many lanes at most.
    pub lanes: u32,
    /// How many deliveries of each at most.
    pub run: u32,
    /// How long the leases last.
    pub lease: Duration,
}

/// When to look for events again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextLook {
    /// At once: more is waiting.
    Now,
    /// In some milliseconds: another process was at it, or something has to come first that is not visible yet.
    Soon,
    /// When something wakes the router: nothing is waiting.
    Woken,
}

/// What one look has done.
#[derive(Debug)]
pub struct Routed {
    /// How many events are routed.
    pub events: usize,
    /// Lanes that were leased with it, to their takers.
    pub leased: Vec<ClaimedLane>,
    /// When to look again.
    pub next: NextLook,
}

/// Routes the events of this process' commits, and those that it finds.
#[derive(Debug)]
pub struct Router {
    outbox: Outbox,
}

impl Outbox {
    /// A router. While it lives, commits of this process hand their events to it; a second one only looks.
    #[must_use]
    pub fn router(&self) -> Router {
        Router { outbox: self.clone() }
    }
}

impl Router {
    /// Waits until there may be something to route: a commit of this process, a notification, an event that was put back.
    ///
    /// # Cancel safety
    ///
    /// Safe: a wake-up that was not returned is returned by the next call.
    pub async fn woken(&self) {
        self.outbox.woken(ROUTER).await;
    }

    /// Looks for events that are not routed, and routes up to `most` of them.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is routed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open what is routed and leased. Run it in a task of its own.
    pub async fn route(&mut self, _takers: &[Taker], _most: usize) -> Result<Routed, DbErr> {
        Ok(Routed { events: 0, leased: Vec::new(), next: NextLook::Woken })
    }
}

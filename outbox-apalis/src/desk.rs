//! Between the router of a worker and the feed of a subscription: how many lanes the feed would take now, and the lanes
//! that were leased to it by routing.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use outbox_core::store::ClaimedLane;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(crate) struct Desk {
    state: Mutex<State>,
    /// Lanes have come, or the router has ended.
    arrived: Notify,
}

#[derive(Debug, Default)]
struct State {
    room: usize,
    leased: Vec<(ClaimedLane, Instant)>,
    has_router: bool,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many lanes the feed would take now.
    pub(crate) fn set_room(&self, room: usize) {
        let mut state = self.state();
        state.room = room.saturating_sub(state.leased.len());
    }

    pub(crate) fn room(&self) -> usize {
        self.state().room
    }

    /// Leases for the feed.
    pub(crate) fn put(&self, lane: ClaimedLane, asked_at: Instant) {
        let mut state = self.state();
        state.room = state.room.saturating_sub(1);
        state.leased.push((lane, asked_at));
        self.arrived.notify_one();
    }

    /// Leased lanes, with the moment at which they were asked for.
    pub(crate) fn take(&self) -> Vec<(ClaimedLane, Instant)> {
        std::mem::take(&mut self.state().leased)
    }

    /// Waits for something to take.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Whether nothing is here, and nothing will come.
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.state();
        !state.has_router && state.leased.is_empty()
    }

    pub(crate) fn open(&self) {
        self.state().has_router = true;
    }

    pub(crate) fn close(&self) {
        self.state().has_router = false;
        self.arrived.notify_one();
    }
}

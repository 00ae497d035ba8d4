//! Between the router of a worker and its dispatcher: how many lanes each subscription would take now, and the lanes that
//! were leased by routing.

use std::{
    collections::BTreeMap,
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

/// What a subscription would take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) lanes: usize,
    /// Tenants that have enough.
    pub(crate) passed: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    /// By the index of a subscription; only where there is room.
    rooms: BTreeMap<usize, Room>,
    leased: BTreeMap<usize, Vec<(ClaimedLane, Instant)>>,
    has_router: bool,
    /// Something concerns all of them.
    all: bool,
}

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many lanes a subscription would take now.
    pub(crate) fn set_room(&self, index: usize, mut room: Room) {
        let mut state = self.state();
        room.lanes = room.lanes.saturating_sub(state.leased.get(&index).map_or(0, Vec::len));
        if room.lanes == 0 {
            state.rooms.remove(&index);
        } else {
            state.rooms.insert(index, room);
        }
    }

    /// The subscriptions that would take lanes now.
    pub(crate) fn rooms(&self) -> Vec<(usize, Room)> {
        self.state().rooms.iter().map(|(index, room)| (*index, room.clone())).collect()
    }

    /// Leases for a subscription.
    pub(crate) fn put(&self, index: usize, lane: ClaimedLane, asked_at: Instant) {
        let mut state = self.state();
        if let Some(room) = state.rooms.get_mut(&index) {
            room.lanes -= 1;
            if room.lanes == 0 {
                state.rooms.remove(&index);
            }
        }
        state.leased.entry(index).or_default().push((lane, asked_at));
        self.arrived.notify_one();
    }

    /// Leased lanes of each subscription, with the moment at which they were asked for.
    pub(crate) fn take(&self) -> BTreeMap<usize, Vec<(ClaimedLane, Instant)>> {
        std::mem::take(&mut self.state().leased)
    }

    /// Something has changed that all subscriptions look at.
    pub(crate) fn tell_all(&self) {
        self.state().all = true;
        self.arrived.notify_one();
    }

    /// Whether that is so, once.
    pub(crate) fn concerns_all(&self) -> bool {
        std::mem::take(&mut self.state().all)
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
        self.tell_all();
    }
}

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{TimeDelta, Utc};

use super::model::{FinishedDelivery, Model};
use crate::{
    AttemptLog, Batch, Events, Subject, Subscription,
    store::{
        Announcer, CircuitState, Claim, Holder, LaneRef, LaneReport, LeaseState, News, NewsItem, Reservation, Settled,
        Store, StoreError, TakenOver, Wanted,
    },
};

/// A store in memory, for fast tests of handlers and publishers: no database, no migration, no file.
///
/// A worker delivers from it by the same rules as from a database, with real time: orders per key, retries, dead letters,
/// leases. Handlers that write in the transaction of their acknowledgement need a database.
///
/// Clones are the same store: give one to the worker and commit to the other.
///
/// ```
/// use outbox_core::{Context, Events, Limits, NewEvent, Subscription, testing::MemoryStore};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MemoryStore::new();
/// store.register(&Subscription::new("mails")?);
/// let events = Events::new(Limits::default(), Context::default());
/// events.push(NewEvent::dynamic("order.placed", "order", "7", &())?)?;
/// store.commit(&events);
/// assert_eq!(store.waiting("mails"), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    model: Model,
    subscriptions: Vec<(i32, Subscription)>,
    events: i64,
    announcer: Announcer,
}

impl Default for State {
    fn default() -> Self {
        Self { model: Model::new(1), subscriptions: Vec::new(), events: 0, announcer: Announcer::default() }
    }
}

impl State {
    fn id(&self, name: &str) -> Option<i32> {
        self.subscriptions.iter().find(|(_, each)| each.name() == name).map(|(id, _)| *id)
    }
}

impl MemoryStore {
    /// A store in which nothing is.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a subscription, or gives it another definition. It gets what is committed from now on.
    pub fn register(&self, subscription: &Subscription) {
        self.add(subscription);
    }

    fn add(&self, subscription: &Subscription) -> i32 {
        let mut state = self.state();
        if let Some((id, known)) = state.subscriptions.iter_mut().find(|(_, each)| each.name() == subscription.name()) {
            *known = subscription.clone();
            return *id;
        }
        let id = i32::try_from(state.subscriptions.len() + 1).unwrap_or(i32::MAX);
        state.subscriptions.push((id, subscription.clone()));
        state.model.subscribe(id, subscription.name());
        id
    }

    /// Stores what was pushed, as a commit does, and closes the collector.
    pub fn commit(&self, events: &Events) {
        let Batch { events, context } = events.close();
        let mut state = self.state();
        let now = Utc::now();
        for event in events {
            state.events += 1;
            let (delay, not_before) = event.schedule();
            let head_start = TimeDelta::minutes(event.head_start_minutes().into());
            let delayed = delay.map(|delay| now + TimeDelta::from_std(delay).unwrap_or(TimeDelta::MAX));
            let due_at = delayed.into_iter().chain(not_before).max().unwrap_or(now - head_start);
            let event = Arc::new(event.into_recorded(state.events, now, &context));
            let subject = Subject::of_recorded(&event);
            let matching = state.subscriptions.iter().filter(|(_, each)| each.filter().matches(&subject));
            let keys: Vec<(i32, String)> = matching.map(|(id, each)| (*id, each.key_choice().key(&subject))).collect();
            for (id, key) in keys {
                state.model.add(id, &key, event.clone(), due_at);
                state.announcer.announce(&[NewsItem::Deliveries(id)]);
            }
        }
    }

    /// Pauses a subscription, if there is one of this name.
    pub fn pause(&self, subscription: &str) {
        self.set_paused(subscription, true);
    }

    /// Goes on with a subscription, if there is one of this name.
    pub fn resume(&self, subscription: &str) {
        self.set_paused(subscription, false);
    }

    fn set_paused(&self, subscription: &str, is_paused: bool) {
        let mut state = self.state();
        let Some(id) = state.id(subscription) else { return };
        state.model.set_paused(id, is_paused);
        state.announcer.announce(&[NewsItem::Deliveries(id), NewsItem::State(id)]);
    }

    /// How many deliveries of a subscription wait or are under way.
    #[must_use]
    pub fn waiting(&self, subscription: &str) -> usize {
        let state = self.state();
        let id = state.id(subscription);
        id.map_or(0, |id| state.model.lanes(id).map(|(_, lane)| lane.queue.len()).sum())
    }

    /// The deliveries of a subscription that are over, with the positions of their events: those that were delivered, and
    /// the dead letters.
    #[must_use]
    pub fn finished(&self, subscription: &str) -> Vec<(i64, FinishedDelivery)> {
        let state = self.state();
        let of = |id| state.model.finished(id).map(|(position, each)| (position, each.clone())).collect();
        state.id(subscription).map_or_else(Vec::new, of)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn register(&self, subscription: &Subscription) -> Result<i32, StoreError> {
        Ok(self.add(subscription))
    }

    async fn claim(&self, holder: Holder<'_>, wanted: &[Wanted]) -> Result<Vec<Claim>, StoreError> {
        let (mut state, now) = (self.state(), Utc::now());
        Ok(wanted.iter().map(|wanted| state.model.claim(now, holder, wanted)).collect())
    }

    async fn take_over(&self, holder: Holder<'_>, wanted: Wanted, lanes: &[LaneRef]) -> Result<TakenOver, StoreError> {
        Ok(self.state().model.take_over(Utc::now(), holder, &wanted, lanes))
    }

    async fn settle(&self, reports: &[LaneReport]) -> Result<Vec<Settled>, StoreError> {
        Ok(self.state().model.settle(Utc::now(), reports))
    }

    async fn renew(&self, lanes: &[LaneRef], lease: Duration) -> Result<Vec<LeaseState>, StoreError> {
        Ok(self.state().model.renew(Utc::now(), lanes, lease))
    }

    async fn note(&self, notes: &[(LaneRef, AttemptLog)]) -> Result<Vec<LeaseState>, StoreError> {
        Ok(self.state().model.note(notes))
    }

    async fn held(&self, lanes: &[LaneRef]) -> Result<Vec<bool>, StoreError> {
        Ok(self.state().model.held(lanes))
    }

    async fn set_circuit(&self, subscription: i32, circuit: CircuitState) -> Result<(), StoreError> {
        self.state().model.set_circuit(Utc::now(), subscription, circuit);
        Ok(())
    }

    async fn pause(&self, subscription: &str) -> Result<(), StoreError> {
        self.pause(subscription);
        Ok(())
    }

    async fn reserve(&self, asked: &[Reservation]) -> Result<Vec<Option<Duration>>, StoreError> {
        let (mut state, now) = (self.state(), Utc::now());
        Ok(asked.iter().map(|asked| state.model.reserve(now, asked)).collect())
    }

    fn news(&self) -> News {
        self.state().announcer.subscribe()
    }

    fn lost_connections(&self) -> u64 {
        0
    }
}

//! The database as the [`Store`] of workers.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use async_trait::async_trait;
use outbox_core::{
    AttemptLog, Subscription,
    store::{
        CircuitState, Claim, ClaimedLane, Holder, LaneRef, LaneReport, LeaseState, News, Reservation, Settled, Store,
        StoreError, TakenOver, Wanted,
    },
};
use sea_orm::DbErr;
use serde::Serialize;

use crate::{
    Outbox,
    flush::{json, seconds},
};

#[async_trait]
impl Store for Outbox {
    async fn register(&self, subscription: &Subscription) -> Result<i32, StoreError> {
        self.register(subscription).await.map_err(StoreError::new)
    }

    async fn claim(&self, holder: Holder<'_>, wanted: &[Wanted]) -> Result<Vec<Claim>, StoreError> {
        self.claim_of(holder, wanted).await.map_err(failed)
    }

    async fn take_over(&self, holder: Holder<'_>, wanted: Wanted, lanes: &[LaneRef]) -> Result<TakenOver, StoreError> {
        let (Holder { worker, lease }, Wanted { subscription, run, .. }) = (holder, wanted);
        let taken = self.take_over(subscription, worker, lanes, run, lease).await.map_err(failed)?;
        let keys: HashSet<&str> = taken.iter().map(|ClaimedLane { lane, .. }| lane.key.as_str()).collect();
        let is_left = |lane: &&LaneRef| lane.subscription == subscription && !keys.contains(lane.key.as_str());
        let others: Vec<LaneRef> = lanes.iter().filter(is_left).cloned().collect();
        let busy = if others.is_empty() { Vec::new() } else { self.relayed(&others).await.map_err(failed)? };
        Ok(TakenOver { lanes: taken, busy })
    }

    async fn route(&self) -> Result<(), StoreError> {
        self.route_waiting().await.map(|_| ()).map_err(failed)
    }

    async fn settle(&self, reports: &[LaneReport]) -> Result<Vec<Settled>, StoreError> {
        self.settle(reports).await.map_err(failed)
    }

    async fn renew(&self, lanes: &[LaneRef], lease: Duration) -> Result<Vec<LeaseState>, StoreError> {
        let done = self.renew(lanes, lease).await.map_err(failed)?.into_iter().collect();
        self.states(lanes.iter(), &done).await.map_err(failed)
    }

    async fn note(&self, notes: &[(LaneRef, AttemptLog)]) -> Result<Vec<LeaseState>, StoreError> {
        let done = self.note_attempts(notes).await.map_err(failed)?;
        self.states(notes.iter().map(|(lane, _)| lane), &done).await.map_err(failed)
    }

    async fn held(&self, lanes: &[LaneRef]) -> Result<Vec<bool>, StoreError> {
        let held: HashSet<LaneRef> = self.held(lanes).await.map_err(failed)?.into_iter().collect();
        Ok(lanes.iter().map(|lane| held.contains(lane)).collect())
    }

    async fn set_circuit(&self, subscription: i32, circuit: CircuitState) -> Result<(), StoreError> {
        let set = match circuit {
            CircuitState::Closed => self.close_circuit(subscription).await,
            CircuitState::Open { wait, failed } => self.open_circuit(subscription, wait, failed).await,
        };
        set.map_err(failed)
    }

    async fn pause(&self, subscription: &str) -> Result<(), StoreError> {
        self.pause(subscription).await.map(|_| ()).map_err(failed)
    }

    async fn reserve(&self, asked: &[Reservation]) -> Result<Vec<Option<Duration>>, StoreError> {
        self.reserve(asked).await.map_err(failed)
    }

    fn news(&self) -> News {
        self.announcer().subscribe()
    }

    fn lost_connections(&self) -> u64 {
        self.lost_connections()
    }
}

#[derive(Serialize)]
struct ReservationRow {
    subscription: i32,
    time: f64,
    longest: f64,
}

impl Outbox {
    async fn reserve(&self, asked: &[Reservation]) -> Result<Vec<Option<Duration>>, DbErr> {
        let row = |asked: &Reservation| ReservationRow {
            subscription: asked.subscription,
            time: seconds(asked.time()),
            longest: seconds(asked.longest()),
        };
        let asked_rows: Vec<ReservationRow> = asked.iter().map(row).collect();
        let rows = self.query_all(self.store(), self.sql().reserve, [json(&asked_rows)?.into()]).await?;
        let reserved = rows.iter().map(|row| Ok((row.try_get("", "id")?, row.try_get::<f64>("", "after")?)));
        let reserved = reserved.collect::<Result<HashMap<i32, f64>, DbErr>>()?;
        let after = |asked: &Reservation| {
            let after = reserved.get(&asked.subscription)?;
            Some(Duration::try_from_secs_f64(after.max(0.0)).unwrap_or_default())
        };
        Ok(asked.iter().map(after).collect())
    }

    /// What has become of leases, of which those in `done` are held and done.
    async fn states(
        &self,
        lanes: impl Iterator<Item = &LaneRef> + Clone,
        done: &HashSet<LaneRef>,
    ) -> Result<Vec<LeaseState>, DbErr> {
        let others: Vec<LaneRef> = lanes.clone().filter(|lane| !done.contains(lane)).cloned().collect();
        let held = if others.is_empty() { Vec::new() } else { self.held(&others).await? };
        let held: HashSet<LaneRef> = held.into_iter().collect();
        let state = |lane| match lane {
            lane if done.contains(lane) => LeaseState::Done,
            lane if held.contains(lane) => LeaseState::Busy,
            _ => LeaseState::Lost,
        };
        Ok(lanes.map(state).collect())
    }
}

fn failed(error: DbErr) -> StoreError {
    StoreError::new(error)
}

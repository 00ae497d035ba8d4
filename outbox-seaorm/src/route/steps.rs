//! Routing on SQLite: statement by statement in a write transaction, which excludes all other writers. A request routes
//! its own events, and what waits before them; a worker routes what SQL has inserted.

use std::time::{Duration, Instant};

use outbox_core::Batch;
use sea_orm::{DatabaseTransaction, DbErr};

use super::{NextLook, ROUTER, Routed, Waiting, plan::keys, set_gone_aside};
use crate::{
    Outbox,
    flush::{self, DeliveryRow, insert_deliveries, json},
    sql::Route,
    subscriptions::KnownSubscriptions,
};

/// How much a request routes that is not its own: more is left to a worker, with what is its own.
const MOST_IN_FLUSH: i64 = 100;

/// How long one transaction of a worker may take: requests wait meanwhile.
const LONG: Duration = Duration::from_millis(5);

/// How many events a transaction routes: as many as are done in time.
#[derive(Debug)]
pub(super) struct Pace {
    events: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { events: 50 }
    }
}

impl Pace {
    fn took(&mut self, time: Duration) {
        if time > LONG {
            self.events = (self.events / 2).max(1);
        } else if time < LONG / 2 {
            self.events = (self.events * 2).min(super::MOST);
        }
    }
}

/// In the transaction of a request: stores its events, with their deliveries, or with marks if much waits before them.
/// Returns whom to wake.
pub(crate) async fn flush(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    batch: Batch,
    statements: (&'static str, &'static str),
) -> Result<Vec<i32>, DbErr> {
    let (insert_events, insert_marks) = statements;
    let (known, waits) = outbox.current_known_and_waits(tx).await?;
    let mut waiting = if waits { read(outbox, tx, MOST_IN_FLUSH + 1).await? } else { Vec::new() };
    set_gone_aside(outbox, tx, &mut waiting).await?;
    let positions = flush::insert_events(outbox, tx, &batch, insert_events).await?;
    if waiting.len() > usize::try_from(MOST_IN_FLUSH).unwrap_or(usize::MAX) {
        let positions: Vec<i64> = positions.into_values().collect();
        outbox.execute(tx, insert_marks, [json(&positions)?.into()]).await?;
        return Ok(vec![ROUTER]);
    }
    let foreign = waiting.len();
    for event in batch.events {
        let position = *positions.get(&event.id()).ok_or(DbErr::RecordNotInserted)?;
        let event = event.into_recorded(position, chrono::DateTime::UNIX_EPOCH, &batch.context);
        waiting.push(Waiting { position, event: Some(event), has_payload: true, due: 0.0 });
    }
    write(outbox, tx, &known, &waiting, foreign).await
}

/// In a transaction of its own.
pub(super) async fn route(outbox: &Outbox, pace: &mut Pace, most: usize) -> Result<Routed, DbErr> {
    // Asked first: an idle look takes no write lock.
    if outbox.last_unrouted().await?.is_none() {
        return Ok(Routed::nothing(NextLook::Woken));
    }
    let began = Instant::now();
    let page = most.min(pace.events);
    let tx = outbox.begin_write().await?;
    let mut waiting = read(outbox, &tx, i64::try_from(page).unwrap_or(i64::MAX)).await?;
    let full = waiting.len() >= page;
    set_gone_aside(outbox, &tx, &mut waiting).await?;
    let known = outbox.current_known(&tx).await?;
    let woken = write(outbox, &tx, &known, &waiting, waiting.len()).await?;
    tx.commit().await?;
    pace.took(began.elapsed());
    outbox.wake(&woken);
    let next = if full { NextLook::Now } else { NextLook::Woken };
    Ok(Routed { events: waiting.len(), leased: Vec::new(), next })
}

async fn read(outbox: &Outbox, tx: &DatabaseTransaction, number: i64) -> Result<Vec<Waiting>, DbErr> {
    let rows = outbox.query_all(tx, outbox.sql().unrouted, [0_i64.into(), number.into()]).await?;
    rows.iter().map(Waiting::read).collect()
}

/// Deliveries and lanes of all, in the order of positions; of the first `foreign` there are marks.
async fn write(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    known: &KnownSubscriptions,
    waiting: &[Waiting],
    foreign: usize,
) -> Result<Vec<i32>, DbErr> {
    if waiting.is_empty() {
        return Ok(Vec::new());
    }
    let mut deliveries = Vec::new();
    let mut marked = 0;
    for (index, waiting) in waiting.iter().enumerate() {
        let keys = waiting.event.as_ref().map(|event| keys(event, known)).unwrap_or_default();
        let position = waiting.position;
        deliveries.extend(keys.into_iter().map(|(subscription, key)| DeliveryRow { subscription, key, position }));
        if index < foreign {
            marked = deliveries.len();
        }
    }
    insert_deliveries(outbox, tx, &deliveries).await?;
    if foreign > 0 {
        let Route::InSteps { take_marks } = outbox.sql().route else { return Ok(Vec::new()) };
        let positions: Vec<i64> = waiting[..foreign].iter().map(|waiting| waiting.position).collect();
        outbox.execute(tx, take_marks, [json(&positions)?.into()]).await?;
        // One that was put back may come before what workers have tried.
        outbox.execute(tx, outbox.sql().restart_lanes, [json(&deliveries[..marked])?.into()]).await?;
    }
    let mut woken: Vec<i32> = deliveries.iter().map(|delivery| delivery.subscription).collect();
    woken.sort_unstable();
    woken.dedup();
    Ok(woken)
}

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use outbox_core::{Batch, NewEvent, Subject};
use sea_orm::{DatabaseTransaction, DbErr};
use serde::Serialize;
use uuid::Uuid;

use crate::{Outbox, sqlite, subscriptions::KnownSubscriptions};

/// A head start of one priority step.
const SECONDS_PER_PRIORITY: f64 = 60.0;

/// Longest wait: a thousand years. SQLite knows no time after the year 9999.
const LONGEST_WAIT: Duration = Duration::from_secs(1000 * 366 * 24 * 3600);

/// The times that sort as text and that SQLite reads: the years 0 to 9999.
const FIRST_TIME: DateTime<Utc> = DateTime::from_timestamp_millis(-62_167_219_200_000).expect("in range");
const LAST_TIME: DateTime<Utc> = DateTime::from_timestamp_millis(253_402_300_799_999).expect("in range");

#[derive(Serialize)]
struct EventRow<'a> {
    id: String,
    event_type: &'a str,
    schema_version: i32,
    aggregate_type: &'a str,
    aggregate_id: &'a str,
    payload: &'a str,
    occurred_at: Option<String>,
    tags: Option<&'a std::collections::BTreeMap<String, String>>,
    max_attempts: Option<u32>,
}

#[derive(Serialize)]
pub(crate) struct DeliveryRow {
    pub(crate) subscription: i32,
    pub(crate) key: String,
    pub(crate) position: i64,
    pub(crate) wait: f64,
    pub(crate) not_before: Option<String>,
}

#[derive(Serialize)]
struct LaneRow<'a> {
    subscription: i32,
    key: &'a str,
    deliveries: usize,
}

/// Writes the events of a request with their deliveries and lanes, as the last thing before COMMIT: positions follow
/// the order of commits. Returns the subscriptions to wake.
pub(crate) async fn flush(outbox: &Outbox, tx: &DatabaseTransaction, batch: Batch) -> Result<Vec<i32>, DbErr> {
    if batch.events.is_empty() {
        return Ok(Vec::new());
    }
    let known = current(outbox, tx).await?;
    let positions = insert_events(outbox, tx, &batch).await?;
    let tenant = batch.context.tenant.as_deref();
    let mut deliveries = Vec::new();
    for event in &batch.events {
        let subject = Subject::of_new(event, tenant);
        let position = *positions.get(&event.id()).ok_or_else(|| DbErr::RecordNotInserted)?;
        for subscription in known.matching(&subject) {
            let (wait, not_before) = schedule(event);
            let key = subscription.ordering.key(&subject);
            deliveries.push(DeliveryRow { subscription: subscription.id, key, position, wait, not_before });
        }
    }
    insert_deliveries(outbox, tx, &deliveries).await?;
    let mut woken: Vec<i32> = deliveries.iter().map(|delivery| delivery.subscription).collect();
    woken.sort_unstable();
    woken.dedup();
    Ok(woken)
}

/// The subscriptions as this transaction sees them: this process' copy, read again if it is old.
async fn current(outbox: &Outbox, tx: &DatabaseTransaction) -> Result<std::sync::Arc<KnownSubscriptions>, DbErr> {
    let row = outbox.query_one(tx, sqlite::GENERATION, []).await?;
    let generation: i64 =
        row.ok_or_else(|| DbErr::RecordNotFound("outbox_meta".to_owned()))?.try_get("", "generation")?;
    let known = outbox.known();
    if known.generation == generation {
        return Ok(known);
    }
    let known = std::sync::Arc::new(KnownSubscriptions::load(outbox, tx, generation).await?);
    outbox.set_known(known.clone());
    Ok(known)
}

async fn insert_events(outbox: &Outbox, tx: &DatabaseTransaction, batch: &Batch) -> Result<HashMap<Uuid, i64>, DbErr> {
    let rows: Vec<EventRow<'_>> = batch
        .events
        .iter()
        .map(|event| EventRow {
            id: event.id().simple().to_string(),
            event_type: event.event_type(),
            schema_version: event.schema_version(),
            aggregate_type: event.aggregate_type(),
            aggregate_id: event.aggregate_id(),
            payload: event.payload(),
            occurred_at: event.occurred().map(timestamp),
            tags: (!event.tags().is_empty()).then(|| event.tags()),
            max_attempts: event.attempts_limit(),
        })
        .collect();
    let context = batch.context.clone();
    let (actor_kind, actor_id) = context.actor.map(|actor| (actor.kind, actor.id)).unzip();
    let values = [
        json(&rows)?.into(),
        context.tenant.into(),
        actor_kind.into(),
        actor_id.into(),
        context.correlation_id.into(),
        context.causation_id.into(),
        context.traceparent.into(),
        context.tracestate.into(),
    ];
    let inserted = outbox.query_all(tx, sqlite::INSERT_EVENTS, values).await?;
    inserted.iter().map(|row| Ok((row.try_get("", "event_id")?, row.try_get("", "position")?))).collect()
}

/// Inserts deliveries and adds them to their lanes.
pub(crate) async fn insert_deliveries(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    deliveries: &[DeliveryRow],
) -> Result<(), DbErr> {
    if deliveries.is_empty() {
        return Ok(());
    }
    let mut counts: HashMap<(i32, &str), usize> = HashMap::new();
    for delivery in deliveries {
        *counts.entry((delivery.subscription, &delivery.key)).or_default() += 1;
    }
    let lanes: Vec<LaneRow<'_>> =
        counts.into_iter().map(|((subscription, key), deliveries)| LaneRow { subscription, key, deliveries }).collect();
    outbox.execute(tx, sqlite::INSERT_DELIVERIES, [json(deliveries)?.into()]).await?;
    outbox.execute(tx, sqlite::UPSERT_LANES, [json(&lanes)?.into()]).await?;
    Ok(())
}

/// A delay counts from the commit. A head start is for what is due at once: together with a delay it would deliver
/// too early.
fn schedule(event: &NewEvent) -> (f64, Option<String>) {
    match event.schedule() {
        (None, None) => (f64::from(event.head_start_minutes()) * -SECONDS_PER_PRIORITY, None),
        (delay, not_before) => (seconds(delay.unwrap_or_default()), not_before.map(timestamp)),
    }
}

/// A wait as the statements take it.
pub(crate) fn seconds(wait: Duration) -> f64 {
    wait.min(LONGEST_WAIT).as_secs_f64()
}

/// The format of the tables' times.
pub(crate) fn timestamp(at: DateTime<Utc>) -> String {
    at.clamp(FIRST_TIME, LAST_TIME).to_rfc3339_opts(SecondsFormat::Millis, true)
}

pub(crate) fn json<T: Serialize + ?Sized>(rows: &T) -> Result<String, DbErr> {
    serde_json::to_string(rows).map_err(|error| DbErr::Json(error.to_string()))
}

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use outbox_core::{Batch, NewEvent, Subject};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, RuntimeErr, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::{Outbox, outcome::CommitId, sql::Flush, subscriptions::KnownSubscriptions};

/// A head start of one priority step.
const SECONDS_PER_PRIORITY: f64 = 60.0;

/// Longest wait: a thousand years. SQLite knows no time after the year 9999.
const LONGEST_WAIT: Duration = Duration::from_secs(1000 * 366 * 24 * 3600);

/// The times that sort as text and that both databases read: the years 1 to 9999.
const FIRST_TIME: DateTime<Utc> = DateTime::from_timestamp_millis(-62_135_596_800_000).expect("in range");
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
    wait: f64,
    not_before: Option<String>,
}

impl EventRow<'_> {
    /// The columns of a single event, in the order of the statement's parameters.
    fn values(&self, id: Uuid) -> Result<[Value; 11], DbErr> {
        Ok([
            id.into(),
            self.event_type.into(),
            self.schema_version.into(),
            self.aggregate_type.into(),
            self.aggregate_id.into(),
            self.payload.into(),
            self.occurred_at.clone().into(),
            self.tags.map(json).transpose()?.into(),
            self.wait.into(),
            self.not_before.clone().into(),
            self.max_attempts.map(i64::from).into(),
        ])
    }
}

#[derive(Serialize)]
struct MatchRow {
    event: usize,
    subscription: i32,
    key: String,
}

#[derive(Serialize)]
pub(crate) struct DeliveryRow {
    pub(crate) subscription: i32,
    pub(crate) key: String,
    pub(crate) position: i64,
}

#[derive(Serialize)]
struct LaneRow<'a> {
    subscription: i32,
    key: &'a str,
    deliveries: usize,
}

/// What a flush has written.
#[derive(Debug, Default)]
pub(crate) struct Flushed {
    /// The subscriptions to wake.
    pub(crate) woken: Vec<i32>,
    /// The transaction, if the flush came to know it.
    pub(crate) commit_id: Option<CommitId>,
}

/// Writes the events of a request with their deliveries and lanes, as the last thing before COMMIT: positions follow
/// the order of commits.
pub(crate) async fn flush(outbox: &Outbox, tx: &DatabaseTransaction, batch: Batch) -> Result<Flushed, DbErr> {
    if batch.events.is_empty() {
        return Ok(Flushed::default());
    }
    let (mut woken, commit_id) = match outbox.sql().flush {
        Flush::AtOnce { one, many, confirm } => {
            let (woken, id, generation) = at_once(outbox, tx, &batch, one, many).await?;
            if let Some(generation) = generation {
                confirm_generation(outbox, tx, generation, confirm).await?;
            }
            (woken, Some(id))
        }
        Flush::InSteps { insert_events } => (in_steps(outbox, tx, &batch, insert_events).await?, None),
    };
    woken.sort_unstable();
    woken.dedup();
    Ok(Flushed { woken, commit_id })
}

/// One statement, with the process' copy of the subscriptions. If that copy is old the statement writes nothing, and is
/// repeated with a new one. Also returns the generation of the copy if the transaction cannot know whether it is current.
async fn at_once(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    batch: &Batch,
    one: &'static str,
    many: &'static str,
) -> Result<(Vec<i32>, CommitId, Option<i64>), DbErr> {
    let rows = event_rows(batch);
    let mut events = None;
    let mut known = outbox.known();
    loop {
        let matches: Vec<MatchRow> = matches(batch, &known).collect();
        let mut values = Vec::from(context_values(batch));
        values.push(known.generation.into());
        let sql = if let ([event], [delivery]) = (&*rows, &*matches) {
            values.extend([delivery.subscription.into(), delivery.key.as_str().into()]);
            values.extend(event.values(batch.events[0].id())?);
            one
        } else {
            let events = match &events {
                Some(events) => events,
                None => events.insert(json(&rows)?),
            };
            values.extend([events.as_str().into(), json(&matches)?.into()]);
            many
        };
        let written = tx.query_one_raw(outbox.statement(sql, values)).await;
        if let Some(row) = written.inspect_err(|error| outbox.store().saw(error)).map_err(explained)? {
            let woken = matches.into_iter().map(|each| each.subscription).collect();
            let stale = (!row.try_get::<bool>("", "fresh")?).then_some(known.generation);
            return Ok((woken, CommitId::of_event(batch.events[0].id(), &row)?, stale));
        }
        let before = known.generation;
        known = current(outbox, tx).await?;
        if known.generation == before {
            return Err(DbErr::RecordNotInserted);
        }
    }
}

/// A transaction that the application has set to REPEATABLE READ or SERIALIZABLE matched its events with the subscriptions
/// as they were when it began. The row is locked, so the commit comes before the next change of the subscriptions; if one
/// came already, the lock fails with 40001, as its other conflicts do.
async fn confirm_generation(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    generation: i64,
    confirm: &'static str,
) -> Result<(), DbErr> {
    let row = outbox.query_one(tx, confirm, []).await?;
    match row.map(|row| row.try_get::<i64>("", "generation")).transpose()? {
        Some(found) if found == generation => Ok(()),
        _ => Err(DbErr::RecordNotInserted),
    }
}

/// The sentence for what an operator has to mend.
fn explained(error: DbErr) -> DbErr {
    let DbErr::Query(RuntimeErr::SqlxError(cause)) = &error else { return error };
    let repeated = cause.as_database_error().is_some_and(|cause| {
        cause.is_unique_violation() && cause.constraint().is_some_and(|name| name.ends_with("events_pkey"))
    });
    if repeated {
        return DbErr::Custom(format!(
            "positions are given out twice: the sequence behind the column position of the events was set back, by a \
             restore for example; `outbox doctor` says how to set it after the last position ({cause})"
        ));
    }
    error
}

/// Statement by statement, where a statement costs no round trip.
async fn in_steps(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    batch: &Batch,
    sql: &'static str,
) -> Result<Vec<i32>, DbErr> {
    let known = current(outbox, tx).await?;
    let positions = insert_events(outbox, tx, batch, sql).await?;
    let deliveries = matches(batch, &known)
        .map(|MatchRow { event, subscription, key }| {
            let position = *positions.get(&batch.events[event].id()).ok_or(DbErr::RecordNotInserted)?;
            Ok(DeliveryRow { subscription, key, position })
        })
        .collect::<Result<Vec<_>, DbErr>>()?;
    insert_deliveries(outbox, tx, &deliveries).await?;
    Ok(deliveries.iter().map(|delivery| delivery.subscription).collect())
}

/// Which event goes to which subscription, with its key.
fn matches<'a>(batch: &'a Batch, known: &'a KnownSubscriptions) -> impl Iterator<Item = MatchRow> + 'a {
    batch.events.iter().enumerate().flat_map(|(event, new)| {
        let subject = Subject::of_new(new, batch.context.tenant.as_deref());
        let matching = known.matching(&subject).map(|subscription| MatchRow {
            event,
            subscription: subscription.id,
            key: subscription.ordering.key(&subject),
        });
        matching.collect::<Vec<_>>()
    })
}

/// The subscriptions as this transaction sees them: this process' copy, read again if it is old.
async fn current(outbox: &Outbox, tx: &DatabaseTransaction) -> Result<std::sync::Arc<KnownSubscriptions>, DbErr> {
    let mut row = outbox.query_one(tx, outbox.sql().generation, []).await?;
    if row.is_none() {
        outbox.restore_meta(tx).await?;
        row = outbox.query_one(tx, outbox.sql().generation, []).await?;
    }
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

async fn insert_events(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    batch: &Batch,
    sql: &'static str,
) -> Result<HashMap<Uuid, i64>, DbErr> {
    let [tenant, actor_kind, actor_id, correlation, causation, traceparent, tracestate] = context_values(batch);
    let events = json(&event_rows(batch))?.into();
    let values = [events, tenant, actor_kind, actor_id, correlation, causation, traceparent, tracestate];
    let inserted = outbox.query_all(tx, sql, values).await?;
    inserted.iter().map(|row| Ok((row.try_get("", "event_id")?, row.try_get("", "position")?))).collect()
}

fn event_rows(batch: &Batch) -> Vec<EventRow<'_>> {
    fn row(event: &NewEvent) -> EventRow<'_> {
        let (wait, not_before) = schedule(event);
        EventRow {
            id: event.id().simple().to_string(),
            event_type: event.event_type(),
            schema_version: event.schema_version(),
            aggregate_type: event.aggregate_type(),
            aggregate_id: event.aggregate_id(),
            payload: event.payload(),
            occurred_at: event.occurred().map(timestamp),
            tags: (!event.tags().is_empty()).then(|| event.tags()),
            max_attempts: event.attempts_limit(),
            wait,
            not_before,
        }
    }
    batch.events.iter().map(row).collect()
}

/// What all events of a request share, in the order of the statements' parameters.
fn context_values(batch: &Batch) -> [Value; 7] {
    let context = batch.context.clone();
    let (actor_kind, actor_id) = context.actor.map(|actor| (actor.kind, actor.id)).unzip();
    [
        context.tenant.into(),
        actor_kind.into(),
        actor_id.into(),
        context.correlation_id.into(),
        context.causation_id.into(),
        context.traceparent.into(),
        context.tracestate.into(),
    ]
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
    outbox.execute(tx, outbox.sql().insert_deliveries, [json(deliveries)?.into()]).await?;
    outbox.execute(tx, outbox.sql().upsert_lanes, [json(&lanes)?.into()]).await?;
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

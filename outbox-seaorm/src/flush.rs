use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, SecondsFormat, SubsecRound, Utc};
use outbox_core::{Batch, NewEvent};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, QueryResult, RuntimeErr, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    Outbox,
    outcome::CommitId,
    route::{self, Committed, ROUTER},
    sql::Flush,
};

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
    /// Whom to wake: subscriptions, or the router.
    pub(crate) woken: Vec<i32>,
    /// The events, if this process has a router that will route them.
    pub(crate) events: Vec<Committed>,
    /// The transaction, if the flush came to know it.
    pub(crate) commit_id: Option<CommitId>,
}

/// Writes the events of a request, as the last thing before COMMIT.
///
/// On PostgreSQL workers route them afterwards. On SQLite, where nobody else can write meanwhile, this transaction does,
/// in the order of positions: whatever waits comes first.
pub(crate) async fn flush(outbox: &Outbox, tx: &DatabaseTransaction, batch: Batch) -> Result<Flushed, DbErr> {
    if batch.events.is_empty() {
        return Ok(Flushed::default());
    }
    match outbox.sql().flush {
        Flush::Marked { one, many } => marked(outbox, tx, batch, one, many).await,
        Flush::Routed { insert_events, insert_marks } => {
            let woken = route::flush_in_steps(outbox, tx, batch, (insert_events, insert_marks)).await?;
            Ok(Flushed { woken, ..Flushed::default() })
        }
    }
}

async fn marked(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    batch: Batch,
    one: &'static str,
    many: &'static str,
) -> Result<Flushed, DbErr> {
    let mut values = Vec::from(context_values(&batch));
    let rows = event_rows(&batch);
    let sql = if let [event] = &*rows {
        values.extend(event.values(batch.events[0].id())?);
        one
    } else {
        values.push(json(&rows)?.into());
        many
    };
    let written = tx.query_all_raw(outbox.statement(sql, values)).await;
    let written = written.inspect_err(|error| outbox.store().saw(error)).map_err(explained)?;
    let [first, ..] = &*written else { return Err(DbErr::RecordNotInserted) };
    let commit_id = Some(CommitId::of_event(batch.events[0].id(), first)?);
    let events = if outbox.handed().is_taken() { recorded(batch, &written)? } else { Vec::new() };
    Ok(Flushed { woken: vec![ROUTER], events, commit_id })
}

/// The events as they are stored.
fn recorded(batch: Batch, rows: &[QueryResult]) -> Result<Vec<Committed>, DbErr> {
    let Batch { events, context } = batch;
    events
        .into_iter()
        .zip(rows)
        .map(|(event, row)| {
            let (position, recorded_at) = (row.try_get("", "position")?, row.try_get("", "recorded_at")?);
            let mut event = event.into_recorded(position, recorded_at, &context);
            event.occurred_at = event.occurred_at.clamp(FIRST_TIME, LAST_TIME).trunc_subsecs(3);
            Ok(Committed { event, due: row.try_get("", "due")? })
        })
        .collect()
}

/// The sentence for what an operator has to mend.
fn explained(error: DbErr) -> DbErr {
    let DbErr::Query(RuntimeErr::SqlxError(cause)) = &error else { return error };
    let repeated = cause.as_database_error().is_some_and(|cause| {
        cause.is_unique_violation()
            && cause.constraint().is_some_and(|name| name.ends_with("events_pkey") || name.ends_with("unrouted_pkey"))
    });
    if repeated {
        return DbErr::Custom(format!(
            "positions are given out twice: the sequence behind the column position of the events was set back, by a \
             restore for example; `outbox doctor` says how to set it after the last position ({cause})"
        ));
    }
    error
}

/// Returns their positions.
pub(crate) async fn insert_events(
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

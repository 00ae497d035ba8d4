//! What the subscriptions `stats` and `activity` keep, and how the page sees it.
//!
//! Both write in the transaction that acknowledges the delivery, so a crash never counts an event twice or not at all.

use std::{collections::HashSet, convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::State,
    response::sse::{Event as SseEvent, KeepAlive, Sse},
};
use chrono::Utc;
use futures_util::{Stream, StreamExt, stream};
use outbox_apalis::{Effect, Handlers};
use outbox_core::{Change, DeliveryError};
use outbox_seaorm::Outbox;
use sea_orm::{
    ActiveValue::Set, ConnectionTrait, FromQueryResult, QueryOrder, QuerySelect, Statement, entity::prelude::*,
};
use serde::Serialize;

use crate::{
    App,
    events::{TodoCompleted, TodoCreated, TodoData, TodoDeleted, TodoRenamed, TodoReopened},
    todos::TodoError,
};

const FEED_LENGTH: u64 = 100;
const FEED_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, DeriveEntityModel)]
#[sea_orm(table_name = "activity")]
pub(crate) struct Model {
    #[sea_orm(primary_key)]
    id: i64,
    #[sea_orm(unique)]
    event_id: String,
    event_type: String,
    todo_id: i64,
    title: String,
    summary: String,
    at: String,
    latency_ms: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub(crate) enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// The subscription `stats`.
pub(crate) fn stats_handlers() -> Handlers {
    Handlers::new()
        .on_tx(|_: TodoCreated, effect| count(effect, "created = created + 1, open = open + 1"))
        .on_tx(|_: TodoRenamed, effect| count(effect, "renamed = renamed + 1"))
        .on_tx(|_: TodoCompleted, effect| count(effect, "completed = completed + 1, open = open - 1"))
        .on_tx(|_: TodoReopened, effect| count(effect, "open = open + 1"))
        .on_tx(|TodoDeleted(change), effect| {
            let was_open = !change.data.completed;
            count(effect, if was_open { "deleted = deleted + 1, open = open - 1" } else { "deleted = deleted + 1" })
        })
}

async fn count(effect: Effect, change: &'static str) -> Result<(), DeliveryError> {
    effect.tx().execute_unprepared(&format!("update stats set {change} where id = 1")).await?;
    Ok(())
}

/// The subscription `activity`.
pub(crate) fn activity_handlers() -> Handlers {
    Handlers::new()
        .on_tx(|TodoCreated(change), effect| record(effect, change, |todo, _| format!("“{}” was added", todo.title)))
        .on_tx(|TodoRenamed(change), effect| {
            record(effect, change, |todo, old| format!("“{old}” is now “{}”", todo.title))
        })
        .on_tx(|TodoCompleted(change), effect| record(effect, change, |todo, _| format!("“{}” is done", todo.title)))
        .on_tx(|TodoReopened(change), effect| {
            record(effect, change, |todo, _| format!("“{}” is open again", todo.title))
        })
        .on_tx(|TodoDeleted(change), effect| record(effect, change, |todo, _| format!("“{}” was deleted", todo.title)))
}

async fn record(
    effect: Effect,
    change: Change<TodoData>,
    summary: fn(&TodoData, &str) -> String,
) -> Result<(), DeliveryError> {
    let event = effect.delivery().event();
    let old_title = change.previous.as_ref().and_then(|previous| previous.get("title")?.as_str()).unwrap_or_default();
    let entry = ActiveModel {
        event_id: Set(event.id.to_string()),
        event_type: Set(event.event_type.clone()),
        todo_id: Set(change.data.id),
        summary: Set(summary(&change.data, old_title)),
        title: Set(change.data.title),
        at: Set(event.recorded_at.to_rfc3339()),
        latency_ms: Set((Utc::now() - event.recorded_at).num_milliseconds().max(0)),
        ..Default::default()
    };
    entry.insert(effect.tx()).await?;
    Ok(())
}

#[derive(Debug, Serialize, FromQueryResult)]
pub(crate) struct Stats {
    created: i64,
    completed: i64,
    renamed: i64,
    deleted: i64,
    open: i64,
}

pub(crate) async fn stats(State(outbox): State<Outbox>) -> Result<Json<Stats>, TodoError> {
    let db = outbox.reader();
    let sql = "select created, completed, renamed, deleted, open from stats where id = 1";
    let stats = Stats::find_by_statement(Statement::from_string(db.get_database_backend(), sql)).one(db).await?;
    Ok(Json(stats.ok_or(TodoError::NotFound)?))
}

pub(crate) async fn activity(State(outbox): State<Outbox>) -> Result<Json<Vec<Model>>, TodoError> {
    Ok(Json(newest(&outbox).await?))
}

async fn newest(outbox: &Outbox) -> Result<Vec<Model>, DbErr> {
    Entity::find().order_by_desc(Column::Id).limit(FEED_LENGTH).all(outbox.reader()).await
}

/// Server-sent events: what is recorded from now on. The stream ends when the process stops or the database fails; the
/// browser connects again and reads `/activity` first, so nothing is missed.
///
/// Looks at the newest entries instead of those with a higher id: on PostgreSQL a lower id can commit later.
pub(crate) async fn live(
    State(app): State<App>,
) -> Result<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>, TodoError> {
    let seen: HashSet<i64> = newest(&app.outbox).await?.iter().map(|entry| entry.id).collect();
    let interval = tokio::time::interval(FEED_INTERVAL);
    let outbox = app.outbox.clone();
    let batches = stream::unfold((outbox, interval, seen), |(outbox, mut interval, mut seen)| async move {
        loop {
            interval.tick().await;
            let newest = newest(&outbox).await.ok()?;
            let fresh: Vec<Model> = newest.iter().rev().filter(|entry| !seen.contains(&entry.id)).cloned().collect();
            if !fresh.is_empty() {
                seen = newest.iter().map(|entry| entry.id).collect();
                return Some((fresh, (outbox, interval, seen)));
            }
        }
    });
    let events = batches
        .flat_map(stream::iter)
        .filter_map(|entry| async move { SseEvent::default().json_data(entry).ok().map(Ok) });
    Ok(Sse::new(events.take_until(app.stopped())).keep_alive(KeepAlive::default()))
}

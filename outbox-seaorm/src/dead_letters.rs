use chrono::{DateTime, Utc};
use sea_orm::{DbErr, TryGetable, Value};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::{
    By, Outbox,
    audit::{Entry, as_text},
    deliveries::attempt_log,
    flush::{self, DeliveryRow, timestamp},
};

/// How many dead letters one transaction replays or discards.
const BATCH: u64 = 500;

/// How many ids an audit entry shows.
const SHOWN_IDS: usize = 100;

/// Which dead letters; all conditions must hold. Defaults to all.
#[derive(Clone, Debug, Default)]
pub struct DeadLetterFilter {
    /// Only those with these ids.
    pub ids: Option<Vec<i64>>,
    /// Only those of this subscription.
    pub subscription: Option<String>,
    /// Only those of events of this type. An event that is gone or unreadable has none.
    pub event_type: Option<String>,
    /// Only those that died at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Only those that died before this time.
    pub until: Option<DateTime<Utc>>,
}

/// A delivery that was given up. Serializes as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct DeadLetter {
    /// Its own id.
    #[serde(serialize_with = "as_text")]
    pub id: i64,
    /// The event's id; this and what else is of the event is `None` if its row is gone or cannot be read.
    pub event_id: Option<Uuid>,
    /// The name of the subscription.
    pub subscription: String,
    /// The event type.
    pub event_type: Option<String>,
    /// The type of the aggregate.
    pub aggregate_type: Option<String>,
    /// The id of the aggregate.
    pub aggregate_id: Option<String>,
    /// How many attempts were made.
    pub attempts: u32,
    /// The last error.
    pub error: String,
    /// When it was given up.
    pub died_at: DateTime<Utc>,
    /// The position of the event.
    #[serde(skip)]
    pub position: i64,
    /// Its failed attempts.
    #[serde(skip)]
    pub attempt_log: Vec<serde_json::Value>,
}

/// What an action of an operator was about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// How many deliveries it was asked to change, or would change in a dry run.
    pub matched: u64,
    /// How many it has changed: none in a dry run, fewer if some changed meanwhile.
    pub changed: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Action {
    Replay,
    Discard,
}

impl Outbox {
    /// Lists dead letters, the newest first, also those whose event is gone or cannot be read. The next page begins
    /// before the last id of this one.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, DbErr> {
        let Some([ids, subscription, event_type, since, until]) = self.dead_letter_values(filter).await? else {
            return Ok(Vec::new());
        };
        let values = [ids, subscription, event_type, since, until, Value::BigInt(before), limit.into()];
        let rows = self.query_all(self.store_reader(), self.sql().list_dead_letters, values).await?;
        rows.iter()
            .map(|row| {
                Ok(DeadLetter {
                    id: row.try_get("", "id")?,
                    event_id: readable(row, "event_id"),
                    subscription: row.try_get("", "name")?,
                    event_type: readable(row, "event_type"),
                    aggregate_type: readable(row, "aggregate_type"),
                    aggregate_id: readable(row, "aggregate_id"),
                    attempts: row.try_get::<i32>("", "attempts")?.unsigned_abs(),
                    error: row.try_get("", "error")?,
                    died_at: row.try_get("", "died_at")?,
                    position: row.try_get("", "position")?,
                    attempt_log: attempt_log(row, "attempt_log"),
                })
            })
            .collect()
    }

    /// Delivers dead letters again, with all their attempts: each goes back to its place in the queue of its key, due at
    /// once, and a key that it holds up goes on. Those whose event is gone stay.
    ///
    /// The destination may have the event already; a transactional handler has its inbox entry, so its effect happens
    /// once however often the event is replayed. Works in transactions of some hundred each; a crash leaves the rest, and
    /// the audit entry says how far it came. What dies while this runs is left for the next time.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn replay_dead_letters(
        &self,
        filter: &DeadLetterFilter,
        dry_run: bool,
        by: &By,
    ) -> Result<Changed, DbErr> {
        self.act(Action::Replay, filter, dry_run, by).await
    }

    /// Gives dead letters up for good: their deliveries are forgotten, and keys that they hold up go on. The events stay.
    ///
    /// Works in transactions of some hundred each; a crash leaves the rest, and the audit entry says how far it came.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn discard_dead_letters(
        &self,
        filter: &DeadLetterFilter,
        dry_run: bool,
        by: &By,
    ) -> Result<Changed, DbErr> {
        self.act(Action::Discard, filter, dry_run, by).await
    }

    async fn act(&self, action: Action, filter: &DeadLetterFilter, dry_run: bool, by: &By) -> Result<Changed, DbErr> {
        let Some(selected) = self.dead_letter_values(filter).await? else { return Ok(Changed::default()) };
        let count = self.query_one(self.store_reader(), self.sql().count_dead_letters, selected.clone()).await?;
        let matched: i64 = count.map_or(Ok(0), |row| row.try_get("", "matched"))?;
        let mut done = Changed { matched: matched.unsigned_abs(), changed: 0 };
        if dry_run {
            return Ok(done);
        }
        let name = if action == Action::Replay { "replay" } else { "discard" };
        let mut entry = Entry { by, action: name, target: "dead-letters", details: shown(filter), id: None };
        let last = self.query_one(self.store_reader(), self.sql().last_dead_letter, []).await?;
        let last: i64 = last.map_or(Ok(None), |row| row.try_get("", "last"))?.unwrap_or(0);
        let mut after = 0;
        loop {
            let tx = self.begin_write().await?;
            let [ids, subscription, event_type, since, until] = selected.clone();
            let values = [ids, subscription, event_type, since, until, after.into(), last.into(), BATCH.into()];
            let rows = self.query_all(&tx, self.sql().next_dead_letters, values).await?;
            let ids = rows.iter().map(|row| row.try_get::<i64>("", "id")).collect::<Result<Vec<_>, _>>()?;
            let subscriptions = rows.iter().map(|row| row.try_get::<i32>("", "subscription_id"));
            let mut subscriptions = subscriptions.collect::<Result<Vec<_>, _>>()?;
            subscriptions.sort_unstable();
            subscriptions.dedup();
            self.query_all(&tx, self.sql().lock_subscriptions, [flush::json(&subscriptions)?.into()]).await?;
            let only_with_event = action == Action::Replay;
            let values = [flush::json(&ids)?.into(), only_with_event.into()];
            let taken = self.query_all(&tx, self.sql().take_dead_letters, values).await?;
            let taken = taken
                .iter()
                .map(|row| {
                    let (subscription, key) = (row.try_get("", "subscription_id")?, row.try_get("", "key")?);
                    Ok(DeliveryRow { subscription, key, position: row.try_get("", "position")? })
                })
                .collect::<Result<Vec<_>, DbErr>>()?;
            match action {
                Action::Replay => self.requeue(&tx, &taken).await?,
                Action::Discard => {
                    let taken: Value = flush::json(&taken)?.into();
                    self.query_all(&tx, self.sql().lock_lanes, [taken.clone()]).await?;
                    self.execute(&tx, self.sql().release_lanes, [taken.clone()]).await?;
                    self.execute(&tx, self.sql().delete_empty_lanes, [taken]).await?;
                }
            }
            done.changed += taken.len() as u64;
            entry.store(self, &tx, done.changed).await?;
            tx.commit().await?;
            self.wake(&subscriptions);
            match ids.last() {
                Some(id) if ids.len() as u64 == BATCH => after = *id,
                _ => return Ok(done),
            }
        }
    }

    /// The filter as the statements take it; `None` if it names a subscription that is not there.
    async fn dead_letter_values(&self, filter: &DeadLetterFilter) -> Result<Option<[Value; 5]>, DbErr> {
        let subscription = match &filter.subscription {
            None => None,
            Some(name) => match self.subscription_id(name).await? {
                None => return Ok(None),
                id => id,
            },
        };
        let ids = filter.ids.as_ref().map(flush::json).transpose()?;
        let (since, until) = (filter.since.map(timestamp), filter.until.map(timestamp));
        Ok(Some([ids.into(), subscription.into(), filter.event_type.clone().into(), since.into(), until.into()]))
    }
}

/// A column that somebody broke is as good as none.
fn readable<T: TryGetable>(row: &sea_orm::QueryResult, column: &str) -> Option<T> {
    row.try_get::<Option<T>>("", column).ok().flatten()
}

/// What the audit says about a filter.
fn shown(filter: &DeadLetterFilter) -> serde_json::Value {
    let ids = filter.ids.as_ref().map(|ids| ids.iter().take(SHOWN_IDS).collect::<Vec<_>>());
    json!({
        "ids": ids,
        "subscription": filter.subscription,
        "event_type": filter.event_type,
        "since": filter.since,
        "until": filter.until,
    })
}

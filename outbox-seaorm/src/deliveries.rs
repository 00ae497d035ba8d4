use std::fmt;

use chrono::{DateTime, Utc};
use outbox_core::{Actor, RecordedEvent};
use sea_orm::{ConnectionTrait, DbErr, QueryResult};
use serde::Serialize;
use uuid::Uuid;

use crate::Outbox;

/// Where a delivery stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeliveryState {
    /// It waits: for its time, for a worker, or for an earlier delivery of its key.
    Pending,
    /// A worker has leased it.
    Leased,
    /// The destination has it.
    Delivered,
    /// Its attempts are used up, or its error was permanent.
    Dead,
}

impl fmt::Display for DeliveryState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pending => "pending",
            Self::Leased => "leased",
            Self::Delivered => "delivered",
            Self::Dead => "dead",
        })
    }
}

impl DeliveryState {
    /// All states, unfinished first.
    pub const ALL: [Self; 4] = [Self::Leased, Self::Pending, Self::Dead, Self::Delivered];
}

/// A delivery as dashboards show it.
#[derive(Clone, Debug)]
pub struct DeliveryRecord {
    /// The name of the subscription.
    pub subscription: String,
    /// The event.
    pub event: RecordedEvent,
    /// Where it stands.
    pub state: DeliveryState,
    /// How many attempts were begun.
    pub attempts: u32,
    /// When it is due; for a leased one, when the lease ends. `None` once it is finished.
    pub due_at: Option<DateTime<Utc>>,
    /// When it was delivered or became a dead letter.
    pub finished_at: Option<DateTime<Utc>>,
    /// The worker that has leased it.
    pub leased_by: Option<String>,
    /// The last error.
    pub error: Option<String>,
}

impl Outbox {
    /// Lists deliveries, newest event first: of one subscription or of all, in one state or in all. All as of one moment.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn deliveries(
        &self,
        subscription: Option<&str>,
        state: Option<DeliveryState>,
        offset: u32,
        limit: u32,
    ) -> Result<Vec<DeliveryRecord>, DbErr> {
        let tx = self.begin_read().await?;
        let mut found = Vec::new();
        for (id, name) in self.subscription_ids(&tx, subscription).await? {
            for each in DeliveryState::ALL {
                if state.is_none_or(|state| state == each) {
                    found.extend(self.list(&tx, id, &name, each, offset.saturating_add(limit)).await?);
                }
            }
        }
        found.sort_by_key(|record| std::cmp::Reverse(record.event.position));
        Ok(found.into_iter().skip(offset as usize).take(limit as usize).collect())
    }

    /// The delivery of one event to one subscription, if there is one.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn delivery(&self, subscription: &str, event: Uuid) -> Result<Option<DeliveryRecord>, DbErr> {
        let Some(id) = self.subscription_id(subscription).await? else { return Ok(None) };
        let Some(row) = self.query_one(self.store_reader(), self.sql().event_by_id, [event.into()]).await? else {
            return Ok(None);
        };
        let standings = self.standings(row.try_get("", "position")?, Some(id)).await?;
        let Some(delivery) = standings.into_iter().find_map(|standing| standing.delivery()) else { return Ok(None) };
        Ok(Some(DeliveryRecord {
            subscription: delivery.subscription,
            event: recorded(&row)?,
            state: delivery.state,
            attempts: delivery.attempts,
            due_at: delivery.due_at,
            finished_at: delivery.finished_at,
            leased_by: delivery.leased_by,
            error: delivery.error,
        }))
    }

    /// The finished deliveries of the last seven days, the oldest day first.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn activity(&self, subscription: &str) -> Result<[u64; 7], DbErr> {
        let mut days = [0; 7];
        if let Some(id) = self.subscription_id(subscription).await? {
            for row in self.query_all(self.store_reader(), self.sql().activity, [id.into()]).await? {
                let days_ago: i64 = row.try_get("", "days_ago")?;
                let deliveries: i64 = row.try_get("", "deliveries")?;
                if let Some(day) = usize::try_from(6 - days_ago).ok().and_then(|day| days.get_mut(day)) {
                    *day += deliveries.unsigned_abs();
                }
            }
        }
        Ok(days)
    }

    /// Whether there is a subscription of this name.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn is_registered(&self, subscription: &str) -> Result<bool, DbErr> {
        Ok(self.subscription_id(subscription).await?.is_some())
    }

    pub(crate) async fn subscription_id(&self, name: &str) -> Result<Option<i32>, DbErr> {
        let ids = self.subscription_ids(self.store_reader(), Some(name)).await?;
        Ok(ids.into_iter().next().map(|(id, _)| id))
    }

    async fn subscription_ids(
        &self,
        db: &impl ConnectionTrait,
        name: Option<&str>,
    ) -> Result<Vec<(i32, String)>, DbErr> {
        let rows = self.query_all(db, self.sql().subscriptions, []).await?;
        let ids = rows.iter().map(|row| Ok((row.try_get("", "id")?, row.try_get::<String>("", "name")?)));
        let ids: Vec<(i32, String)> = ids.collect::<Result<_, DbErr>>()?;
        Ok(ids.into_iter().filter(|(_, each)| name.is_none_or(|name| name == each)).collect())
    }

    async fn list(
        &self,
        db: &impl ConnectionTrait,
        id: i32,
        name: &str,
        state: DeliveryState,
        limit: u32,
    ) -> Result<Vec<DeliveryRecord>, DbErr> {
        let leased = state == DeliveryState::Leased;
        let rows = match state {
            DeliveryState::Pending | DeliveryState::Leased => {
                self.query_all(db, self.sql().list_unfinished, [id.into(), leased.into(), limit.into()]).await?
            }
            DeliveryState::Delivered => {
                self.query_all(db, self.sql().list_delivered, [id.into(), limit.into()]).await?
            }
            DeliveryState::Dead => self.query_all(db, self.sql().list_dead, [id.into(), limit.into()]).await?,
        };
        rows.iter()
            .map(|row| {
                let record = DeliveryRecord {
                    subscription: name.to_owned(),
                    event: recorded(row)?,
                    state,
                    attempts: 0,
                    due_at: None,
                    finished_at: None,
                    leased_by: None,
                    error: None,
                };
                match state {
                    DeliveryState::Pending | DeliveryState::Leased => unfinished(record, row),
                    DeliveryState::Delivered | DeliveryState::Dead => Ok(DeliveryRecord {
                        attempts: row.try_get::<i32>("", "attempts")?.unsigned_abs(),
                        finished_at: row.try_get("", "finished_at")?,
                        error: row.try_get("", "error")?,
                        ..record
                    }),
                }
            })
            .collect()
    }
}

/// Attempts, lease and error are those of the lane's head; what waits behind it has none yet.
fn unfinished(record: DeliveryRecord, row: &QueryResult) -> Result<DeliveryRecord, DbErr> {
    if !row.try_get::<bool>("", "head")? {
        return Ok(DeliveryRecord { due_at: row.try_get("", "due_at")?, ..record });
    }
    Ok(DeliveryRecord {
        attempts: row.try_get::<i32>("", "lane_attempts")?.unsigned_abs(),
        due_at: row.try_get("", "lane_due_at")?,
        leased_by: row.try_get("", "leased_by")?,
        error: row.try_get("", "last_error")?,
        ..record
    })
}

/// The failed attempts that a column lists; none if nobody can read it.
pub(crate) fn attempt_log(row: &QueryResult, column: &str) -> Vec<serde_json::Value> {
    let log = row.try_get::<Option<String>>("", column).ok().flatten();
    log.and_then(|log| serde_json::from_str(&log).ok()).unwrap_or_default()
}

/// Reads a row that has all columns of the events.
pub(crate) fn recorded(row: &QueryResult) -> Result<RecordedEvent, DbErr> {
    let actor_kind: Option<String> = row.try_get("", "actor_kind")?;
    let actor_id: Option<String> = row.try_get("", "actor_id")?;
    let tags: Option<String> = row.try_get("", "tags")?;
    Ok(RecordedEvent {
        position: row.try_get("", "position")?,
        id: row.try_get("", "event_id")?,
        event_type: row.try_get("", "event_type")?,
        schema_version: row.try_get("", "schema_version")?,
        aggregate_type: row.try_get("", "aggregate_type")?,
        aggregate_id: row.try_get("", "aggregate_id")?,
        payload: row.try_get("", "payload")?,
        occurred_at: time(row, "occurred_at")?,
        recorded_at: time(row, "recorded_at")?,
        tenant: row.try_get("", "tenant")?,
        actor: actor_kind.zip(actor_id).map(|(kind, id)| Actor { kind, id }),
        correlation_id: row.try_get("", "correlation_id")?,
        causation_id: row.try_get("", "causation_id")?,
        traceparent: row.try_get("", "traceparent")?,
        tracestate: row.try_get("", "tracestate")?,
        tags: tags
            .map(|tags| serde_json::from_str(&tags))
            .transpose()
            .map_err(|error| DbErr::Json(format!("tags: {error}")))?
            .unwrap_or_default(),
        max_attempts: row.try_get::<Option<i32>>("", "max_attempts")?.map(i32::unsigned_abs),
    })
}

fn time(row: &QueryResult, column: &str) -> Result<DateTime<Utc>, DbErr> {
    let time: Option<DateTime<Utc>> = row.try_get("", column)?;
    time.ok_or_else(|| DbErr::Type(format!("{column} is not a point in time")))
}

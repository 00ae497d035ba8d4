use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sea_orm::DbErr;
use serde::Serialize;

use crate::{
    Outbox, Unrouted,
    definitions::Definition,
    workers::{ALIVE_FOR, Known},
};

/// How far deliveries in the history are counted: a dashboard asks every few seconds.
const COUNTED: i64 = 1_000_000;

/// What operators look at first.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// All subscriptions by name.
    pub subscriptions: Vec<SubscriptionStatus>,
    /// The workers that were seen lately.
    pub workers: Vec<WorkerStatus>,
    /// Events that are not routed to subscriptions yet.
    pub unrouted: Unrouted,
}

/// One subscription.
#[derive(Clone, Debug, Serialize)]
pub struct SubscriptionStatus {
    /// The name.
    pub name: String,
    /// Deliveries that are not finished, the leased ones included, and events for it that are not routed yet, as far as they
    /// are among the oldest 10,000.
    pub pending: i64,
    /// Keys that a worker holds at this moment.
    pub leased: i64,
    /// Deliveries in the history, counted up to a million: that many means that many or more.
    pub delivered: i64,
    /// Dead letters.
    pub dead: i64,
    /// The age of the oldest event that is not delivered, in seconds.
    pub oldest_pending_age_seconds: Option<f64>,
    /// Whether an operator has paused it.
    pub paused: bool,
    /// Whether the destination is thought to be up (`closed`), down (`open`), or about to be tried (`half-open`).
    pub circuit: String,
    /// The last error of a delivery that is being retried, else that of the newest dead letter.
    pub last_error: Option<String>,
}

/// Deliveries of a subscription that wait for longer than anything explains.
#[derive(Clone, Debug, Serialize)]
pub struct Postponed {
    /// The subscription.
    pub subscription: String,
    /// How many keys wait, counted up to 1,000.
    pub keys: i64,
    /// How long the last of them still waits, in seconds.
    pub seconds: f64,
}

/// One worker process.
#[derive(Clone, Debug, Serialize)]
pub struct WorkerStatus {
    /// Host, process and a random part.
    pub id: String,
    /// The subscriptions it delivers.
    pub subscriptions: Vec<String>,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// Its last heartbeat.
    pub last_seen_at: DateTime<Utc>,
    /// How long ago that was, by the database's clock.
    pub last_seen_seconds: f64,
    /// Those of its subscriptions whose stored definition is another than its own: filter or ordering. The stored one counts.
    pub disagrees: Vec<String>,
    /// Those of its subscriptions that are not stored any more: it gets nothing of them.
    pub removed: Vec<String>,
}

impl WorkerStatus {
    /// Whether it was seen lately: within 15 s, three heartbeats.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.last_seen_seconds < ALIVE_FOR.as_secs_f64()
    }
}

impl Outbox {
    /// Counts deliveries and lists workers.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn status(&self) -> Result<Status, DbErr> {
        let unrouted = self.unrouted().await?;
        Ok(Status { subscriptions: self.counted(COUNTED).await?, workers: self.workers().await?, unrouted })
    }

    /// What waits and what has died, without counting the history: `delivered` is 0. For what asks often.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn backlog(&self) -> Result<Vec<SubscriptionStatus>, DbErr> {
        self.counted(0).await
    }

    async fn counted(&self, delivered: i64) -> Result<Vec<SubscriptionStatus>, DbErr> {
        // First, so that what is routed meanwhile is counted twice and not never.
        let unrouted = self.unrouted_by_subscription().await?;
        let rows = self.query_all(self.store_reader(), self.sql().status, [delivered.into()]).await?;
        rows.iter()
            .map(|row| {
                let (events, age) = unrouted.get(&row.try_get("", "id")?).copied().unzip();
                let routed_age: Option<f64> = row.try_get("", "oldest_pending_age_seconds")?;
                let ages = routed_age.into_iter().chain(age);
                Ok(SubscriptionStatus {
                    name: row.try_get("", "name")?,
                    pending: row.try_get::<i64>("", "pending")? + events.unwrap_or(0),
                    leased: row.try_get("", "leased")?,
                    delivered: row.try_get("", "delivered")?,
                    dead: row.try_get("", "dead")?,
                    oldest_pending_age_seconds: ages.reduce(f64::max),
                    paused: row.try_get("", "paused")?,
                    circuit: row.try_get("", "circuit")?,
                    last_error: row.try_get("", "last_error")?,
                })
            })
            .collect()
    }

    /// Finds keys whose next delivery is due later than a delay of its event, or a day after a failure, explains: the
    /// database's clock was ahead, or somebody has changed rows. [`make_due`](Self::make_due) mends it.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn postponed(&self) -> Result<Vec<Postponed>, DbErr> {
        let rows = self.query_all(self.store_reader(), self.sql().postponed, []).await?;
        rows.iter()
            .map(|row| {
                Ok(Postponed {
                    subscription: row.try_get("", "name")?,
                    keys: row.try_get("", "deliveries")?,
                    seconds: row.try_get("", "seconds")?,
                })
            })
            .collect()
    }

    /// Lists the workers that were seen lately.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn workers(&self) -> Result<Vec<WorkerStatus>, DbErr> {
        let rows = self.query_all(self.store_reader(), self.sql().workers, []).await?;
        let stored = if rows.is_empty() { HashMap::new() } else { self.definitions().await? };
        rows.iter()
            .map(|row| {
                let known: String = row.try_get("", "subscriptions")?;
                let known: Vec<Known> = serde_json::from_str(&known).unwrap_or_default();
                let of = |differs: fn(&Known, Option<&Definition>) -> bool| {
                    let known = known.iter().filter(|each| differs(each, stored.get(&each.name)));
                    known.map(|each| each.name.clone()).collect()
                };
                Ok(WorkerStatus {
                    id: row.try_get("", "id")?,
                    subscriptions: known.iter().map(|each| each.name.clone()).collect(),
                    started_at: row.try_get("", "started_at")?,
                    last_seen_at: row.try_get("", "last_seen_at")?,
                    last_seen_seconds: row.try_get("", "last_seen_seconds")?,
                    disagrees: of(|known, stored| {
                        stored.is_some_and(|stored| !stored.is(&known.filter, &known.ordering))
                    }),
                    removed: of(|_, stored| stored.is_none()),
                })
            })
            .collect()
    }
}

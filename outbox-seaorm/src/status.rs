use chrono::{DateTime, Utc};
use sea_orm::DbErr;
use serde::Serialize;

use crate::Outbox;

/// How far deliveries in the history are counted: a dashboard asks every few seconds.
const COUNTED: i64 = 1_000_000;

/// What operators look at first.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// All subscriptions by name.
    pub subscriptions: Vec<SubscriptionStatus>,
    /// The workers that were seen lately.
    pub workers: Vec<WorkerStatus>,
}

/// One subscription.
#[derive(Clone, Debug, Serialize)]
pub struct SubscriptionStatus {
    /// The name.
    pub name: String,
    /// Deliveries that are not finished, the leased ones included.
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
}

impl Outbox {
    /// Counts deliveries and lists workers.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn status(&self) -> Result<Status, DbErr> {
        Ok(Status { subscriptions: self.counted(COUNTED).await?, workers: self.workers().await? })
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
        let rows = self.query_all(self.store_reader(), self.sql().status, [delivered.into()]).await?;
        rows.iter()
            .map(|row| {
                Ok(SubscriptionStatus {
                    name: row.try_get("", "name")?,
                    pending: row.try_get("", "pending")?,
                    leased: row.try_get("", "leased")?,
                    delivered: row.try_get("", "delivered")?,
                    dead: row.try_get("", "dead")?,
                    oldest_pending_age_seconds: row.try_get("", "oldest_pending_age_seconds")?,
                    paused: row.try_get("", "paused")?,
                    circuit: row.try_get("", "circuit")?,
                    last_error: row.try_get("", "last_error")?,
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
        rows.iter()
            .map(|row| {
                let subscriptions: String = row.try_get("", "subscriptions")?;
                Ok(WorkerStatus {
                    id: row.try_get("", "id")?,
                    subscriptions: serde_json::from_str(&subscriptions).unwrap_or_default(),
                    started_at: row.try_get("", "started_at")?,
                    last_seen_at: row.try_get("", "last_seen_at")?,
                    last_seen_seconds: row.try_get("", "last_seen_seconds")?,
                })
            })
            .collect()
    }
}

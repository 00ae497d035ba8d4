use std::time::Duration;

use chrono::{DateTime, Utc};
use sea_orm::DbErr;

use crate::{
    Outbox,
    flush::{json, seconds},
};

impl Outbox {
    /// Shows dashboards that a worker is alive, and returns the database's time. Says nothing about leases: those have ends
    /// of their own.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn heartbeat(&self, worker: &str, subscriptions: &[&str]) -> Result<DateTime<Utc>, DbErr> {
        let values = [worker.into(), json(subscriptions)?.into()];
        let row = self.query_one(self.store(), self.sql().heartbeat, values).await?;
        row.ok_or_else(|| DbErr::RecordNotFound("outbox_workers".to_owned()))?.try_get("", "last_seen_at")
    }

    /// Takes a worker that has stopped off the dashboards.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn forget_worker(&self, worker: &str) -> Result<(), DbErr> {
        self.execute(self.store(), self.sql().forget_worker, [worker.into()]).await.map(|_| ())
    }

    /// Takes workers off the dashboards that were not seen for this long: those that were killed.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn forget_workers(&self, unseen: Duration) -> Result<(), DbErr> {
        self.execute(self.store(), self.sql().forget_workers, [seconds(unseen).into()]).await.map(|_| ())
    }
}

use std::time::Duration;

use chrono::{DateTime, Utc};
use outbox_core::{Filter, Ordering, Subscription};
use sea_orm::DbErr;
use serde::{Deserialize, Serialize};

use crate::{
    Outbox,
    flush::{json, seconds},
};

/// How long after its last heartbeat a worker still counts as alive.
pub(crate) const ALIVE_FOR: Duration = Duration::from_secs(15);

/// A subscription as a worker knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) filter: Filter,
    pub(crate) ordering: Ordering,
}

impl From<&Subscription> for Known {
    fn from(subscription: &Subscription) -> Self {
        Self {
            name: subscription.name().to_owned(),
            filter: subscription.filter().clone(),
            ordering: subscription.key_choice().clone(),
        }
    }
}

impl Outbox {
    /// Shows that a worker is alive, and how it knows its subscriptions: for dashboards, and for registrations of the same
    /// names. Returns the database's time. Says nothing about leases: those have ends of their own.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn heartbeat(&self, worker: &str, subscriptions: &[&Subscription]) -> Result<DateTime<Utc>, DbErr> {
        let known: Vec<Known> = subscriptions.iter().map(|each| Known::from(*each)).collect();
        let values = [worker.into(), json(&known)?.into()];
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

//! Events that are not routed yet, and those that were set aside because routing failed for them, as operators see them.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sea_orm::DbErr;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::{
    By, Outbox, flush,
    route::{ROUTER, Waiting, keys},
};

/// How many events are looked at to say whose they are.
const MATCHED: i64 = 10_000;

/// Events that no subscription has got yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Unrouted {
    /// How many wait for a worker to route them, counted up to a million.
    pub waiting: i64,
    /// The age of the oldest of them, in seconds.
    pub oldest_age_seconds: Option<f64>,
    /// How many were set aside: routing has failed for them, and an operator decides.
    pub set_aside: i64,
}

/// An event that could not be routed.
#[derive(Clone, Debug, Serialize)]
pub struct SetAside {
    /// The event's position.
    pub position: i64,
    /// The event's id; `None` if its row is gone.
    pub event_id: Option<Uuid>,
    /// Its type.
    pub event_type: Option<String>,
    /// When it was set aside.
    pub set_aside_at: DateTime<Utc>,
    /// Why.
    pub error: String,
}

/// The mark of an event that is not routed.
#[derive(Clone, Debug)]
pub(crate) struct UnroutedMark {
    /// When and why it was set aside.
    pub(crate) set_aside: Option<(DateTime<Utc>, String)>,
    /// Whether a worker is alive that would route it.
    pub(crate) has_worker: bool,
}

impl Outbox {
    /// Counts the events that are not routed.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn unrouted(&self) -> Result<Unrouted, DbErr> {
        let row = self.query_one(self.store_reader(), self.sql().count_unrouted, []).await?;
        let Some(row) = row else { return Ok(Unrouted::default()) };
        Ok(Unrouted {
            waiting: row.try_get("", "waiting")?,
            oldest_age_seconds: row.try_get("", "oldest_age_seconds")?,
            set_aside: row.try_get("", "set_aside")?,
        })
    }

    /// Of each subscription how many of the oldest 10,000 unrouted events match it, and the age of the oldest in seconds.
    pub(crate) async fn unrouted_by_subscription(&self) -> Result<HashMap<i32, (i64, f64)>, DbErr> {
        let values = [0_i64.into(), MATCHED.into()];
        let rows = self.query_all(self.store_reader(), self.sql().unrouted, values).await?;
        let mut found: HashMap<i32, (i64, f64)> = HashMap::new();
        if rows.is_empty() {
            return Ok(found);
        }
        let known = self.current_known(self.store_reader()).await?;
        for row in &rows {
            let Some(event) = Waiting::read(row)?.event else { continue };
            let age: f64 = row.try_get::<Option<f64>>("", "age").ok().flatten().unwrap_or(0.0);
            for (subscription, _) in keys(&event, &known) {
                let (events, oldest) = found.entry(subscription).or_default();
                (*events, *oldest) = (*events + 1, oldest.max(age));
            }
        }
        Ok(found)
    }

    /// The mark of an event, if it is not routed.
    pub(crate) async fn unrouted_mark(&self, position: i64) -> Result<Option<UnroutedMark>, DbErr> {
        let Some(row) = self.query_one(self.store_reader(), self.sql().unrouted_mark, [position.into()]).await? else {
            return Ok(None);
        };
        let error: Option<String> = row.try_get("", "error")?;
        let at: Option<DateTime<Utc>> = row.try_get("", "set_aside_at")?;
        let has_worker = self.workers().await?.iter().any(crate::WorkerStatus::is_alive);
        Ok(Some(UnroutedMark { set_aside: at.map(|at| (at, error.unwrap_or_default())), has_worker }))
    }

    /// Lists events that were set aside, the newest first: those before this position, `limit` at most.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn set_aside(&self, before: Option<i64>, limit: u32) -> Result<Vec<SetAside>, DbErr> {
        let values = [before.into(), limit.into()];
        let rows = self.query_all(self.store_reader(), self.sql().list_set_aside, values).await?;
        rows.iter()
            .map(|row| {
                Ok(SetAside {
                    position: row.try_get("", "position")?,
                    event_id: row.try_get("", "event_id")?,
                    event_type: row.try_get("", "event_type")?,
                    set_aside_at: row.try_get("", "set_aside_at")?,
                    error: row.try_get("", "error")?,
                })
            })
            .collect()
    }

    /// Has events that were set aside routed again: those at these positions, or all. Returns how many. Leaves an [audit
    /// entry](crate::AuditEntry), `put-back`.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn put_back(&self, positions: Option<&[i64]>, by: &By) -> Result<u64, DbErr> {
        let changed = self.change_set_aside("put-back", self.sql().put_back, positions, by).await?;
        self.wake(&[ROUTER]);
        Ok(changed)
    }

    /// Gives up events that were set aside: no subscription gets them. The events stay, and can be replayed. Returns how
    /// many. Leaves an [audit entry](crate::AuditEntry), `discard-unrouted`.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn discard_set_aside(&self, positions: Option<&[i64]>, by: &By) -> Result<u64, DbErr> {
        self.change_set_aside("discard-unrouted", self.sql().discard_set_aside, positions, by).await
    }

    async fn change_set_aside(
        &self,
        action: &'static str,
        sql: &'static str,
        positions: Option<&[i64]>,
        by: &By,
    ) -> Result<u64, DbErr> {
        let given = positions.map(flush::json).transpose()?;
        let tx = self.begin_write().await?;
        let changed = self.execute(&tx, sql, [given.into()]).await?;
        let target = positions.map_or_else(|| "all".to_owned(), |positions| format!("{} events", positions.len()));
        self.audit(&tx, by, action, &target, &json!({ "changed": changed, "positions": positions })).await?;
        tx.commit().await?;
        Ok(changed)
    }
}

use chrono::{DateTime, Utc};
use outbox_core::RecordedEvent;
use sea_orm::{DbErr, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::{DeliveryState, Outbox, deliveries::recorded, flush::timestamp};

/// Which events; all conditions must hold. Defaults to all.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    /// Only events of this type.
    pub event_type: Option<String>,
    /// Only events of aggregates of this type.
    pub aggregate_type: Option<String>,
    /// Only events of the aggregate with this id.
    pub aggregate_id: Option<String>,
    /// Only events of this tenant.
    pub tenant: Option<String>,
    /// Only events that were caused by this kind of actor.
    pub actor_kind: Option<String>,
    /// Only events that were stored at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Only events that were stored before this time.
    pub until: Option<DateTime<Utc>>,
}

/// One page of events.
#[derive(Clone, Debug)]
pub struct EventPage {
    /// The events, the newest first. Those whose row cannot be read are left out; their deliveries are dead letters.
    pub events: Vec<RecordedEvent>,
    /// The position before which the next page begins; `None` if this is the last.
    pub next: Option<i64>,
}

/// An event with its deliveries.
#[derive(Clone, Debug)]
pub struct EventDetails {
    /// The event; if its row cannot be read, what is wrong with it.
    pub event: Result<RecordedEvent, String>,
    /// Its position.
    pub position: i64,
    /// Its delivery to each subscription that has one, by name.
    pub deliveries: Vec<DeliveryDetails>,
}

/// Where the delivery of an event to one subscription stands. Serializes as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct DeliveryDetails {
    /// The name of the subscription.
    pub subscription: String,
    /// Where it stands.
    pub state: DeliveryState,
    /// How many attempts were begun.
    pub attempts: u32,
    /// When it is due; for a leased one, when the lease ends. `None` once it is finished, and while a dead letter holds
    /// it up.
    pub due_at: Option<DateTime<Utc>>,
    /// When it was delivered or became a dead letter.
    pub finished_at: Option<DateTime<Utc>>,
    /// The worker that has leased it.
    pub leased_by: Option<String>,
    /// The last error.
    pub error: Option<String>,
    /// Its failed attempts.
    pub attempt_log: Vec<serde_json::Value>,
}

impl Outbox {
    /// Lists events, the newest first, in pages: `before` is [`next`](EventPage::next) of the page before.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn events(&self, filter: &EventFilter, before: Option<i64>, limit: u32) -> Result<EventPage, DbErr> {
        let sql = &self.sql().list_events;
        let sql = match filter {
            EventFilter { aggregate_type: Some(_), aggregate_id: Some(_), .. } => sql.of_aggregate,
            EventFilter { event_type: Some(_), .. } => sql.of_type,
            EventFilter { tenant: Some(_), .. } => sql.of_tenant,
            _ => sql.of_all,
        };
        let filter = filter.clone();
        let values = [
            filter.event_type.into(),
            filter.aggregate_type.into(),
            filter.aggregate_id.into(),
            filter.tenant.into(),
            filter.actor_kind.into(),
            filter.since.map(timestamp).into(),
            filter.until.map(timestamp).into(),
            Value::BigInt(before),
            // One more tells whether there is another page.
            limit.saturating_add(1).into(),
        ];
        let mut rows = self.query_all(self.store_reader(), sql, values).await?;
        let more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        let last = rows.last().filter(|_| more).map(|row| row.try_get("", "position")).transpose()?;
        let events = rows.iter().filter_map(|row| {
            let event = recorded(row);
            if let Err(error) = &event {
                tracing::warn!(%error, "the row of an event cannot be read");
            }
            event.ok()
        });
        Ok(EventPage { events: events.collect(), next: last })
    }

    /// One event with its deliveries, all of them as of one moment; `None` if it is not there.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn event(&self, id: Uuid) -> Result<Option<EventDetails>, DbErr> {
        let Some(row) = self.query_one(self.store_reader(), self.sql().event_by_id, [id.into()]).await? else {
            return Ok(None);
        };
        let position = row.try_get("", "position")?;
        let event = recorded(&row).map_err(|error| format!("the event's row cannot be read: {error}"));
        let standings = self.standings(position, None).await?;
        let deliveries = standings.into_iter().filter_map(|standing| standing.delivery()).collect();
        Ok(Some(EventDetails { event, position, deliveries }))
    }
}

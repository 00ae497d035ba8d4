use std::cmp::Reverse;

use chrono::{DateTime, Utc};
use outbox_core::RecordedEvent;
use sea_orm::{DbErr, Value};
use serde::Serialize;
use uuid::Uuid;

use crate::{DamagedEvent, DeliveryState, Outbox, deliveries::listed, flush::timestamp};

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

/// How many rows are asked for at once, and how many bytes of payloads end a page.
const ROWS_AT_ONCE: u32 = 50;
const PAGE_BYTES: usize = 8 * 1024 * 1024;

fn values(filter: &EventFilter, before: Option<i64>, limit: u32) -> [Value; 9] {
    let filter = filter.clone();
    [
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
    ]
}

/// One page of events.
#[derive(Clone, Debug)]
pub struct EventPage {
    /// The events, the newest first, without the damaged ones.
    pub events: Vec<RecordedEvent>,
    /// Those among them whose row somebody has damaged, the newest first.
    pub damaged: Vec<DamagedEvent>,
    /// The position before which the next page begins; `None` if this is the last.
    pub next: Option<i64>,
}

impl EventPage {
    /// All events of the page, the newest first, the damaged ones among the others.
    #[must_use]
    pub fn rows(&self) -> Vec<Result<&RecordedEvent, &DamagedEvent>> {
        let mut rows: Vec<_> = self.events.iter().map(Ok).chain(self.damaged.iter().map(Err)).collect();
        rows.sort_by_key(|row| Reverse(row.map_or_else(|damaged| damaged.event.position, |event| event.position)));
        rows
    }
}

/// An event with its deliveries.
#[derive(Clone, Debug)]
pub struct EventDetails {
    /// The event.
    pub event: Result<RecordedEvent, DamagedEvent>,
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
    /// Lists events, the newest first, in pages: `before` is [`next`](EventPage::next) of the page before. A page has at
    /// most `limit` events, and less when their payloads have some MiB together: `next` says whether there are more.
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
        let mut page = EventPage { events: Vec::new(), damaged: Vec::new(), next: before };
        let (mut left, mut bytes) = (limit, 0);
        loop {
            let rows =
                self.query_all(self.store_reader(), sql, values(filter, page.next, left.min(ROWS_AT_ONCE))).await?;
            let asked = left.min(ROWS_AT_ONCE) as usize;
            let more = rows.len() > asked;
            for row in rows.iter().take(asked) {
                match listed(row) {
                    Ok(event) => {
                        bytes += event.payload.len();
                        page.events.push(event);
                    }
                    Err(damaged) => {
                        bytes += damaged.event.payload.len();
                        page.damaged.push(*damaged);
                    }
                }
            }
            let last = rows.iter().take(asked).next_back();
            page.next = last.filter(|_| more).map(|row| row.try_get("", "position")).transpose()?;
            left = left.saturating_sub(ROWS_AT_ONCE);
            if page.next.is_none() || left == 0 || bytes >= PAGE_BYTES {
                return Ok(page);
            }
        }
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
        let event = listed(&row).map_err(|damaged| *damaged);
        // First: what is routed meanwhile is among the deliveries.
        let mark = self.unrouted_mark(position).await?;
        let waiting = event.as_ref().ok().filter(|_| mark.is_some());
        let standings = self.standings(position, None).await?;
        let deliveries = standings.into_iter().filter_map(|standing| standing.delivery(waiting)).collect();
        Ok(Some(EventDetails { event, position, deliveries }))
    }
}

use std::{cmp::Reverse, collections::BTreeMap, fmt};

use chrono::{DateTime, Utc};
use outbox_core::{Actor, RecordedEvent};
use sea_orm::{ConnectionTrait, DbErr, QueryResult, TryGetable};
use serde::{Serialize, de::IgnoredAny};
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

/// How far back [`Outbox::deliveries`] lists: so many of the newest that match.
pub const DELIVERIES_LISTED: u32 = 10_000;

/// Longest page.
const LARGEST_PAGE: u32 = 500;

/// How many rows are in memory with their payloads as they are stored.
const ROWS_AT_ONCE: usize = 20;

/// Largest payload in a list, in bytes.
const LARGEST_LISTED: usize = 64 * 1024;

/// A delivery as dashboards show it.
#[derive(Clone, Debug)]
pub struct DeliveryRecord {
    /// The name of the subscription.
    pub subscription: String,
    /// The event. If its row cannot be read as a whole, what can be read of it; the rest is as in [`DamagedEvent`].
    pub event: RecordedEvent,
    /// What is wrong with the event's row, or that its payload is too large for a list; `None` if nothing is.
    pub unreadable: Option<String>,
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
    /// Takes little memory, whatever the outbox holds: a page has at most 500 deliveries, there is none after the
    /// newest [`DELIVERIES_LISTED`], and a payload of more than 64 KiB is left out, which
    /// [`unreadable`](DeliveryRecord::unreadable) says. [`events`](Self::events) goes back to the beginning.
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
        let end = offset.saturating_add(limit.min(LARGEST_PAGE)).min(DELIVERIES_LISTED);
        let page = end.saturating_sub(offset) as usize;
        if page == 0 {
            return Ok(Vec::new());
        }
        let tx = self.begin_read().await?;
        let subscriptions = self.subscription_ids(&tx, subscription).await?;
        let lists =
            subscriptions.iter().flat_map(|(id, name)| DeliveryState::ALL.map(|state| List { id: *id, name, state }));
        let lists: Vec<List<'_>> = lists.filter(|list| state.is_none_or(|state| state == list.state)).collect();
        // Which ones they are is found out by their positions alone; only the page's own rows are read as a whole.
        let mut newest: Vec<(Reverse<i64>, usize)> = Vec::new();
        for (nth, list) in lists.iter().enumerate() {
            newest.extend(self.newest(&tx, list, end).await?.into_iter().map(|position| (Reverse(position), nth)));
            newest.sort_unstable();
            newest.truncate(end as usize);
        }
        let mut found = Vec::with_capacity(page);
        for (nth, list) in lists.iter().enumerate() {
            let positions = newest.iter().skip(offset as usize).filter(|(_, of)| *of == nth);
            let positions: Vec<i64> = positions.map(|(Reverse(position), _)| *position).collect();
            // What stands together in the page stands together in its list.
            for rows in positions.chunks(ROWS_AT_ONCE) {
                // A delivery whose event is gone is not listed; the one that comes in its place is another part's.
                let last = rows.last().copied().unwrap_or_default();
                let listed = self.list(&tx, list, rows[0], rows.len()).await?;
                found.extend(listed.into_iter().filter(|record| record.event.position >= last));
            }
        }
        found.sort_by_key(|record| Reverse(record.event.position));
        Ok(found)
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
        let Some(delivery) = standings.into_iter().find_map(|standing| standing.delivery(None)) else {
            return Ok(None);
        };
        let (event, unreadable) = shown(&row);
        Ok(Some(DeliveryRecord {
            subscription: delivery.subscription,
            event,
            unreadable,
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

    /// The positions of a list, the newest first.
    async fn newest(&self, db: &impl ConnectionTrait, list: &List<'_>, limit: u32) -> Result<Vec<i64>, DbErr> {
        let rows = match list.unfinished() {
            Some(leased) => {
                let values = [list.id.into(), leased.into(), limit.into()];
                self.query_all(db, self.sql().newest_unfinished, values).await?
            }
            None if list.state == DeliveryState::Delivered => {
                self.query_all(db, self.sql().newest_delivered, [list.id.into(), limit.into()]).await?
            }
            None => self.query_all(db, self.sql().newest_dead, [list.id.into(), limit.into()]).await?,
        };
        rows.iter().map(|row| row.try_get("", "position")).collect()
    }

    /// So many deliveries from this position on, the newest first.
    async fn list(
        &self,
        db: &impl ConnectionTrait,
        list: &List<'_>,
        from: i64,
        count: usize,
    ) -> Result<Vec<DeliveryRecord>, DbErr> {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        let rows = match list.unfinished() {
            Some(leased) => {
                let values = [list.id.into(), leased.into(), from.into(), count.into()];
                self.query_all(db, self.sql().list_unfinished, values).await?
            }
            None if list.state == DeliveryState::Delivered => {
                self.query_all(db, self.sql().list_delivered, [list.id.into(), from.into(), count.into()]).await?
            }
            None => self.query_all(db, self.sql().list_dead, [list.id.into(), from.into(), count.into()]).await?,
        };
        rows.iter().map(|row| list.record(row)).collect()
    }
}

/// The deliveries of one subscription in one state.
struct List<'a> {
    id: i32,
    name: &'a str,
    state: DeliveryState,
}

impl List<'_> {
    /// Whether they are leased, of those that are not finished.
    fn unfinished(&self) -> Option<bool> {
        match self.state {
            DeliveryState::Pending => Some(false),
            DeliveryState::Leased => Some(true),
            DeliveryState::Delivered | DeliveryState::Dead => None,
        }
    }

    fn record(&self, row: &QueryResult) -> Result<DeliveryRecord, DbErr> {
        let (mut event, mut unreadable) = shown(row);
        if event.payload.len() > LARGEST_LISTED {
            unreadable.get_or_insert(format!("the payload is not listed: it has {} bytes", event.payload.len()));
            event.payload = "null".to_owned();
        }
        let record = DeliveryRecord {
            subscription: self.name.to_owned(),
            event,
            unreadable,
            state: self.state,
            attempts: 0,
            due_at: None,
            finished_at: None,
            leased_by: None,
            error: None,
        };
        if self.unfinished().is_some() {
            return unfinished(record, row);
        }
        Ok(DeliveryRecord {
            attempts: row.try_get::<i32>("", "attempts")?.unsigned_abs(),
            finished_at: row.try_get("", "finished_at")?,
            error: row.try_get("", "error")?,
            ..record
        })
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

/// An event whose row somebody has damaged, as far as it can be read.
#[derive(Clone, Debug)]
pub struct DamagedEvent {
    /// What can be read of it. The rest is empty: no text, no tags, the nil id, the beginning of 1970, the payload `null`.
    pub event: RecordedEvent,
    /// The fields of `event` that are empty because they cannot be read.
    pub missing: Vec<&'static str>,
    /// What is wrong with the row.
    pub error: String,
}

/// Reads a row that has all columns of the events; says what is wrong with one that cannot be read as a whole.
pub(crate) fn recorded(row: &QueryResult) -> Result<RecordedEvent, String> {
    let mut reading = Reading::new(row);
    let event = reading.event();
    if reading.errors.is_empty() { Ok(event) } else { Err(reading.error()) }
}

/// Reads a row for people: one whose payload is not JSON is damaged as well. Workers leave that to who uses the payload.
pub(crate) fn listed(row: &QueryResult) -> Result<RecordedEvent, Box<DamagedEvent>> {
    let mut reading = Reading::new(row);
    let event = reading.event();
    if let Err(error) = serde_json::from_str::<IgnoredAny>(&event.payload) {
        reading.errors.push(format!("payload: {error}"));
    }
    if reading.errors.is_empty() {
        return Ok(event);
    }
    let error = reading.error();
    Err(Box::new(DamagedEvent { event, missing: reading.missing, error }))
}

/// The event of a row, and what is wrong with it.
fn shown(row: &QueryResult) -> (RecordedEvent, Option<String>) {
    match listed(row) {
        Ok(event) => (event, None),
        Err(damaged) => (damaged.event, Some(damaged.error)),
    }
}

/// Reads the columns of an event one by one, and goes on after one that cannot be read.
struct Reading<'a> {
    row: &'a QueryResult,
    missing: Vec<&'static str>,
    errors: Vec<String>,
}

impl<'a> Reading<'a> {
    fn new(row: &'a QueryResult) -> Self {
        Self { row, missing: Vec::new(), errors: Vec::new() }
    }

    fn event(&mut self) -> RecordedEvent {
        RecordedEvent {
            position: self.column("position", "position"),
            id: self.column("event_id", "id"),
            event_type: self.column("event_type", "event_type"),
            schema_version: self.column("schema_version", "schema_version"),
            aggregate_type: self.column("aggregate_type", "aggregate_type"),
            aggregate_id: self.column("aggregate_id", "aggregate_id"),
            payload: self.payload(),
            occurred_at: self.time("occurred_at"),
            recorded_at: self.time("recorded_at"),
            tenant: self.column("tenant", "tenant"),
            actor: self.actor(),
            correlation_id: self.column("correlation_id", "correlation_id"),
            causation_id: self.column("causation_id", "causation_id"),
            traceparent: self.column("traceparent", "traceparent"),
            tracestate: self.column("tracestate", "tracestate"),
            tags: self.tags(),
            max_attempts: self.column::<Option<i32>>("max_attempts", "max_attempts").map(i32::unsigned_abs),
        }
    }

    fn column<T: TryGetable + Default>(&mut self, column: &str, field: &'static str) -> T {
        let read = self.row.try_get("", column).map_err(|error| error.to_string());
        self.or_empty(read, field)
    }

    fn or_empty<T: Default>(&mut self, read: Result<T, String>, field: &'static str) -> T {
        read.unwrap_or_else(|error| {
            self.missing.push(field);
            self.errors.push(error);
            T::default()
        })
    }

    fn payload(&mut self) -> String {
        let payload: String = self.column("payload", "payload");
        if self.missing.contains(&"payload") { "null".to_owned() } else { payload }
    }

    fn time(&mut self, column: &'static str) -> DateTime<Utc> {
        let time = self.row.try_get::<Option<DateTime<Utc>>>("", column).map_err(|error| error.to_string());
        let time = time.and_then(|time| time.ok_or_else(|| format!("{column} is not a point in time")));
        self.or_empty(time, column)
    }

    fn actor(&mut self) -> Option<Actor> {
        let kind: Option<String> = self.column("actor_kind", "actor");
        let id: Option<String> = self.column("actor_id", "actor");
        kind.zip(id).map(|(kind, id)| Actor { kind, id })
    }

    fn tags(&mut self) -> BTreeMap<String, String> {
        let Some(tags) = self.column::<Option<String>>("tags", "tags") else { return BTreeMap::new() };
        let tags = serde_json::from_str(&tags).map_err(|error| format!("tags: {error}"));
        self.or_empty(tags, "tags")
    }

    fn error(&self) -> String {
        format!("the event's row cannot be read: {}", self.errors.join("; "))
    }
}

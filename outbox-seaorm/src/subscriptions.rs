use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use outbox_core::{Filter, Ordering, RecordedEvent, StartPosition, Subject, Subscription};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, QueryResult, RuntimeErr, Value};
use serde::de::DeserializeOwned;

use crate::{
    By, Outbox,
    definitions::Definition,
    deliveries::recorded,
    flush::{DeliveryRow, insert_deliveries, json, timestamp},
    workers,
};

/// How many old events one transaction of a backfill looks at.
const BACKFILL_BATCH: u64 = 500;

/// How often a registration begins again after it has met another one, or a lock.
const TRIES: u32 = 20;

/// How long it waits before that, times the number of its tries.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// How many rows of a removed subscription one statement deletes.
const SWEEP: u64 = 5000;

/// How many event types are remembered with who takes them.
const MOST_TYPES: usize = 1000;

/// A process' copy of the subscriptions, with the generation it was read at.
#[derive(Debug, Default)]
pub(crate) struct KnownSubscriptions {
    pub(crate) generation: i64,
    subscriptions: Vec<Known>,
    /// Who takes events of a type, if tags and tenant fit: a few of a thousand.
    by_type: RwLock<HashMap<String, Arc<[usize]>>>,
}

#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) id: i32,
    filter: Filter,
    pub(crate) ordering: Ordering,
}

impl KnownSubscriptions {
    pub(crate) async fn load(outbox: &Outbox, db: &impl ConnectionTrait, generation: i64) -> Result<Self, DbErr> {
        let rows = outbox.query_all(db, outbox.sql().subscriptions, []).await?;
        let subscriptions = rows
            .iter()
            .map(|row| {
                Ok(Known {
                    id: row.try_get("", "id")?,
                    filter: parsed(row, "filter")?,
                    ordering: parsed(row, "ordering")?,
                })
            })
            .collect::<Result<_, DbErr>>()?;
        Ok(Self { generation, subscriptions, by_type: RwLock::default() })
    }

    #[cfg(test)]
    pub(crate) fn of(subscriptions: impl IntoIterator<Item = Subscription>) -> Self {
        let known = |(n, each): (i32, Subscription)| Known {
            id: n,
            filter: each.filter().clone(),
            ordering: each.key_choice().clone(),
        };
        Self { subscriptions: (1..).zip(subscriptions).map(known).collect(), ..Self::default() }
    }

    /// In the order of their ids.
    pub(crate) fn matching(&self, subject: &Subject<'_>) -> Vec<&Known> {
        let takers = self.takers(subject.event_type);
        takers.iter().map(|index| &self.subscriptions[*index]).filter(|known| known.filter.matches(subject)).collect()
    }

    fn takers(&self, event_type: &str) -> Arc<[usize]> {
        if let Some(takers) = self.by_type.read().unwrap_or_else(PoisonError::into_inner).get(event_type) {
            return takers.clone();
        }
        let takes = |known: &Known| known.filter.types().iter().any(|pattern| pattern.matches(event_type));
        let takers: Arc<[usize]> = (0..self.subscriptions.len())
            .filter(|index| self.subscriptions[*index].filter.types().is_empty() || takes(&self.subscriptions[*index]))
            .collect();
        let mut by_type = self.by_type.write().unwrap_or_else(PoisonError::into_inner);
        if by_type.len() >= MOST_TYPES {
            by_type.clear();
        }
        by_type.insert(event_type.to_owned(), takers.clone());
        takers
    }
}

pub(crate) fn parsed<T: DeserializeOwned>(row: &QueryResult, column: &str) -> Result<T, DbErr> {
    serde_json::from_str(&row.try_get::<String>("", column)?).map_err(|error| DbErr::Json(error.to_string()))
}

/// Whether two transactions were in each other's way: a deadlock, a lock that was not there in time, or a conflict at
/// another isolation level than ours. A session that was idle for too long with its lock is ended.
fn is_conflict(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("40001" | "40P01" | "55P03" | "25P03" | "57P05"))
}

/// Why a subscription could not be registered.
#[derive(Debug, thiserror::Error)]
#[error("the subscription {name:?} could not be registered")]
pub struct RegisterError {
    name: String,
    #[source]
    source: DbErr,
}

/// What became of a registration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Registered {
    /// The id of the subscription.
    pub id: i32,
    /// The worker for which another definition of the subscription stays; `None` if this one counts.
    pub kept_by: Option<String>,
}

impl Outbox {
    /// Makes a subscription known and returns its id.
    ///
    /// The first registration of a name decides where it begins. Later ones change filter and ordering. What is visible
    /// when this is called is routed first, as things were; so every event that commits after this has returned is the new
    /// subscription's, or meets the new definition. With a start in the past, the deliveries of old events are written before
    /// this returns; workers claim none of them before all are there, so their order is kept. A crash in between is mended by
    /// the next registration.
    ///
    /// A definition that was replaced before does not come back while a worker is alive that has the one which replaced
    /// it: the older version of a program, restarted last, takes no events from the newer. This returns the id all the
    /// same; [`register_as`](Self::register_as) says which worker it is. Each change leaves an
    /// [audit entry](crate::AuditEntry), `define`, with the definitions before and after.
    ///
    /// If much waits to be routed, because no worker was running, this takes as long as routing it: some ten thousand events
    /// a second. A definition that is stored already waits for nothing.
    ///
    /// # Errors
    ///
    /// [`RegisterError`] if the database fails; registering again continues.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn register(&self, subscription: &Subscription) -> Result<i32, RegisterError> {
        let by = format!("process {}", std::process::id());
        Ok(self.register_as(subscription, &by).await?.id)
    }

    /// As [`register`](Self::register), by a worker of this name: the audit has it, if that changes a definition.
    ///
    /// # Errors
    ///
    /// As [`register`](Self::register).
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn register_as(&self, subscription: &Subscription, by: &str) -> Result<Registered, RegisterError> {
        let mut tries = 1;
        loop {
            match self.try_register(subscription, by).await {
                Err(source) if tries < TRIES && is_conflict(&source) => {
                    tracing::debug!(error = %source, "the registration begins again");
                    tokio::time::sleep(TRY_AGAIN * tries).await;
                    tries += 1;
                }
                ended => {
                    return ended.map_err(|source| RegisterError { name: subscription.name().to_owned(), source });
                }
            }
        }
    }

    async fn try_register(&self, subscription: &Subscription, by: &str) -> Result<Registered, DbErr> {
        let (registered, backfill) = self.upsert(subscription, by).await?;
        let id = registered.id;
        if backfill {
            while !self.backfill(id, subscription).await? {}
            if self.next_due(id).await?.is_some_and(|next| next.after.is_some()) {
                self.wake(&[id]);
            }
        }
        Ok(registered)
    }

    /// The ids under which these subscriptions are stored, and whether as they are here; `None` for those that are not.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn registered(&self, subscriptions: &[&Subscription]) -> Result<Vec<Option<(i32, bool)>>, DbErr> {
        let stored = self.definitions().await?;
        let of = |subscription: &&Subscription| {
            let stored = stored.get(subscription.name())?;
            Some((stored.id, stored.is(subscription.filter(), subscription.key_choice())))
        };
        Ok(subscriptions.iter().map(of).collect())
    }

    /// Also returns whether a backfill has to be done.
    async fn upsert(&self, subscription: &Subscription, by: &str) -> Result<(Registered, bool), DbErr> {
        let last = self.last_unrouted().await?.unwrap_or(0);
        loop {
            if let Some(registered) = self.try_upsert(subscription, by, last).await? {
                return Ok(registered);
            }
            // Beside others; whatever the subscription is to become, this is from before.
            self.route_until(last).await?;
        }
    }

    /// `None` if another process has registered the same name at the same moment, or something up to position `last` is
    /// not routed yet.
    async fn try_upsert(
        &self,
        subscription: &Subscription,
        by: &str,
        last: i64,
    ) -> Result<Option<(Registered, bool)>, DbErr> {
        let new = workers::Known::from(subscription);
        let tx = self.begin_write().await?;
        let existing = self.query_one(&tx, self.sql().subscription_by_name, [subscription.name().into()]).await?;
        let registered = match existing {
            Some(row) => {
                let id = row.try_get("", "id")?;
                let (filter, ordering) = (parsed(&row, "filter")?, parsed(&row, "ordering")?);
                let stored = Definition { id, filter, ordering };
                let same = stored.is(&new.filter, &new.ordering);
                let kept_by = if same { None } else { self.keeps_definition(&tx, &stored, &new).await? };
                if !same && kept_by.is_none() {
                    if !self.lock_routing(&tx, last).await? {
                        return Ok(None);
                    }
                    self.change_definition(&tx, &stored, &new, by).await?;
                }
                (Registered { id, kept_by }, row.try_get::<Option<i64>>("", "backfill_from")?.is_some())
            }
            None => {
                if !self.lock_routing(&tx, last).await? {
                    return Ok(None);
                }
                let (from, until) = self.backfill_range(&tx, subscription.start_position()).await?;
                let (filter, ordering) = (json(&new.filter)?.into(), json(&new.ordering)?.into());
                let values = [subscription.name().into(), filter, ordering, from.into(), until.into()];
                let Some(row) = self.query_one(&tx, self.sql().insert_subscription, values).await? else {
                    return Ok(None);
                };
                self.execute(&tx, self.sql().bump_generation, []).await?;
                (Registered { id: row.try_get("", "id")?, kept_by: None }, from.is_some())
            }
        };
        tx.commit().await?;
        Ok(Some(registered))
    }

    /// Stops routing until the transaction ends, which must be soon. False if something up to position `last` waits: it is
    /// not to meet what this transaction changes.
    async fn lock_routing(&self, tx: &DatabaseTransaction, last: i64) -> Result<bool, DbErr> {
        if let Some(lock) = self.sql().lock_generation
            && self.query_one(tx, lock, []).await?.is_none()
        {
            self.restore_meta(tx).await?;
            self.query_one(tx, lock, []).await?;
        }
        let values = [0_i64.into(), last.into()];
        Ok(self.query_one(tx, self.sql().unrouted_until, values).await?.is_none())
    }

    async fn change_definition(
        &self,
        tx: &DatabaseTransaction,
        stored: &Definition,
        new: &workers::Known,
        by: &str,
    ) -> Result<(), DbErr> {
        let (filter, ordering) = (json(&new.filter)?, json(&new.ordering)?);
        let from = (json(&stored.filter)?, json(&stored.ordering)?);
        tracing::warn!(
            subscription = &*new.name,
            from_filter = from.0,
            from_ordering = from.1,
            to_filter = filter,
            to_ordering = ordering,
            by,
            "the definition of a subscription is changed"
        );
        let values = [stored.id.into(), filter.into(), ordering.into()];
        self.note_definition(tx, stored, new, by).await?;
        self.execute(tx, self.sql().update_subscription, values).await?;
        self.execute(tx, self.sql().bump_generation, []).await.map(|_| ())
    }

    /// The first and the last position of what was routed before the subscription; nothing if it begins now.
    async fn backfill_range(
        &self,
        tx: &DatabaseTransaction,
        start: StartPosition,
    ) -> Result<(Option<i64>, Option<i64>), DbErr> {
        let since = match start {
            StartPosition::Now => return Ok((None, None)),
            StartPosition::Beginning => String::new(),
            StartPosition::Since(at) => timestamp(at),
        };
        let row = self.query_one(tx, self.sql().first_position_since, [since.into()]).await?;
        let first: Option<i64> = row.map_or(Ok(None), |row| row.try_get("", "position"))?;
        let row = self.query_one(tx, self.sql().last_position, []).await?;
        let last: Option<i64> = row.map_or(Ok(None), |row| row.try_get("", "last"))?;
        Ok(first.zip(last).unzip())
    }

    /// One batch; true when there is nothing left. Each batch is a transaction that also stores how far it came, so
    /// any number of processes may work on it.
    async fn backfill(&self, id: i32, subscription: &Subscription) -> Result<bool, DbErr> {
        let tx = self.begin_write().await?;
        let row = self.query_one(&tx, self.sql().subscription_by_name, [subscription.name().into()]).await?;
        let Some(row) = row else { return Ok(true) };
        let Some(from) = row.try_get::<Option<i64>>("", "backfill_from")? else { return Ok(true) };
        if parsed::<Filter>(&row, "filter")? != *subscription.filter()
            || parsed::<Ordering>(&row, "ordering")? != *subscription.key_choice()
        {
            // Another process has changed it meanwhile. It waits and fills for itself.
            return Ok(true);
        }
        let until = row.try_get::<Option<i64>>("", "backfill_until")?.unwrap_or(i64::MAX);
        let positions = self.next_positions(&tx, from - 1, until, None, BACKFILL_BATCH).await?;
        // Retention may have taken some in between: what is locked is there. What is not routed yet is not locked: it is
        // routed with this subscription.
        let rows = self.query_all(&tx, self.sql().lock_events, [json(&positions)?.into()]).await?;
        // A row that somebody damaged holds up no others.
        let events: Vec<RecordedEvent> = rows.iter().filter_map(|row| recorded(row).ok()).collect();
        let (filter, ordering) = (subscription.filter(), subscription.key_choice());
        self.add_missing(&tx, id, filter, ordering, &events).await?;
        let next = positions.last().map(|last| last + 1);
        self.execute(&tx, self.sql().set_backfill, [id.into(), Value::BigInt(next)]).await?;
        tx.commit().await?;
        Ok(next.is_none())
    }

    /// Inserts the deliveries that a subscription should have of these events and has not.
    async fn add_missing(
        &self,
        tx: &DatabaseTransaction,
        id: i32,
        filter: &Filter,
        ordering: &Ordering,
        events: &[RecordedEvent],
    ) -> Result<bool, DbErr> {
        let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
        let done = self.query_all(tx, self.sql().positions_known, [id.into(), json(&positions)?.into()]).await?;
        let done = done.iter().map(|row| row.try_get::<i64>("", "position")).collect::<Result<HashSet<_>, _>>()?;
        let missing: Vec<DeliveryRow> = events
            .iter()
            .filter(|event| !done.contains(&event.position))
            .filter_map(|event| {
                let subject = Subject::of_recorded(event);
                filter.matches(&subject).then(|| DeliveryRow {
                    subscription: id,
                    key: ordering.key(&subject),
                    position: event.position,
                })
            })
            .collect();
        insert_deliveries(self, tx, &missing).await?;
        let keys: HashSet<&str> = missing.iter().map(|delivery| delivery.key.as_str()).collect();
        self.execute(tx, self.sql().due_with_head, [id.into(), json(&keys)?.into()]).await?;
        Ok(!missing.is_empty())
    }

    /// Deletes what removed subscriptions have left: deliveries, history, dead letters. Workers call it every few seconds.
    ///
    /// # Errors
    ///
    /// If the database fails; the next call goes on.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn sweep_removed(&self) -> Result<(), DbErr> {
        for row in self.query_all(self.store_reader(), self.sql().orphans, []).await? {
            let id: i32 = row.try_get("", "id")?;
            for sql in self.sql().sweep {
                while self.execute(self.store(), sql, [id.into(), SWEEP.into()]).await? >= SWEEP {}
            }
        }
        Ok(())
    }

    /// Stops the delivery of a subscription; its events go on being collected. What is under way ends. False if there
    /// is no such subscription.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn pause(&self, name: &str) -> Result<bool, DbErr> {
        Ok(self.pause_as(name, None).await?.is_some())
    }

    /// As [`pause`](Self::pause), by an operator: leaves an [audit entry](crate::AuditEntry). Whether that changed
    /// anything; `None` if there is no such subscription.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn pause_as(&self, name: &str, by: impl Into<Option<&By>>) -> Result<Option<bool>, DbErr> {
        self.change(name, "pause", self.sql().pause, by.into()).await
    }

    /// Goes on with the delivery of a subscription. False if there is no such subscription.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn resume(&self, name: &str) -> Result<bool, DbErr> {
        Ok(self.resume_as(name, None).await?.is_some())
    }

    /// As [`resume`](Self::resume), by an operator; see [`pause_as`](Self::pause_as).
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn resume_as(&self, name: &str, by: impl Into<Option<&By>>) -> Result<Option<bool>, DbErr> {
        self.change(name, "resume", self.sql().resume, by.into()).await
    }

    async fn change(
        &self,
        name: &str,
        action: &'static str,
        sql: &'static str,
        by: Option<&By>,
    ) -> Result<Option<bool>, DbErr> {
        let tx = self.begin_write().await?;
        let Some(row) = self.query_one(&tx, self.sql().subscription_by_name, [name.into()]).await? else {
            return Ok(None);
        };
        let changed = self.execute(&tx, sql, [name.into()]).await? == 1;
        if let Some(by) = by {
            self.audit(&tx, by, action, name, &serde_json::json!({ "changed": u8::from(changed) })).await?;
        }
        tx.commit().await?;
        self.wake_about_state(row.try_get("", "id")?);
        Ok(Some(changed))
    }

    /// Makes due what waits, by an operator: deliveries that have failed, and those that a clock which was ahead has put off.
    /// What an event asked for itself, a delay or a time, is kept; so are leases, and what waits behind a dead letter.
    /// Returns how many keys are due earlier now; `None` if there is no such subscription. Leaves an [audit
    /// entry](crate::AuditEntry), `due`.
    ///
    /// Attempts are not given back. Commits of the keys in question wait until it is done.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is changed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn make_due(&self, name: &str, by: &By) -> Result<Option<u64>, DbErr> {
        let tx = self.begin_write().await?;
        let Some(row) = self.query_one(&tx, self.sql().subscription_by_name, [name.into()]).await? else {
            return Ok(None);
        };
        let id: i32 = row.try_get("", "id")?;
        let lanes = self.query_all(&tx, self.sql().lock_waiting, [id.into()]).await?;
        let keys = lanes.iter().map(|row| row.try_get("", "key")).collect::<Result<Vec<String>, _>>()?;
        let keys: Value = json(&keys)?.into();
        self.execute(&tx, self.sql().due_as_asked, [id.into(), keys.clone()]).await?;
        let changed = self.execute(&tx, self.sql().due_with_heads, [id.into(), keys]).await?;
        self.audit(&tx, by, "due", name, &serde_json::json!({ "changed": changed })).await?;
        tx.commit().await?;
        self.wake(&[id]);
        Ok(Some(changed))
    }

    /// Removes a subscription with its unfinished deliveries, its history and its dead letters; the events stay. False
    /// if there is no such subscription. A worker that still has it delivers what it has claimed, and its results are
    /// dropped.
    ///
    /// The subscription is gone at once. What it leaves is deleted in batches: if that is cut off,
    /// [workers](Self::sweep_removed) go on with it.
    ///
    /// # Errors
    ///
    /// If the database fails. Removing it again continues.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is removed.
    pub async fn remove(&self, name: &str) -> Result<bool, DbErr> {
        self.remove_as(name, None).await
    }

    /// As [`remove`](Self::remove), by an operator: leaves an [audit entry](crate::AuditEntry).
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is removed.
    pub async fn remove_as(&self, name: &str, by: impl Into<Option<&By>>) -> Result<bool, DbErr> {
        let by = by.into();
        let mut tries = 1;
        loop {
            match self.try_remove(name, by).await {
                Err(error) if tries < TRIES && is_conflict(&error) => {
                    tokio::time::sleep(TRY_AGAIN * tries).await;
                    tries += 1;
                }
                Ok(true) => {
                    if let Err(error) = self.sweep_removed().await {
                        tracing::warn!(subscription = name, %error, "workers delete what the subscription has left");
                    }
                    return Ok(true);
                }
                ended => return ended,
            }
        }
    }

    async fn try_remove(&self, name: &str, by: Option<&By>) -> Result<bool, DbErr> {
        let tx = self.begin_write().await?;
        let Some(row) = self.query_one(&tx, self.sql().subscription_by_name, [name.into()]).await? else {
            return Ok(false);
        };
        // Whatever waits is not delivered to it.
        self.lock_routing(&tx, 0).await?;
        if let Some(by) = by {
            self.audit(&tx, by, "remove", name, &serde_json::json!({})).await?;
        }
        let id: i32 = row.try_get("", "id")?;
        self.execute(&tx, self.sql().remove, [id.into()]).await?;
        self.execute(&tx, self.sql().bump_generation, []).await?;
        tx.commit().await?;
        self.wake_about_state(id);
        Ok(true)
    }

    /// A transaction of the outbox' own. On SQLite it waits for the write lock first, so it never fails halfway.
    pub(crate) async fn begin_write(&self) -> Result<DatabaseTransaction, DbErr> {
        self.store().begin().await
    }

    /// A transaction that only reads, all of it as of one moment.
    pub(crate) async fn begin_read(&self) -> Result<DatabaseTransaction, DbErr> {
        self.store_reader().begin_read().await
    }
}

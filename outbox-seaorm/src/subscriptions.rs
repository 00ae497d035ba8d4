use std::{
    collections::HashSet,
    time::{Duration, Instant},
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

/// How long a registration waits for the commits that are under way.
const COMMITS_END_WITHIN: Duration = Duration::from_secs(5);

/// How often a registration begins again after it has met another one.
const TRIES: u32 = 20;

/// How often it looks.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A process' copy of the subscriptions, with the generation it was read at.
#[derive(Debug, Default)]
pub(crate) struct KnownSubscriptions {
    pub(crate) generation: i64,
    subscriptions: Vec<Known>,
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
        Ok(Self { generation, subscriptions })
    }

    pub(crate) fn matching<'a>(&'a self, subject: &'a Subject<'a>) -> impl Iterator<Item = &'a Known> + 'a {
        self.subscriptions.iter().filter(move |known| known.filter.matches(subject))
    }
}

pub(crate) fn parsed<T: DeserializeOwned>(row: &QueryResult, column: &str) -> Result<T, DbErr> {
    serde_json::from_str(&row.try_get::<String>("", column)?).map_err(|error| DbErr::Json(error.to_string()))
}

/// Whether two transactions were in each other's way: a deadlock, or a conflict at another isolation level than ours.
fn is_conflict(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(code.as_deref(), Some("40001" | "40P01"))
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
    /// The first registration of a name decides where it begins. Later ones change filter and ordering, which hold for
    /// events that commit afterwards. From its commit on, every flush of every process sees the new subscription. With
    /// a start in the past, the deliveries of old events are written before this returns; workers claim none of them
    /// before all are there, so their order is kept. A crash in between is mended by the next registration.
    ///
    /// A definition that was replaced before does not come back while a worker is alive that has the one which replaced
    /// it: the older version of a program, restarted last, takes no events from the newer. This returns the id all the
    /// same; [`register_as`](Self::register_as) says which worker it is. Each change leaves an
    /// [audit entry](crate::AuditEntry), `define`, with the definitions before and after.
    ///
    /// On PostgreSQL a commit that is under way meanwhile may not know of the subscription or its change. This waits for
    /// it, 5 s at most, and adds what it missed before workers claim anything. What commits even later is added
    /// [by workers](Self::settle_subscriptions), and may come after a later event of its key.
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
                    tokio::time::sleep(LOOK_AGAIN * tries).await;
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
            self.flushes_end(subscription.name()).await?;
            self.add_missed(subscription.name()).await?;
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

    async fn upsert(&self, subscription: &Subscription, by: &str) -> Result<(Registered, bool), DbErr> {
        loop {
            if let Some(registered) = self.try_upsert(subscription, by).await? {
                return Ok(registered);
            }
        }
    }

    /// `None` if another process has registered the same name at the same moment.
    async fn try_upsert(&self, subscription: &Subscription, by: &str) -> Result<Option<(Registered, bool)>, DbErr> {
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
                let changes = !same && kept_by.is_none();
                if changes {
                    self.change_definition(&tx, &stored, &new, by).await?;
                }
                let waits = changes && self.sql().flushes_under_way.is_some();
                (Registered { id, kept_by }, waits || row.try_get::<Option<i64>>("", "backfill_from")?.is_some())
            }
            None => {
                let from = self.first_position(&tx, subscription.start_position()).await?;
                let (filter, ordering) = (json(&new.filter)?.into(), json(&new.ordering)?.into());
                let values = [subscription.name().into(), filter, ordering, from.into()];
                let Some(row) = self.query_one(&tx, self.sql().insert_subscription, values).await? else {
                    return Ok(None);
                };
                self.execute(&tx, self.sql().bump_generation, []).await?;
                let registered = Registered { id: row.try_get("", "id")?, kept_by: None };
                (registered, from.is_some() || self.sql().flushes_under_way.is_some())
            }
        };
        tx.commit().await?;
        Ok(Some(registered))
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
        self.execute(tx, self.sql().update_subscription, values).await?;
        self.execute(tx, self.sql().bump_generation, []).await?;
        self.note_definition(tx, stored, new, by).await
    }

    async fn first_position(&self, tx: &DatabaseTransaction, start: StartPosition) -> Result<Option<i64>, DbErr> {
        let since = match start {
            StartPosition::Now => return Ok(None),
            StartPosition::Beginning => String::new(),
            StartPosition::Since(at) => timestamp(at),
        };
        let row = self.query_one(tx, self.sql().first_position_since, [since.into()]).await?;
        row.map_or(Ok(None), |row| row.try_get("", "position"))
    }

    /// Waits until the flushes are over that may not know of a change that is committed now.
    async fn flushes_end(&self, name: &str) -> Result<(), DbErr> {
        let Some(sql) = self.sql().flushes_under_way else { return Ok(()) };
        let under_way = async || {
            let rows = self.query_all(self.store_reader(), sql, []).await?;
            rows.iter().map(|row| row.try_get("", "flush")).collect::<Result<HashSet<String>, DbErr>>()
        };
        let (began, mut left) = (Instant::now(), under_way().await?);
        while !left.is_empty() {
            if began.elapsed() > COMMITS_END_WITHIN {
                let commits = left.len();
                tracing::warn!(subscription = name, commits, "commits from before the registration do not end");
                break;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            let now = under_way().await?;
            left.retain(|flush| now.contains(flush));
        }
        Ok(())
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
        let positions = self.next_positions(&tx, from - 1, i64::MAX, None, BACKFILL_BATCH).await?;
        // Retention may have taken some in between: what is locked is there.
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

    /// Mends what flushes missed that were under way while a subscription changed: they matched their events with the
    /// subscriptions as they were before, and committed afterwards. Workers call it every few seconds.
    ///
    /// A [registration](Self::register) has waited for most of them: what is added here was 5 s late, and may come after a
    /// later delivery of its key. Never happens on SQLite.
    ///
    /// # Errors
    ///
    /// If the database fails; the next call goes on.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn settle_subscriptions(&self) -> Result<(), DbErr> {
        for row in self.query_all(self.store_reader(), self.sql().unsettled_subscriptions, []).await? {
            let name = row.try_get::<String>("", "name")?;
            self.store().until_given_up(self.add_missed(&name)).await?;
        }
        let Some(orphans) = self.sql().orphans else { return Ok(()) };
        for row in self.query_all(self.store_reader(), orphans, []).await? {
            for statement in self.sql().remove {
                self.execute(self.store(), statement, [row.try_get::<i32>("", "id")?.into()]).await?;
            }
        }
        Ok(())
    }

    /// In pages, each a transaction: so many locks at most, and so many events in memory.
    async fn add_missed(&self, name: &str) -> Result<(), DbErr> {
        let (mut after, mut settled) = (0, true);
        while let Some(last) = self.settle_subscription(name, after, &mut settled).await? {
            after = last;
        }
        Ok(())
    }

    /// One page; the position to go on after, or `None` at the end. `settled` says whether no late flush can be left.
    async fn settle_subscription(&self, name: &str, after: i64, settled: &mut bool) -> Result<Option<i64>, DbErr> {
        let tx = self.begin_write().await?;
        let Some(row) = self.query_one(&tx, self.sql().subscription_by_name, [name.into()]).await? else {
            return Ok(None);
        };
        let id: i32 = row.try_get("", "id")?;
        let (filter, ordering) = (parsed(&row, "filter")?, parsed(&row, "ordering")?);
        let asked = self.query_one(&tx, self.sql().settle_subscription, [id.into()]).await?;
        *settled &= asked.map_or(Ok(false), |row| row.try_get("", "settled"))?;
        let values = [id.into(), after.into(), BACKFILL_BATCH.into()];
        let rows = self.query_all(&tx, self.sql().missed_events, values).await?;
        // A row that somebody damaged holds up no others.
        let events: Vec<RecordedEvent> = rows.iter().filter_map(|row| recorded(row).ok()).collect();
        let added = self.add_missing(&tx, id, &filter, &ordering, &events).await?;
        let last = rows.last().map(|row| row.try_get::<i64>("", "position")).transpose()?;
        if last.is_none() && *settled {
            self.execute(&tx, self.sql().forget_change, [id.into()]).await?;
        }
        tx.commit().await?;
        if added {
            self.wake(&[id]);
        }
        Ok(last)
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
        self.wake(&[row.try_get("", "id")?]);
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
    /// # Errors
    ///
    /// If the database fails; nothing is removed then.
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
    /// If the database fails; nothing is removed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is removed.
    pub async fn remove_as(&self, name: &str, by: impl Into<Option<&By>>) -> Result<bool, DbErr> {
        let tx = self.begin_write().await?;
        let Some(row) = self.query_one(&tx, self.sql().subscription_by_name, [name.into()]).await? else {
            return Ok(false);
        };
        let id: i32 = row.try_get("", "id")?;
        for statement in self.sql().remove {
            self.execute(&tx, statement, [id.into()]).await?;
        }
        self.execute(&tx, self.sql().bump_generation, []).await?;
        if let Some(by) = by.into() {
            self.audit(&tx, by, "remove", name, &serde_json::json!({})).await?;
        }
        tx.commit().await?;
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

use std::collections::HashSet;

use outbox_core::{Filter, Ordering, StartPosition, Subject, Subscription};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, QueryResult, Value};
use serde::de::DeserializeOwned;

use crate::{
    Outbox,
    deliveries::recorded,
    flush::{DeliveryRow, insert_deliveries, json, timestamp},
    tx::Shared,
};

/// How many old events one transaction of a backfill looks at.
const BACKFILL_BATCH: u64 = 500;

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

fn parsed<T: DeserializeOwned>(row: &QueryResult, column: &str) -> Result<T, DbErr> {
    serde_json::from_str(&row.try_get::<String>("", column)?).map_err(|error| DbErr::Json(error.to_string()))
}

/// Why a subscription could not be registered.
#[derive(Debug, thiserror::Error)]
#[error("the subscription {name:?} could not be registered")]
pub struct RegisterError {
    name: String,
    #[source]
    source: DbErr,
}

impl Outbox {
    /// Makes a subscription known and returns its id.
    ///
    /// The first registration of a name decides where it begins. Later ones change filter and ordering, which hold for
    /// events that commit afterwards. From its commit on, every flush of every process sees the new subscription. With
    /// a start in the past, the deliveries of old events are written before this returns; workers claim none of them
    /// before all are there, so their order is kept. A crash in between is mended by the next registration.
    ///
    /// # Errors
    ///
    /// [`RegisterError`] if the database fails; registering again continues.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn register(&self, subscription: &Subscription) -> Result<i32, RegisterError> {
        let named = |source| RegisterError { name: subscription.name().to_owned(), source };
        let (id, backfill) = self.upsert(subscription).await.map_err(named)?;
        if backfill {
            while !self.backfill(id, subscription).await.map_err(named)? {}
            self.wake(&[id]);
        }
        Ok(id)
    }

    async fn upsert(&self, subscription: &Subscription) -> Result<(i32, bool), DbErr> {
        let filter = json(subscription.filter())?;
        let ordering = json(subscription.key_choice())?;
        let tx = self.begin_write().await?;
        let existing = self.query_one(&tx, self.sql().subscription_by_name, [subscription.name().into()]).await?;
        let (id, backfill) = match existing {
            Some(row) => {
                let id: i32 = row.try_get("", "id")?;
                let same = parsed::<Filter>(&row, "filter")? == *subscription.filter()
                    && parsed::<Ordering>(&row, "ordering")? == *subscription.key_choice();
                if !same {
                    let values = [id.into(), filter.into(), ordering.into()];
                    self.execute(&tx, self.sql().update_subscription, values).await?;
                    self.execute(&tx, self.sql().bump_generation, []).await?;
                }
                (id, row.try_get::<Option<i64>>("", "backfill_from")?.is_some())
            }
            None => {
                let from = self.first_position(&tx, subscription.start_position()).await?;
                let values = [subscription.name().into(), filter.into(), ordering.into(), from.into()];
                let row = self.query_one(&tx, self.sql().insert_subscription, values).await?;
                self.execute(&tx, self.sql().bump_generation, []).await?;
                (row.ok_or(DbErr::RecordNotInserted)?.try_get("", "id")?, from.is_some())
            }
        };
        tx.commit().await?;
        Ok((id, backfill))
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

    /// One batch; true when there is nothing left. Each batch is a transaction that also stores how far it came, so
    /// any number of processes may work on it.
    async fn backfill(&self, id: i32, subscription: &Subscription) -> Result<bool, DbErr> {
        let tx = self.begin_write().await?;
        let row = self.query_one(&tx, self.sql().subscription_by_name, [subscription.name().into()]).await?;
        let from = row.map_or(Ok(None), |row| row.try_get::<Option<i64>>("", "backfill_from"))?;
        let Some(from) = from else { return Ok(true) };
        let rows = self.query_all(&tx, self.sql().events_from, [from.into(), BACKFILL_BATCH.into()]).await?;
        let events = rows.iter().map(recorded).collect::<Result<Vec<_>, _>>()?;
        let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
        let done = self.query_all(&tx, self.sql().positions_known, [id.into(), json(&positions)?.into()]).await?;
        let done = done.iter().map(|row| row.try_get::<i64>("", "position")).collect::<Result<HashSet<_>, _>>()?;
        let missing: Vec<DeliveryRow> = events
            .iter()
            .filter(|event| !done.contains(&event.position))
            .filter_map(|event| {
                let subject = Subject::of_recorded(event);
                subscription.filter().matches(&subject).then(|| DeliveryRow {
                    subscription: id,
                    key: subscription.key_choice().key(&subject),
                    position: event.position,
                    wait: 0.0,
                    not_before: None,
                })
            })
            .collect();
        insert_deliveries(self, &tx, &missing).await?;
        let keys: HashSet<&str> = missing.iter().map(|delivery| delivery.key.as_str()).collect();
        self.execute(&tx, self.sql().due_with_head, [id.into(), json(&keys)?.into()]).await?;
        let next = positions.last().map(|last| last + 1);
        self.execute(&tx, self.sql().set_backfill, [id.into(), Value::BigInt(next)]).await?;
        tx.commit().await?;
        Ok(next.is_none())
    }

    /// A transaction of the outbox' own. On SQLite it waits for the write lock first, so it never fails halfway.
    pub(crate) async fn begin_write(&self) -> Result<DatabaseTransaction, DbErr> {
        Shared::begin(self.store()).await
    }
}

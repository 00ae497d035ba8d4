use std::collections::HashSet;

use chrono::{DateTime, Utc};
use outbox_core::{Filter, Ordering, Subject};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, Value};
use serde_json::json;
use uuid::Uuid;

use crate::{
    By, Changed, Outbox,
    audit::Entry,
    deliveries::recorded,
    flush::{self, DeliveryRow, insert_deliveries, timestamp},
    subscriptions::parsed,
};

/// How many events one transaction looks at.
const BATCH: u64 = 500;

/// Which events a subscription gets again.
#[derive(Clone, Debug)]
pub enum Replay {
    /// Those that were stored at this time or later, by the database's clock.
    Since(DateTime<Utc>),
    /// Those of this type.
    EventType(String),
    /// These.
    Events(Vec<Uuid>),
}

/// The positions still to look at.
enum Positions {
    Given(Vec<i64>),
    Range { after: i64, last: i64, event_type: Option<String> },
}

impl Outbox {
    /// Delivers events to a subscription again, or for the first time: those that it has got, that it has as dead letters,
    /// and that it never had because it began later. Only events that its filter takes, and none that is not finished.
    /// `None` if there is no such subscription.
    ///
    /// Each goes to its place in the queue of its key, due at once, and its history begins anew. The destination gets the
    /// event with the same id once more; a transactional handler has its inbox entry, so its effect does *not* happen a
    /// second time. Works in transactions of some hundred events each; a crash leaves the rest, and the audit entry says
    /// how far it came.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn replay(
        &self,
        subscription: &str,
        replay: &Replay,
        dry_run: bool,
        by: &By,
    ) -> Result<Option<Changed>, DbErr> {
        if self.subscription_id(subscription).await?.is_none() {
            return Ok(None);
        }
        let mut positions = self.positions(replay).await?;
        let details = match replay {
            Replay::Since(since) => json!({ "since": since }),
            Replay::EventType(event_type) => json!({ "event_type": event_type }),
            Replay::Events(ids) => json!({ "event_ids": ids.iter().take(100).collect::<Vec<_>>() }),
        };
        let mut entry = Entry { by, action: "replay", target: subscription, details, id: None };
        let mut done = Changed::default();
        loop {
            let page = self.next_page(&mut positions).await?;
            if page.is_empty() && (dry_run || entry.id.is_some()) {
                return Ok(Some(done));
            }
            let tx = self.begin_write().await?;
            let row = self.query_one(&tx, self.sql().subscription_by_name, [subscription.into()]).await?;
            let Some(row) = row else { return Ok(None) };
            let (id, filter, ordering) = (row.try_get("", "id")?, parsed(&row, "filter")?, parsed(&row, "ordering")?);
            let again = self.finished_of(&tx, id, &filter, &ordering, &page).await?;
            done.matched += again.len() as u64;
            if dry_run {
                tx.rollback().await?;
                continue;
            }
            self.deliver_again(&tx, id, again).await?;
            done.changed = done.matched;
            entry.store(self, &tx, done.changed).await?;
            tx.commit().await?;
            self.wake(&[id]);
        }
    }

    /// Of these events those that the subscription takes and that wait for nothing.
    async fn finished_of(
        &self,
        tx: &DatabaseTransaction,
        id: i32,
        filter: &Filter,
        ordering: &Ordering,
        page: &[i64],
    ) -> Result<Vec<DeliveryRow>, DbErr> {
        let page: Value = flush::json(page)?.into();
        let events = self.query_all(tx, self.sql().lock_events, [page.clone()]).await?;
        let unfinished = self.query_all(tx, self.sql().positions_unfinished, [id.into(), page]).await?;
        let unfinished = unfinished.iter().map(|row| row.try_get::<i64>("", "position"));
        let unfinished = unfinished.collect::<Result<HashSet<_>, _>>()?;
        // What cannot be read is a dead letter and stays one.
        let events = events.iter().filter_map(|row| recorded(row).ok());
        let again = events.filter(|event| !unfinished.contains(&event.position)).filter_map(|event| {
            let subject = Subject::of_recorded(&event);
            let taken = filter.matches(&subject);
            taken.then(|| DeliveryRow { subscription: id, key: ordering.key(&subject), position: event.position })
        });
        Ok(again.collect())
    }

    async fn deliver_again(&self, tx: &DatabaseTransaction, id: i32, mut again: Vec<DeliveryRow>) -> Result<(), DbErr> {
        let positions: Vec<i64> = again.iter().map(|delivery| delivery.position).collect();
        let positions: Value = flush::json(&positions)?.into();
        self.execute(tx, self.sql().take_delivered, [id.into(), positions.clone()]).await?;
        // The ordering may have changed since it died; a lane that is held is that of its old key.
        for row in self.query_all(tx, self.sql().take_dead_letters_at, [id.into(), positions]).await? {
            let position: i64 = row.try_get("", "position")?;
            if let Some(delivery) = again.iter_mut().find(|delivery| delivery.position == position) {
                delivery.key = row.try_get("", "key")?;
            }
        }
        self.requeue(tx, &again).await
    }

    /// Puts deliveries that are nowhere any more into their lanes.
    pub(crate) async fn requeue(&self, tx: &DatabaseTransaction, again: &[DeliveryRow]) -> Result<(), DbErr> {
        insert_deliveries(self, tx, again).await?;
        let again: Value = flush::json(again)?.into();
        self.execute(tx, self.sql().release_lanes, [again.clone()]).await?;
        self.execute(tx, self.sql().restart_lanes, [again]).await?;
        Ok(())
    }

    async fn positions(&self, replay: &Replay) -> Result<Positions, DbErr> {
        let (db, sql) = (self.store_reader(), self.sql());
        let (after, event_type) = match replay {
            Replay::Events(ids) => {
                let ids: Vec<String> = ids.iter().map(|id| id.simple().to_string()).collect();
                let rows = self.query_all(db, sql.positions_of, [flush::json(&ids)?.into()]).await?;
                let positions = rows.iter().map(|row| row.try_get("", "position")).collect::<Result<_, _>>()?;
                return Ok(Positions::Given(positions));
            }
            Replay::Since(since) => {
                let row = self.query_one(db, sql.first_position_since, [timestamp(*since).into()]).await?;
                let first: Option<i64> = row.map_or(Ok(None), |row| row.try_get("", "position"))?;
                (first.map_or(i64::MAX, |first| first - 1), None)
            }
            Replay::EventType(event_type) => (0, Some(event_type.clone())),
        };
        let row = self.query_one(db, sql.last_position, []).await?;
        let last: Option<i64> = row.map_or(Ok(None), |row| row.try_get("", "last"))?;
        Ok(Positions::Range { after, last: last.unwrap_or(0), event_type })
    }

    async fn next_page(&self, positions: &mut Positions) -> Result<Vec<i64>, DbErr> {
        match positions {
            Positions::Given(rest) => {
                let page = rest.len().min(BATCH as usize);
                Ok(rest.drain(..page).collect())
            }
            Positions::Range { after, last, event_type } => {
                let page =
                    self.next_positions(self.store_reader(), *after, *last, event_type.as_deref(), BATCH).await?;
                *after = page.last().copied().unwrap_or(*last);
                Ok(page)
            }
        }
    }

    pub(crate) async fn next_positions(
        &self,
        db: &impl ConnectionTrait,
        after: i64,
        last: i64,
        event_type: Option<&str>,
        limit: u64,
    ) -> Result<Vec<i64>, DbErr> {
        let values = [after.into(), last.into(), event_type.into(), limit.into()];
        let rows = self.query_all(db, self.sql().next_positions, values).await?;
        rows.iter().map(|row| row.try_get("", "position")).collect()
    }
}

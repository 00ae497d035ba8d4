//! Which definition of a subscription counts, when programs of several versions register it.
//!
//! Among the definitions of workers that are alive, the one that was introduced last counts, see ADR 11. When each was
//! introduced stands in the audit table: every change is an entry there.

use std::collections::HashMap;

use outbox_core::{Filter, Ordering};
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    By, Outbox,
    subscriptions::parsed,
    workers::{ALIVE_FOR, Known},
};

/// What the entries in the audit table are called.
const ACTION: &str = "define";

/// What a subscription takes, and what waits for what. Compared as values: databases order the members of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Definition {
    #[serde(skip)]
    pub(crate) id: i32,
    pub(crate) filter: Filter,
    pub(crate) ordering: Ordering,
}

impl Definition {
    pub(crate) fn is(&self, filter: &Filter, ordering: &Ordering) -> bool {
        self.filter == *filter && self.ordering == *ordering
    }
}

/// A change, as the audit table has it.
#[derive(Debug, Deserialize)]
struct Change {
    from: Definition,
    to: Definition,
}

impl Outbox {
    /// All that are stored, by name.
    pub(crate) async fn definitions(&self) -> Result<HashMap<String, Definition>, DbErr> {
        let rows = self.query_all(self.store_reader(), self.sql().subscriptions, []).await?;
        rows.iter()
            .map(|row| {
                let definition = Definition {
                    id: row.try_get("", "id")?,
                    filter: parsed(row, "filter")?,
                    ordering: parsed(row, "ordering")?,
                };
                Ok((row.try_get("", "name")?, definition))
            })
            .collect()
    }

    /// A worker that is alive and has the stored definition, if that is newer than the one that is to replace it.
    pub(crate) async fn keeps_definition(
        &self,
        tx: &DatabaseTransaction,
        stored: &Definition,
        new: &Known,
    ) -> Result<Option<String>, DbErr> {
        let rows = self.query_all(tx, self.sql().definitions, [ACTION.into(), new.name.as_str().into()]).await?;
        let changes = rows.iter().map(|row| parsed(row, "details")).collect::<Result<Vec<Change>, _>>()?;
        let introduced = |filter: &Filter, ordering: &Ordering| {
            let first = changes.first().is_some_and(|change| change.from.is(filter, ordering));
            let changed = || changes.iter().position(|change| change.to.is(filter, ordering)).map(|index| index + 1);
            if first { Some(0) } else { changed() }
        };
        // One that nobody has ever changed it to is that of its first registration.
        let stored_at = introduced(&stored.filter, &stored.ordering).unwrap_or(changes.len());
        if introduced(&new.filter, &new.ordering).is_none_or(|new_at| new_at > stored_at) {
            return Ok(None);
        }
        for row in self.query_all(tx, self.sql().workers, []).await? {
            let known: Vec<Known> = parsed(&row, "subscriptions").unwrap_or_default();
            let has_it = |each: &Known| each.name == new.name && stored.is(&each.filter, &each.ordering);
            if row.try_get::<f64>("", "last_seen_seconds")? < ALIVE_FOR.as_secs_f64() && known.iter().any(has_it) {
                return row.try_get("", "id").map(Some);
            }
        }
        Ok(None)
    }

    /// Notes a change, in the transaction that makes it.
    pub(crate) async fn note_definition(
        &self,
        tx: &DatabaseTransaction,
        from: &Definition,
        to: &Known,
        by: &str,
    ) -> Result<(), DbErr> {
        let details = json!({ "from": from, "to": { "filter": to.filter, "ordering": to.ordering } });
        self.audit(tx, &By::new(by), ACTION, &to.name, &details).await.map(|_| ())
    }
}

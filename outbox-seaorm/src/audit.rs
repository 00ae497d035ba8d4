use chrono::{DateTime, Utc};
use sea_orm::{DatabaseTransaction, DbErr};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::{Outbox, flush::json};

/// The longest name of an actor, and the longest reason, in characters.
const ACTOR_LENGTH: usize = 255;
const REASON_LENGTH: usize = 1000;

/// Who changes something as an operator, and why. It stands in the audit table afterwards.
#[derive(Clone, Debug)]
pub struct By {
    actor: String,
    reason: Option<String>,
}

impl By {
    /// Names the operator. What is longer than 255 characters is cut off, control characters are left out.
    #[must_use]
    pub fn new(actor: &str) -> Self {
        Self { actor: plain(actor, ACTOR_LENGTH), reason: None }
    }

    /// Says why. What is longer than 1,000 characters is cut off, control characters are left out.
    #[must_use]
    pub fn reason(mut self, reason: &str) -> Self {
        self.reason = Some(plain(reason, REASON_LENGTH)).filter(|reason| !reason.is_empty());
        self
    }
}

fn plain(text: &str, length: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(length).collect()
}

/// What an operator has done. Serializes as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct AuditEntry {
    /// A running number.
    #[serde(serialize_with = "as_text")]
    pub id: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// What: `pause`, `resume`, `remove`, `replay`, `discard`, `due`; `define` by a program that changed a subscription.
    pub action: String,
    /// To what: a subscription, or `dead-letters`.
    pub target: String,
    /// Reason, filter, and how much was changed.
    pub details: Value,
}

impl Outbox {
    /// The newest actions of operators, the newest first.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn audit_entries(&self, limit: u32) -> Result<Vec<AuditEntry>, DbErr> {
        let rows = self.query_all(self.store_reader(), self.sql().list_audit, [limit.into()]).await?;
        rows.iter()
            .map(|row| {
                let details: Option<String> = row.try_get("", "details")?;
                Ok(AuditEntry {
                    id: row.try_get("", "id")?,
                    at: row.try_get("", "at")?,
                    actor: row.try_get("", "actor")?,
                    action: row.try_get("", "action")?,
                    target: row.try_get("", "target")?,
                    details: details.and_then(|details| serde_json::from_str(&details).ok()).unwrap_or_default(),
                })
            })
            .collect()
    }

    /// Stores an action in the transaction that does it, and returns the entry's id.
    pub(crate) async fn audit(
        &self,
        tx: &DatabaseTransaction,
        by: &By,
        action: &str,
        target: &str,
        details: &Value,
    ) -> Result<i64, DbErr> {
        let details = json(&with_reason(by, details))?;
        let values = [by.actor.as_str().into(), action.into(), target.into(), details.into()];
        let row = self.query_one(tx, self.sql().insert_audit, values).await?;
        row.ok_or(DbErr::RecordNotInserted)?.try_get("", "id")
    }
}

/// The entry of an action that takes several transactions: each of them says how far it came.
pub(crate) struct Entry<'a> {
    pub(crate) by: &'a By,
    pub(crate) action: &'static str,
    pub(crate) target: &'a str,
    pub(crate) details: Value,
    pub(crate) id: Option<i64>,
}

impl Entry<'_> {
    pub(crate) async fn store(&mut self, outbox: &Outbox, tx: &DatabaseTransaction, changed: u64) -> Result<(), DbErr> {
        self.details["changed"] = changed.into();
        match self.id {
            None => self.id = Some(outbox.audit(tx, self.by, self.action, self.target, &self.details).await?),
            Some(id) => {
                let details = json(&with_reason(self.by, &self.details))?;
                outbox.execute(tx, outbox.sql().update_audit, [id.into(), details.into()]).await?;
            }
        }
        Ok(())
    }
}

fn with_reason(by: &By, details: &Value) -> Value {
    let mut details = details.clone();
    if let Some(reason) = &by.reason {
        details["reason"] = reason.as_str().into();
    }
    details
}

/// Ids leave as text: not every reader of JSON has numbers of this size.
pub(crate) fn as_text<S: Serializer>(id: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

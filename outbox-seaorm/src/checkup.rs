use sea_orm::{DbErr, QueryResult};
use serde::Serialize;

use crate::Outbox;

/// What is wrong with a database, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Complaint {
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub to_do: String,
}

impl Outbox {
    /// Compares what the database has and how it is set with what the outbox counts on. Nothing on SQLite.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Safe: it only reads.
    pub async fn checkup(&self) -> Result<Vec<Complaint>, DbErr> {
        let Some(sql) = self.sql().checkup else { return Ok(Vec::new()) };
        match self.query_one(self.store_reader(), sql, []).await? {
            Some(row) => complaints(&row),
            None => Ok(Vec::new()),
        }
    }
}

fn complaints(row: &QueryResult) -> Result<Vec<Complaint>, DbErr> {
    let mut found = Vec::new();
    let mut note = |problem: &str, to_do: String| found.push(Complaint { problem: problem.to_owned(), to_do });
    let last: i64 = row.try_get("", "last")?;
    if row.try_get::<Option<i64>>("", "drawn")?.unwrap_or(last) < last {
        let sequence: String = row.try_get("", "sequence")?;
        note(
            "positions are given out twice: their sequence was set back, by a restore for example",
            format!("select setval('{sequence}', {last})"),
        );
    }
    if !row.try_get::<bool>("", "in_order")? {
        note(
            "numbers are not given out in their order: a sequence of the outbox has a cache, or counts down",
            "alter sequence … cache 1 increment 1, for outbox_events.position and outbox_deliveries.seq".to_owned(),
        );
    }
    if let Some(sessions) = row.try_get::<Option<String>>("", "stuck")? {
        note(
            &format!("routing is held up by session {sessions}"),
            "select pg_terminate_backend(…), if it does not go away; look for the process that it belongs to"
                .to_owned(),
        );
    }
    if row.try_get::<String>("", "read_only")? == "on" {
        note("the database takes no writes", "set default_transaction_read_only = off for it".to_owned());
    }
    for setting in ["fsync", "full_page_writes", "synchronous_commit"] {
        if row.try_get::<String>("", setting)? == "off" {
            note(
                &format!("{setting} is off: what was confirmed can be lost when the server crashes"),
                format!("set {setting} = on, in postgresql.conf or for the database or role"),
            );
        }
    }
    Ok(found)
}

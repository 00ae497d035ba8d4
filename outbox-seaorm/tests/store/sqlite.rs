//! What the tests say differently to SQLite: each test has a file of its own.

use outbox_seaorm::Outbox;
use sea_orm::{DatabaseConnection, DbBackend};
use tempfile::TempDir;

use super::fixture;

pub(crate) const BACKEND: DbBackend = DbBackend::Sqlite;

/// A statement that is still at work when its future is polled for the first time.
pub(crate) const SLOW: &str = "
    insert into notes
    with recursive n (i) as (select 1 union all select i + 1 from n where i < 100000) select 'slow ' || max(i) from n";

/// A statement that fails and ends the transaction, with all its savepoints, where `notes` has an 'a'.
pub(crate) const END_TRANSACTION: &str = "insert or rollback into notes values ('a')";

pub(crate) const NOW: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";

/// A statement that records an event without the library.
pub(crate) fn record(event_type: &str, aggregate_type: &str, aggregate_id: &str, payload: &str) -> String {
    format!(
        "insert into outbox_record (event_type, aggregate_type, aggregate_id, payload)
         values ('{event_type}', '{aggregate_type}', '{aggregate_id}', '{payload}')"
    )
}

/// How much earlier than its head a lane may be due: the times are the same.
pub(crate) const FLUSH_SECONDS: &str = "0";

/// What somebody may do to the row of an event, and what is said about it.
pub(crate) const DAMAGE: [(&str, &str); 9] = [
    ("payload = '{'", "payload"),
    ("payload = x'ff00ff'", "payload"),
    ("tags = '[1]'", "tags"),
    ("event_id = x'00'", "event_id"),
    ("occurred_at = 'yesterday'", "occurred_at"),
    ("recorded_at = 'never'", "recorded_at"),
    ("schema_version = 'two'", "schema_version"),
    ("max_attempts = 'many'", "max_attempts"),
    ("aggregate_type = x'ff', tenant = x'ff', actor_kind = x'ff', tags = '{', recorded_at = ''", "tags"),
];

/// A database, gone when it is dropped.
pub(crate) struct Place {
    directory: TempDir,
}

impl Place {
    pub(crate) async fn empty() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// With the tables of the outbox and the table `notes` of an application.
    pub(crate) async fn migrated() -> Self {
        let place = Self::empty().await;
        fixture::migrate(&place.connect(1).await).await;
        place
    }

    pub(crate) fn url(&self) -> String {
        format!("sqlite://{}?mode=rwc", self.directory.path().join("test.db").display())
    }

    pub(crate) async fn connect(&self, connections: u32) -> Outbox {
        Outbox::connect(&self.url(), connections).await.unwrap()
    }

    /// Connections for what a test does to the tables itself.
    pub(crate) fn hand<'a>(outbox: &'a Outbox, _: &'a DatabaseConnection) -> &'a DatabaseConnection {
        outbox.writer()
    }

    /// Connections that see only what is committed.
    pub(crate) async fn witness(&self, outbox: &Outbox) -> DatabaseConnection {
        outbox.reader().clone()
    }
}

/// A text as a time.
pub(crate) fn time(text: &str) -> String {
    text.to_owned()
}

/// So many seconds before a time.
pub(crate) fn before(time: &str, seconds: &str) -> String {
    format!("strftime('%Y-%m-%dT%H:%M:%fZ', {time}, printf('%+.3f seconds', -({seconds})))")
}

/// These columns as one JSON array.
pub(crate) fn array(columns: &str) -> String {
    format!("json_array({columns})")
}

/// A column that holds JSON, as an element of [`array`].
pub(crate) fn json(column: &str) -> String {
    format!("json({column})")
}

/// Waits until nobody is in a transaction: whoever writes next waits for the only connection that writes.
pub(crate) async fn quiet(_: &DatabaseConnection) {}

//! What the tests say differently to PostgreSQL: each test has a database of its own on one private server.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use outbox_seaorm::Outbox;
use outbox_test_servers::Postgres;
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, Statement};

use super::{SETTINGS, STRANGER, fixture};

pub(crate) const BACKEND: DbBackend = DbBackend::Postgres;

/// A statement that is still at work when its future is polled for the first time.
pub(crate) const SLOW: &str = "insert into notes select 'slow ' || max(i) from generate_series(1, 100000) i";

/// A statement that fails and ends the transaction, with all its savepoints.
pub(crate) const END_TRANSACTION: &str = "select pg_terminate_backend(pg_backend_pid())";

pub(crate) const NOW: &str = "clock_timestamp()";

/// A statement that records an event without the library.
pub(crate) fn record(event_type: &str, aggregate_type: &str, aggregate_id: &str, payload: &str) -> String {
    format!("select outbox_record('{event_type}', '{aggregate_type}', '{aggregate_id}', '{payload}')")
}

/// How much earlier than its head a lane may be due: a flush locks its lanes first.
pub(crate) const FLUSH_SECONDS: &str = "5";

/// What somebody may do to the row of an event, and what is said about it.
pub(crate) const DAMAGE: [(&str, &str); 6] = [
    ("tags = '[1]'", "tags"),
    ("occurred_at = 'infinity'", "occurred_at"),
    ("recorded_at = '-infinity'", "recorded_at"),
    ("recorded_at = 'infinity'", "recorded_at"),
    ("occurred_at = '290000-01-01'", "occurred_at"),
    ("tags = '7', recorded_at = '290000-01-01'", "tags"),
];

/// A database, gone when it is dropped.
pub(crate) struct Place {
    url: String,
}

/// No test here stops the server, so nothing has to survive that.
pub(crate) fn server() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start(&[&["fsync=off", "max_connections=300"], SETTINGS].concat()))
}

/// The database that [`Place::migrated`] copies.
fn template() -> &'static str {
    static TEMPLATE: OnceLock<String> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let migrate = || {
            let url = server().database();
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let db = connect(&url, 1).await;
                fixture::migrate(&Outbox::new(db.clone())).await;
                db.execute_unprepared(STRANGER).await.unwrap();
                // A database in use cannot be copied.
                db.close().await.unwrap();
            });
            url
        };
        // The runtime of a test runs no other runtime in its thread.
        thread::spawn(migrate).join().unwrap()
    })
}

pub(crate) async fn connect(url: &str, connections: u32) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url);
    options.max_connections(connections).sqlx_logging(false);
    Database::connect(options).await.unwrap()
}

impl Place {
    pub(crate) async fn empty() -> Self {
        Self { url: server().database() }
    }

    /// With the tables of the outbox and the table `notes` of an application.
    pub(crate) async fn migrated() -> Self {
        Self { url: server().copy_of(template()) }
    }

    pub(crate) fn url(&self) -> String {
        self.url.clone()
    }

    /// With one connection for all units of work: if one of them leaves it in a bad state, the next one shows it.
    pub(crate) async fn connect(&self, _: u32) -> Outbox {
        Outbox::connect(&self.url, 1).await.unwrap()
    }

    /// Connections that see only what is committed, and that a stranger's tables do not lead astray.
    pub(crate) async fn witness(&self, _: &Outbox) -> DatabaseConnection {
        connect(&format!("{}?options[search_path]=public,stranger&options[idle_session_timeout]=0", self.url), 1).await
    }

    /// Connections for what a test does to the tables itself.
    pub(crate) fn hand<'a>(_: &'a Outbox, witness: &'a DatabaseConnection) -> &'a DatabaseConnection {
        witness
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        server().discard(&self.url);
    }
}

/// A text as a time.
pub(crate) fn time(text: &str) -> String {
    format!("({text})::timestamptz")
}

/// So many seconds before a time.
pub(crate) fn before(time: &str, seconds: &str) -> String {
    format!("{time} - ({seconds})::float8 * interval '1 second'")
}

/// These columns as one JSON array.
pub(crate) fn array(columns: &str) -> String {
    format!("json_build_array({columns})::text")
}

/// A column that holds JSON, as an element of [`array`].
pub(crate) fn json(column: &str) -> String {
    column.to_owned()
}

/// Waits until nobody is in a transaction: what was begun is rolled back or committed by then.
pub(crate) async fn quiet(witness: &DatabaseConnection) {
    let sql = "select coalesce(string_agg(state || ': ' || query, '; '), '') from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
                  and (xact_start is not null or state <> 'idle')";
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let row = witness.query_one_raw(Statement::from_string(BACKEND, sql)).await.unwrap().unwrap();
        let busy: String = row.try_get_by_index(0).unwrap();
        if busy.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "a transaction was not ended: {busy}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

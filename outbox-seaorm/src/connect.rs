use std::time::Duration;

use sea_orm::{
    ConnectOptions, Database, DatabaseConnection, DbErr,
    sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous},
};

use crate::Outbox;

/// How long a request waits for a connection, or for SQLite's write lock.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the database could not be opened. No text holds a password: only scheme, file and cause are shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The URL names another kind of database.
    #[error(
        "the database URL starts with {scheme:?}; use sqlite://FILE?mode=rwc, for example sqlite://todo.db?mode=rwc"
    )]
    UnknownScheme {
        /// What stands before the colon.
        scheme: String,
    },
    /// The database did not open.
    #[error("the database could not be opened; check that the file's folder exists and can be written")]
    Open(#[source] DbErr),
}

impl Outbox {
    /// Opens a database for the outbox and for the application's own use ([`reader`](Self::reader)).
    ///
    /// SQLite runs with a write-ahead log, `synchronous=FULL` (a commit that was confirmed survives a power cut),
    /// foreign keys on, one connection for writing and `readers` for reading: several write connections are no faster
    /// and make the slowest requests many times slower (measured).
    ///
    /// # Errors
    ///
    /// [`ConnectError`] if the URL names another database or the file cannot be opened.
    pub async fn connect(url: &str, readers: u32) -> Result<Self, ConnectError> {
        match url.split(':').next() {
            Some("sqlite") if url.contains(':') => {}
            scheme => {
                let scheme = scheme.unwrap_or_default().chars().take(20).collect();
                return Err(ConnectError::UnknownScheme { scheme });
            }
        }
        let writer = sqlite(url, 1).await.map_err(ConnectError::Open)?;
        let reader = sqlite(url, readers.max(1)).await.map_err(ConnectError::Open)?;
        Ok(Self::with_connections(writer, reader))
    }
}

async fn sqlite(url: &str, connections: u32) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections)
        .min_connections(1)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .sqlx_logging(false)
        .map_sqlx_sqlite_opts(|options| {
            options
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full)
                .busy_timeout(ACQUIRE_TIMEOUT)
                .foreign_keys(true)
        });
    Database::connect(options).await
}

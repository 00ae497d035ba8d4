use std::time::Duration;

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, RuntimeErr, SqlxPostgresConnector,
    sqlx,
    sqlx::{
        PgConnection,
        sqlite::{SqliteJournalMode, SqliteSynchronous},
    },
};

use crate::{Outbox, clean, pooler::Connections};

/// How long a request waits for a connection, or for SQLite's write lock.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Claims, settlements, renewals and dashboards: short statements, a few at a time.
const STORE_CONNECTIONS: u32 = 6;

/// After this much idle time a connection is tested before it is used.
const PING_AFTER: Duration = Duration::from_secs(1);

/// Why the database could not be opened. No text holds a password: only scheme, file and cause are shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The URL names another kind of database.
    #[error(
        "the database URL starts with {scheme:?}; use sqlite://FILE?mode=rwc, for example sqlite://todo.db?mode=rwc, or \
         postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    UnknownScheme {
        /// What stands before the `://`.
        scheme: String,
    },
    /// The URL has no scheme. Nothing of it is shown: what it begins with may be a password.
    #[error(
        "the database URL has no scheme; use sqlite://FILE?mode=rwc, for example sqlite://todo.db?mode=rwc, or \
         postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    NoScheme,
    /// A SQLite database in memory.
    #[error("a SQLite database in memory is another one for each connection; use a file, sqlite://FILE?mode=rwc")]
    InMemory,
    /// The URL has a part that its driver does not know.
    #[error("the database URL cannot be read; check its spelling, and what stands after a '?'")]
    Url(#[source] DbErr),
    /// The database did not open.
    #[error("the database could not be opened; check that the file's folder exists and can be written")]
    Open(#[source] DbErr),
    /// The server did not answer, or refused.
    #[error("the database server could not be reached; check host, port, user, password and database of its URL")]
    Server(#[source] DbErr),
}

/// The pools of an outbox.
#[derive(Clone, Debug)]
pub(crate) struct Pools {
    /// For units of work.
    pub(crate) writer: Connections,
    /// For the application's own reading.
    pub(crate) reader: DatabaseConnection,
    /// For claims, settlements and renewals, so that requests that use up their pool hold up no lease.
    pub(crate) store: Connections,
    /// For reading what dashboards show and whether anything is due.
    pub(crate) store_reader: Connections,
    /// No hook of somebody else is on the connections.
    pub(crate) opened_here: bool,
}

/// A worker's statements look up single rows by their keys. While a table is small the planner would rather compare all
/// its rows with all the keys, and go on so for a while when it has grown. Planning or compiling them anew brings
/// nothing.
async fn look_up(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let settings = "set enable_seqscan = off; set plan_cache_mode = force_generic_plan; set jit = off";
    sqlx::Executor::execute(connection, settings).await.map(|_| ())
}

impl Pools {
    pub(crate) fn with_own_store(&self) -> Self {
        let store = match self.store.get_database_backend() {
            DbBackend::Postgres => {
                let pool = self.store.db.get_postgres_connection_pool();
                let mut options = pool.options().clone().min_connections(0).max_connections(STORE_CONNECTIONS);
                if self.opened_here && !self.store.pooled {
                    options = options.after_connect(|connection, _| Box::pin(look_up(connection)));
                }
                let pool = options.connect_lazy_with((*pool.connect_options()).clone());
                Connections::from(SqlxPostgresConnector::from_sqlx_postgres_pool(pool))
            }
            // Its connections have threads of their own.
            _ => return self.clone(),
        };
        Self { store: store.clone(), store_reader: store, ..self.clone() }
    }
}

impl Outbox {
    /// Opens a database for the outbox and for the application's own use ([`reader`](Self::reader)).
    ///
    /// On **SQLite**: a write-ahead log, `synchronous=FULL` (a commit that was confirmed survives a power cut), foreign
    /// keys on, one connection for writing and `connections` for reading. Several write connections are no faster and
    /// make the slowest requests many times slower (measured).
    ///
    /// On **PostgreSQL**: one pool of at most `connections` for units of work and the application's own reading, and a
    /// small one of its own for the work of the worker. No superuser, no extension; everything runs at READ COMMITTED.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] if the URL names another database, or this one cannot be opened.
    pub async fn connect(url: &str, connections: u32) -> Result<Self, ConnectError> {
        let connections = connections.max(1);
        match url.split_once(':').map(|(scheme, _)| scheme) {
            Some("sqlite") if url.contains(":memory:") || url.contains("mode=memory") => Err(ConnectError::InMemory),
            Some("sqlite") => {
                let writer = Connections::guarded(sqlite(url, 1).await?);
                let reader = sqlite(url, connections).await?;
                let store_reader = Connections::guarded(reader.clone());
                let pools = Pools { store: writer.clone(), writer, reader, store_reader, opened_here: true };
                Ok(Self::with_pools(pools))
            }
            Some("postgres" | "postgresql") => {
                let requests = postgres(url, connections).await?;
                let store = Connections::from(postgres(url, STORE_CONNECTIONS).await?);
                let pools = Pools {
                    writer: requests.clone().into(),
                    reader: requests,
                    store: store.clone(),
                    store_reader: store,
                    opened_here: true,
                };
                Ok(Self::with_pools(pools))
            }
            _ => Err(scheme(url).map_or(ConnectError::NoScheme, |scheme| ConnectError::UnknownScheme { scheme })),
        }
    }
}

/// What stands before the `://`, if it can be nothing but a scheme.
fn scheme(url: &str) -> Option<String> {
    let (scheme, _) = url.split_once("://")?;
    (scheme.len() <= 20 && scheme.bytes().all(|c| c.is_ascii_alphabetic())).then(|| scheme.to_owned())
}

fn refused(error: DbErr, otherwise: fn(DbErr) -> ConnectError) -> ConnectError {
    match &error {
        DbErr::Conn(RuntimeErr::SqlxError(cause)) if matches!(**cause, sqlx::Error::Configuration(_)) => {
            ConnectError::Url(error)
        }
        // Its text is the whole URL, with the password.
        DbErr::Conn(RuntimeErr::Internal(_)) => ConnectError::Url(DbErr::Custom("it cannot be parsed".to_owned())),
        _ => otherwise(error),
    }
}

async fn postgres(url: &str, connections: u32) -> Result<DatabaseConnection, ConnectError> {
    let mut options = ConnectOptions::new(url);
    options
        .max_connections(connections)
        .min_connections(1)
        .connect_timeout(ACQUIRE_TIMEOUT)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A ping before every request would cost a round trip; one after a pause finds most dead connections.
        .test_before_acquire(false)
        .test_before_acquire_if_idle_for(PING_AFTER)
        .sqlx_logging(false);
    Database::connect(options).await.map_err(|error| refused(error, ConnectError::Server))
}

async fn sqlite(url: &str, connections: u32) -> Result<DatabaseConnection, ConnectError> {
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
        })
        .map_sqlx_sqlite_pool_opts(clean::guarded);
    Database::connect(options).await.map_err(|error| refused(error, ConnectError::Open))
}

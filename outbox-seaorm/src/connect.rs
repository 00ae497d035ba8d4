use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, RuntimeErr, SqlxPostgresConnector,
    sqlx,
    sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous},
};
use url::form_urlencoded;

use crate::{
    Outbox, clean,
    pooler::{self, Connections},
    sessions::{Purpose, Sessions},
};

/// How long a request waits for a connection, or for SQLite's write lock.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// When a SQLite file that was busy is opened again.
const OPEN_AGAIN: Duration = Duration::from_millis(20);

/// SQLite's code for a lock that somebody else has.
const SQLITE_BUSY: u32 = 5;

/// Claims, settlements, renewals and dashboards: short statements, a few at a time.
pub(crate) const STORE_CONNECTIONS: u32 = 6;

/// What may stand behind the '?' of a PostgreSQL URL, besides `options[…]`. Others would be ignored by the driver.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// How long the store waits for an answer, outside of workers, whose lease says how long. Long enough for the counts of a
/// dashboard.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How large the write-ahead log of SQLite stays when it is begun anew, in bytes: 64 MiB.
const LOG_LIMIT: &str = "67108864";

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
    /// The URL has a parameter that the driver ignores, so that what it asks for would not happen.
    #[error(
        "the database URL asks for {name:?}, which this driver does not have; remove it. Limits of statements and sessions \
         go into options[…], for example ?options[statement_timeout]=5s, those of TCP connections into the operating \
         system"
    )]
    Parameter {
        /// Its name.
        name: String,
    },
    /// The URL names more than one host.
    #[error(
        "the database URL names several hosts; use one address that always leads to the primary: a DNS name or a virtual \
         address that moves, or a proxy such as HAProxy or PgBouncer"
    )]
    SeveralHosts,
    /// The server is a standby, and was still one after 5 s.
    #[error(
        "the server is a standby, which takes no writes; use the address of the primary, or one that moves with it"
    )]
    Standby,
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

impl Pools {
    /// Its calls have this limit. If it is exceeded, the other pools begin anew too.
    pub(crate) fn with_own_store(&self, connections: u32, limit: Duration) -> Self {
        let store = match self.store.get_database_backend() {
            DbBackend::Postgres => {
                let store = self.store.now();
                let pool = store.get_postgres_connection_pool();
                let mut options = pool.options().clone().min_connections(0).max_connections(connections);
                let sessions = self.store.sessions().clone();
                if self.opened_here {
                    let purpose = if self.store.pooled { Purpose::Pooled } else { Purpose::Worker };
                    options = sessions.prepare(options, purpose);
                }
                let pool = options.connect_lazy_with((*pool.connect_options()).clone());
                Connections::from(SqlxPostgresConnector::from_sqlx_postgres_pool(pool))
                    .sharing(&sessions)
                    .replaceable(Some(limit), &[&self.store, &self.writer])
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
    /// keys on, a log that is cut to 64 MiB when it can be, one connection for writing and `connections` for reading. Several write connections are no faster and
    /// make the slowest requests many times slower (measured).
    ///
    /// On **PostgreSQL**: one pool of at most `connections` for units of work and the application's own reading, and a
    /// small one of its own for the work of the worker. No superuser, no extension. Whatever server, database, role or URL
    /// say, transactions begin at READ COMMITTED, JIT is off, and idle sessions are not ended; other limits are theirs. A
    /// standby is refused. When a server has become read-only, goes away or is replaced by another one, all connections
    /// are replaced.
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
                check_parameters(url)?;
                let sessions = Arc::default();
                let requests = postgres(url, connections, &sessions).await?;
                let store = postgres(url, STORE_CONNECTIONS, &sessions).await?.replaceable(Some(ANSWER_WITHIN), &[]);
                let pools = Pools {
                    reader: requests.db.clone(),
                    // How long a unit of work may take is the application's decision.
                    writer: requests.replaceable(None, &[]),
                    store: store.clone(),
                    store_reader: store,
                    opened_here: true,
                };
                let outbox = Self::with_pools(pools);
                // The tables may not be there yet.
                outbox.find_tables().await.map_err(ConnectError::Server)?;
                Ok(outbox)
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

/// Refuses what the driver would ignore, or not understand.
fn check_parameters(url: &str) -> Result<(), ConnectError> {
    let address = url.split_once('?').map_or(url, |(address, _)| address);
    let host = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or(host);
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let mut several = host.contains(',');
    for (name, value) in parameters(url) {
        let is_setting = name.starts_with("options[") && name.ends_with(']');
        if !is_setting && !PARAMETERS.contains(&&*name) {
            return Err(ConnectError::Parameter { name: name.chars().take(40).collect() });
        }
        several |= matches!(&*name, "host" | "hostaddr" | "port") && value.contains(',');
    }
    if several { Err(ConnectError::SeveralHosts) } else { Ok(()) }
}

fn parameters(url: &str) -> form_urlencoded::Parse<'_> {
    form_urlencoded::parse(url.split_once('?').map_or("", |(_, parameters)| parameters).as_bytes())
}

async fn postgres(url: &str, connections: u32, sessions: &Arc<Sessions>) -> Result<Connections, ConnectError> {
    let mut options = ConnectOptions::new(url);
    let pooled = parameters(url).any(|(name, value)| pooler::is_pooled(&name, &value));
    let (preparing, purpose) = (sessions.clone(), if pooled { Purpose::Pooled } else { Purpose::Requests });
    options
        .max_connections(connections)
        .min_connections(1)
        .connect_timeout(ACQUIRE_TIMEOUT)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .map_sqlx_postgres_pool_opts(move |options| preparing.prepare(options, purpose))
        .sqlx_logging(false);
    let opened = Database::connect(options).await;
    let opened = opened.map_err(|error| {
        if sessions.led_to_a_standby() { ConnectError::Standby } else { refused(error, ConnectError::Server) }
    });
    Ok(Connections::from(opened?).sharing(sessions))
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
                // After a reader has kept a snapshot for long, the log is as large as what was written meanwhile.
                .pragma("journal_size_limit", LOG_LIMIT)
        })
        .map_sqlx_sqlite_pool_opts(clean::guarded);
    // Who switches a new file to the write-ahead log does not wait for others who migrate it: SQLite refuses at once.
    let began = Instant::now();
    loop {
        match Database::connect(options.clone()).await {
            Err(error) if is_busy(&error) && began.elapsed() < ACQUIRE_TIMEOUT => tokio::time::sleep(OPEN_AGAIN).await,
            opened => return opened.map_err(|error| refused(error, ConnectError::Open)),
        }
    }
}

fn is_busy(error: &DbErr) -> bool {
    let DbErr::Conn(RuntimeErr::SqlxError(error)) = error else { return false };
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse::<u32>().ok()).is_some_and(|code| code & 0xff == SQLITE_BUSY)
}

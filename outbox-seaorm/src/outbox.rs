use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
    time::Duration,
};

use outbox_core::{
    Clock, Limits, SystemClock,
    store::{Announcer, NewsItem},
};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseConnectionType as Connection, DbBackend, DbErr, QueryResult,
    RuntimeErr, Statement, Value,
    sqlx::{self, postgres::PgConnectOptions, sqlite::SqliteConnectOptions},
};
use tokio::sync::Notify;

use crate::{
    calls::Calls,
    claim::Mark,
    connect::{Pools, STORE_CONNECTIONS},
    names::Names,
    notify::Notifier,
    pooler::Connections,
    postgres::POSTGRES,
    route::{Committed, Handed, ROUTER},
    sql::Sql,
    sqlite::SQLITE,
    subscriptions::KnownSubscriptions,
};

/// How long after a write that failed because of the disk the next one is expected to fail as well.
const DISK_RECOVERS: Duration = Duration::from_secs(5);

/// A probe that waits longer has given up.
const READY_WITHIN: Duration = Duration::from_secs(2);

const SCHEMA_VERSION: i32 = 3;

/// The outbox of one database: opens units of work, and is the store that workers claim from.
///
/// A cheap handle. Clones of one outbox wake each other: a commit through one starts the delivery by a worker on
/// another at once. Two outboxes made separately for the same database find each other's events by polling.
#[derive(Clone, Debug)]
pub struct Outbox {
    inner: Arc<Inner>,
    pools: Arc<Pools>,
    limits: Limits,
    clock: Arc<dyn Clock>,
    names: Arc<Names>,
}

#[derive(Debug)]
struct Inner {
    notifier: Notifier,
    known: RwLock<Arc<KnownSubscriptions>>,
    wakes: Mutex<HashMap<i32, Arc<Notify>>>,
    /// How large the payloads of a subscription are, in bytes, as the last claim found it.
    sizes: Mutex<HashMap<i32, usize>>,
    announcer: Announcer,
    /// The tenant of each subscription whose turn was last, while others crowd it out.
    turns: Mutex<HashMap<i32, String>>,
    marks: Mutex<HashMap<i32, Mark>>,
    /// The connections of workers in this process.
    workers: Mutex<Vec<Weak<Calls>>>,
    /// Events on their way to the router of this process.
    handed: Handed,
}

/// Why a process cannot do its work at this moment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotReady {
    /// The tables do not fit, or cannot be read.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The file of the database is another one than the one that is open.
    #[error("the database file is not the one that is open")]
    File(#[source] DbErr),
    /// A write has failed because the disk is full or broken, a moment ago or again.
    #[error("the database cannot write; see whether its disk is full")]
    Disk(#[source] DbErr),
    /// The database has not answered in time.
    #[error("the database does not answer in time")]
    Late,
    /// The worker of this process waits for the database.
    #[error("the database does not answer the worker; see whether it runs, and what is between")]
    Silent,
}

/// A database whose tables do not fit this version.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchemaError {
    /// The pool that was handed over begins its transactions at another isolation level.
    #[error(
        "the connections begin transactions at {found:?}, and a second commit at a time fails there; open them with \
         `Outbox::connect`, or set default_transaction_isolation = 'read committed' for the role of the outbox"
    )]
    Isolation {
        /// The level.
        found: String,
    },
    /// The tables are there, and empty as after a `truncate`: the one row of `outbox_meta` is missing and cannot be
    /// written.
    #[error(
        "the row of outbox_meta is missing and could not be written; give this program the right to insert it, or run \
         `outbox doctor` with a role that has it"
    )]
    Emptied(#[source] DbErr),
    /// The tables are missing.
    #[error("the database has no outbox tables; run the migrations first (see `outbox_migrations::up`)")]
    Missing(#[source] DbErr),
    /// The database does not answer, or refuses.
    #[error("the database does not answer; check that it runs and that this program may read its tables")]
    Unanswered(#[source] DbErr),
    /// The tables are from an earlier version.
    #[error(
        "the outbox tables are from an older version (schema {found}, this program needs {known}); run the migrations \
         (see `outbox_migrations::up`)"
    )]
    Older {
        /// The version in the database.
        found: i32,
        /// The version this program needs.
        known: i32,
    },
    /// The tables are from a later version.
    #[error(
        "the outbox tables are from a newer version (schema {found}, this program knows {known}); start that version, \
         or restore a backup from before the upgrade"
    )]
    Newer {
        /// The version in the database.
        found: i32,
        /// The version this program knows.
        known: i32,
    },
}

impl Outbox {
    /// Uses one connection pool for everything. Prefer [`connect`](Self::connect) for SQLite: a transaction that begins on
    /// a pool that was opened elsewhere is checked each time, because SQLite may have ended the one before by itself.
    ///
    /// Pools of SQLite and PostgreSQL only. With a mock, a proxy or another database every use is an error that says so.
    #[must_use]
    pub fn new(db: DatabaseConnection) -> Self {
        Self::with_connections(db.clone(), db)
    }

    /// Uses one pool for transactions and the worker's bookkeeping, and one for reading.
    #[must_use]
    pub fn with_connections(writer: DatabaseConnection, reader: DatabaseConnection) -> Self {
        // They are the application's: never closed here.
        let (writer, store_reader) = (
            Connections::from(writer).replaceable(None, &[]),
            Connections::from(reader.clone()).replaceable(None, &[]),
        );
        Self::with_pools(Pools { store: writer.clone(), writer, reader, store_reader, opened_here: false })
    }

    pub(crate) fn with_pools(pools: Pools) -> Self {
        let notifier = Notifier::new(pools.store.clone());
        let inner = Inner {
            notifier,
            known: RwLock::default(),
            wakes: Mutex::default(),
            sizes: Mutex::default(),
            announcer: Announcer::default(),
            turns: Mutex::default(),
            marks: Mutex::default(),
            workers: Mutex::default(),
            handed: Handed::default(),
        };
        Self {
            inner: Arc::new(inner),
            pools: Arc::new(pools),
            limits: Limits::default(),
            clock: Arc::new(SystemClock),
            names: Arc::default(),
        }
    }

    /// The same outbox, whose claims, settlements and renewals use connections of their own on PostgreSQL, made in the
    /// current runtime: what a worker uses on a thread of its own, so that a handler that blocks the threads of the
    /// application does not stop them.
    ///
    /// A call on these connections that has no answer within `limit` is an error, and whether it was done is not known. All
    /// of them are given up then, and units of work begin with new ones too: a network that has lost them without a word
    /// is noticed by nobody else. The metric `outbox_database_timeouts_total` counts it.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn with_own_store(&self, limit: Duration) -> Self {
        self.with_store_of(STORE_CONNECTIONS, limit)
    }

    /// Its one connection stays warm, and waits for nobody.
    pub(crate) fn with_own_connection(&self) -> Self {
        let limit = self.store().calls().and_then(|calls| calls.limit());
        limit.map_or_else(|| self.clone(), |limit| self.with_store_of(1, limit))
    }

    fn with_store_of(&self, connections: u32, limit: Duration) -> Self {
        let pools = self.pools.with_own_store(connections, limit);
        if let Some(calls) = pools.store.calls() {
            let mut workers = self.inner.workers.lock().unwrap_or_else(PoisonError::into_inner);
            workers.retain(|worker| worker.strong_count() > 0);
            workers.push(Arc::downgrade(calls));
        }
        Self { pools: Arc::new(pools), ..self.clone() }
    }

    /// Whether the database answers, has the tables, and answers the workers of this process, and whether the file of a SQLite
    /// database is still the one that is open: what a health check asks. For 5 s after a write that failed because of the
    /// disk it says so, then it tries a small one. Takes 2 s at most.
    ///
    /// # Errors
    ///
    /// [`NotReady`], whose text says why.
    pub async fn ready(&self) -> Result<(), NotReady> {
        if let Some(file) = &self.pools.writer.file {
            file.check().map_err(NotReady::File)?;
        }
        let workers = self.inner.workers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if workers.iter().filter_map(Weak::upgrade).any(|calls| calls.is_silent()) {
            return Err(NotReady::Silent);
        }
        // In a task of its own: a connection that is dropped while it waits for an answer is lost to its pool.
        let outbox = self.clone();
        let checked = tokio::spawn(async move {
            outbox.check_schema().await?;
            outbox.check_disk().await
        });
        match tokio::time::timeout(READY_WITHIN, checked).await {
            Ok(Ok(checked)) => checked,
            _ => Err(NotReady::Late),
        }
    }

    async fn check_disk(&self) -> Result<(), NotReady> {
        let sessions = self.store().sessions();
        let Some(failed_for) = sessions.disk_failed_for() else { return Ok(()) };
        // On a disk that is nearly full a small write may succeed while others fail.
        if failed_for < DISK_RECOVERS {
            return Err(NotReady::Disk(DbErr::Custom(format!("a write has failed {failed_for:.1?} ago"))));
        }
        self.execute(self.store(), self.sql().write_the_same, []).await.map_err(NotReady::Disk)?;
        sessions.disk_works();
        Ok(())
    }

    /// How often a connection of this outbox was found to be lost, by whatever it was used for. A crash of the server, or a
    /// failover, takes back leases that routing gave a moment before: after each loss a worker asks which are still
    /// [held](Self::held).
    #[must_use]
    pub fn lost_connections(&self) -> u64 {
        self.store().sessions().losses()
    }

    /// Sets how much one unit of work may push.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Takes the time at which events occur from this clock; what is compared is the database's time in any case.
    /// Defaults to the clock of the operating system.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Uses tables whose names start with `prefix` instead of `outbox_`; see `outbox_migrations::with_prefix`.
    ///
    /// # Panics
    ///
    /// If the prefix has other characters than `a-z`, `0-9` and `_`, starts with a digit, or is longer than 32 characters.
    #[must_use]
    pub fn table_prefix(mut self, prefix: &str) -> Self {
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
        assert!(
            (1..=32).contains(&prefix.len())
                && prefix.bytes().all(allowed)
                && !prefix.starts_with(|c: char| c.is_ascii_digit()),
            "a table prefix has 1 to 32 of the characters a-z, 0-9 and '_' and starts with no digit"
        );
        self.names = Arc::new(Names::with_prefix(prefix));
        self
    }

    /// The connections for reading, for the application's own queries too.
    #[must_use]
    pub fn reader(&self) -> &DatabaseConnection {
        &self.pools.reader
    }

    /// The connections for writing. On SQLite there is one: hold it shortly.
    #[must_use]
    pub fn writer(&self) -> &DatabaseConnection {
        &self.pools.writer.db
    }

    /// Whether both use the same tables through the same connections, as clones do, and outboxes that were made of clones
    /// of one `DatabaseConnection`: a unit of work of one is a unit of work of the other.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.names.prefix() == other.names.prefix() && is_same_pool(self.writer(), other.writer())
    }

    /// Where the tables are, for people: file, or host, port and database, and the prefix of their names. Without user and
    /// password.
    #[must_use]
    pub fn location(&self) -> String {
        let file = sqlite_options(self.writer()).map(|options| options.get_filename().display().to_string());
        let server = postgres_options(self.writer()).map(|options| {
            format!("{}:{}/{}", options.get_host(), options.get_port(), options.get_database().unwrap_or_default())
        });
        let database = file.or(server).unwrap_or_else(|| "no database".to_owned());
        format!("{database} ({}…)", self.names.prefix())
    }

    /// Makes sure that the tables exist and are not from a later version, and that a pool that was handed over begins
    /// transactions as the outbox needs them.
    ///
    /// If somebody has emptied all tables, as cleaners of test databases do, the row of `outbox_meta` is written again.
    ///
    /// # Errors
    ///
    /// [`SchemaError`], whose text says what to do.
    pub async fn check_schema(&self) -> Result<(), SchemaError> {
        self.find_tables().await.map_err(SchemaError::Unanswered)?;
        let row = self.query_one(self.store_reader(), self.sql().schema_version, []).await;
        let found = match row {
            Ok(Some(row)) => row.try_get("", "schema_version").map_err(SchemaError::Missing)?,
            Ok(None) => {
                self.restore_meta(self.store()).await.map_err(SchemaError::Emptied)?;
                SCHEMA_VERSION
            }
            Err(error) if is_missing_table(&error) => return Err(SchemaError::Missing(error)),
            Err(error) => return Err(SchemaError::Unanswered(error)),
        };
        if found > SCHEMA_VERSION {
            return Err(SchemaError::Newer { found, known: SCHEMA_VERSION });
        }
        if found < SCHEMA_VERSION {
            return Err(SchemaError::Older { found, known: SCHEMA_VERSION });
        }
        self.check_isolation().await
    }

    /// Sessions that were opened here begin as they should; behind a pooler each transaction does.
    async fn check_isolation(&self) -> Result<(), SchemaError> {
        if self.backend() != DbBackend::Postgres || self.pools.opened_here || self.store().pooled {
            return Ok(());
        }
        let sql = "select current_setting('default_transaction_isolation') as level";
        let row = self.store().query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await;
        let level = row.and_then(|row| row.map_or(Ok(String::new()), |row| row.try_get("", "level")));
        match level.map_err(SchemaError::Unanswered)? {
            level if level.starts_with("read ") => Ok(()),
            found => Err(SchemaError::Isolation { found }),
        }
    }

    /// Writes the row of `outbox_meta` that somebody has deleted, with a generation that nobody has a copy of.
    pub(crate) async fn restore_meta(&self, db: &impl ConnectionTrait) -> Result<(), DbErr> {
        if self.execute(db, self.sql().restore_meta, [SCHEMA_VERSION.into()]).await? > 0 {
            tracing::warn!("the tables were emptied: the row of outbox_meta was missing and is written again");
        }
        Ok(())
    }

    /// Waits until a commit of this process has written a delivery for the subscription. A commit that happened since
    /// the last wait counts: no wake-up is lost.
    ///
    /// # Cancel safety
    ///
    /// Safe: a wake-up that was not returned is returned by the next call.
    pub async fn woken(&self, subscription: i32) {
        self.wake_of(subscription).notified().await;
    }

    /// Lets all workers know that a subscription was paused, resumed or removed: by its id, and for that by its negative.
    pub(crate) fn wake_about_state(&self, subscription: i32) {
        self.wake(&[subscription, -subscription]);
    }

    /// Wakes the workers of this process, and lets those of other processes know.
    pub(crate) fn wake(&self, subscriptions: &[i32]) {
        self.wake_here(subscriptions);
        self.inner.notifier.notify(subscriptions);
    }

    /// The events of a commit that has happened.
    pub(crate) fn committed(&self, events: Vec<Committed>, woken: &[i32]) {
        if events.is_empty() {
            self.wake(woken);
        } else {
            self.handed().push(events);
            self.wake_of(ROUTER).notify_one();
        }
    }

    pub(crate) fn wake_here(&self, subscriptions: &[i32]) {
        if subscriptions.contains(&ROUTER) {
            self.handed().look();
        }
        for subscription in subscriptions.iter().filter(|id| **id >= 0) {
            self.wake_of(*subscription).notify_one();
        }
        let news: Vec<NewsItem> = subscriptions.iter().filter_map(|id| news_of(*id)).collect();
        self.announcer().announce(&news);
    }

    /// Makes every worker of this process look.
    pub(crate) fn wake_all_here(&self) {
        self.handed().look();
        for wake in self.inner.wakes.lock().unwrap_or_else(PoisonError::into_inner).values() {
            wake.notify_one();
        }
        self.announcer().announce(&[NewsItem::Anything]);
    }

    pub(crate) fn announcer(&self) -> &Announcer {
        &self.inner.announcer
    }

    fn wake_of(&self, subscription: i32) -> Arc<Notify> {
        let mut wakes = self.inner.wakes.lock().unwrap_or_else(PoisonError::into_inner);
        wakes.entry(subscription).or_default().clone()
    }

    /// Where the last claim of this process has ended.
    pub(crate) fn take_mark(&self, subscription: i32) -> Option<Mark> {
        self.inner.marks.lock().unwrap_or_else(PoisonError::into_inner).remove(&subscription)
    }

    pub(crate) fn set_mark(&self, subscription: i32, mark: Option<Mark>) {
        let mut marks = self.inner.marks.lock().unwrap_or_else(PoisonError::into_inner);
        match mark {
            Some(mark) => marks.insert(subscription, mark),
            None => marks.remove(&subscription),
        };
    }

    pub(crate) fn last_turn(&self, subscription: i32) -> String {
        let turns = self.inner.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.get(&subscription).cloned().unwrap_or_default()
    }

    pub(crate) fn set_last_turn(&self, subscription: i32, tenant: String) {
        self.inner.turns.lock().unwrap_or_else(PoisonError::into_inner).insert(subscription, tenant);
    }

    pub(crate) fn claimed_size(&self, subscription: i32) -> Option<usize> {
        self.inner.sizes.lock().unwrap_or_else(PoisonError::into_inner).get(&subscription).copied()
    }

    pub(crate) fn set_claimed_size(&self, subscription: i32, bytes: usize) {
        self.inner.sizes.lock().unwrap_or_else(PoisonError::into_inner).insert(subscription, bytes);
    }

    pub(crate) fn push_limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn push_clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }

    pub(crate) fn known(&self) -> Arc<KnownSubscriptions> {
        self.inner.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_known(&self, known: Arc<KnownSubscriptions>) {
        *self.inner.known.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// This process' copy of the subscriptions, read again if it is not that of this transaction.
    pub(crate) async fn current_known(&self, db: &impl ConnectionTrait) -> Result<Arc<KnownSubscriptions>, DbErr> {
        self.current_known_and_waits(db).await.map(|(known, _)| known)
    }

    /// Also whether events may be waiting to be routed.
    pub(crate) async fn current_known_and_waits(
        &self,
        db: &impl ConnectionTrait,
    ) -> Result<(Arc<KnownSubscriptions>, bool), DbErr> {
        let mut row = self.query_one(db, self.sql().generation, []).await?;
        if row.is_none() {
            self.restore_meta(db).await?;
            row = self.query_one(db, self.sql().generation, []).await?;
        }
        let row = row.ok_or_else(|| DbErr::RecordNotFound("outbox_meta".to_owned()))?;
        let (generation, waits) = (row.try_get::<i64>("", "generation")?, row.try_get("", "waits")?);
        let known = self.known();
        if known.generation == generation {
            return Ok((known, waits));
        }
        let known = Arc::new(KnownSubscriptions::load(self, db, generation).await?);
        self.set_known(known.clone());
        Ok((known, waits))
    }

    pub(crate) fn handed(&self) -> &Handed {
        &self.inner.handed
    }

    pub(crate) fn notifier(&self) -> &Notifier {
        &self.inner.notifier
    }

    /// For units of work.
    pub(crate) fn connections(&self) -> Connections {
        self.pools.writer.finding(&self.names)
    }

    /// Looks where the tables are, if that is not known yet.
    pub(crate) async fn find_tables(&self) -> Result<(), DbErr> {
        self.names.find(self.store()).await
    }

    pub(crate) fn store(&self) -> &Connections {
        &self.pools.store
    }

    pub(crate) fn store_reader(&self) -> &Connections {
        &self.pools.store_reader
    }

    pub(crate) fn sql(&self) -> &'static Sql {
        match self.backend() {
            DbBackend::Postgres => &POSTGRES,
            _ => &SQLITE,
        }
    }

    pub(crate) fn backend(&self) -> DbBackend {
        self.pools.writer.get_database_backend()
    }

    /// The statement with this outbox' table names.
    pub(crate) fn statement(&self, sql: &'static str, values: impl IntoIterator<Item = Value>) -> Statement {
        Statement::from_sql_and_values(self.backend(), self.names.apply(sql), values)
    }

    pub(crate) async fn execute<const N: usize>(
        &self,
        db: &impl ConnectionTrait,
        sql: &'static str,
        values: [Value; N],
    ) -> Result<u64, DbErr> {
        let done = db.execute_raw(self.statement(sql, values)).await;
        Ok(done.inspect_err(|error| self.store().saw(error))?.rows_affected())
    }

    pub(crate) async fn query_one<const N: usize>(
        &self,
        db: &impl ConnectionTrait,
        sql: &'static str,
        values: [Value; N],
    ) -> Result<Option<QueryResult>, DbErr> {
        db.query_one_raw(self.statement(sql, values)).await.inspect_err(|error| self.store().saw(error))
    }

    pub(crate) async fn query_all<const N: usize>(
        &self,
        db: &impl ConnectionTrait,
        sql: &'static str,
        values: [Value; N],
    ) -> Result<Vec<QueryResult>, DbErr> {
        db.query_all_raw(self.statement(sql, values)).await.inspect_err(|error| self.store().saw(error))
    }
}

/// What a number tells workers: a subscription has something to deliver, or its state has changed.
fn news_of(number: i32) -> Option<NewsItem> {
    match number {
        ROUTER => None,
        1.. => Some(NewsItem::Deliveries(number)),
        _ => Some(NewsItem::State(number.saturating_neg())),
    }
}

/// The options of a pool are its own, so they tell pools apart.
fn is_same_pool(one: &DatabaseConnection, other: &DatabaseConnection) -> bool {
    let same_file =
        sqlite_options(one).zip(sqlite_options(other)).is_some_and(|(one, other)| Arc::ptr_eq(&one, &other));
    let (one, other) = (postgres_options(one), postgres_options(other));
    same_file || one.zip(other).is_some_and(|(one, other)| Arc::ptr_eq(&one, &other))
}

fn sqlite_options(db: &DatabaseConnection) -> Option<Arc<SqliteConnectOptions>> {
    let is_sqlite = matches!(db.inner, Connection::SqlxSqlitePoolConnection(_));
    is_sqlite.then(|| db.get_sqlite_connection_pool().connect_options())
}

fn postgres_options(db: &DatabaseConnection) -> Option<Arc<PgConnectOptions>> {
    let is_postgres = matches!(db.inner, Connection::SqlxPostgresPoolConnection(_));
    is_postgres.then(|| db.get_postgres_connection_pool().connect_options())
}

fn is_missing_table(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    match &**error {
        sqlx::Error::Database(error) => {
            error.code().as_deref() == Some("42P01") || error.message().starts_with("no such table")
        }
        _ => false,
    }
}

impl From<DatabaseConnection> for Outbox {
    fn from(db: DatabaseConnection) -> Self {
        Self::new(db)
    }
}

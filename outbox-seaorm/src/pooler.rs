//! Connections behind a pooler that gives each transaction another session, such as PgBouncer in its mode
//! `transaction`.
//!
//! sqlx prepares each statement under a name, in a round trip of its own before the one that runs it (0.9). Behind such
//! a pooler another session may run it, and other clients have used the same names. So every statement is in a
//! transaction, and each transaction begins by forgetting the names it finds.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseConnectionType, DatabaseTransaction, DbBackend, DbErr, ExecResult,
    IsolationLevel, QueryResult, SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
    sqlx::ConnectOptions,
};

use crate::{calls::Calls, clean, file::File, names::Names, sessions::Sessions, to_its_end::to_its_end};

/// The connections of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    /// As they were at first.
    pub(crate) db: DatabaseConnection,
    /// Whether a session lasts for one transaction only: said by `statement-cache-capacity=0` in the URL.
    pub(crate) pooled: bool,
    kind: Kind,
    /// Of connections that were opened here: those of the same outbox know the same.
    sessions: Arc<Sessions>,
    /// To be found before a transaction begins in which `search_path` may change.
    names: Option<Arc<Names>>,
    /// Where they are made anew when the server does not answer.
    calls: Option<Arc<Calls>>,
    /// The file of a SQLite database.
    pub(crate) file: Option<Arc<File>>,
}

/// Whether this parameter of a URL says that a session lasts for one transaction only.
pub(crate) fn is_pooled(name: &str, value: &str) -> bool {
    name == "statement-cache-capacity" && value == "0"
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Postgres,
    /// On which [`clean::guarded`] has kept what is not clean out of the pool, or not.
    Sqlite {
        guarded: bool,
    },
    /// A mock, a proxy, another database: every use is an error.
    Other,
}

/// What is said about connections that the outbox cannot use.
const OTHER: &str = "the outbox works on pools of SQLite and PostgreSQL, not on mock, proxy or MySQL connections; in tests, \
                     use a temporary file (`outbox_seaorm::testing::TestOutbox`)";

impl From<DatabaseConnection> for Connections {
    #[allow(clippy::match_wildcard_for_single_variants, reason = "features of SeaORM add variants")]
    fn from(db: DatabaseConnection) -> Self {
        let (kind, pooled) = match &db.inner {
            DatabaseConnectionType::SqlxPostgresPoolConnection(_) => {
                let url = db.get_postgres_connection_pool().connect_options().to_url_lossy();
                (Kind::Postgres, url.query_pairs().any(|(name, value)| is_pooled(&name, &value)))
            }
            DatabaseConnectionType::SqlxSqlitePoolConnection(_) => (Kind::Sqlite { guarded: false }, false),
            _ => (Kind::Other, false),
        };
        let file = File::of(&db).map(Arc::new);
        Self { db, pooled, kind, sessions: Arc::default(), names: None, calls: None, file }
    }
}

impl Connections {
    /// Connections to SQLite whose pool has the options of [`clean::guarded`].
    pub(crate) fn guarded(db: DatabaseConnection) -> Self {
        Self { kind: Kind::Sqlite { guarded: true }, ..Self::from(db) }
    }

    fn usable(&self) -> Result<&DatabaseConnection, DbErr> {
        match self.kind {
            Kind::Other => Err(DbErr::Custom(OTHER.to_owned())),
            Kind::Postgres | Kind::Sqlite { .. } => Ok(&self.db),
        }
    }

    /// The same as others of the outbox know about the sessions.
    pub(crate) fn sharing(self, sessions: &Arc<Sessions>) -> Self {
        Self { sessions: sessions.clone(), ..self }
    }

    pub(crate) fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    /// The same, made anew when a server does not answer: within the limit, if there is one, or when one that has these
    /// as neighbours finds out.
    pub(crate) fn replaceable(self, limit: Option<Duration>, neighbours: &[&Self]) -> Self {
        if self.get_database_backend() != DbBackend::Postgres {
            return self;
        }
        let neighbours = neighbours.iter().filter_map(|each| each.calls.clone()).collect();
        Self { calls: Some(Calls::new(self.db.clone(), limit, neighbours)), ..self }
    }

    pub(crate) fn calls(&self) -> Option<&Arc<Calls>> {
        self.calls.as_ref()
    }

    /// The connections of this moment.
    pub(crate) fn now(&self) -> DatabaseConnection {
        self.calls.as_ref().map_or_else(|| self.db.clone(), |calls| calls.connections())
    }

    /// Runs several statements, of which each waits for the server, until their connections are given up.
    pub(crate) async fn until_given_up<T>(&self, work: impl Future<Output = Result<T, DbErr>>) -> Result<T, DbErr> {
        match &self.calls {
            Some(calls) => calls.until_given_up(work).await,
            None => work.await,
        }
    }

    /// One call, with the connections of this moment.
    async fn call<T, F>(&self, call: impl FnOnce(Self) -> F) -> Result<T, DbErr>
    where
        F: Future<Output = Result<T, DbErr>>,
    {
        let result = match &self.calls {
            Some(calls) => calls.answered(|db| call(Self { db, calls: None, ..self.clone() })).await,
            None => call(self.clone()).await,
        };
        result.inspect_err(|error| self.saw(error))
    }

    /// For units of work of an outbox whose tables have these names.
    pub(crate) fn finding(&self, names: &Arc<Names>) -> Self {
        Self { names: Some(names.clone()), ..self.clone() }
    }

    /// Takes notice of an error that a statement has had.
    pub(crate) fn saw(&self, error: &DbErr) {
        self.sessions.saw(error);
    }

    /// For writing.
    pub(crate) async fn begin(&self) -> Result<DatabaseTransaction, DbErr> {
        if let Some(names) = &self.names {
            names.find(&Self { names: None, ..self.clone() }).await?;
        }
        // IMMEDIATE: a deferred SQLite transaction that reads first can fail at its first write.
        let mode = Some(SqliteTransactionMode::Immediate);
        self.begin_with(TransactionOptions { sqlite_transaction_mode: mode, ..TransactionOptions::default() }).await
    }

    /// For reading several things as they are at one moment.
    pub(crate) async fn begin_read(&self) -> Result<DatabaseTransaction, DbErr> {
        let isolation_level = match self.get_database_backend() {
            DbBackend::Postgres => Some(IsolationLevel::RepeatableRead),
            // Every SQLite transaction reads a snapshot.
            _ => None,
        };
        self.begin_with(TransactionOptions { isolation_level, ..TransactionOptions::default() }).await
    }

    /// A BEGIN is never left halfway: on PostgreSQL, sqlx leaves a poisoned connection in the pool when its future is
    /// dropped (0.9.0), and request futures are dropped whenever a client hangs up.
    async fn begin_with(&self, options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
        self.usable()?;
        if let Some(file) = &self.file {
            file.check()?;
        }
        self.call(|now| begin(now, options)).await
    }
}

async fn begin(now: Connections, mut options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
    let Connections { db, pooled, kind, .. } = now;
    let begin = to_its_end(async move {
        if let Kind::Sqlite { guarded: false } = kind {
            return clean::begin(&db, options).await;
        }
        if !pooled {
            return db.begin_with_options(options).await;
        }
        // SeaORM prepares the statement that sets it, before the names are forgotten (2.0). It comes first: later
        // statements find a snapshot.
        let isolation = options.isolation_level.take().unwrap_or(IsolationLevel::ReadCommitted);
        let transaction = db.begin_with_options(options).await?;
        let begin = format!("set transaction isolation level {isolation}; deallocate all");
        transaction.execute_unprepared(&begin).await?;
        Ok(transaction)
    });
    begin.await.map_err(|panicked| DbErr::Custom(format!("no transaction was begun: {panicked}")))?
}

#[async_trait]
impl ConnectionTrait for Connections {
    fn get_database_backend(&self) -> DbBackend {
        match self.kind {
            Kind::Postgres => DbBackend::Postgres,
            Kind::Sqlite { .. } | Kind::Other => DbBackend::Sqlite,
        }
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.call(|now| async move {
            if !now.pooled {
                return now.usable()?.execute_raw(statement).await;
            }
            let transaction = now.begin().await?;
            let result = transaction.execute_raw(statement).await?;
            transaction.commit().await.map(|()| result)
        })
        .await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.call(|now| async move { now.usable()?.execute_unprepared(sql).await }).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.call(|now| async move {
            if !now.pooled {
                return now.usable()?.query_one_raw(statement).await;
            }
            let transaction = now.begin().await?;
            let row = transaction.query_one_raw(statement).await?;
            transaction.commit().await.map(|()| row)
        })
        .await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.call(|now| async move {
            if !now.pooled {
                return now.usable()?.query_all_raw(statement).await;
            }
            let transaction = now.begin().await?;
            let rows = transaction.query_all_raw(statement).await?;
            transaction.commit().await.map(|()| rows)
        })
        .await
    }
}

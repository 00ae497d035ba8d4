//! Connections behind a pooler that gives each transaction another session, such as PgBouncer in its mode
//! `transaction`.
//!
//! sqlx prepares each statement under a name, in a round trip of its own before the one that runs it (0.9). Behind such
//! a pooler another session may run it, and other clients have used the same names. So every statement is in a
//! transaction, and each transaction begins by forgetting the names it finds.

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseConnectionType, DatabaseTransaction, DbBackend, DbErr, ExecResult,
    IsolationLevel, QueryResult, SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
    sqlx::ConnectOptions,
};

use crate::{clean, to_its_end::to_its_end};

/// The connections of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    pub(crate) db: DatabaseConnection,
    /// Whether a session lasts for one transaction only: said by `statement-cache-capacity=0` in the URL.
    pub(crate) pooled: bool,
    kind: Kind,
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
                let pooled = url.query_pairs().any(|(name, value)| name == "statement-cache-capacity" && value == "0");
                (Kind::Postgres, pooled)
            }
            DatabaseConnectionType::SqlxSqlitePoolConnection(_) => (Kind::Sqlite { guarded: false }, false),
            _ => (Kind::Other, false),
        };
        Self { db, pooled, kind }
    }
}

impl Connections {
    /// Connections to SQLite whose pool has the options of [`clean::guarded`].
    pub(crate) fn guarded(db: DatabaseConnection) -> Self {
        Self { db, pooled: false, kind: Kind::Sqlite { guarded: true } }
    }

    fn usable(&self) -> Result<&DatabaseConnection, DbErr> {
        match self.kind {
            Kind::Other => Err(DbErr::Custom(OTHER.to_owned())),
            Kind::Postgres | Kind::Sqlite { .. } => Ok(&self.db),
        }
    }

    /// For writing.
    pub(crate) async fn begin(&self) -> Result<DatabaseTransaction, DbErr> {
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
    async fn begin_with(&self, mut options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
        self.usable()?;
        let Self { db, pooled, kind } = self.clone();
        let begin = to_its_end(async move {
            if let Kind::Sqlite { guarded: false } = kind {
                return clean::begin(&db, options).await;
            }
            if !pooled {
                return db.begin_with_options(options).await;
            }
            // SeaORM prepares the statement that sets it, before the names are forgotten (2.0). It comes first: later
            // statements find a snapshot.
            let isolation = options.isolation_level.take();
            let isolation = isolation.map(|level| format!("set transaction isolation level {level}; "));
            let transaction = db.begin_with_options(options).await?;
            transaction.execute_unprepared(&format!("{}deallocate all", isolation.unwrap_or_default())).await?;
            Ok(transaction)
        });
        begin.await.map_err(|panicked| DbErr::Custom(format!("no transaction was begun: {panicked}")))?
    }
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
        if !self.pooled {
            return self.usable()?.execute_raw(statement).await;
        }
        let transaction = self.begin().await?;
        let result = transaction.execute_raw(statement).await?;
        transaction.commit().await.map(|()| result)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.usable()?.execute_unprepared(sql).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        if !self.pooled {
            return self.usable()?.query_one_raw(statement).await;
        }
        let transaction = self.begin().await?;
        let row = transaction.query_one_raw(statement).await?;
        transaction.commit().await.map(|()| row)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        if !self.pooled {
            return self.usable()?.query_all_raw(statement).await;
        }
        let transaction = self.begin().await?;
        let rows = transaction.query_all_raw(statement).await?;
        transaction.commit().await.map(|()| rows)
    }
}

//! Connections behind a pooler that gives each transaction another session, such as PgBouncer in its mode
//! `transaction`.
//!
//! sqlx prepares each statement under a name, in a round trip of its own before the one that runs it (0.9). Behind such
//! a pooler another session may run it, and other clients have used the same names. So every statement is in a
//! transaction, and each transaction begins by forgetting the names it finds.

use std::sync::Arc;

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, ExecResult, IsolationLevel,
    QueryResult, SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait, sqlx::ConnectOptions,
};

use crate::{names::Names, sessions::Sessions, to_its_end::to_its_end};

/// The connections of one pool.
#[derive(Clone, Debug)]
pub(crate) struct Connections {
    pub(crate) db: DatabaseConnection,
    /// Whether a session lasts for one transaction only: said by `statement-cache-capacity=0` in the URL.
    pub(crate) pooled: bool,
    /// Of connections that were opened here: those of the same outbox know the same.
    sessions: Arc<Sessions>,
    /// To be found before a transaction begins in which `search_path` may change.
    names: Option<Arc<Names>>,
}

/// Whether this parameter of a URL says that a session lasts for one transaction only.
pub(crate) fn is_pooled(name: &str, value: &str) -> bool {
    name == "statement-cache-capacity" && value == "0"
}

impl From<DatabaseConnection> for Connections {
    fn from(db: DatabaseConnection) -> Self {
        let pooled = db.get_database_backend() == DbBackend::Postgres && {
            let url = db.get_postgres_connection_pool().connect_options().to_url_lossy();
            url.query_pairs().any(|(name, value)| is_pooled(&name, &value))
        };
        Self { db, pooled, sessions: Arc::default(), names: None }
    }
}

impl Connections {
    /// The same as others of the outbox know about the sessions.
    pub(crate) fn sharing(self, sessions: &Arc<Sessions>) -> Self {
        Self { sessions: sessions.clone(), ..self }
    }

    pub(crate) fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    /// For units of work of an outbox whose tables have these names.
    pub(crate) fn finding(&self, names: &Arc<Names>) -> Self {
        Self { names: Some(names.clone()), ..self.clone() }
    }

    /// Takes notice of an error that a statement has had.
    pub(crate) fn saw(&self, error: &DbErr) {
        self.sessions.saw(error);
    }

    fn seen<T>(&self, result: Result<T, DbErr>) -> Result<T, DbErr> {
        result.inspect_err(|error| self.saw(error))
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
        let isolation_level = match self.db.get_database_backend() {
            DbBackend::Postgres => Some(IsolationLevel::RepeatableRead),
            // Every SQLite transaction reads a snapshot.
            _ => None,
        };
        self.begin_with(TransactionOptions { isolation_level, ..TransactionOptions::default() }).await
    }

    /// A BEGIN is never left halfway: on PostgreSQL, sqlx leaves a poisoned connection in the pool when its future is
    /// dropped (0.9.0), and request futures are dropped whenever a client hangs up.
    async fn begin_with(&self, mut options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
        let Self { db, pooled, .. } = self.clone();
        let begin = to_its_end(async move {
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
        let begun = begin.await.map_err(|panicked| DbErr::Custom(format!("no transaction was begun: {panicked}")))?;
        self.seen(begun)
    }
}

#[async_trait]
impl ConnectionTrait for Connections {
    fn get_database_backend(&self) -> DbBackend {
        self.db.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        if !self.pooled {
            return self.seen(self.db.execute_raw(statement).await);
        }
        let transaction = self.begin().await?;
        let result = self.seen(transaction.execute_raw(statement).await)?;
        transaction.commit().await.map(|()| result)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.seen(self.db.execute_unprepared(sql).await)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        if !self.pooled {
            return self.seen(self.db.query_one_raw(statement).await);
        }
        let transaction = self.begin().await?;
        let row = self.seen(transaction.query_one_raw(statement).await)?;
        transaction.commit().await.map(|()| row)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        if !self.pooled {
            return self.seen(self.db.query_all_raw(statement).await);
        }
        let transaction = self.begin().await?;
        let rows = self.seen(transaction.query_all_raw(statement).await)?;
        transaction.commit().await.map(|()| rows)
    }
}

//! Whether a COMMIT whose answer was lost has happened.

use std::time::{Duration, Instant};

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, QueryResult, Statement};

use crate::Outbox;

/// How long to ask. A crashed server needs a moment to recover.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a transaction may stay in progress after its connection died, before its session is ended.
const STALE: Duration = Duration::from_secs(1);

/// A transaction as its database knows it, and the session it runs in.
#[derive(Clone, Debug)]
pub(crate) struct CommitId {
    transaction: String,
    session: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed,
    RolledBack,
    Unknown,
}

/// Asks which transaction this is, before its COMMIT. Fails in a transaction that cannot commit any more: PostgreSQL
/// would answer its COMMIT with a ROLLBACK that looks like a success. On SQLite a COMMIT cannot get lost.
pub(crate) async fn identify(transaction: &DatabaseTransaction) -> Result<Option<CommitId>, DbErr> {
    if transaction.get_database_backend() != DbBackend::Postgres {
        return Ok(None);
    }
    let sql = "select pg_current_xact_id_if_assigned()::text as transaction, pg_backend_pid() as session";
    let row = transaction.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    let row = row.ok_or_else(|| DbErr::RecordNotFound("the transaction".to_owned()))?;
    CommitId::read(&row)
}

impl CommitId {
    /// `None` if the transaction has no id: then it has written nothing, and it does not matter whether it commits.
    pub(crate) fn read(row: &QueryResult) -> Result<Option<Self>, DbErr> {
        let Some(transaction) = row.try_get::<Option<String>>("", "transaction")? else { return Ok(None) };
        Ok(Some(Self { transaction, session: row.try_get("", "session")? }))
    }
}

/// Finds out over another connection. Every error of a COMMIT is checked: a session that is ended can answer with an
/// error although its COMMIT has happened just before.
pub(crate) async fn find_out(outbox: &Outbox, id: Option<CommitId>) -> Outcome {
    let Some(CommitId { transaction, session }) = id else { return Outcome::RolledBack };
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let status = Statement::from_sql_and_values(
            DbBackend::Postgres,
            "select pg_xact_status($1::text::xid8) as status",
            [transaction.as_str().into()],
        );
        let status = outbox.store().query_one_raw(status).await.ok().flatten();
        match status.and_then(|row| row.try_get::<Option<String>>("", "status").ok().flatten()).as_deref() {
            Some("committed") => return Outcome::Committed,
            Some("aborted") => return Outcome::RolledBack,
            Some("in progress") if started.elapsed() > STALE => end_session(outbox, &transaction, session).await,
            _ => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
    Outcome::Unknown
}

/// The server has not noticed yet that its client is gone. Only a session that still runs this very transaction is
/// ended: behind a connection pooler it may serve somebody else by now.
async fn end_session(outbox: &Outbox, transaction: &str, session: i32) {
    let end = Statement::from_sql_and_values(
        DbBackend::Postgres,
        "select pg_terminate_backend(pid) from pg_stat_activity
          where pid = $1 and backend_xid::text::bigint = $2::text::bigint % 4294967296",
        [session.into(), transaction.into()],
    );
    if let Err(error) = outbox.store().query_one_raw(end).await {
        tracing::debug!(%error, "the session of a lost COMMIT was not ended");
    }
}

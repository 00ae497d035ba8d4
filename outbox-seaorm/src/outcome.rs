//! Whether a COMMIT whose answer was lost has happened.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, QueryResult, Statement};
use uuid::Uuid;

use crate::Outbox;

/// How long to ask. A crashed server needs a moment to recover.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a transaction may stay in progress after its connection died, before its session is ended.
const STALE: Duration = Duration::from_secs(1);

/// What a transaction leaves when it commits, and how its server knows it until then.
#[derive(Clone, Debug)]
pub(crate) struct CommitId {
    trace: Trace,
    session: i32,
    /// When the server was started.
    server: DateTime<Utc>,
    /// When the transaction began.
    began: DateTime<Utc>,
}

#[derive(Clone, Debug)]
enum Trace {
    /// An event, whose id is nobody else's.
    Event(Uuid),
    /// The id of the transaction, which is another transaction's on another server, or after a failover.
    Transaction(String),
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
    let sql = "select pg_current_xact_id_if_assigned()::text as transaction, pg_backend_pid() as session,
                      pg_postmaster_start_time() as server, now() as began";
    let row = transaction.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?;
    let row = row.ok_or_else(|| DbErr::RecordNotFound("the transaction".to_owned()))?;
    // Without an id it has written nothing, and it does not matter whether it commits.
    let Some(transaction) = row.try_get::<Option<String>>("", "transaction")? else { return Ok(None) };
    CommitId::read(Trace::Transaction(transaction), &row).map(Some)
}

impl CommitId {
    /// Of a transaction that has written this event.
    pub(crate) fn of_event(event: Uuid, row: &QueryResult) -> Result<Self, DbErr> {
        Self::read(Trace::Event(event), row)
    }

    fn read(trace: Trace, row: &QueryResult) -> Result<Self, DbErr> {
        let (session, server, began) =
            (row.try_get("", "session")?, row.try_get("", "server")?, row.try_get("", "began")?);
        Ok(Self { trace, session, server, began })
    }
}

/// Finds out over another connection. Every error of a COMMIT is checked: a session that is ended can answer with an
/// error although its COMMIT has happened just before.
pub(crate) async fn find_out(outbox: &Outbox, id: Option<CommitId>) -> Outcome {
    let Some(id) = id else { return Outcome::RolledBack };
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        match ask(outbox, &id).await {
            Ok(Some(outcome)) => return outcome,
            Ok(None) if started.elapsed() > STALE => end_session(outbox, &id).await,
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "what became of a COMMIT could not be asked"),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Outcome::Unknown
}

/// Whether the server is a standby; whether it is the one of the transaction, or was started since, as after a crash; and
/// whether the transaction is under way there. Its session may serve others by then. What this role may not see counts as
/// under way.
const LOOK: &str = "
    select pg_is_in_recovery() as standby, pg_postmaster_start_time() = $1 as same,
           pg_postmaster_start_time() > $2 as restarted,
           exists (select from pg_stat_activity where pid = $3 and (backend_start is null or xact_start = $2)) as running";

/// `None` if it is to be asked again. In one transaction, so that one server answers; its statements see what is committed
/// when they begin, and the event is looked for last.
async fn ask(outbox: &Outbox, id: &CommitId) -> Result<Option<Outcome>, DbErr> {
    let tx = outbox.begin_write().await?;
    let values = [id.server.into(), id.began.into(), id.session.into()];
    let look = tx.query_one_raw(Statement::from_sql_and_values(DbBackend::Postgres, LOOK, values)).await?;
    let look = look.ok_or_else(|| DbErr::RecordNotFound("the server".to_owned()))?;
    let is = |what: &str| look.try_get::<bool>("", what);
    // It may not have everything yet, and another one may become the primary.
    if is("standby")? {
        return Ok(None);
    }
    match &id.trace {
        Trace::Event(event) if outbox.query_one(&tx, outbox.sql().event_exists, [(*event).into()]).await?.is_some() => {
            Ok(Some(Outcome::Committed))
        }
        Trace::Event(_) if is("same")? => Ok((!is("running")?).then_some(Outcome::RolledBack)),
        // Its sessions are gone, and all that had committed is there again.
        Trace::Event(_) if is("restarted")? => Ok(Some(Outcome::RolledBack)),
        Trace::Transaction(transaction) if is("same")? => ended(&tx, transaction).await,
        // Another server: what it lacks may be on its way to it, or lost with the old one.
        Trace::Event(_) | Trace::Transaction(_) => Ok(Some(Outcome::Unknown)),
    }
}

async fn ended(tx: &DatabaseTransaction, transaction: &str) -> Result<Option<Outcome>, DbErr> {
    let sql = "select pg_xact_status($1::text::xid8) as status";
    let row = tx.query_one_raw(Statement::from_sql_and_values(DbBackend::Postgres, sql, [transaction.into()])).await?;
    let status = row.map_or(Ok(None), |row| row.try_get::<Option<String>>("", "status"))?;
    Ok(match status.as_deref() {
        Some("committed") => Some(Outcome::Committed),
        Some("aborted") => Some(Outcome::RolledBack),
        _ => None,
    })
}

/// The server has not noticed yet that its client is gone. Only a session that still runs this very transaction is
/// ended: behind a connection pooler it may serve somebody else by now.
async fn end_session(outbox: &Outbox, id: &CommitId) {
    let end = Statement::from_sql_and_values(
        DbBackend::Postgres,
        "select pg_terminate_backend(pid) from pg_stat_activity
          where pid = $1 and xact_start = $2 and pg_postmaster_start_time() = $3",
        [id.session.into(), id.began.into(), id.server.into()],
    );
    if let Err(error) = outbox.store().query_one_raw(end).await {
        tracing::debug!(%error, "the session of a lost COMMIT was not ended");
    }
}

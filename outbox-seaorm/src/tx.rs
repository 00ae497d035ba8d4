mod control;
mod nested;
mod savepoint;
mod scope;
#[cfg(feature = "stream")]
mod stream;

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use outbox_core::Events;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, RuntimeErr, Statement};
use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard, SetOnce};

pub(crate) use self::scope::Scope;
use self::{control::transaction_control, scope::LONGEST_WAIT};
pub use self::{nested::NestedTx, savepoint::SavepointError};
use crate::{pooler::Connections, unit_of_work::is_transient};

const CLOSED: &str = "the transaction has ended; use it before the response is ready and do not move it into a task";
const FAILED: &str = "an earlier statement of this transaction failed, so nothing more can be done with it; wrap \
                      statements that may fail in `tx.savepoint(…)`";
const ENDED: &str = "the savepoint of this handle has ended; use the handle of the transaction";
const AROUND: &str =
    "this handle is not the savepoint's; inside of its closure, use the handle that the closure is given";

/// The transaction of a request (or of a job): use it wherever SeaORM takes a connection.
///
/// A cheap handle; clones use the same transaction, one statement at a time. It begins with the first statement, so a
/// request that uses none costs nothing. Statements that begin or end a transaction or a savepoint (`COMMIT`, `SAVEPOINT`
/// …) are refused. SeaORM's own `begin` is a savepoint here, [`NestedTx`].
///
/// # States
///
/// - *idle*: nothing was executed yet.
/// - *open*: the transaction has begun.
/// - *failed*: a statement failed, or was cancelled before its answer came, outside a savepoint. Every further
///   statement is an error, and the commit is refused. PostgreSQL works this way by itself; the handle makes SQLite the
///   same, and makes sure that an ignored error never turns into a commit that stores nothing.
/// - *closed*: the unit of work has ended; every use is an error.
///
/// A savepoint has a handle of its own, with the same states.
#[derive(Clone)]
pub struct Tx {
    pub(crate) shared: Arc<Shared>,
    pub(crate) scope: Arc<Scope>,
    pub(crate) events: Events,
    /// Counts the handles that are in use: a commit is refused while one is left.
    pub(crate) _in_use: Arc<()>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) writer: Connections,
    pub(crate) events: Events,
    pub(crate) root: Arc<Scope>,
    pub(crate) closed: AtomicBool,
    /// Whether somebody has tried to use a handle since it was closed.
    pub(crate) used_late: AtomicBool,
    /// When the transaction has begun.
    pub(crate) begun: SetOnce<Instant>,
    pub(crate) transaction: Mutex<Option<DatabaseTransaction>>,
}

impl Shared {
    pub(crate) fn new(writer: Connections, events: Events) -> Self {
        let (root, closed, used_late, transaction) = Default::default();
        Self { writer, events, root, closed, used_late, begun: SetOnce::new(), transaction }
    }

    /// Waits for the statement in progress and rolls back what is open.
    pub(crate) async fn abandon(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let _ = self.events.close();
        drop(self.root.take_after_commit());
        let transaction = self.transaction.lock().await.take();
        if let Some(transaction) = transaction {
            roll_back(transaction).await;
        }
    }
}

pub(crate) async fn roll_back(transaction: DatabaseTransaction) {
    if let Err(error) = transaction.rollback().await {
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, "a rollback failed: the database has ended the transaction; its connection is given up");
    }
}

/// A statement in progress. The handle counts as failed unless the statement's success is reported: an error and a future
/// that is dropped halfway both leave it so.
struct InProgress<'a> {
    transaction: MutexGuard<'a, Option<DatabaseTransaction>>,
    turn: OwnedMutexGuard<()>,
    unfinished: Unfinished<'a>,
    writer: &'a Connections,
}

struct Unfinished<'a> {
    scope: &'a Scope,
    armed: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.scope.fail(false);
        }
    }
}

impl InProgress<'_> {
    fn transaction(&self) -> &DatabaseTransaction {
        self.transaction.as_ref().expect("a statement in progress has a transaction")
    }

    fn finish<T>(self, result: Result<T, DbErr>) -> Result<T, DbErr> {
        self.finish_in_turn(result).map(|(value, _turn)| value)
    }

    fn finish_in_turn<T>(mut self, result: Result<T, DbErr>) -> Result<(T, OwnedMutexGuard<()>), DbErr> {
        if let Err(error) = &result {
            self.writer.saw(error);
            self.unfinished.scope.fail(is_transient(error));
        }
        self.unfinished.armed = false;
        result.map(|value| (value, self.turn))
    }
}

impl Tx {
    async fn start(&self, sql: Option<&str>) -> Result<InProgress<'_>, DbErr> {
        let turn = self.turn().await?;
        let transaction = self.shared.transaction.lock().await;
        self.check()?;
        let unfinished = Unfinished { scope: &self.scope, armed: true };
        let mut started = InProgress { transaction, turn, unfinished, writer: &self.shared.writer };
        if let Some(control) = sql.and_then(|sql| transaction_control(sql, self.get_database_backend())) {
            let refused = format!(
                "{control} would end or change the transaction of the whole request; for a part that may be rolled back \
                 use `tx.savepoint(…)`, to roll back all of it answer with an error"
            );
            return Err(DbErr::Custom(refused));
        }
        if started.transaction.is_none() {
            let begun = self.shared.writer.begin().await;
            if let Err(error) = &begun {
                self.scope.fail(is_transient(error));
                started.unfinished.armed = false;
            }
            *started.transaction = Some(begun?);
            let _once = self.shared.begun.set(Instant::now());
        }
        Ok(started)
    }

    /// Waits until nothing else is executed through this handle's scope.
    async fn turn(&self) -> Result<OwnedMutexGuard<()>, DbErr> {
        if self.events.is_around() {
            self.scope.fail(false);
            return Err(DbErr::Custom(AROUND.to_owned()));
        }
        self.scope.turn().await.ok_or_else(|| {
            self.scope.fail(false);
            let waited = LONGEST_WAIT.as_secs();
            DbErr::Custom(format!(
                "a savepoint was not over after {waited} s, so it is not waited for; in it, and in tasks it waits for, use \
                 its own handle"
            ))
        })
    }

    fn check(&self) -> Result<(), DbErr> {
        let refused = if self.shared.closed.load(Ordering::SeqCst) {
            // A commit that waits for the last handles to go is not made without what this would have written.
            self.shared.used_late.store(true, Ordering::SeqCst);
            CLOSED
        } else if self.scope.has_ended() {
            ENDED
        } else if self.scope.has_failed_by_chance() {
            // Still about load or chance.
            return Err(DbErr::Conn(RuntimeErr::Internal(FAILED.to_owned())));
        } else if self.scope.has_failed() {
            FAILED
        } else {
            return Ok(());
        };
        Err(DbErr::Custom(refused.to_owned()))
    }

    /// Begins the transaction now instead of with the first statement.
    ///
    /// Its name is not `begin`, which is SeaORM's for a [transaction inside](NestedTx) of this one.
    ///
    /// # Errors
    ///
    /// If no connection is free in time, the database is out of reach, or the handle is failed or closed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the handle failed: nothing can be committed.
    pub async fn begin_now(&self) -> Result<(), DbErr> {
        self.start(None).await?.finish(Ok(()))
    }

    /// The collector that is flushed when this transaction commits; that of the savepoint, for a savepoint's handle.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Runs `work` in a task of its own once the commit is confirmed: clear a cache, tell somebody who waits. It is dropped
    /// if the transaction, or the savepoint of this handle, is rolled back, and if nobody knows whether it has committed.
    ///
    /// **Not durable**: it runs at most once, and a crash after the COMMIT loses it. What must happen is an event with a
    /// subscription. The response does not wait for it.
    ///
    /// ```no_run
    /// # async fn example(tx: outbox_seaorm::Tx) -> Result<(), sea_orm::DbErr> {
    /// tx.after_commit(async move { println!("the cache is old now") })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the handle is failed or closed, its savepoint has ended, or another savepoint's closure uses it.
    pub fn after_commit(&self, work: impl Future<Output = ()> + Send + 'static) -> Result<(), DbErr> {
        if self.events.is_around() {
            return Err(DbErr::Custom(AROUND.to_owned()));
        }
        self.check()?;
        self.scope.push_after_commit(Box::pin(work));
        Ok(())
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let closed = self.shared.closed.load(Ordering::SeqCst);
        let mut shown = f.debug_struct("Tx");
        shown.field("scope", &self.scope).field("closed", &closed).field("events", &self.events).finish_non_exhaustive()
    }
}

#[async_trait]
impl ConnectionTrait for Tx {
    fn get_database_backend(&self) -> DbBackend {
        self.shared.writer.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        let started = self.start(Some(&statement.sql)).await?;
        let result = started.transaction().execute_raw(statement).await;
        started.finish(result)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        let started = self.start(Some(sql)).await?;
        let result = started.transaction().execute_unprepared(sql).await;
        started.finish(result)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let started = self.start(Some(&statement.sql)).await?;
        let result = started.transaction().query_one_raw(statement).await;
        started.finish(result)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let started = self.start(Some(&statement.sql)).await?;
        let result = started.transaction().query_all_raw(statement).await;
        started.finish(result)
    }
}

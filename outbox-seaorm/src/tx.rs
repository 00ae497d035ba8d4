use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use outbox_core::Events;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, Statement};
use tokio::sync::{Mutex, MutexGuard};

use crate::{pooler::Connections, unit_of_work::is_transient};

const CLOSED: &str = "the transaction has ended; use it before the response is ready and do not move it into a task";
const FAILED: &str = "an earlier statement of this transaction failed, so nothing more can be done with it; wrap \
                      statements that may fail in `tx.savepoint(…)`";

/// The transaction of a request (or of a job): use it wherever SeaORM takes a connection.
///
/// A cheap handle; clones use the same transaction, one statement at a time. It begins with the first statement, so a
/// request that uses none costs nothing.
///
/// # States
///
/// - *idle*: nothing was executed yet.
/// - *open*: the transaction has begun.
/// - *failed*: a statement failed, or was cancelled before its answer came, outside a savepoint. Every further
///   statement is an error, and the commit is refused. PostgreSQL works this way by itself; the handle makes SQLite the
///   same, and makes sure that an ignored error never turns into a commit that stores nothing.
/// - *closed*: the unit of work has ended; every use is an error.
#[derive(Clone, Debug)]
pub struct Tx {
    pub(crate) shared: Arc<Shared>,
    /// Counts the handles that are in use: a commit is refused while one is left.
    pub(crate) _in_use: Arc<()>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) writer: Connections,
    pub(crate) events: Events,
    pub(crate) closed: AtomicBool,
    pub(crate) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) transaction: Option<DatabaseTransaction>,
    pub(crate) failed: bool,
    /// What made it fail was about load or chance.
    pub(crate) transient: bool,
    savepoints: u32,
}

impl Shared {
    /// Waits for the statement in progress and rolls back what is open.
    pub(crate) async fn abandon(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let _ = self.events.close();
        let transaction = self.state.lock().await.transaction.take();
        if let Some(transaction) = transaction {
            // An error here means that the connection is gone, and the transaction with it.
            if let Err(error) = transaction.rollback().await {
                tracing::debug!(%error, "rollback failed");
            }
        }
    }
}

/// A statement in progress. The handle counts as failed until the statement's success is reported: an error and a
/// future that is dropped halfway both leave it so.
struct InProgress<'a> {
    state: MutexGuard<'a, State>,
    writer: &'a Connections,
}

impl InProgress<'_> {
    fn transaction(&self) -> &DatabaseTransaction {
        self.state.transaction.as_ref().expect("a statement in progress has a transaction")
    }

    fn finish<T>(mut self, result: Result<T, DbErr>) -> Result<T, DbErr> {
        let result = result.inspect_err(|error| self.writer.saw(error));
        self.state.failed = result.is_err();
        self.state.transient = result.as_ref().is_err_and(is_transient);
        result
    }
}

impl Tx {
    async fn start(&self) -> Result<InProgress<'_>, DbErr> {
        let mut state = self.shared.state.lock().await;
        if self.shared.closed.load(Ordering::SeqCst) {
            return Err(DbErr::Custom(CLOSED.to_owned()));
        }
        if state.failed {
            return Err(DbErr::Custom(FAILED.to_owned()));
        }
        state.failed = true;
        if state.transaction.is_none() {
            let begun = self.shared.writer.begin().await;
            state.transient = begun.as_ref().is_err_and(is_transient);
            state.transaction = Some(begun?);
        }
        Ok(InProgress { state, writer: &self.shared.writer })
    }

    /// Begins the transaction now instead of with the first statement.
    ///
    /// # Errors
    ///
    /// If no connection is free in time, the database is out of reach, or the handle is failed or closed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the handle failed: nothing can be committed.
    pub async fn begin(&self) -> Result<(), DbErr> {
        self.start().await?.finish(Ok(()))
    }

    /// The collector that is flushed when this transaction commits.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// Runs `work` in a savepoint. If it answers with an error, or a statement in it failed, what it wrote is rolled
    /// back and the events pushed meanwhile are dropped; the transaction goes on.
    ///
    /// One at a time: a savepoint inside a savepoint is fine, two side by side are not.
    ///
    /// ```no_run
    /// # use outbox_core::NewEvent;
    /// # use outbox_seaorm::{SavepointError, Tx};
    /// # use sea_orm::{ConnectionTrait, DbErr};
    /// # async fn example(tx: Tx) -> Result<(), DbErr> {
    /// let kept = tx
    ///     .savepoint(|tx, events| async move {
    ///         tx.execute_unprepared("insert into labels values ('urgent')").await?;
    ///         events.push(NewEvent::dynamic("label.created", "label", "urgent", &())?)?;
    ///         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    ///     })
    ///     .await;
    /// if let Err(SavepointError::Work(error)) = kept {
    ///     println!("no such label: {error}"); // the transaction is still good
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`SavepointError::Work`] with what `work` answered, [`SavepointError::StatementFailed`] if it answered with a
    /// success although one of its statements had failed, [`SavepointError::Database`] if the savepoint itself could
    /// not be set, kept or rolled back.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the handle failed: nothing can be committed.
    pub async fn savepoint<T, E, F, Fut>(&self, work: F) -> Result<T, SavepointError<E>>
    where
        F: FnOnce(Tx, Events) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let mark = self.shared.events.len();
        let mut started = self.start().await.map_err(SavepointError::Database)?;
        started.state.savepoints += 1;
        let name = format!("outbox_{}", started.state.savepoints);
        let set = started.transaction().execute_unprepared(&format!("savepoint {name}")).await;
        started.finish(set).map_err(SavepointError::Database)?;

        let mut unfinished = Unfinished { shared: &self.shared, armed: true };
        let answer = work(self.clone(), self.shared.events.clone()).await;
        let mut state = self.shared.state.lock().await;
        let statement_failed = std::mem::replace(&mut state.failed, true);
        state.savepoints -= 1;
        let Some(transaction) = &state.transaction else {
            return Err(SavepointError::Database(DbErr::Custom(CLOSED.to_owned())));
        };
        let keep = answer.is_ok() && !statement_failed;
        let end = if keep {
            format!("release savepoint {name}")
        } else {
            format!("rollback to savepoint {name}; release savepoint {name}")
        };
        for statement in end.split("; ") {
            if let Err(error) = transaction.execute_unprepared(statement).await {
                state.transient = is_transient(&error);
                return Err(SavepointError::Database(error));
            }
        }
        if !keep {
            self.shared.events.truncate(mark);
        }
        (state.failed, state.transient) = (false, false);
        drop(state);
        unfinished.armed = false;
        match answer {
            Ok(_) if statement_failed => Err(SavepointError::StatementFailed),
            answer => answer.map_err(SavepointError::Work),
        }
    }
}

/// Marks the handle failed when a savepoint's future is dropped, or panics, before the savepoint has ended.
struct Unfinished<'a> {
    shared: &'a Shared,
    armed: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        // The lock is free unless another clone is at work right now; a handle that is closed before its unit of work
        // ends is not committed either.
        match self.shared.state.try_lock() {
            Ok(mut state) => state.failed = true,
            Err(_) => self.shared.closed.store(true, Ordering::SeqCst),
        }
    }
}

/// Why a savepoint did not hold.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavepointError<E> {
    /// The work answered with an error; it was rolled back.
    #[error("the work in the savepoint failed")]
    Work(#[source] E),
    /// A statement failed and the work answered with a success nevertheless; it was rolled back.
    #[error("a statement in the savepoint failed")]
    StatementFailed,
    /// The savepoint could not be set, kept or rolled back. The transaction cannot commit any more.
    #[error("the savepoint could not be set or ended")]
    Database(#[source] DbErr),
}

#[async_trait]
impl ConnectionTrait for Tx {
    fn get_database_backend(&self) -> DbBackend {
        self.shared.writer.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        let started = self.start().await?;
        let result = started.transaction().execute_raw(statement).await;
        started.finish(result)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        let started = self.start().await?;
        let result = started.transaction().execute_unprepared(sql).await;
        started.finish(result)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        let started = self.start().await?;
        let result = started.transaction().query_one_raw(statement).await;
        started.finish(result)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        let started = self.start().await?;
        let result = started.transaction().query_all_raw(statement).await;
        started.finish(result)
    }
}

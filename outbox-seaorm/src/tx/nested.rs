use std::{
    fmt,
    future::{Future, poll_fn},
    ops::Deref,
    pin::Pin,
    sync::Arc,
};

use async_trait::async_trait;
use sea_orm::{
    AccessMode, ConnectionTrait, DbBackend, DbErr, ExecResult, IsolationLevel, QueryResult, Statement,
    TransactionError, TransactionOptions, TransactionSession, TransactionTrait,
};
use tokio::sync::OwnedMutexGuard;

use super::{CLOSED, FAILED, Tx, scope::Scope};
use crate::unit_of_work::is_transient;

const OPTIONS: &str = "a transaction inside of another is a savepoint, which has no isolation level and no access mode of \
                       its own; begin it without";

/// A savepoint as SeaORM's code knows it: what [`TransactionTrait::begin`] of a [`Tx`] answers with.
///
/// `commit` keeps what it wrote and the events pushed into [its collector](Tx::events); `rollback` drops both, and the
/// transaction goes on. If one of its statements failed, `commit` rolls back and is an error. Dropped without either, it
/// leaves the handle it was made from failed: nothing can be committed. The rest is as with [`Tx::savepoint`]; other
/// handles wait for the end, also the one it was made from.
///
/// ```no_run
/// use outbox_seaorm::Tx;
/// use sea_orm::{ConnectionTrait, DbErr, TransactionTrait};
///
/// async fn label(tx: &Tx) -> Result<(), DbErr> {
///     let inside = tx.begin().await?;
///     match inside.execute_unprepared("insert into labels values ('urgent')").await {
///         Ok(_) => inside.commit().await,
///         Err(_) => inside.rollback().await, // it is there already
///     }
/// }
/// ```
#[must_use = "it must be committed or rolled back"]
pub struct NestedTx {
    tx: Tx,
    around: Arc<Scope>,
    /// Nobody else executes anything in the scope around it.
    _turn: OwnedMutexGuard<()>,
    ended: bool,
}

impl Tx {
    /// Begins a savepoint, which holds the turn of this handle's scope until its end.
    pub(super) async fn open_savepoint(&self) -> Result<NestedTx, DbErr> {
        let started = self.start(None).await?;
        let inside = self.scope.inside();
        let set = started.transaction().execute_unprepared(&format!("savepoint {}", name(&inside))).await;
        let turn = started.finish_in_turn(set)?.1;
        self.scope.count_savepoint();
        let events = self.events.open_savepoint();
        let tx = Self { scope: inside, events, ..self.clone() };
        Ok(NestedTx { tx, around: self.scope.clone(), _turn: turn, ended: false })
    }
}

fn name(scope: &Scope) -> String {
    format!("outbox_{}", scope.depth)
}

impl NestedTx {
    /// Keeps what it wrote and its events.
    ///
    /// # Errors
    ///
    /// If one of its statements failed, which rolls it back, or the database fails, which leaves the whole transaction
    /// failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the transaction failed: nothing can be committed.
    pub async fn commit(self) -> Result<(), DbErr> {
        if self.end(true).await? { Ok(()) } else { Err(DbErr::Custom(FAILED.to_owned())) }
    }

    /// Takes back what it wrote, and drops its events.
    ///
    /// # Errors
    ///
    /// If the database fails, which leaves the whole transaction failed.
    ///
    /// # Cancel safety
    ///
    /// As [`commit`](Self::commit).
    pub async fn rollback(self) -> Result<(), DbErr> {
        self.end(false).await.map(|_| ())
    }

    /// Ends the savepoint, and says whether it was kept.
    pub(super) async fn end(mut self, keep: bool) -> Result<bool, DbErr> {
        let scope = self.tx.scope.clone();
        // A clone in a task may be at work. What fails on the way fails the scope around, when this is dropped.
        let _turn = self.tx.turn().await?;
        let transaction = self.tx.shared.transaction.lock().await;
        scope.end();
        let keep = keep && !scope.has_failed();
        let Some(transaction) = &*transaction else { return Err(DbErr::Custom(CLOSED.to_owned())) };
        let name = name(&scope);
        let end = if keep {
            format!("release savepoint {name}")
        } else {
            format!("rollback to savepoint {name}; release savepoint {name}")
        };
        for statement in end.split("; ") {
            if let Err(error) = transaction.execute_unprepared(statement).await {
                self.around.fail(is_transient(&error));
                return Err(error);
            }
        }
        if keep {
            self.tx.events.keep();
            scope.take_after_commit().into_iter().for_each(|work| self.around.push_after_commit(work));
        }
        self.ended = true;
        Ok(keep)
    }

    async fn run<T, E>(
        self,
        callback: impl for<'c> FnOnce(&'c Self) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
    ) -> Result<T, TransactionError<E>>
    where
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        let inside = self.tx.events.clone();
        let answer = {
            let mut work = inside.inside(|| callback(&self));
            poll_fn(|context| inside.inside(|| work.as_mut().poll(context))).await
        };
        match answer {
            Ok(answer) => self.commit().await.map(|()| answer).map_err(TransactionError::Connection),
            Err(error) => {
                self.rollback().await.map_err(TransactionError::Connection)?;
                Err(TransactionError::Transaction(error))
            }
        }
    }
}

impl Drop for NestedTx {
    fn drop(&mut self) {
        self.tx.scope.end();
        self.tx.events.discard();
        drop(self.tx.scope.take_after_commit());
        if !self.ended {
            self.around.fail(self.around.has_failed_by_chance());
        }
        self.around.count_savepoint();
    }
}

impl Deref for NestedTx {
    type Target = Tx;

    fn deref(&self) -> &Tx {
        &self.tx
    }
}

impl fmt::Debug for NestedTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NestedTx").field(&self.tx).finish()
    }
}

#[async_trait]
impl ConnectionTrait for NestedTx {
    fn get_database_backend(&self) -> DbBackend {
        self.tx.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.tx.execute_raw(statement).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.tx.execute_unprepared(sql).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.tx.query_one_raw(statement).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.tx.query_all_raw(statement).await
    }
}

#[async_trait]
impl TransactionSession for NestedTx {
    async fn commit(self) -> Result<(), DbErr> {
        Self::commit(self).await
    }

    async fn rollback(self) -> Result<(), DbErr> {
        Self::rollback(self).await
    }
}

/// `begin` is a savepoint; a level or a mode of its own is refused.
#[async_trait]
impl TransactionTrait for Tx {
    type Transaction = NestedTx;

    async fn begin(&self) -> Result<NestedTx, DbErr> {
        self.open_savepoint().await
    }

    async fn begin_with_config(
        &self,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<NestedTx, DbErr> {
        if isolation_level.is_some() || access_mode.is_some() {
            return Err(DbErr::Custom(OPTIONS.to_owned()));
        }
        self.open_savepoint().await
    }

    async fn begin_with_options(&self, options: TransactionOptions) -> Result<NestedTx, DbErr> {
        self.begin_with_config(options.isolation_level, options.access_mode).await
    }

    async fn transaction<F, T, E>(&self, callback: F) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c NestedTx) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        let nested = self.begin().await.map_err(TransactionError::Connection)?;
        nested.run(callback).await
    }

    async fn transaction_with_config<F, T, E>(
        &self,
        callback: F,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c NestedTx) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        let nested = self.begin_with_config(isolation_level, access_mode).await;
        nested.map_err(TransactionError::Connection)?.run(callback).await
    }
}

/// As that of [`Tx`]: savepoints nest.
#[async_trait]
impl TransactionTrait for NestedTx {
    type Transaction = Self;

    async fn begin(&self) -> Result<Self, DbErr> {
        self.tx.begin().await
    }

    async fn begin_with_config(
        &self,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<Self, DbErr> {
        self.tx.begin_with_config(isolation_level, access_mode).await
    }

    async fn begin_with_options(&self, options: TransactionOptions) -> Result<Self, DbErr> {
        self.tx.begin_with_options(options).await
    }

    async fn transaction<F, T, E>(&self, callback: F) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c Self) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        self.tx.transaction(callback).await
    }

    async fn transaction_with_config<F, T, E>(
        &self,
        callback: F,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c Self) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        self.tx.transaction_with_config(callback, isolation_level, access_mode).await
    }
}

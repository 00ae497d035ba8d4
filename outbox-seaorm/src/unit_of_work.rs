use std::{
    fmt,
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use outbox_core::{Batch, Context, Events};
use sea_orm::{DatabaseTransaction, DbErr, RuntimeErr, sqlx};
use tokio::runtime::Handle;

use crate::{
    LaneReport, Outbox, Settled,
    flush::{self, Flushed},
    lanes,
    metrics::Recorded,
    outcome::{self, Outcome},
    sessions,
    to_its_end::to_its_end,
    tx::{Shared, Tx, roll_back},
};

/// One transaction and one collector: what the layer opens for each request, and what jobs, command-line tools and
/// tests use directly.
///
/// Nothing is written until the first statement. [`commit`](Self::commit) flushes the events as the last thing before
/// COMMIT; dropping the unit of work rolls back.
///
/// Most code wants [`Outbox::transaction`], which is this with a closure.
#[derive(Debug)]
pub struct UnitOfWork {
    outbox: Outbox,
    source: TxSource,
    finished: bool,
    /// For the rollback when it is dropped outside: the connection's way back to its pool is a task.
    runtime: Option<Handle>,
}

/// Hands out the handles of a unit of work without counting as one itself; what a request carries in its extensions.
#[derive(Clone, Debug)]
pub struct TxSource {
    outbox: Outbox,
    shared: Arc<Shared>,
    in_use: Arc<std::sync::Mutex<std::sync::Weak<()>>>,
}

impl TxSource {
    /// A handle to the transaction.
    #[must_use]
    pub fn tx(&self) -> Tx {
        let mut in_use = self.in_use.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let token = in_use.upgrade().unwrap_or_default();
        *in_use = Arc::downgrade(&token);
        let (scope, events) = (self.shared.root.clone(), self.shared.events.clone());
        Tx { shared: self.shared.clone(), scope, events, _in_use: token }
    }

    /// The collector.
    #[must_use]
    pub fn events(&self) -> Events {
        self.shared.events.clone()
    }

    /// Waits until the transaction has begun, and returns when that was.
    ///
    /// # Cancel safety
    ///
    /// Safe.
    pub async fn begun(&self) -> Instant {
        *self.shared.begun.wait().await
    }

    /// Whether the transaction has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.shared.begun.initialized()
    }

    /// The outbox of the unit of work.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// Whether a handle is left, after a moment in which those that are not used any more may go: a task that was
    /// aborted, or has sent what the request waited for, drops its handle a little later than that.
    async fn is_held(&self) -> bool {
        for _ in 0..HANDLE_GRACE.as_millis() {
            if self.handles() == 0 {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.handles() > 0
    }

    fn handles(&self) -> usize {
        self.in_use.lock().unwrap_or_else(std::sync::PoisonError::into_inner).strong_count()
    }
}

/// How long a commit waits for handles that are left, if there are any.
const HANDLE_GRACE: Duration = Duration::from_millis(100);

/// Why a unit of work did not commit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// A clone of the transaction handle is still held, by a spawned task or a response stream. Rolled back.
    #[error(
        "the transaction handle is still in use by a spawned task or a response stream, so the transaction was rolled \
         back; finish with `Tx` before the response is ready"
    )]
    HandleHeld,
    /// A statement failed, or was cancelled halfway, and the work ended with a success nevertheless. Rolled back.
    #[error(
        "a statement of the transaction failed and its error was ignored, so the transaction was rolled back; use \
         `tx.savepoint(…)` for statements that may fail"
    )]
    StatementFailed,
    /// No connection was free, or the database was busy or out of reach, for a statement of the transaction, and the
    /// work ended with a success nevertheless. Rolled back.
    #[error("the database was not there for a statement of the transaction, so the transaction was rolled back")]
    StatementBusy,
    /// The transaction could not begin. Nothing was written.
    #[error("the transaction could not begin")]
    Begin(#[source] DbErr),
    /// The events could not be written. Rolled back.
    #[error("the events could not be flushed")]
    Flush(#[source] DbErr),
    /// Another commit held the lane of the delivery that was to be acknowledged. Rolled back.
    #[error("another commit holds the key of the delivery")]
    Busy,
    /// The database refused the COMMIT. Rolled back.
    #[error("the database refused to commit")]
    Commit(#[source] DbErr),
    /// The connection was lost between COMMIT and its answer: it may have happened or not.
    #[error("the connection was lost during COMMIT; whether it happened is not known")]
    Unknown(#[source] DbErr),
}

impl CommitError {
    /// Whether the same work may succeed when it is done again at once: no connection was free, or the database was
    /// busy.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Begin(error) | Self::Flush(error) | Self::Commit(error) => is_transient(error),
            Self::Busy | Self::StatementBusy => true,
            Self::HandleHeld | Self::StatementFailed | Self::Unknown(_) => false,
        }
    }
}

/// Whether a database error is about load or chance, not about the statement: no free connection, database locked,
/// serialization failure, deadlock, a disk that is full.
#[must_use]
pub fn is_transient(error: &DbErr) -> bool {
    match error {
        DbErr::ConnectionAcquire(_) | DbErr::Conn(_) => true,
        DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error)) => match &**error {
            sqlx::Error::Database(error) => sessions::may_pass(&**error),
            sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
            _ => false,
        },
        _ => false,
    }
}

impl UnitOfWork {
    pub(crate) fn new(outbox: Outbox, context: Context) -> Self {
        let events = Events::with_clock(outbox.push_limits(), context, outbox.push_clock());
        let shared = Shared::new(outbox.connections(), events);
        let source = TxSource { outbox: outbox.clone(), shared: Arc::new(shared), in_use: Arc::default() };
        Self { outbox, source, finished: false, runtime: Handle::try_current().ok() }
    }

    /// A handle to the transaction; clones and further handles share it.
    #[must_use]
    pub fn tx(&self) -> Tx {
        self.source.tx()
    }

    /// The collector.
    #[must_use]
    pub fn events(&self) -> Events {
        self.source.events()
    }

    /// Whether nothing can be committed any more because of a statement that failed with a [transient
    /// error](is_transient), outside of a savepoint that was rolled back: the work is not to blame.
    #[must_use]
    pub fn lost_its_database(&self) -> bool {
        self.source.shared.root.has_failed_by_chance()
    }

    /// Hands out handles later, for example from the extensions of a request.
    #[must_use]
    pub fn source(&self) -> TxSource {
        self.source.clone()
    }

    /// Flushes the events, commits, and wakes the workers of this process.
    ///
    /// A crash before the COMMIT has reached the database leaves nothing; a crash after it leaves everything.
    ///
    /// # Errors
    ///
    /// [`CommitError`]; all but [`Unknown`](CommitError::Unknown) mean that nothing was written.
    ///
    /// # Cancel safety
    ///
    /// Once started, flush and COMMIT end even if this future is dropped: then in a task of their own.
    pub async fn commit(self) -> Result<(), CommitError> {
        self.finish(None).await.map(|_| ())
    }

    /// As [`commit`](Self::commit), and acknowledges a delivery in the same transaction. If the lease was lost
    /// meanwhile, everything is rolled back and the answer is [`Settled::Superseded`].
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit).
    ///
    /// # Cancel safety
    ///
    /// As [`commit`](Self::commit).
    pub async fn commit_with(self, report: LaneReport) -> Result<Settled, CommitError> {
        self.finish(Some(report)).await
    }

    /// Drops the events and rolls back.
    ///
    /// # Cancel safety
    ///
    /// Once started it ends even if this future is dropped: then in a task of its own.
    pub async fn rollback(mut self) {
        self.finished = true;
        let shared = self.source.shared.clone();
        // A client may hang up while this waits for a statement of a spawned task.
        let _ = to_its_end(async move { shared.abandon().await }).await;
    }

    async fn finish(mut self, report: Option<LaneReport>) -> Result<Settled, CommitError> {
        self.finished = true;
        let (outbox, source, shared) = (self.outbox.clone(), self.source.clone(), self.source.shared.clone());
        // Closed before the handles are counted: one that is handed out from now on can do nothing any more.
        shared.closed.store(true, Ordering::SeqCst);
        let finished = to_its_end(async move {
            let result = if source.is_held().await || shared.used_late.load(Ordering::SeqCst) {
                Err(CommitError::HandleHeld)
            } else {
                commit(&outbox, &shared, report).await
            };
            if let Ok(Settled::Done) = result {
                for work in shared.root.take_after_commit() {
                    tokio::spawn(work);
                }
            }
            if result.is_err() {
                // A statement may be in progress: the answer does not wait for its end. Closed, so nothing commits.
                tokio::spawn(async move { shared.abandon().await });
            }
            result
        });
        finished.await.unwrap_or_else(|panicked| {
            Err(CommitError::Unknown(DbErr::Custom(format!("the commit ended early: {panicked}"))))
        })
    }
}

impl Drop for UnitOfWork {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.source.shared.closed.store(true, Ordering::SeqCst);
        let _ = self.source.shared.events.close();
        if let Some(runtime) = Handle::try_current().ok().or_else(|| self.runtime.take()) {
            let _entered = runtime.enter();
            let shared = self.source.shared.clone();
            runtime.spawn(async move { shared.abandon().await });
        }
    }
}

async fn commit(outbox: &Outbox, shared: &Shared, report: Option<LaneReport>) -> Result<Settled, CommitError> {
    let mut transaction = shared.transaction.lock().await;
    let batch = shared.events.close();
    if shared.root.has_failed() {
        let by_chance = shared.root.has_failed_by_chance();
        return Err(if by_chance { CommitError::StatementBusy } else { CommitError::StatementFailed });
    }
    let transaction = match transaction.take() {
        Some(transaction) => transaction,
        None if batch.events.is_empty() && report.is_none() => return Ok(Settled::Done),
        None => shared.writer.begin().await.map_err(CommitError::Begin)?,
    };
    let recorded = Recorded::of(&batch);
    let written = write(outbox, &transaction, batch, report).await;
    let Flushed { woken, events, commit_id } = match written {
        Ok(Written::Done(flushed)) => flushed,
        refused => {
            roll_back(transaction).await;
            return match refused {
                Ok(Written::Busy) => Err(CommitError::Busy),
                Ok(_) => Ok(Settled::Superseded),
                Err(error) => Err(CommitError::Flush(error)),
            };
        }
    };
    if let Err(error) = transaction.commit().await {
        if error.to_string().contains(NO_TRANSACTION) {
            return Err(CommitError::Unknown(error));
        }
        shared.writer.saw(&error);
        match outcome::find_out(outbox, commit_id).await {
            Outcome::Committed => tracing::info!(%error, "the answer to a COMMIT was lost; it had happened"),
            Outcome::RolledBack => return Err(CommitError::Commit(error)),
            Outcome::Unknown => return Err(CommitError::Unknown(error)),
        }
    }
    recorded.count();
    outbox.committed(events, &woken);
    Ok(Settled::Done)
}

/// What SQLite says to a COMMIT when somebody has ended the transaction before, in a way that was not noticed.
const NO_TRANSACTION: &str = "no transaction is active";

/// What a commit has written; after `Busy` and `Superseded` it must be rolled back.
enum Written {
    /// Everything, with what finds out about a COMMIT whose answer is lost.
    Done(Flushed),
    /// Another commit holds the report's lane.
    Busy,
    /// The report's lease was lost.
    Superseded,
}

/// Writes what belongs to the commit. The last statement asks the database who
/// it is talking to, which also shows that the transaction can still commit.
async fn write(
    outbox: &Outbox,
    transaction: &DatabaseTransaction,
    batch: Batch,
    report: Option<LaneReport>,
) -> Result<Written, DbErr> {
    let mut flushed = flush::flush(outbox, transaction, batch).await?;
    if let Some(report) = report {
        let started = Instant::now();
        loop {
            match lanes::settle_in(outbox, transaction, std::slice::from_ref(&report)).await?.first() {
                Some(Settled::Superseded) => return Ok(Written::Superseded),
                Some(Settled::Busy) if started.elapsed() < BUSY_LIMIT => tokio::time::sleep(BUSY_WAIT).await,
                Some(Settled::Busy) => return Ok(Written::Busy),
                Some(Settled::Done) | None => break,
            }
        }
    }
    if flushed.commit_id.is_none() {
        flushed.commit_id = outcome::identify(transaction).await?;
    }
    Ok(Written::Done(flushed))
}

/// A lane that another commit holds is not waited for with a lock: this transaction has locked other lanes, and two
/// such transactions could wait for each other. It is asked for again, and given up after a while.
const BUSY_WAIT: Duration = Duration::from_millis(5);
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Why [`Outbox::transaction`] stored nothing.
///
/// `?` makes `anyhow::Error` and `Box<dyn Error>` of it, as of a [`SavepointError`](crate::SavepointError).
#[derive(Debug)]
#[non_exhaustive]
pub enum TransactionError<E> {
    /// The work answered with an error; rolled back.
    Work(E),
    /// The work succeeded and the commit did not.
    Commit(CommitError),
}

impl<E: fmt::Display> fmt::Display for TransactionError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Work(error) => write!(f, "{error:#}"),
            Self::Commit(error) => error.fmt(f),
        }
    }
}

/// Not for errors alone: `anyhow::Error` and `Box<dyn Error>` are none.
impl<E: fmt::Debug + fmt::Display> std::error::Error for TransactionError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Work(_) => None,
            Self::Commit(error) => error.source(),
        }
    }
}

impl Outbox {
    /// Opens a unit of work. Nothing is sent to the database before its first statement or its commit.
    #[must_use]
    pub fn begin(&self, context: Context) -> UnitOfWork {
        UnitOfWork::new(self.clone(), context)
    }

    /// Runs `work` in one transaction: what the layer does for a request, for jobs, command-line tools and tests.
    /// Commits if it answers `Ok`, rolls back otherwise.
    ///
    /// ```no_run
    /// use outbox_core::{Context, NewEvent};
    /// use outbox_seaorm::Outbox;
    /// use sea_orm::ConnectionTrait;
    ///
    /// # async fn example(outbox: Outbox) -> Result<(), Box<dyn std::error::Error>> {
    /// outbox
    ///     .transaction(Context::default(), |tx, events| async move {
    ///         tx.execute_unprepared("update invoices set due = true").await?;
    ///         events.push(NewEvent::dynamic("invoices.due", "invoices", "all", &())?)?;
    ///         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`TransactionError::Work`] with what `work` answered, [`TransactionError::Commit`] if the commit failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future before the commit has started rolls back; afterwards the commit ends by itself.
    pub async fn transaction<T, E, F, Fut>(&self, context: Context, work: F) -> Result<T, TransactionError<E>>
    where
        F: FnOnce(Tx, Events) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let unit = self.begin(context);
        let answer = work(unit.tx(), unit.events()).await;
        match answer {
            Ok(value) => unit.commit().await.map(|()| value).map_err(TransactionError::Commit),
            Err(error) => {
                unit.rollback().await;
                Err(TransactionError::Work(error))
            }
        }
    }
}

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::pin,
};

use outbox_core::Events;
use sea_orm::DbErr;

use super::Tx;

/// Why a savepoint did not hold.
///
/// `?` makes `anyhow::Error` and `Box<dyn Error>` of it, whatever the error of the work is, if only it can be shown. So it
/// shows the error of the work, and the causes behind that one as far as the error itself does (`{:#}`).
#[derive(Debug)]
#[non_exhaustive]
pub enum SavepointError<E> {
    /// The work answered with an error; it was rolled back.
    Work(E),
    /// A statement failed and the work answered with a success nevertheless; it was rolled back.
    StatementFailed,
    /// The savepoint could not be set, kept or rolled back. The transaction cannot commit any more.
    Database(DbErr),
}

impl<E: fmt::Display> fmt::Display for SavepointError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Work(error) => write!(f, "{error:#}"),
            Self::StatementFailed => f.write_str("a statement in the savepoint failed, and its error was ignored"),
            Self::Database(_) => f.write_str("the savepoint could not be set or ended"),
        }
    }
}

/// Not for errors alone: `anyhow::Error` and `Box<dyn Error>` are none.
impl<E: fmt::Debug + fmt::Display> std::error::Error for SavepointError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Database(error) => Some(error),
            Self::Work(_) | Self::StatementFailed => None,
        }
    }
}

impl Tx {
    /// Runs `work` in a savepoint. If it answers with an error, or a statement in it failed, what it wrote is rolled
    /// back and the events pushed in it are dropped; the transaction goes on.
    ///
    /// Only the handle and the collector that `work` is given belong to the savepoint. Meanwhile other handles, such as
    /// those of another branch of a `join!`, wait for its end: 10 s at most, which is an error then. Inside of `work` that
    /// would be for ever, so there their use is an error at once, and nothing can be committed any more; a push into
    /// another collector is an error as well. A savepoint inside a savepoint is opened with the handle of the outer one. The
    /// handle that `work` is given is of no use after its end.
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
        F: FnOnce(Self, Events) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let nested = self.open_savepoint().await.map_err(SavepointError::Database)?;
        let (tx, events) = (Self::clone(&nested), nested.events().clone());
        let inside = events.clone();
        let mut work = pin!(inside.inside(|| work(tx, events)));
        let answer = poll_fn(|context| inside.inside(|| work.as_mut().poll(context))).await;
        let kept = nested.end(answer.is_ok()).await.map_err(SavepointError::Database)?;
        match answer {
            Ok(_) if !kept => Err(SavepointError::StatementFailed),
            answer => answer.map_err(SavepointError::Work),
        }
    }
}

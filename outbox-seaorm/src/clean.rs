//! Connections to SQLite whose transaction did not end as the driver thinks.
//!
//! SQLite ends a transaction by itself when the disk is full, a read or write fails, memory runs out, a statement is
//! interrupted, or one says `raise(rollback)` or `or rollback`. sqlx does not notice (0.9): its ROLLBACK fails, it goes
//! on counting the transaction, and its next BEGIN is a savepoint. After that a COMMIT ends only that savepoint: what it
//! confirms is stored nowhere, and the connection holds the write lock until the process ends.

use std::time::{Duration, Instant};

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, SqliteTransactionMode, TransactionOptions,
    TransactionTrait,
    sqlx::{self, Connection, Executor, Sqlite, SqliteConnection, SqlitePool, pool::PoolOptions},
};

/// How often a connection that is not clean may come out of a pool before it is given up.
const TRIES: usize = 4;

/// How long to look for a connection that is on its way back to its pool.
const LOOK: Duration = Duration::from_secs(1);

/// Connections that are not clean do not go back to a pool with these options.
pub(crate) fn guarded(options: PoolOptions<Sqlite>) -> PoolOptions<Sqlite> {
    options.after_release(|connection, _| {
        Box::pin(async move {
            let clean = is_clean(connection).await;
            if !clean {
                tracing::warn!("a connection whose transaction SQLite had ended, or nobody has, was closed");
            }
            Ok::<_, sqlx::Error>(clean)
        })
    })
}

/// Whether no transaction is open, neither in SQLite nor in the books of the driver.
async fn is_clean(connection: &mut SqliteConnection) -> bool {
    // BEGIN is refused inside of a transaction. A rollback that the driver has queued is done before it.
    let outside = Executor::execute(&mut *connection, "begin; rollback").await.is_ok();
    outside && !connection.is_in_transaction()
}

/// Begins a transaction on a pool that somebody else has opened, which has no such guard. What is begun is the outermost
/// transaction for sure.
pub(crate) async fn begin(db: &DatabaseConnection, options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
    for _ in 0..TRIES {
        let begun = match db.begin_with_options(options).await {
            Ok(transaction) => outermost(transaction, options.sqlite_transaction_mode).await,
            Err(error) => Err(error),
        };
        match begun {
            Ok(Some(transaction)) => return Ok(transaction),
            Err(error) if !is_inside(&error) => return Err(error),
            Ok(None) | Err(_) => close_one(db.get_sqlite_connection_pool()).await,
        }
    }
    Err(DbErr::Custom("no connection of the pool is free of the transaction of somebody else".to_owned()))
}

/// `None` if the driver has begun a savepoint only. It names savepoints by how deep it thinks to be, so the first one
/// inside of this transaction has the first name, or it is not the outermost.
async fn outermost(
    transaction: DatabaseTransaction,
    mode: Option<SqliteTransactionMode>,
) -> Result<Option<DatabaseTransaction>, DbErr> {
    let mode = mode.map_or("deferred", |mode| mode.sqlite_keyword());
    // What others have left open goes, with all savepoints.
    if let Err(error) = transaction.execute_unprepared(&format!("rollback; begin {mode}")).await {
        // Another process was faster. The driver rolls back once more, which needs something to roll back.
        transaction.execute_unprepared("begin").await?;
        return Err(error);
    }
    let inside = transaction.begin().await?;
    let first = inside.execute_unprepared("rollback to savepoint _sqlx_savepoint_1").await.is_ok();
    if first {
        inside.commit().await?;
        return Ok(Some(transaction));
    }
    transaction.execute_unprepared("rollback").await?;
    Ok(None)
}

/// Whether BEGIN was refused because a transaction is open that the driver knows nothing of.
fn is_inside(error: &DbErr) -> bool {
    error.to_string().contains("cannot start a transaction within a transaction")
}

/// Closes a connection that is not clean, once it is back in its pool.
async fn close_one(pool: &SqlitePool) {
    let (started, mut clean) = (Instant::now(), Vec::new());
    while started.elapsed() < LOOK {
        let Some(mut connection) = pool.try_acquire() else {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        if is_clean(&mut connection).await {
            clean.push(connection);
            continue;
        }
        tracing::error!("a connection of the application's pool was left inside of a transaction, and was closed");
        if let Err(error) = connection.close().await {
            tracing::debug!(%error, "a connection did not close");
        }
        return;
    }
}

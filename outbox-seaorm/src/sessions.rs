//! The sessions of a pool on PostgreSQL: how they begin, what they are, and when they are not used any more.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sea_orm::{
    DbErr, RuntimeErr,
    sqlx::{
        self, Connection, PgConnection, Postgres, Row,
        error::DatabaseError,
        pool::PoolOptions,
        postgres::{PgDatabaseError, PgRow},
    },
};

/// After this much idle time a connection is tested before it is used.
const PING_AFTER: Duration = Duration::from_secs(1);

/// How often all connections may be replaced.
const REPLACE_EVERY: Duration = Duration::from_secs(1);

/// How long a worker's plans last, if its connection is idle at their end.
const PLANS_LAST: Duration = Duration::from_secs(10);

/// Every session begins with it, in one round trip. What the server, the database, the role or the URL says about these
/// settings is for others: the statements count on READ COMMITTED, are over in a millisecond, look up rows by their keys,
/// and their sessions wait in a pool.
const BEGIN: &str = "select pg_is_in_recovery(),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('jit', 'off', false),
       set_config('enable_indexscan', 'on', false),
       set_config('enable_nestloop', 'on', false),
       case when current_setting('server_version_num')::integer >= 140000
            then set_config('idle_session_timeout', '0', false) end";

/// A worker's statements look up single rows by their keys. While a table is small the planner would rather compare all
/// its rows with all the keys, and go on so when it has grown: queues are empty at one moment and have a million rows at the
/// next. Planning each time costs more than it brings; planning anew [now and then](PLANS_LAST) is enough.
const BEGIN_OF_WORKER: &str = "set enable_seqscan = off; set plan_cache_mode = force_generic_plan";

/// Behind a connection pooler nothing can be set for a session.
const BEGIN_POOLED: &str = "select pg_is_in_recovery()";

/// What the pools of an outbox know about their server.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    /// Connections from before this moment are closed instead of used.
    good_since: Mutex<Option<Instant>>,
    /// Whether the last new connection led to a standby.
    standby: AtomicBool,
    /// How often one was found to be lost.
    losses: AtomicU64,
    /// When a write has last failed because of the disk, if none was found to succeed since.
    disk_failed: Mutex<Option<Instant>>,
}

/// What a pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Units of work, and the application's own reading.
    Requests,
    /// Claims, settlements and renewals.
    Worker,
    /// Any, behind a connection pooler.
    Pooled,
}

impl Sessions {
    /// Sets up the pool. A standby is refused: it takes no writes, and the address may lead to the primary in a moment.
    pub(crate) fn prepare(self: &Arc<Self>, options: PoolOptions<Postgres>, purpose: Purpose) -> PoolOptions<Postgres> {
        let (connecting, acquiring) = (self.clone(), self.clone());
        options
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let sessions = connecting.clone();
                Box::pin(async move { sessions.begin(connection, purpose).await })
            })
            // A ping before every request would cost a round trip; one after a pause finds most dead connections.
            .before_acquire(move |connection, meta| {
                let good = acquiring.are_good(meta.age);
                let sessions = acquiring.clone();
                let plans_are_old = purpose == Purpose::Worker && are_old(meta.age, meta.idle_for);
                Box::pin(async move {
                    if good && plans_are_old {
                        sqlx::raw_sql("discard plans").execute(connection).await.inspect_err(|_| sessions.lost())?;
                    } else if good && meta.idle_for >= PING_AFTER {
                        connection.ping().await.inspect_err(|_| sessions.lost())?;
                    }
                    Ok(good)
                })
            })
    }

    async fn begin(&self, connection: &mut PgConnection, purpose: Purpose) -> Result<(), sqlx::Error> {
        let begin = if purpose == Purpose::Pooled { BEGIN_POOLED } else { BEGIN };
        let row: PgRow = sqlx::raw_sql(begin).fetch_one(&mut *connection).await?;
        let standby: bool = row.try_get(0)?;
        self.standby.store(standby, Ordering::Relaxed);
        if standby {
            return Err(sqlx::Error::Protocol("the server is a standby, which takes no writes".to_owned()));
        }
        if purpose == Purpose::Worker {
            sqlx::raw_sql(BEGIN_OF_WORKER).execute(connection).await?;
        }
        Ok(())
    }

    /// Whether the last new connection led to a standby.
    pub(crate) fn led_to_a_standby(&self) -> bool {
        self.standby.load(Ordering::Relaxed)
    }

    /// How long ago a write has failed because of the disk, if none was found to succeed since.
    pub(crate) fn disk_failed_for(&self) -> Option<Duration> {
        self.disk_failed.lock().unwrap_or_else(PoisonError::into_inner).map(|at| at.elapsed())
    }

    /// A write was found to succeed.
    pub(crate) fn disk_works(&self) {
        *self.disk_failed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// After an error that tells of its session, connections from before are not used any more: the server is read-only or
    /// going away, and so are they, or a table has changed under the statements they have prepared.
    pub(crate) fn saw(&self, error: &DbErr) {
        if tells_of_the_disk(error) {
            *self.disk_failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        if !tells_of_its_session(error) {
            return;
        }
        self.lost();
        let mut good_since = self.good_since.lock().unwrap_or_else(PoisonError::into_inner);
        if good_since.is_none_or(|since| since.elapsed() > REPLACE_EVERY) {
            *good_since = Some(Instant::now());
            tracing::debug!(%error, "all connections are replaced");
        }
    }

    /// A session is gone, and perhaps the server with it.
    pub(crate) fn lost(&self) {
        self.losses.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was found.
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::SeqCst)
    }

    fn are_good(&self, age: Duration) -> bool {
        let good_since = self.good_since.lock().unwrap_or_else(PoisonError::into_inner);
        good_since.is_none_or(|since| age < since.elapsed())
    }
}

/// Whether the time of a connection's plans has ended since it was used last. Nothing has to be remembered about it.
fn are_old(age: Duration, idle: Duration) -> bool {
    let number = |age: Duration| age.as_millis() / PLANS_LAST.as_millis();
    number(age) != number(age.saturating_sub(idle))
}

/// The disk is full, or fails.
fn tells_of_the_disk(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    match error.as_database_error().and_then(DatabaseError::code).as_deref() {
        Some(code) if code.len() == SQLSTATE => matches!(code, "53100" | "58030"),
        Some(code) => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 10 | 13)),
        None => false,
    }
}

fn tells_of_its_session(error: &DbErr) -> bool {
    match error {
        DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error))
        | DbErr::Conn(RuntimeErr::SqlxError(error)) => match &**error {
            sqlx::Error::Io(_) => true,
            sqlx::Error::Database(error) => match error.code().as_deref() {
                // Read-only for the moment, shutting down, crashed, starting up, idle for too long.
                Some("25006" | "57P01" | "57P02" | "57P03" | "57P05") => true,
                Some(code) => code.starts_with("08") || is_old_plan(&**error),
                None => false,
            },
            _ => false,
        },
        _ => false,
    }
}

/// Whether the error of a statement is about its server, its session or others, and may be over in a moment.
pub(crate) fn may_pass(error: &dyn DatabaseError) -> bool {
    match error.code().as_deref() {
        // Serialization failure, deadlock, lock not available; read-only for the moment; a statement or a transaction over
        // its time limit; shutting down, crashed, starting up, idle for too long; input or output error.
        Some(
            "40001" | "40P01" | "55P03" | "25006" | "57014" | "25P03" | "57P01" | "57P02" | "57P03" | "57P05" | "58030",
        ) => true,
        Some(code) if code.len() == SQLSTATE => {
            // The connection; disk full, out of memory, too many connections and other resources.
            code.starts_with("08") || code.starts_with("53") || is_old_plan(error)
        }
        // SQLite: busy, locked, out of memory, input or output error, disk full; the rest of an extended code says more.
        Some(code) => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 7 | 10 | 13)),
        None => false,
    }
}

/// Length of PostgreSQL's codes. Those of SQLite are shorter.
const SQLSTATE: usize = 5;

/// A table has changed under a statement that was prepared before. Its code stands for much else, and its text comes in
/// the server's language.
fn is_old_plan(error: &dyn DatabaseError) -> bool {
    let error = error.try_downcast_ref::<PgDatabaseError>();
    error.is_some_and(|error| error.code() == "0A000" && error.routine() == Some("RevalidateCachedQuery"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_old_once_in_their_time_whenever_the_connection_is_idle() {
        let (second, almost) = (Duration::from_secs(1), PLANS_LAST - Duration::from_millis(1));
        assert!(!are_old(almost, almost), "still the first plans");
        assert!(are_old(PLANS_LAST, Duration::from_millis(1)));
        assert!(!are_old(PLANS_LAST + second, second / 2), "made anew a moment ago");
        assert!(are_old(5 * PLANS_LAST, 3 * PLANS_LAST));
    }
}

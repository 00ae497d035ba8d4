//! Calls to a server that may not answer any more.
//!
//! A network can lose connections without a word: a dead host, a router that forgets, a proxy that swallows. The system
//! gives such a connection up after a quarter of an hour, or never, and sqlx offers none of the options of the socket that
//! would shorten it (0.9). So a call has a limit here. If the answer does not come in time, the whole pool is replaced: a
//! connection that is dropped in the middle of a statement goes back to its pool, which tests it, which waits for the same
//! answer. What is closed with the pool is not tested.
//!
//! Whether a call that was given up has happened is unknown, as after a lost connection.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metrics::counter;
use sea_orm::{DatabaseConnection, DbErr, RuntimeErr, SqlxPostgresConnector, sqlx};

/// How long the goodbyes of a pool may take. Those of a connection that is lost never arrive.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// The pool of a PostgreSQL server for calls that have a limit.
#[derive(Debug)]
pub(crate) struct Calls {
    limit: Option<Duration>,
    current: RwLock<Current>,
    under_way: Mutex<UnderWay>,
    /// Whether the last call got no answer.
    unanswered: AtomicBool,
    /// Pools of the same server: if this one has lost its connections, they probably have too.
    neighbours: Vec<Arc<Calls>>,
}

#[derive(Clone, Debug)]
struct Current {
    number: u64,
    db: DatabaseConnection,
}

#[derive(Debug, Default)]
struct UnderWay {
    calls: u64,
    began: BTreeMap<u64, Instant>,
}

/// A call that is under way, until it is dropped.
struct Call<'a> {
    calls: &'a Calls,
    number: u64,
}

impl Calls {
    pub(crate) fn new(db: DatabaseConnection, limit: Option<Duration>, neighbours: Vec<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            current: RwLock::new(Current { number: 0, db }),
            under_way: Mutex::default(),
            unanswered: AtomicBool::new(false),
            neighbours,
        })
    }

    pub(crate) fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// The connections of this moment. Another call may get others.
    pub(crate) fn connections(&self) -> DatabaseConnection {
        self.current().db
    }

    /// Makes a call with the connections of this moment. An answer that does not come within the limit is an error; so is
    /// every other call that is under way then.
    pub(crate) async fn answered<T, F>(&self, call: impl FnOnce(DatabaseConnection) -> F) -> Result<T, DbErr>
    where
        F: Future<Output = Result<T, DbErr>>,
    {
        let current = self.current();
        let call = call(current.db.clone());
        let Some(limit) = self.limit else { return call.await };
        let _under_way = self.begin();
        let mut closed = current.db.get_postgres_connection_pool().close_event();
        // Dropped at the end, when the pool is closed.
        let mut answer = pin!(closed.do_until(call));
        match tokio::time::timeout(limit, answer.as_mut()).await {
            Ok(Ok(answer)) => {
                self.note(&answer);
                answer
            }
            Ok(Err(closed)) => Err(DbErr::Conn(RuntimeErr::SqlxError(closed.into()))),
            Err(_) => {
                self.give_up(&current, limit);
                let text = format!("no answer within {limit:?}; whether it was done is not known");
                let error = std::io::Error::new(std::io::ErrorKind::TimedOut, text);
                Err(DbErr::Conn(RuntimeErr::SqlxError(sqlx::Error::Io(error).into())))
            }
        }
    }

    /// Runs what consists of several statements until its connections are given up. Without a limit of its own: one of the
    /// calls beside it has to notice.
    pub(crate) async fn until_given_up<T>(&self, work: impl Future<Output = Result<T, DbErr>>) -> Result<T, DbErr> {
        let mut closed = self.current().db.get_postgres_connection_pool().close_event();
        closed.do_until(work).await.map_err(|closed| DbErr::Conn(RuntimeErr::SqlxError(closed.into())))?
    }

    /// Whether the server seems not to answer: the last call failed for that, or one waits for long.
    pub(crate) fn is_silent(&self) -> bool {
        let under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = under_way.began.first_key_value().map(|(_, began)| began.elapsed());
        let waits = oldest.zip(self.limit).is_some_and(|(waits, limit)| waits > limit / 2);
        waits || self.unanswered.load(Ordering::Relaxed)
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn begin(&self) -> Call<'_> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.calls += 1;
        let number = under_way.calls;
        under_way.began.insert(number, Instant::now());
        Call { calls: self, number }
    }

    fn note<T>(&self, answer: &Result<T, DbErr>) {
        let lost = matches!(answer, Err(DbErr::Conn(_) | DbErr::ConnectionAcquire(_)));
        if self.unanswered.swap(lost, Ordering::Relaxed) && !lost {
            tracing::info!("the database answers again");
        }
    }

    fn give_up(&self, lost: &Current, limit: Duration) {
        counter!("outbox_database_timeouts_total").increment(1);
        if !self.unanswered.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                ?limit,
                "the database does not answer; its connections are given up, and new ones are tried"
            );
        }
        if self.renew(lost.number) {
            for neighbour in &self.neighbours {
                neighbour.renew(neighbour.current().number);
            }
        }
        // Marked as closed from here on, also before it is awaited.
        let pool = lost.db.get_postgres_connection_pool().clone();
        drop(pool.close());
        tokio::spawn(async move { tokio::time::timeout(CLOSE_WITHIN, pool.close()).await });
    }

    /// Connections are made anew. What is under way on the old ones may end there. False if another call has done it.
    fn renew(&self, number: u64) -> bool {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.number != number {
            return false;
        }
        let old = current.db.get_postgres_connection_pool();
        let pool = old.options().clone().connect_lazy_with((*old.connect_options()).clone());
        *current = Current { number: number + 1, db: SqlxPostgresConnector::from_sqlx_postgres_pool(pool) };
        true
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut under_way = self.calls.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.began.remove(&self.number);
    }
}

//! Wakes workers of other processes: one NOTIFY for many commits, outside of every request's transaction.
//!
//! A NOTIFY inside a transaction takes a lock on the whole database at commit, which halves the rate of small
//! transactions (measured). Here a commit only leaves its subscriptions in memory; a task sends what has gathered, at
//! most once in a few milliseconds. A notification that gets lost costs latency only: polling finds everything.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sea_orm::{
    ConnectionTrait, DbBackend, Statement,
    sqlx::postgres::{PgListener, PgNotification},
};
use tokio::{sync::Notify, task::AbortHandle};

use crate::{Outbox, pooler::Connections};

const CHANNEL: &str = "outbox";

/// The shortest time between two notifications.
const COALESCE: Duration = Duration::from_millis(5);

/// How long the notification to oneself may take.
const ECHO: Duration = Duration::from_secs(10);

/// When to look again whether notifications arrive.
const LISTEN_AGAIN: Duration = Duration::from_secs(300);

/// How long a lost connection rests before it is made anew.
const RECONNECT: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Notifier {
    db: Connections,
    gathered: Arc<Gathered>,
    sender: OnceLock<AbortHandle>,
    /// Whether the log has it that notifications do not arrive.
    said: AtomicBool,
}

#[derive(Debug, Default)]
struct Gathered {
    subscriptions: Mutex<BTreeSet<i32>>,
    changed: Notify,
}

impl Notifier {
    pub(crate) fn new(db: Connections) -> Self {
        Self { db, gathered: Arc::default(), sender: OnceLock::new(), said: AtomicBool::new(false) }
    }

    pub(crate) fn notify(&self, subscriptions: &[i32]) {
        if subscriptions.is_empty() || self.db.get_database_backend() != DbBackend::Postgres {
            return;
        }
        self.gathered.subscriptions.lock().unwrap_or_else(PoisonError::into_inner).extend(subscriptions);
        self.gathered.changed.notify_one();
        self.sender.get_or_init(|| {
            let (db, gathered) = (self.db.clone(), self.gathered.clone());
            let sender = tokio::spawn(async move {
                loop {
                    gathered.changed.notified().await;
                    let ids =
                        std::mem::take(&mut *gathered.subscriptions.lock().unwrap_or_else(PoisonError::into_inner));
                    send(&db, ids).await;
                    tokio::time::sleep(COALESCE).await;
                }
            });
            sender.abort_handle()
        });
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        if let Some(sender) = self.sender.get() {
            sender.abort();
        }
    }
}

async fn send(db: &Connections, subscriptions: BTreeSet<i32>) {
    let payload = subscriptions.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let notify = Statement::from_sql_and_values(
        DbBackend::Postgres,
        // It stores nothing, so it does not wait for the disk, nor does a commit or a claim wait behind it.
        "select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)",
        [CHANNEL.into(), payload.into()],
    );
    if let Err(error) = db.execute_raw(notify).await {
        tracing::debug!(%error, "other processes were not notified; their polling finds the events");
    }
}

impl Outbox {
    /// Wakes the workers of this process when another process commits: listens for its notifications until the future
    /// is dropped. Waits for nothing on SQLite, where processes poll.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the listening.
    pub async fn listen(&self) -> Infallible {
        if self.backend() != DbBackend::Postgres {
            return std::future::pending().await;
        }
        if self.store().pooled {
            self.say_that_it_polls();
            return std::future::pending().await;
        }
        let pool = self.store().db.get_postgres_connection_pool().clone();
        loop {
            let listened = async {
                // A connection of its own, not one of the pool: it is held for good.
                let mut listener = PgListener::connect_with(&pool).await?;
                listener.ignore_pool_close_event(true);
                listener.listen(CHANNEL).await?;
                // What was committed before the connection stood is found by a look.
                self.wake_all_here();
                // Behind a pooler LISTEN succeeds, and nothing ever comes: not even what this process sends itself.
                send(self.store(), BTreeSet::new()).await;
                match tokio::time::timeout(ECHO, listener.try_recv()).await {
                    // Perhaps that of another process, which came first.
                    Ok(first) => self.heard(first?),
                    Err(_) => return Ok(()),
                }
                loop {
                    self.heard(listener.try_recv().await?);
                }
            };
            let result: Result<(), sea_orm::sqlx::Error> = listened.await;
            match result {
                Ok(()) => {
                    self.say_that_it_polls();
                    tokio::time::sleep(LISTEN_AGAIN).await;
                }
                Err(error) => {
                    tracing::debug!(%error, "not listening for commits of other processes; polling finds them");
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
    }

    /// Wakes whom a notification names; all, after the connection was lost and made anew.
    fn heard(&self, notification: Option<PgNotification>) {
        match notification {
            Some(named) => {
                let ids: Vec<i32> = named.payload().split(',').filter_map(|id| id.parse().ok()).collect();
                self.wake_here(&ids);
            }
            None => self.wake_all_here(),
        }
    }

    /// Says once that this process does not hear of the commits of others.
    fn say_that_it_polls(&self) {
        if !self.notifier().said.swap(true, Ordering::Relaxed) {
            tracing::info!(
                "notifications do not arrive through the connection pooler; commits of other processes are found by \
                 polling"
            );
        }
    }
}

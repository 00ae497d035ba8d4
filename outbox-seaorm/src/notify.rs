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

use metrics::counter;
use sea_orm::{
    ConnectionTrait, DbBackend, Statement, sqlx,
    sqlx::postgres::{PgListener, PgNotification},
};
use tokio::{sync::Notify, task::AbortHandle};

use crate::{Outbox, pooler::Connections};

const CHANNEL: &str = "outbox";

/// The shortest time between two notifications.
const COALESCE: Duration = Duration::from_millis(5);

/// How long the notification to oneself may take.
const ECHO: Duration = Duration::from_secs(10);

/// After so much silence, whether notifications still arrive is tried out.
const SILENCE: Duration = Duration::from_secs(30);

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

/// Whether it is sent.
async fn send(db: &Connections, subscriptions: BTreeSet<i32>) -> bool {
    let payload = subscriptions.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let notify = Statement::from_sql_and_values(
        DbBackend::Postgres,
        // It stores nothing, so it does not wait for the disk, nor does a commit or a claim wait behind it.
        "select set_config('synchronous_commit', 'off', true), pg_notify($1, $2)",
        [CHANNEL.into(), payload.into()],
    );
    let sent = db.execute_raw(notify).await;
    if let Err(error) = &sent {
        tracing::debug!(%error, "other processes were not notified; their polling finds the events");
    }
    sent.is_ok()
}

/// Why a connection listens no more.
enum Ended {
    /// Not even the first notification to oneself has come.
    NeverHeard,
    /// They came, and come no more; or nothing could be sent.
    Silent,
}

impl Outbox {
    /// Wakes the workers of this process when another process commits: listens for its notifications until the future
    /// is dropped. Waits for nothing on SQLite, where processes poll.
    ///
    /// A connection on which nothing arrives any more is made anew, after 40 s at most; until then polling finds what other
    /// processes commit. The metric `outbox_listener_reconnects_total` counts it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the listening.
    pub async fn listen(&self) -> Infallible {
        self.listen_with(SILENCE, ECHO).await
    }

    async fn listen_with(&self, silence: Duration, echo: Duration) -> Infallible {
        if self.backend() != DbBackend::Postgres {
            return std::future::pending().await;
        }
        if self.store().pooled {
            self.say_that_it_polls();
            return std::future::pending().await;
        }
        loop {
            match self.listen_once(silence, echo).await {
                Ok(Ended::NeverHeard) => {
                    self.say_that_it_polls();
                    tokio::time::sleep(LISTEN_AGAIN).await;
                }
                Ok(Ended::Silent) => {
                    counter!("outbox_listener_reconnects_total").increment(1);
                    tracing::warn!("notifications do not arrive any more; the connection that listens is made anew");
                }
                Err(error) => {
                    self.store().sessions().lost();
                    counter!("outbox_listener_reconnects_total").increment(1);
                    tracing::debug!(%error, "not listening for commits of other processes; polling finds them");
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
    }

    /// Listens on one connection until it is lost.
    async fn listen_once(&self, silence: Duration, echo: Duration) -> Result<Ended, sqlx::Error> {
        // A pool of its own, for one connection: it is held for good, and one that is lost keeps nobody's place.
        let db = self.store().now();
        let pool = db.get_postgres_connection_pool();
        let options = pool.options().clone().min_connections(0).max_connections(1);
        let pool = options.connect_lazy_with((*pool.connect_options()).clone());
        let listening = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await.map(|()| listener)
        };
        let Ok(listening) = tokio::time::timeout(echo, listening).await else { return Ok(Ended::Silent) };
        let mut listener = listening?;
        // What was committed before the connection stood is found by a look.
        self.wake_all_here();
        let mut ever = false;
        loop {
            // At first, and whenever it was silent for a while. Behind a pooler LISTEN succeeds, and nothing ever comes: not
            // even what this process sends itself. A connection that was lost without a word is as silent. The echo of
            // another process is as good.
            let store = self.store().clone();
            let sending = tokio::spawn(async move { send(&store, BTreeSet::new()).await });
            let (mut wait, mut heard) = (echo, false);
            while let Ok(notification) = tokio::time::timeout(wait, listener.try_recv()).await {
                self.heard(notification?);
                (wait, heard, ever) = (silence, true, true);
            }
            if !heard {
                let sent = sending.is_finished() && sending.await.is_ok_and(|sent| sent);
                return Ok(if sent && !ever { Ended::NeverHeard } else { Ended::Silent });
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
            None => {
                self.store().sessions().lost();
                self.wake_all_here();
            }
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

#[cfg(test)]
mod tests {
    use outbox_test_servers::{Postgres, Proxy};

    use super::*;

    /// The connection is not closed: nothing arrives on it any more.
    #[tokio::test]
    async fn a_listener_that_hears_nothing_any_more_listens_anew() {
        let server = Postgres::shared();
        let url = server.database();
        let proxy = Proxy::start(server.port()).await;
        let near = Outbox::connect(&url, 1).await.expect("it opens");
        let far = Outbox::connect(&proxy.url(&url, server.port()), 1).await.expect("it opens");
        let listening = tokio::spawn({
            let far = far.clone();
            async move { far.listen_with(Duration::from_millis(200), Duration::from_secs(1)).await }
        });
        let heard = async || {
            let telling = async {
                loop {
                    send(near.store(), BTreeSet::from([7])).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let hears = async {
                tokio::select! {
                    () = telling => {}
                    () = far.woken(7) => {}
                }
            };
            tokio::time::timeout(Duration::from_secs(60), hears).await.expect("it hears in time");
        };
        heard().await;
        proxy.swallow_existing();
        // What had arrived before.
        let _ = tokio::time::timeout(Duration::from_millis(100), far.woken(7)).await;
        heard().await;
        listening.abort();
    }
}

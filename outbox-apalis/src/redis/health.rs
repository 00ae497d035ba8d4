use std::{sync::Arc, time::Duration};

use redis::aio::ConnectionManager;
use tokio::{
    sync::{Notify, watch as channel},
    time::{sleep, timeout},
};

/// Between two looks at Redis.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// An answer that takes longer is none.
const PONG_WITHIN: Duration = Duration::from_secs(1);

/// How long workers claim from the database when Redis answers but takes no jobs; twice as long each time.
const REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(10);

/// Whether Redis can be used at this moment. While it cannot, workers claim from the database.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    up: Arc<channel::Sender<bool>>,
    trouble: Arc<Notify>,
}

impl Health {
    pub(crate) fn new() -> Self {
        Self { up: Arc::new(channel::Sender::new(false)), trouble: Arc::default() }
    }

    pub(crate) fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// Waits until Redis is up, or down.
    pub(crate) async fn wait_for(&self, up: bool) {
        // The sender lives in this very handle.
        let _ = self.up.subscribe().wait_for(|now| *now == up).await;
    }

    /// Redis did not take jobs.
    pub(crate) fn report_trouble(&self) {
        self.up.send_replace(false);
        self.trouble.notify_one();
    }
}

/// Looks at Redis until the future is dropped.
pub(crate) async fn watch(health: Health, mut connection: ConnectionManager) {
    let mut rest = REST;
    let mut introduced = false;
    loop {
        let pong = timeout(PONG_WITHIN, redis::cmd("PING").query_async::<String>(&mut connection)).await;
        let up = matches!(pong, Ok(Ok(_)));
        if up && !introduced {
            introduced = true;
            check_eviction(&mut connection).await;
        }
        health.up.send_if_modified(|was| {
            match (*was, up) {
                (false, true) => tracing::info!("Redis is up: deliveries go through it"),
                (true, false) => tracing::warn!("Redis is away: workers claim from the database"),
                _ => {}
            }
            std::mem::replace(was, up) != up
        });
        tokio::select! {
            () = sleep(LOOK_EVERY) => if up {
                rest = REST;
            },
            () = health.trouble.notified() => {
                tracing::warn!(?rest, "Redis takes no jobs: workers claim from the database for a while");
                health.up.send_replace(false);
                sleep(rest).await;
                rest = (rest * 2).min(LONGEST_REST);
            }
        }
    }
}

/// Jobs that Redis evicts are delivered late.
async fn check_eviction(connection: &mut ConnectionManager) {
    let policy = redis::cmd("CONFIG").arg("GET").arg("maxmemory-policy").query_async::<Vec<String>>(connection).await;
    match policy.as_deref() {
        Ok([_, policy]) if policy != "noeviction" => tracing::warn!(
            policy,
            "Redis may evict jobs; they are delivered after their lease. Set maxmemory-policy noeviction"
        ),
        Ok(_) => {}
        // Hosted servers forbid it.
        Err(error) => tracing::debug!(%error, "the eviction policy of Redis is not known"),
    }
}

//! Deliveries over many machines: relays move claimed lanes into Redis, workers on any machine take them over.
//!
//! Redis makes it quick and wide, and is never trusted: a job is a lease that somebody else may pick up, the lease is in
//! the database, and who picks it up gets a new token there. Whatever Redis loses, repeats or garbles, the lease ends and
//! the lane is due again.

mod consumer;
mod health;
mod job;
mod queue;
mod relay;

use std::time::Duration;

use apalis_redis::Client;
use redis::{
    ConnectionAddr,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use rustls::crypto::ring;

use outbox_seaorm::Outbox;

use crate::assignment::Assignment;
pub(crate) use consumer::consume;
pub(crate) use health::{Health, watch};
pub(crate) use job::{Job, Jobs};
pub(crate) use queue::{Queue, sweep};
pub(crate) use relay::{RELAY_LEASES, relay};

/// How many jobs of one subscription wait in Redis at most. More would gain nothing: the rest waits in the database.
const JOBS: usize = 1000;

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Where workers of many machines find their deliveries; see [`Worker::redis`](crate::Worker::redis).
///
/// Needs nothing of Redis but memory for the waiting jobs: at most [`jobs`](Self::jobs) a subscription, each with up to
/// a hundred events. No persistence, no replication. Use `maxmemory-policy noeviction`: what Redis evicts is delivered,
/// but only after its lease.
#[derive(Clone, Debug)]
pub struct Redis {
    client: Client,
    jobs: usize,
}

/// A Redis URL that makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRedis {
    /// The URL is none, or of another kind.
    #[error("the Redis URL is not of the form redis://USER:PASSWORD@HOST:PORT/DATABASE (rediss:// with TLS)")]
    Url(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There would be no room for a job.
    #[error("at least one job of a subscription must be allowed in Redis, and at most 5,000")]
    Jobs,
}

impl Redis {
    /// Uses the Redis server of this URL, `redis://…`, or with TLS `rediss://…`. It is connected to later: a server that
    /// is away stops nothing.
    ///
    /// A server with TLS must have a certificate of an authority that the machine trusts; those of the file that the
    /// environment's `SSL_CERT_FILE` names, if it names one. If the process has chosen no `CryptoProvider` of rustls when
    /// the worker starts, it is `ring`.
    ///
    /// # Errors
    ///
    /// [`InvalidRedis`] if the URL is none.
    pub fn new(url: &str) -> Result<Self, InvalidRedis> {
        let client = Client::open(url).map_err(|error| InvalidRedis::Url(error.into()))?;
        Ok(Self { client, jobs: JOBS })
    }

    /// Sets how many jobs of one subscription wait in Redis at most. Defaults to 1,000.
    ///
    /// # Errors
    ///
    /// If it is 0, or more than 5,000: the scripts of apalis-redis fail for ever when 8,000 jobs wait.
    pub fn jobs(mut self, jobs: usize) -> Result<Self, InvalidRedis> {
        if !(1..=5000).contains(&jobs) {
            return Err(InvalidRedis::Jobs);
        }
        self.jobs = jobs;
        Ok(self)
    }

    /// A connection that is made when it is first used, and made again when it is lost.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(crate) fn connection(&self) -> Result<ConnectionManager, redis::RedisError> {
        if matches!(self.client.get_connection_info().addr(), ConnectionAddr::TcpTls { .. }) {
            // The client wants a default of the process, and panics if the application has several to choose from and
            // has chosen none.
            let _ = ring::default_provider().install_default();
        }
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(ANSWER_WITHIN))
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_number_of_retries(1);
        ConnectionManager::new_lazy_with_config(self.client.clone(), config)
    }

    pub(crate) fn jobs_limit(&self) -> usize {
        self.jobs
    }
}

/// What a feed needs to get its lanes from Redis.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    pub(crate) health: Health,
    pub(crate) queue: Queue,
    pub(crate) jobs: std::sync::Arc<Jobs>,
}

/// Keeps everything that Redis needs for one subscription going, until the future is dropped.
pub(crate) async fn run(outbox: Outbox, assignment: Assignment, transport: Transport) {
    tokio::join!(relay(&outbox, &assignment, &transport), consume(&assignment, &transport), sweep(&transport));
}

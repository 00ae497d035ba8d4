//! The environment variables, with the names and meanings that the example has; `docs/configuration.md` lists them.

use std::{env, net::SocketAddr, num::NonZeroU64, str::FromStr, time::Duration};

use outbox_apalis::{InvalidOption, InvalidRedis, Redis, Worker};
use outbox_axum::random_token;
use outbox_core::{AfterDeadLetter, InvalidPolicy, Ordering, RetryPolicy};
use outbox_seaorm::Retention;

/// The lease of a worker that was not told another.
const DEFAULT_LEASE: Duration = Duration::from_secs(30);

pub(crate) struct Config {
    pub(crate) database_url: String,
    pub(crate) pool: u32,
    pub(crate) http_addr: SocketAddr,
    pub(crate) ops_addr: SocketAddr,
    /// The token, and whether it was made up here and must be shown.
    pub(crate) ops_token: (String, bool),
    pub(crate) redis: Option<Redis>,
    pub(crate) sink: Option<Sink>,
    retention: Option<Duration>,
    pub(crate) after_dead_letter: AfterDeadLetter,
    lease: Option<Duration>,
    poll: Option<Duration>,
    max_attempts: Option<u32>,
    backoff_base: Option<Duration>,
    backoff_max: Option<Duration>,
    concurrency: Option<usize>,
    pub(crate) grace: Duration,
}

/// Where the subscription `sink` posts, and what it signs with.
pub(crate) struct Sink {
    pub(crate) url: String,
    pub(crate) secret: String,
    pub(crate) ordering: Ordering,
    /// Where the subscriptions `sink-2`, `sink-3` … post.
    pub(crate) more: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the environment variable {name} is {value:?}, but must be {expected}")]
    Value { name: &'static str, value: String, expected: &'static str },
    #[error("no operator token could be made; set OPS_TOKEN to 16 bytes or more")]
    Randomness(#[source] std::io::Error),
    #[error("REDIS_URL cannot be used")]
    Redis(#[from] InvalidRedis),
    #[error("SINK_URL is set, but WEBHOOK_SECRET is not; set it to whsec_ and base64")]
    Secret,
    #[error("the retry settings OUTBOX_MAX_ATTEMPTS, OUTBOX_BACKOFF_BASE_MS and OUTBOX_BACKOFF_MAX_MS do not fit")]
    Retry(#[from] InvalidPolicy),
    #[error("the settings OUTBOX_LEASE_MS, OUTBOX_POLL_MS and OUTBOX_CONCURRENCY do not fit")]
    Worker(#[from] InvalidOption),
}

impl Config {
    pub(crate) fn from_env() -> Result<Self, ConfigError> {
        let address = "an address such as 127.0.0.1:3000";
        let pool: Option<u32> = read("DB_POOL", "a number of connections from 1")?;
        if pool == Some(0) {
            return Err(ConfigError::Value { name: "DB_POOL", value: "0".to_owned(), expected: "at least 1" });
        }
        Ok(Self {
            database_url: database_url(text("DATABASE_URL")),
            pool: pool.unwrap_or(10),
            http_addr: read("HTTP_ADDR", address)?.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3000))),
            ops_addr: read("OPS_ADDR", address)?.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3001))),
            ops_token: match text("OPS_TOKEN") {
                Some(token) => (token, false),
                None => (random_token().map_err(ConfigError::Randomness)?, true),
            },
            redis: text("REDIS_URL").map(|url| Redis::new(&url)).transpose()?,
            sink: sink()?,
            retention: read("OUTBOX_RETENTION_MS", "a number of milliseconds")?.map(Duration::from_millis),
            after_dead_letter: after_dead_letter()?,
            lease: milliseconds("OUTBOX_LEASE_MS")?,
            poll: milliseconds("OUTBOX_POLL_MS")?,
            max_attempts: read("OUTBOX_MAX_ATTEMPTS", "a number from 1")?,
            backoff_base: milliseconds("OUTBOX_BACKOFF_BASE_MS")?,
            backoff_max: milliseconds("OUTBOX_BACKOFF_MAX_MS")?,
            concurrency: read("OUTBOX_CONCURRENCY", "a number from 1")?,
            grace: milliseconds("OUTBOX_SHUTDOWN_GRACE_MS")?.unwrap_or(Duration::from_secs(10)),
        })
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease.unwrap_or(DEFAULT_LEASE)
    }

    pub(crate) fn retry_policy(&self) -> Result<RetryPolicy, ConfigError> {
        let mut policy = RetryPolicy::default();
        if let Some(attempts) = self.max_attempts {
            policy = policy.max_attempts(attempts)?;
        }
        let base = self.backoff_base.unwrap_or(Duration::from_secs(1));
        Ok(policy.backoff(base, self.backoff_max.unwrap_or(base.max(Duration::from_secs(60))))?)
    }

    pub(crate) fn apply(&self, mut worker: Worker) -> Result<Worker, ConfigError> {
        worker = worker.lease(self.lease())?;
        if let Some(redis) = &self.redis {
            worker = worker.redis(redis.clone());
        }
        if let Some(poll) = self.poll {
            worker = worker.poll(poll)?;
        }
        if let Some(concurrency) = self.concurrency {
            worker = worker.concurrency(concurrency)?;
        }
        if let Some(retention) = self.retention {
            worker = worker.retention(Retention::default().keep(retention));
        }
        Ok(worker.shutdown_grace(self.grace))
    }
}

fn after_dead_letter() -> Result<AfterDeadLetter, ConfigError> {
    let name = "OUTBOX_DEAD_LETTER_POLICY";
    match text(name).as_deref() {
        None | Some("continue") => Ok(AfterDeadLetter::Continue),
        Some("hold") => Ok(AfterDeadLetter::Hold),
        Some(value) => Err(ConfigError::Value { name, value: value.to_owned(), expected: "hold or continue" }),
    }
}

fn sink() -> Result<Option<Sink>, ConfigError> {
    match (text("SINK_URL"), text("WEBHOOK_SECRET")) {
        (None, _) => Ok(None),
        (Some(_), None) => Err(ConfigError::Secret),
        (Some(url), Some(secret)) => {
            let more =
                text("MORE_SINK_URLS").map_or_else(Vec::new, |urls| urls.split(',').map(str::to_owned).collect());
            Ok(Some(Sink { url, secret, ordering: ordering()?, more }))
        }
    }
}

fn ordering() -> Result<Ordering, ConfigError> {
    let name = "SINK_ORDERING";
    match text(name).as_deref() {
        None | Some("key") => Ok(Ordering::Aggregate),
        Some("global") => Ok(Ordering::Global),
        Some(value) => Err(ConfigError::Value { name, value: value.to_owned(), expected: "key or global" }),
    }
}

/// Without a mode, SQLite would refuse to start with a file that does not exist yet.
fn database_url(url: Option<String>) -> String {
    let url = url.unwrap_or_else(|| "sqlite://conformance.db".to_owned());
    if url.starts_with("sqlite:") && !url.contains("mode=") {
        let separator = if url.contains('?') { '&' } else { '?' };
        return format!("{url}{separator}mode=rwc");
    }
    url
}

/// Empty is as good as not set.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn read<T: FromStr>(name: &'static str, expected: &'static str) -> Result<Option<T>, ConfigError> {
    let Some(value) = text(name) else { return Ok(None) };
    match value.parse() {
        Ok(parsed) => Ok(Some(parsed)),
        Err(_) => Err(ConfigError::Value { name, value, expected }),
    }
}

fn milliseconds(name: &'static str) -> Result<Option<Duration>, ConfigError> {
    let value: Option<NonZeroU64> = read(name, "a number of milliseconds from 1")?;
    Ok(value.map(|ms| Duration::from_millis(ms.get())))
}

//! The environment variables of the example; `docs/configuration.md` lists them.

use std::{env, net::SocketAddr, num::NonZeroU64, str::FromStr, time::Duration};

use outbox_apalis::{InvalidOption, InvalidRedis, Redis, Worker};
use outbox_axum::random_token;
use outbox_core::{InvalidPolicy, RetryPolicy};
use outbox_seaorm::Retention;

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) database_url: String,
    pub(crate) http_addr: SocketAddr,
    pub(crate) ops_addr: SocketAddr,
    /// The token, and whether it was made up here and must be shown.
    pub(crate) ops_token: (String, bool),
    redis: Option<Redis>,
    /// Where events are posted, and the secret they are signed with.
    pub(crate) webhook: Option<(String, String)>,
    lease: Option<Duration>,
    poll: Option<Duration>,
    max_attempts: Option<u32>,
    backoff_base: Option<Duration>,
    backoff_max: Option<Duration>,
    concurrency: Option<usize>,
    retention: Option<Duration>,
    pub(crate) grace: Duration,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the environment variable {name} is {value:?}, but must be {expected}")]
    Value { name: &'static str, value: String, expected: &'static str },
    #[error("no operator token could be made; set OPS_TOKEN to 16 bytes or more")]
    Randomness(#[source] std::io::Error),
    #[error("REDIS_URL cannot be used")]
    Redis(#[from] InvalidRedis),
    #[error("WEBHOOK_URL is set without WEBHOOK_SECRET; set it to whsec_ and 24 to 64 random bytes in base64")]
    WebhookSecret,
    #[error("the retry settings OUTBOX_MAX_ATTEMPTS, OUTBOX_BACKOFF_BASE_MS and OUTBOX_BACKOFF_MAX_MS do not fit")]
    Retry(#[from] InvalidPolicy),
    #[error("the settings OUTBOX_LEASE_MS, OUTBOX_POLL_MS and OUTBOX_CONCURRENCY do not fit")]
    Worker(#[from] InvalidOption),
}

impl Config {
    pub(crate) fn from_env() -> Result<Self, ConfigError> {
        let redis = env::var("REDIS_URL").ok().filter(|url| !url.is_empty());
        let webhook = match (env::var("WEBHOOK_URL"), env::var("WEBHOOK_SECRET")) {
            (Err(_), _) => None,
            (Ok(url), Ok(secret)) => Some((url, secret)),
            (Ok(_), Err(_)) => return Err(ConfigError::WebhookSecret),
        };
        let ops_token = match env::var("OPS_TOKEN") {
            Ok(token) if !token.is_empty() => (token, false),
            _ => (random_token().map_err(ConfigError::Randomness)?, true),
        };
        let address = "an address such as 127.0.0.1:3000";
        Ok(Self {
            database_url: database_url(env::var("DATABASE_URL").ok()),
            http_addr: read("HTTP_ADDR", address)?.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3000))),
            ops_addr: read("OPS_ADDR", address)?.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 3001))),
            ops_token,
            redis: redis.map(|url| Redis::new(&url)).transpose()?,
            webhook,
            lease: milliseconds("OUTBOX_LEASE_MS")?,
            poll: milliseconds("OUTBOX_POLL_MS")?,
            max_attempts: read("OUTBOX_MAX_ATTEMPTS", "a number from 1")?,
            backoff_base: milliseconds("OUTBOX_BACKOFF_BASE_MS")?,
            backoff_max: milliseconds("OUTBOX_BACKOFF_MAX_MS")?,
            concurrency: read("OUTBOX_CONCURRENCY", "a number from 1")?,
            retention: read("OUTBOX_RETENTION_MS", "a number of milliseconds")?.map(Duration::from_millis),
            grace: milliseconds("OUTBOX_SHUTDOWN_GRACE_MS")?.unwrap_or(Duration::from_secs(10)),
        })
    }

    /// Whether anything about attempts was set.
    pub(crate) fn sets_retries(&self) -> bool {
        self.max_attempts.is_some() || self.backoff_base.is_some() || self.backoff_max.is_some()
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
        if let Some(lease) = self.lease {
            worker = worker.lease(lease)?;
        }
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

/// Without a mode, SQLite would refuse to start with a file that does not exist yet.
fn database_url(url: Option<String>) -> String {
    let url = url.unwrap_or_else(|| "sqlite://todo.db".to_owned());
    if url.starts_with("sqlite:") && !url.contains("mode=") {
        let separator = if url.contains('?') { '&' } else { '?' };
        return format!("{url}{separator}mode=rwc");
    }
    url
}

fn read<T: FromStr>(name: &'static str, expected: &'static str) -> Result<Option<T>, ConfigError> {
    match env::var(name) {
        Err(_) => Ok(None),
        Ok(value) => match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(_) => Err(ConfigError::Value { name, value, expected }),
        },
    }
}

fn milliseconds(name: &'static str) -> Result<Option<Duration>, ConfigError> {
    let value: Option<NonZeroU64> = read(name, "a number of milliseconds from 1")?;
    Ok(value.map(|ms| Duration::from_millis(ms.get())))
}

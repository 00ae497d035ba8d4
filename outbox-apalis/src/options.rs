use std::time::Duration;

/// How a worker claims and delivers. All durations are measured by this process, except that leases and retry times
/// are compared by the database's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) lease: Duration,
    pub(crate) timeout: Option<Duration>,
    pub(crate) poll: Option<Duration>,
    pub(crate) concurrency: usize,
    /// How many deliveries of one tenant may be under way; as many as of all, if it is not set.
    pub(crate) of_tenant: Option<usize>,
    pub(crate) batch: usize,
    pub(crate) grace: Duration,
}

/// A busy server is not a silent one, however short the lease is.
const SHORTEST_CALL: Duration = Duration::from_secs(1);

/// However long the lease is, an operator does not wait for longer.
const LONGEST_CALL: Duration = Duration::from_secs(15);

/// An option of a worker that makes no sense; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InvalidOption(pub(crate) &'static str);

impl Options {
    pub(crate) const DEFAULT: Self = Self {
        lease: Duration::from_secs(30),
        timeout: None,
        poll: None,
        concurrency: 10,
        of_tenant: None,
        batch: 100,
        grace: Duration::from_secs(10),
    };

    /// How long one attempt may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(self.lease)
    }

    /// How long a call to the database may take: a server that is silent for longer is asked over new connections, early
    /// enough that what was leased meanwhile is delivered within two leases.
    pub(crate) fn call_limit(&self) -> Duration {
        (self.lease / 2).clamp(SHORTEST_CALL, LONGEST_CALL)
    }

    /// An attempt is cancelled this long before its lease ends, so that its result still counts.
    pub(crate) fn margin(&self) -> Duration {
        self.lease / 5
    }
}

use std::fmt::Debug;

use chrono::{DateTime, Utc};

/// Tells the time at which an event occurred.
///
/// Only descriptive times come from here. Everything that is compared (leases, retries, schedules) uses the
/// database's clock, so hosts whose clocks differ agree on it.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Returns the current time.
    fn now(&self) -> DateTime<Utc>;
}

/// The clock of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use chrono::{DateTime, TimeDelta, Utc};

/// The database's time as this process knows it: what the database last said, and what has passed since. What this
/// machine takes for the time does not matter.
#[derive(Clone, Debug)]
pub(crate) struct DatabaseClock(Arc<Mutex<(DateTime<Utc>, Instant)>>);

impl DatabaseClock {
    /// The database was asked then, and has said this now.
    pub(crate) fn new(said: DateTime<Utc>, asked_at: Instant) -> Self {
        Self(Arc::new(Mutex::new(reading(said, asked_at))))
    }

    /// As [`new`](Self::new), again.
    pub(crate) fn set(&self, said: DateTime<Utc>, asked_at: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reading(said, asked_at);
    }

    pub(crate) fn now(&self) -> DateTime<Utc> {
        let (said, at) = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said + TimeDelta::from_std(at.elapsed()).unwrap_or_default()
    }
}

/// The database has read its clock between question and answer.
fn reading(said: DateTime<Utc>, asked_at: Instant) -> (DateTime<Utc>, Instant) {
    (said, asked_at + asked_at.elapsed() / 2)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_goes_on_from_what_the_database_has_said() {
        let said: DateTime<Utc> = "2001-02-03T04:05:06Z".parse().unwrap();
        let asked_at = Instant::now() - Duration::from_secs(10);
        let clock = DatabaseClock::new(said, asked_at);
        let between = |from: i64, to: i64| (from..=to).contains(&(clock.now() - said).num_seconds());
        // Half of the time in which it was asked has passed since it read its clock.
        assert!(between(5, 8), "{}", clock.now());
        clock.set(said - TimeDelta::hours(1), Instant::now());
        assert!(between(-3600, -3597), "{}", clock.now());
    }
}

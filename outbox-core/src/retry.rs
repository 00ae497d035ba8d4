use std::time::Duration;

/// The random part of the wait between two attempts.
///
/// The names are those of "Exponential Backoff And Jitter" (Marc Brooker, AWS Architecture Blog, 2015).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Jitter {
    /// The computed wait exactly. Deliveries that failed together are tried together again.
    None,
    /// Between half of the computed wait and all of it.
    #[default]
    Equal,
    /// Between nothing and the computed wait.
    Full,
}

/// When a failed delivery is tried again, and how often.
///
/// The wait before attempt `n + 1` is `base × multiplierⁿ⁻¹`, at most `max`, with [`Jitter`] applied. It is stored as
/// a time of the database's clock, so a restart does not shorten it.
///
/// ```
/// use std::time::Duration;
/// use outbox_core::{Jitter, RetryPolicy};
///
/// let policy = RetryPolicy::default().max_attempts(4)?.backoff(Duration::from_millis(100), Duration::from_secs(1))?;
/// assert_eq!(policy.jitter(Jitter::None).delay(3, 0.5), Duration::from_millis(400));
/// # Ok::<(), outbox_core::InvalidPolicy>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    max_attempts: u32,
    base: Duration,
    max: Duration,
    multiplier: f64,
    jitter: Jitter,
}

/// A retry policy that makes no sense; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InvalidPolicy(&'static str);

impl RetryPolicy {
    const DEFAULT: Self = Self {
        max_attempts: 6,
        base: Duration::from_secs(1),
        max: Duration::from_secs(60),
        multiplier: 2.0,
        jitter: Jitter::Equal,
    };

    /// For destinations of other people, which may be down for a night: 14 attempts in about a day, 1, 4, 16, 64, 256, 1,024
    /// and 4,096 s apart, then 4 h each time. With the default jitter the last comes after 13 to 25 h.
    ///
    /// What fails in a row for several keys opens the circuit and spends nothing, however long it takes. So this is for
    /// what only some events meet, or a subscription with few keys; and what comes after such an event in its key waits as
    /// long.
    #[must_use]
    pub fn patient() -> Self {
        Self { max_attempts: 14, max: Duration::from_secs(4 * 3600), multiplier: 4.0, ..Self::DEFAULT }
    }

    /// Sets how often a delivery is tried before it becomes a dead letter. Defaults to 6: the first attempt and five
    /// more.
    ///
    /// # Errors
    ///
    /// If it is 0.
    pub fn max_attempts(mut self, attempts: u32) -> Result<Self, InvalidPolicy> {
        if attempts == 0 {
            return Err(InvalidPolicy("a delivery needs at least one attempt"));
        }
        self.max_attempts = attempts;
        Ok(self)
    }

    /// Sets the wait after the first failure and the longest wait. Defaults to 1 s and 60 s.
    ///
    /// # Errors
    ///
    /// If `base` is zero or longer than `max`, or `max` is longer than a year.
    pub fn backoff(mut self, base: Duration, max: Duration) -> Result<Self, InvalidPolicy> {
        if base.is_zero() {
            return Err(InvalidPolicy("the first wait between attempts must be longer than zero"));
        }
        if base > max {
            return Err(InvalidPolicy("the first wait between attempts must not be longer than the longest"));
        }
        if max > Duration::from_secs(366 * 24 * 3600) {
            return Err(InvalidPolicy("the longest wait between attempts must be at most a year"));
        }
        (self.base, self.max) = (base, max);
        Ok(self)
    }

    /// Sets by how much each wait grows. Defaults to 2.
    ///
    /// # Errors
    ///
    /// If it is below 1 or not finite.
    pub fn multiplier(mut self, multiplier: f64) -> Result<Self, InvalidPolicy> {
        if !multiplier.is_finite() || multiplier < 1.0 {
            return Err(InvalidPolicy("the multiplier between attempts must be at least 1"));
        }
        self.multiplier = multiplier;
        Ok(self)
    }

    /// Sets the random part of the wait. Defaults to [`Jitter::Equal`].
    #[must_use]
    pub fn jitter(mut self, jitter: Jitter) -> Self {
        self.jitter = jitter;
        self
    }

    /// How often a delivery is tried; `own` is the event's own limit and wins.
    #[must_use]
    pub fn attempts(&self, own: Option<u32>) -> u32 {
        own.unwrap_or(self.max_attempts)
    }

    /// The wait after `attempts` failed attempts (1 after the first). `random` decides the jitter: at least 0, below 1.
    #[must_use]
    pub fn delay(&self, attempts: u32, random: f64) -> Duration {
        let exponent = i32::try_from(attempts.saturating_sub(1)).unwrap_or(i32::MAX);
        let computed = self.base.as_secs_f64() * self.multiplier.powi(exponent);
        let capped = computed.min(self.max.as_secs_f64());
        let share = match self.jitter {
            Jitter::None => 1.0,
            Jitter::Equal => random.mul_add(0.5, 0.5),
            Jitter::Full => random,
        };
        Duration::from_secs_f64(capped * share)
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn waits_double_up_to_the_longest() {
        let policy = RetryPolicy::default().jitter(Jitter::None);
        let waits: Vec<_> = (1..=8).map(|n| policy.delay(n, 0.3).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(policy.delay(u32::MAX, 0.3).as_secs(), 60);
    }

    #[test]
    fn a_patient_policy_outlives_a_night_and_starts_soon() {
        let policy = RetryPolicy::patient();
        let sum = |random| {
            (1..policy.attempts(None)).map(|n| policy.delay(n, random)).sum::<Duration>().as_secs_f64() / 3600.0
        };
        assert!(
            (12.5..13.0).contains(&sum(0.0)) && (25.0..26.0).contains(&sum(0.999_999)),
            "{} {}",
            sum(0.0),
            sum(1.0)
        );
        assert_eq!(policy.jitter(Jitter::None).delay(1, 0.3).as_secs(), 1);
    }

    #[test]
    fn equal_jitter_stays_between_half_and_all_of_the_wait() {
        let policy = RetryPolicy::default();
        let mut random = fastrand::Rng::with_seed(7);
        let waits: Vec<_> = (0..1000).map(|_| policy.delay(2, random.f64())).collect();
        assert!(waits.iter().all(|wait| (1000 * MS..=2000 * MS).contains(wait)));
        assert!(waits.iter().any(|wait| *wait < 1100 * MS) && waits.iter().any(|wait| *wait > 1900 * MS));
    }

    #[test]
    fn full_jitter_starts_at_nothing() {
        let policy = RetryPolicy::default().jitter(Jitter::Full);
        assert_eq!(policy.delay(1, 0.0), Duration::ZERO);
        assert_eq!(policy.delay(1, 0.25), 250 * MS);
    }

    #[test]
    fn nonsense_is_refused_where_it_is_given() {
        let policy = RetryPolicy::default();
        assert!(policy.max_attempts(0).is_err());
        assert!(policy.backoff(Duration::ZERO, MS).is_err());
        assert!(policy.backoff(2 * MS, MS).is_err());
        assert!(policy.multiplier(0.5).is_err());
        assert!(policy.multiplier(f64::NAN).is_err());
    }

    #[test]
    fn an_events_own_limit_wins() {
        assert_eq!(RetryPolicy::default().attempts(None), 6);
        assert_eq!(RetryPolicy::default().attempts(Some(1)), 1);
    }
}

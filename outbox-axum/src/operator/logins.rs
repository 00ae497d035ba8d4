use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use metrics::counter;
use tokio::time::Instant;

/// So many wrong tokens are answered at once: people mistype.
const FREE: f64 = 5.0;

/// How many are forgotten each second.
const FORGOTTEN: f64 = 1.0;

/// By how much each one more makes the answers slower, and how slow they get.
const STEP: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(3);

/// How often the log says that there are wrong ones.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// The wrong tokens of this listener. The more there were lately, the longer each waits for its answer; the right one
/// never waits.
#[derive(Clone, Debug, Default)]
pub(super) struct Refused(Arc<Mutex<Recent>>);

#[derive(Debug, Default)]
struct Recent {
    lately: f64,
    last: Option<Instant>,
    logged: Option<Instant>,
    unlogged: u64,
}

impl Refused {
    /// Counts one, and says how long it has to wait.
    pub(super) fn one(&self) -> Duration {
        counter!("outbox_operator_logins_refused_total").increment(1);
        let now = Instant::now();
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = recent.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        recent.lately = FORGOTTEN.mul_add(-passed.as_secs_f64(), recent.lately).max(0.0) + 1.0;
        recent.last = Some(now);
        recent.unlogged += 1;
        if recent.logged.is_none_or(|logged| now.saturating_duration_since(logged) >= LOG_EVERY) {
            tracing::warn!(refused = recent.unlogged, "somebody asks for the operators' pages with a wrong token");
            recent.logged = Some(now);
            recent.unlogged = 0;
        }
        STEP.mul_f64((recent.lately - FREE).max(0.0)).min(LONGEST)
    }
}

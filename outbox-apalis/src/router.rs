//! The router of a worker: one task that routes what commits, and leases what is new to the feeds that have room.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::counter;
use outbox_seaorm::{NextLook, Outbox, Routed, Router, Taker};
use sea_orm::DbErr;
use tokio_util::sync::CancellationToken;

use crate::{
    assignment::Assignment,
    desk::{Desk, Room},
};

/// How many events are routed at once at most.
const MOST: usize = 500;

/// So many events at once are a high load. Then a pause lets more come together: a few large statements cost less than
/// many small ones.
const LOADED: usize = 8;
const COALESCE: Duration = Duration::from_millis(5);

/// From the first to the longest wait for what another process is at.
const SOON: Duration = Duration::from_millis(1);
const LATEST: Duration = Duration::from_millis(20);

/// Between two tries while the database is out of reach: the first, and the longest.
const OUTAGE: Duration = Duration::from_millis(100);
const LONGEST_OUTAGE: Duration = Duration::from_secs(5);

/// How long to wait after a look: pure, so that it can be tested.
#[derive(Debug)]
struct Waits {
    poll: Duration,
    idle: Duration,
    soon: Duration,
    outage: Duration,
    longest_outage: Duration,
}

/// When the next look begins.
#[derive(Debug, PartialEq, Eq)]
enum Wait {
    /// After so long, whatever happens.
    For(Duration),
    /// When something wakes the router, and after so long at the latest.
    Woken(Duration),
}

impl Waits {
    /// `call_limit` is how long a call takes at most: with short leases what is back is to be found soon, so that a call in
    /// vain and a wait fit into one.
    fn new(poll: Duration, call_limit: Duration) -> Self {
        let longest_outage = LONGEST_OUTAGE.min(call_limit);
        Self { poll, idle: poll / 4, soon: SOON, outage: OUTAGE, longest_outage }
    }

    /// `took` is how long the look was. On SQLite requests have their turn for as long.
    fn after(&mut self, routed: &Routed, took: Duration, is_sqlite: bool) -> Wait {
        self.outage = OUTAGE;
        if routed.events > 0 || routed.next == NextLook::Now {
            (self.idle, self.soon) = (self.poll / 4, SOON);
        }
        match routed.next {
            NextLook::Now => Wait::For(if is_sqlite { took } else { Duration::ZERO }),
            NextLook::Soon => {
                let soon = self.soon;
                self.soon = (2 * soon).min(LATEST);
                Wait::For(soon)
            }
            NextLook::Woken if routed.events >= LOADED => Wait::For(COALESCE),
            NextLook::Woken => {
                self.soon = SOON;
                let idle = self.idle;
                self.idle = (2 * idle).min(self.poll);
                Wait::Woken(idle)
            }
        }
    }

    fn after_error(&mut self) -> Wait {
        let wait = self.outage.min(self.longest_outage);
        self.outage = 2 * wait;
        Wait::For(wait)
    }
}

/// Routes until it is told to stop.
pub(crate) async fn run(outbox: Outbox, assignments: Vec<Assignment>, desk: Arc<Desk>, stop: CancellationToken) {
    let closing = Closing(desk);
    let poll = assignments.iter().map(|assignment| assignment.poll).min().unwrap_or(Duration::from_secs(5));
    let is_sqlite = outbox.writer().get_database_backend() == sea_orm::DbBackend::Sqlite;
    let mut router = outbox.router();
    let call_limit = assignments.iter().map(|assignment| assignment.options.call_limit()).min();
    let mut waits = Waits::new(poll, call_limit.unwrap_or(LONGEST_OUTAGE));
    while !stop.is_cancelled() {
        let began = Instant::now();
        let wait = match route(&mut router, &assignments, &closing.0).await {
            Ok(routed) => {
                counter!("outbox_events_routed_total").increment(routed.events as u64);
                waits.after(&routed, began.elapsed(), is_sqlite)
            }
            Err(error) => {
                let wait = waits.after_error();
                tracing::warn!(%error, ?wait, "cannot route events, trying again");
                wait
            }
        };
        let (longest, woken) = match wait {
            Wait::For(time) => (time, false),
            Wait::Woken(time) => (time.mul_f64(fastrand::f64().mul_add(0.2, 0.9)), true),
        };
        tokio::select! {
            () = router.woken(), if woken => waits.idle = waits.poll / 4,
            () = tokio::time::sleep(longest) => {}
            () = stop.cancelled() => {}
        }
    }
}

/// One look. It is not cut off: nobody would know of the leases.
async fn route(router: &mut Router, assignments: &[Assignment], desk: &Desk) -> Result<Routed, DbErr> {
    let rooms = desk.rooms();
    let taker = |(index, room): &(usize, Room)| {
        let assignment = &assignments[*index];
        Taker {
            subscription: assignment.subscription.now(),
            worker: assignment.worker.clone(),
            lanes: u32::try_from(room.lanes).unwrap_or(u32::MAX),
            passed: room.passed.clone(),
            run: u32::try_from(assignment.options.batch).unwrap_or(u32::MAX),
            lease: assignment.options.lease,
        }
    };
    let takers: Vec<Taker> = rooms.iter().map(taker).collect();
    let asked_at = Instant::now();
    let mut routed = router.route(&takers, MOST).await?;
    for lane in routed.leased.drain(..) {
        let taker = takers.iter().zip(&rooms).find(|(taker, _)| taker.subscription == lane.lane.subscription);
        if let Some((_, (index, _))) = taker {
            desk.put(*index, lane, asked_at);
        }
    }
    Ok(routed)
}

/// Tells the dispatcher that nothing comes any more, also after a panic.
struct Closing(Arc<Desk>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLL: Duration = Duration::from_secs(8);

    fn routed(events: usize, next: NextLook) -> Routed {
        Routed { events, leased: Vec::new(), next }
    }

    #[test]
    fn idle_looks_become_rare_and_a_commit_makes_them_frequent_again() {
        let mut waits = Waits::new(POLL, LONGEST_OUTAGE);
        for seconds in [2, 4, 8, 8] {
            let wait = waits.after(&routed(0, NextLook::Woken), Duration::ZERO, false);
            assert_eq!(wait, Wait::Woken(Duration::from_secs(seconds)));
        }
        let wait = waits.after(&routed(1, NextLook::Woken), Duration::ZERO, false);
        assert_eq!(wait, Wait::Woken(Duration::from_secs(2)));
    }

    #[test]
    fn a_router_that_was_skipped_looks_again_soon_until_nothing_is_left() {
        let mut waits = Waits::new(POLL, LONGEST_OUTAGE);
        for millis in [1, 2, 4, 8, 16, 20, 20] {
            let wait = waits.after(&routed(0, NextLook::Soon), Duration::ZERO, false);
            assert_eq!(wait, Wait::For(Duration::from_millis(millis)));
        }
        assert!(matches!(waits.after(&routed(0, NextLook::Woken), Duration::ZERO, false), Wait::Woken(_)));
        let wait = waits.after(&routed(0, NextLook::Soon), Duration::ZERO, false);
        assert_eq!(wait, Wait::For(SOON));
    }

    #[test]
    fn a_backlog_is_routed_at_once_and_on_sqlite_requests_have_their_turn() {
        let (mut waits, took) = (Waits::new(POLL, LONGEST_OUTAGE), Duration::from_millis(5));
        assert_eq!(waits.after(&routed(500, NextLook::Now), took, false), Wait::For(Duration::ZERO));
        assert_eq!(waits.after(&routed(500, NextLook::Now), took, true), Wait::For(took));
        assert_eq!(waits.after(&routed(20, NextLook::Woken), took, false), Wait::For(COALESCE));
    }

    #[test]
    fn an_outage_is_asked_about_less_and_less_often() {
        let mut waits = Waits::new(POLL, LONGEST_OUTAGE);
        let waited: Vec<Wait> = (0..8).map(|_| waits.after_error()).collect();
        assert_eq!(waited[0], Wait::For(OUTAGE));
        assert_eq!(waited[7], Wait::For(LONGEST_OUTAGE));
    }

    #[test]
    fn with_short_leases_an_outage_is_asked_about_more_often() {
        let limit = Duration::from_millis(300);
        let mut waits = Waits::new(POLL, limit);
        let waited: Vec<Wait> = (0..4).map(|_| waits.after_error()).collect();
        assert_eq!(waited, [OUTAGE, 2 * OUTAGE, limit, limit].map(Wait::For));
        let mut waits = Waits::new(POLL, OUTAGE / 2);
        assert_eq!(waits.after_error(), Wait::For(OUTAGE / 2));
    }
}

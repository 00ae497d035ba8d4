//! What is to happen, drawn from a seed.

use std::time::Duration;

use chrono::TimeDelta;
use fastrand::Rng;
use outbox_core::{AfterDeadLetter, RetryPolicy};

use crate::{feed::Every, options::Options};

/// So often a delivery is tried that sets no limit of its own. A bad day may cost one attempt, and there are fewer of
/// them: whatever succeeds in the end must not become a dead letter.
pub(super) const ATTEMPTS: u32 = 12;
const BAD_DAYS: usize = 8;

pub(super) const MS: Duration = Duration::from_millis(1);

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) workers: usize,
    pub(super) subscriptions: usize,
    pub(super) options: Options,
    pub(super) outside: bool,
    pub(super) after_dead_letter: AfterDeadLetter,
    pub(super) retry: RetryPolicy,
    pub(super) every: Every,
    pub(super) keys: u32,
    pub(super) tenants: u32,
    /// Lanes come through Redis while it is up.
    pub(super) redis: bool,
    /// When events are committed.
    pub(super) commits: Vec<Duration>,
    /// Some of them kill their worker.
    pub(super) poison: bool,
    pub(super) bad_days: Vec<(Duration, BadDay)>,
    /// How often, of a thousand times, a call or its answer is lost, late, or made twice, or finds lanes busy.
    pub(super) lost: u32,
    pub(super) late: u32,
    pub(super) busy: u32,
    /// When all faults are over.
    pub(super) end: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum BadDay {
    Kill,
    /// A process stands still for so long.
    Freeze(Duration),
    /// The database is out of reach.
    Away(Duration),
    /// The database's clock steps.
    ClockStep(TimeDelta),
    /// The server crashes, and takes back what it had not written.
    Crash,
    /// The destination is down.
    Down(Duration),
    /// Redis is away.
    RedisAway(Duration),
    /// An operator pauses the subscription.
    Pause(Duration),
    /// A worker is told to stop, and started again.
    Restart,
    /// The subscription is removed and registered again.
    Remove,
    /// An operator decides about keys that are held.
    LetGo,
}

impl Plan {
    pub(super) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let lease = MS * rng.u32(200..5000);
        let end = lease * rng.u32(2..8);
        let at = |rng: &mut Rng| end.mul_f64(rng.f64());
        let keys = rng.u32(1..12);
        // Some at any time, and many together.
        let bursts: Vec<Duration> = (0..3).map(|_| at(&mut rng)).collect();
        let together = rng.u8(..10);
        let mut commit = |_| if rng.u8(..10) < together { bursts[rng.usize(..3)] } else { at(&mut rng) };
        let commits = (0..60).map(&mut commit).collect::<Vec<_>>();
        let commits = commits[..rng.usize(1..60)].to_vec();
        let bad_days = rng.usize(..BAD_DAYS);
        // Half of them in the middle of much work.
        let day = |rng: &mut Rng| match rng.bool() {
            true => at(rng),
            false => (bursts[rng.usize(..3)] + MS * rng.u32(1..100)).min(end),
        };
        let bad_days = (0..bad_days).map(|_| (day(&mut rng), BadDay::random(&mut rng, lease))).collect();
        let quiet = rng.u8(..3) == 0;
        Self {
            seed,
            workers: rng.usize(1..4),
            subscriptions: if rng.bool() { 1 } else { rng.usize(2..5) },
            options: Options {
                lease,
                timeout: rng.bool().then(|| lease.mul_f64(rng.f64().mul_add(0.5, 0.1))),
                concurrency: rng.usize(1..6),
                of_tenant: if rng.u8(..4) == 0 { Some(rng.usize(1..4)) } else { None },
                batch: rng.usize(1..6),
                grace: lease.mul_f64(rng.f64()),
                ..Options::DEFAULT
            },
            outside: rng.bool(),
            after_dead_letter: if rng.u8(..4) == 0 { AfterDeadLetter::Hold } else { AfterDeadLetter::Continue },
            retry: RetryPolicy::default()
                .max_attempts(ATTEMPTS)
                .and_then(|policy| policy.backoff(50 * MS, lease))
                .expect("a policy"),
            every: Every {
                here: if rng.u8(..6) == 0 { MS * rng.u32(..30) } else { Duration::ZERO },
                fleet: if rng.u8(..6) == 0 { MS * rng.u32(..30) } else { Duration::ZERO },
            },
            keys,
            redis: rng.u8(..4) == 0,
            tenants: if rng.bool() { 0 } else { rng.u32(1..4) },
            commits,
            poison: rng.u8(..4) == 0,
            bad_days,
            lost: if quiet { 0 } else { rng.u32(..30) },
            late: if quiet { 0 } else { rng.u32(..60) },
            busy: if rng.bool() { 0 } else { rng.u32(..300) },
            end,
        }
    }
}

impl Plan {
    /// Whether nothing goes wrong but what events do, and nothing is done but what costs no attempt.
    pub(super) fn is_calm(&self) -> bool {
        let calm = |day: &BadDay| matches!(day, BadDay::Pause(_) | BadDay::LetGo | BadDay::RedisAway(_));
        self.bad_days.iter().all(|(_, day)| calm(day)) && self.lost == 0 && self.late == 0 && !self.poison
    }

    /// Whether workers and store always reach each other.
    pub(super) fn is_connected(&self) -> bool {
        let parts = |day: &BadDay| matches!(day, BadDay::Freeze(_) | BadDay::Away(_) | BadDay::Crash);
        self.lost == 0 && self.late == 0 && !self.bad_days.iter().any(|(_, day)| parts(day))
    }

    /// Whether the server crashes on one of the days.
    pub(super) fn crashes(&self) -> bool {
        self.bad_days.iter().any(|(_, day)| matches!(day, BadDay::Crash))
    }
}

impl BadDay {
    fn random(rng: &mut Rng, lease: Duration) -> Self {
        let time = |rng: &mut Rng, leases: f64| lease.mul_f64(rng.f64() * leases);
        match rng.u8(..11) {
            0 => Self::Kill,
            1 => Self::Freeze(time(rng, 2.0)),
            2 => Self::Away(time(rng, 2.0)),
            3 => Self::ClockStep(TimeDelta::milliseconds(rng.i64(-3000..3000))),
            4 => Self::Crash,
            5 => Self::Down(time(rng, 2.0)),
            6 => Self::Pause(time(rng, 2.0)),
            7 => Self::Restart,
            8 => Self::Remove,
            9 => Self::RedisAway(time(rng, 2.0)),
            _ => Self::LetGo,
        }
    }
}

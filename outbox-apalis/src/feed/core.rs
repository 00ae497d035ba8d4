//! Decides what to deliver next, and what to ask of the store. It waits for nothing, knows no clock and no chance: the
//! driver tells it what has happened and when, and does what it wants.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use outbox_core::{
    AfterDeadLetter, AttemptLog, RecordedEvent, RetryPolicy,
    store::{CircuitState, LaneRef, Next},
};
use tokio_util::sync::CancellationToken;

use super::{
    ahead::Ahead,
    calls::{Answer, Calls, Change},
    circuit::Circuit,
    leases::Leases,
    pace::{Every, Pace},
    reports::Reports,
    running::Running,
    schedule::{SOON, Schedule},
    table::Table,
    told::Told,
    trial::Head,
    unknown::Unknown,
};
use crate::{
    assignment::Until,
    destination::{AttemptResult, Destination},
    options::Options,
    redis::Job,
};

mod answers;
mod ending;
mod room;
mod starting;
mod wanting;

/// How long after the grace a worker that stops goes on trying to store results, if its leases last that long.
const LAST_TRIES: Duration = Duration::from_secs(10);

/// What does not change while a feed runs: a plain record.
pub(crate) struct Settings {
    pub(crate) worker: Arc<str>,
    pub(crate) retry: RetryPolicy,
    pub(crate) after_dead_letter: AfterDeadLetter,
    pub(crate) destination: Arc<dyn Destination>,
    pub(crate) options: Options,
    /// How long a transactional handler may take.
    pub(crate) effect_time: Duration,
    /// The longest wait between two looks at the database.
    pub(crate) poll: Duration,
    /// The shortest times between two attempts.
    pub(crate) every: Every,
    pub(crate) until: Until,
    /// Attempts are numbered from here on: a core before this one may have begun some.
    pub(crate) numbered_from: u64,
}

/// When something happens, as the driver sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now: Instant,
    /// The database's time.
    pub(crate) utc: DateTime<Utc>,
    /// From 0 to 1, at random.
    pub(crate) chance: f64,
}

/// An attempt that is to begin.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) event: Arc<RecordedEvent>,
    pub(crate) lane: LaneRef,
    pub(crate) number: u32,
    pub(crate) log: AttemptLog,
    /// Whether the run of the lane ends with this delivery.
    pub(crate) last: bool,
    /// How long the handler or publisher may take.
    pub(crate) time: Duration,
    pub(crate) running: Running,
    pub(crate) cancelled: CancellationToken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Working,
    /// Attempts under way may go on until then.
    Stopping(Instant),
    /// What could not be stored is tried again until then.
    LastTries(Instant),
    Over,
}

/// Lanes that come through Redis.
#[derive(Debug, Default)]
struct Relayed {
    /// Whether they do at present.
    at_present: bool,
    /// Jobs that could not be taken over yet.
    arrived: Vec<Job>,
}

/// All state of a feed. Each part has rules of its own; what concerns several of them is here.
pub(crate) struct Core {
    settings: Settings,
    table: Table,
    ahead: Ahead,
    schedule: Schedule,
    reports: Reports,
    leases: Leases,
    circuit: Circuit,
    unknown: Unknown,
    pace: Pace,
    calls: Calls,
    /// Suspects are being tried: nothing else starts until their results are stored.
    trial: bool,
    relayed: Relayed,
    /// How many deliveries this process may have under way, of those that all workers may have together.
    share: usize,
    phase: Phase,
    told: Vec<Told>,
}

impl Core {
    /// `losses` is how many connections were lost until now.
    pub(crate) fn new(settings: Settings, losses: u64, now: Instant) -> Self {
        let Settings { options, poll, every, until, .. } = &settings;
        Self {
            table: Table::numbered_from(settings.numbered_from),
            ahead: Ahead::new(options.batch, now),
            schedule: Schedule::new(*poll, *until == Until::Stopped, now),
            reports: Reports::new(settings.destination.is_outside(), now),
            leases: Leases::new(options.lease, losses, now),
            circuit: Circuit::new(),
            unknown: Unknown::new(now),
            pace: Pace::new(*every, now),
            calls: Calls::default(),
            trial: false,
            relayed: Relayed::default(),
            share: usize::MAX,
            phase: Phase::Working,
            told: Vec::new(),
            settings,
        }
    }

    /// What there is to tell since the last time.
    pub(crate) fn told(&mut self) -> Vec<Told> {
        std::mem::take(&mut self.told)
    }

    /// Checks what has to be true at any time; `under_way` is how many results are being stored.
    #[cfg(test)]
    pub(crate) fn check(&self, under_way: usize) {
        self.table.check(self.reports.results() + under_way);
        assert!(self.table.running() <= self.settings.options.concurrency, "too many attempts at once");
    }

    // What happens

    /// An attempt has ended, or was never begun.
    pub(crate) fn ended(&mut self, result: AttemptResult, at: Moment) {
        let AttemptResult { key, attempt, end, started } = result;
        let Some(lane) = self.table.end(&key, attempt) else {
            self.told.push(Told::LostLease("the result of an attempt whose lease was lost is dropped"));
            self.told.push(Told::Superseded(1));
            return;
        };
        if let Some(event) = lane.run.front().cloned() {
            self.judge(key, &event, end, started, at);
        }
    }

    /// The store has answered.
    pub(crate) fn answered(&mut self, answer: Answer, at: Moment) {
        self.calls.answered(&answer);
        match answer {
            Answer::Claimed { asked_at, asked, times_down, claim } => {
                self.claimed(asked_at, asked, times_down, claim, at);
            }
            Answer::Taken { asked_at, taken } => self.taken(asked_at, taken, at),
            Answer::Settled { reports, settled } => self.settled(reports, settled, at),
            Answer::Noted { asked, noted } => self.noted(&asked, noted, at.now),
            Answer::Renewed { asked_at, asked, renewed } => self.renewed(asked_at, &asked, renewed, at.now),
            Answer::Checked { losses, asked, held } => self.checked(losses, &asked, held, at.now),
            Answer::Changed => {}
            Answer::Reserved { asked_at, attempts, after } => self.reserved(asked_at, attempts, after, at),
        }
    }

    /// Something was committed for the subscription. While lanes come through Redis, that is the relay's affair.
    pub(crate) fn woken(&mut self, now: Instant) {
        if self.is_working() && !self.relayed.at_present {
            self.schedule.woken(now);
        }
    }

    /// The subscription was paused, resumed or removed.
    pub(crate) fn state_changed(&mut self, now: Instant) {
        if self.is_working() {
            self.schedule.state_changed(now);
        }
    }

    /// So many connections were lost until now.
    pub(crate) fn lost_connections(&mut self, losses: u64) {
        self.leases.lost_connections(losses);
    }

    /// How many deliveries this process may have under way, of those that all workers may have together.
    pub(crate) fn set_share(&mut self, share: usize) {
        self.share = share;
    }

    /// Whether Redis is up.
    pub(crate) fn redis_is_up(&mut self, up: bool, now: Instant) {
        let relayed = up && self.settings.until == Until::Stopped;
        if std::mem::replace(&mut self.relayed.at_present, relayed) != relayed && self.is_working() {
            self.schedule.look(now);
        }
    }

    /// Jobs have come through Redis. `many` if there may be more.
    pub(crate) fn arrived(&mut self, jobs: Vec<Job>, many: bool, now: Instant) {
        self.relayed.arrived.extend(jobs);
        if many && !self.relayed.arrived.is_empty() {
            self.ahead.came_full(now, self.capacity());
        }
    }

    /// Nothing more begins; attempts under way may go on for so long.
    pub(crate) fn stop(&mut self, grace: Duration, now: Instant) {
        if self.is_working() {
            self.phase = Phase::Stopping(now + grace);
        }
    }

    /// It is later. `worker_is_gone` if no result will come any more.
    pub(crate) fn time_passes(&mut self, worker_is_gone: bool, at: Moment) {
        match self.phase {
            Phase::Stopping(end) if end <= at.now => {
                self.phase = Phase::LastTries(at.now + self.settings.options.lease.min(LAST_TRIES));
                self.table.cancel(None);
                if worker_is_gone {
                    self.table.forget_running();
                }
            }
            Phase::LastTries(end) if end <= at.now => {
                self.told.push(Told::GivenUp);
                self.phase = Phase::Over;
            }
            _ => {}
        }
        if self.leases.guards(!self.table.is_empty(), at.now) {
            self.guard_attempts(at);
        }
    }

    /// Whether what the feed was started for is done.
    pub(crate) fn is_done(&self, now: Instant) -> bool {
        let claimed_all = match self.settings.until {
            Until::Stopped => false,
            Until::Once => self.schedule.has_claimed(),
            Until::Drained => self.schedule.has_claimed() && self.schedule.look_at() > now,
        };
        claimed_all && self.table.is_empty() && self.reports.is_empty() && self.calls.are_done()
    }

    /// Whether attempts may begin: it works, its subscription is not paused, and this process has a share of it.
    fn serves(&self) -> bool {
        self.is_working() && self.schedule.is_served() && self.share > 0
    }

    pub(crate) fn is_working(&self) -> bool {
        self.phase == Phase::Working
    }

    /// Whether it has stopped, and nothing is left to be stored or given back.
    pub(crate) fn is_over(&self) -> bool {
        let is_empty = self.table.is_empty() && self.relayed.arrived.is_empty() && self.reports.is_empty();
        !self.is_working() && is_empty && self.calls.are_done()
    }

    /// Whether it has stopped, and has tried for long enough to store what is left.
    pub(crate) fn has_given_up(&self) -> bool {
        self.phase == Phase::Over
    }

    // What ends leases

    /// Reports a lane for the last time.
    fn finish_lane(&mut self, key: &str, next: impl FnOnce(Head) -> Next) {
        if let Some(report) = self.table.report(key, next) {
            self.reports.push(report);
        }
    }

    /// Gives a lane back, and takes off the attempt that was not made. After a wait, it is due again; the text says why.
    fn give_back(&mut self, key: &str, wait: Option<(Duration, String)>) {
        let Some(lane) = self.table.get_mut(key) else { return };
        if std::mem::take(&mut lane.probe) {
            // It has found out nothing: another probe does.
            let wait = wait.as_ref().map_or(SOON, |(wait, _)| *wait);
            self.calls.tell(Change::Circuit(CircuitState::Open { wait, failed: false }));
        }
        self.finish_lane(key, |head| {
            let (attempts, log) = (head.attempts.saturating_sub(1), head.log);
            match wait {
                None => Next::Release { attempts, log },
                Some((after, error)) => Next::Retry { after, attempts, error, log },
            }
        });
    }

    /// Gives back what was leased and not started.
    fn give_back_idle(&mut self) {
        for key in self.table.stop() {
            self.give_back(&key, None);
        }
    }

    /// The lease of a lane was taken over: everything about it is void.
    fn lose(&mut self, key: &str, now: Instant) {
        if let Some(lane) = self.table.remove(key) {
            self.schedule.look_again_for(&lane, now);
        }
    }
}

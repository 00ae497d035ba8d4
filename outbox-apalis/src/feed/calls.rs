//! The calls to the store, and their answers. Each is a task of its own, so that none is ever dropped halfway; how long it
//! may take is a matter of the connections.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use outbox_core::AttemptLog;
use outbox_seaorm::{Claim, ClaimedLane, LaneRef, LaneReport, Mark, Outbox, Settled};
use sea_orm::DbErr;

use super::{outage_wait, reports::BUSY_WAIT};
use crate::{
    assignment::{Assignment, Until},
    redis::Job,
};

/// How often a call is tried whose answer is not urgent.
const TRIES: u32 = 3;

/// What the core wants from the store. At most one of each kind is under way.
#[derive(Debug)]
pub(crate) enum Call {
    Claim {
        mark: Option<Mark>,
        lanes: usize,
        /// How often the destination had been found down.
        times_down: u32,
    },
    /// Takes over what has come through Redis.
    TakeOver(Vec<Job>),
    Settle(Vec<LaneReport>),
    /// Notes which suspects are about to be tried.
    Note(Vec<(LaneRef, AttemptLog)>),
    Renew(Vec<LaneRef>),
    /// Asks which leases there still are, after so many lost connections.
    Check {
        losses: u64,
        lanes: Vec<LaneRef>,
    },
    Change(Change),
}

/// Something about the subscription as a whole that was found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nobody claims until the wait is over. `failed` if the destination was found down once more.
    OpenCircuit {
        wait: Duration,
        failed: bool,
    },
    CloseCircuit,
    Pause,
}

/// What the store has answered.
#[derive(Debug)]
pub(crate) enum Answer {
    Claimed { asked_at: Instant, capacity: usize, times_down: u32, claim: Result<Claim, DbErr> },
    Taken { asked_at: Instant, taken: Result<Taken, DbErr> },
    Settled { reports: Vec<LaneReport>, settled: Result<Vec<Settled>, DbErr> },
    Noted { asked: Vec<LaneRef>, noted: Result<Held, DbErr> },
    Renewed { asked_at: Instant, asked: Vec<LaneRef>, renewed: Result<Held, DbErr> },
    Checked { losses: u64, asked: Vec<LaneRef>, held: Result<HashSet<LaneRef>, DbErr> },
    Changed,
}

/// What became of leases that were to be renewed, or whose attempts were to be noted; those in neither set are lost.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) done: HashSet<LaneRef>,
    /// Still held; a commit has the lanes at this moment.
    pub(crate) busy: HashSet<LaneRef>,
}

/// What became of jobs that were to be taken over; those in neither list are void.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// The lanes, and whether they are probes.
    pub(crate) lanes: Vec<(ClaimedLane, bool)>,
    /// A commit has their lanes at this moment.
    pub(crate) busy: Vec<Job>,
    /// How many were not what the database says.
    pub(crate) void: usize,
}

/// Makes a call, for the subscription of this assignment.
pub(crate) async fn make(assignment: Assignment, call: Call) -> Answer {
    let outbox = &assignment.outbox;
    let asked_at = Instant::now();
    match call {
        Call::Claim { mark, lanes, times_down } => {
            let claim = claim(&assignment, mark, lanes).await;
            Answer::Claimed { asked_at, capacity: lanes, times_down, claim }
        }
        Call::TakeOver(jobs) => Answer::Taken { asked_at, taken: take_over(&assignment, jobs).await },
        Call::Settle(reports) => {
            let settled = outbox.settle(&reports).await;
            Answer::Settled { reports, settled }
        }
        Call::Note(notes) => {
            let noted = note(outbox, &notes).await;
            Answer::Noted { asked: notes.into_iter().map(|(lane, _)| lane).collect(), noted }
        }
        Call::Renew(lanes) => {
            let renewed = renew(outbox, &lanes, assignment.options.lease).await;
            Answer::Renewed { asked_at, asked: lanes, renewed }
        }
        Call::Check { losses, lanes } => {
            let held = check(outbox, &lanes).await;
            Answer::Checked { losses, asked: lanes, held }
        }
        Call::Change(change) => {
            tell(&assignment, change).await;
            Answer::Changed
        }
    }
}

async fn claim(assignment: &Assignment, mark: Option<Mark>, lanes: usize) -> Result<Claim, DbErr> {
    let Assignment { outbox, subscription, worker, options, until, .. } = assignment;
    let id = subscription.now();
    if *until != Until::Stopped {
        outbox.route_waiting().await?;
    }
    outbox.claim_after(mark, id, worker, count(lanes), count(options.batch), options.lease).await
}

/// Only the lease counts, and it counts once: what else a job says, or how often it comes, changes nothing.
async fn take_over(assignment: &Assignment, jobs: Vec<Job>) -> Result<Taken, DbErr> {
    let Assignment { outbox, subscription, worker, options, .. } = assignment;
    let (subscription, total) = (subscription.now(), jobs.len());
    let refs: Vec<LaneRef> = jobs.iter().map(|job| job.lane.clone()).collect();
    let taken = outbox.take_over(subscription, worker, &refs, count(options.batch), options.lease).await?;
    let mut taken: HashMap<String, ClaimedLane> = taken.into_iter().map(|lane| (lane.lane.key.clone(), lane)).collect();
    let mut lanes = Vec::with_capacity(taken.len());
    let mut others = Vec::new();
    for job in jobs {
        match taken.remove(&job.lane.key) {
            Some(mut lane) => {
                lane.run.truncate(if job.probe { 1 } else { usize::MAX });
                lanes.push((lane, job.probe));
            }
            None if job.lane.subscription == subscription => others.push(job),
            None => {}
        }
    }
    let refs: Vec<LaneRef> = others.iter().map(|job| job.lane.clone()).collect();
    let waiting: HashSet<LaneRef> =
        if refs.is_empty() { HashSet::new() } else { outbox.relayed(&refs).await?.into_iter().collect() };
    let busy: Vec<Job> = others.into_iter().filter(|job| waiting.contains(&job.lane)).collect();
    let void = total - lanes.len() - busy.len();
    Ok(Taken { lanes, busy, void })
}

async fn renew(outbox: &Outbox, lanes: &[LaneRef], lease: Duration) -> Result<Held, DbErr> {
    let done = outbox.renew(lanes, lease).await?.into_iter().collect();
    with_busy(outbox, lanes.iter(), done).await
}

async fn note(outbox: &Outbox, notes: &[(LaneRef, AttemptLog)]) -> Result<Held, DbErr> {
    let done = outbox.note_attempts(notes).await?;
    let held = with_busy(outbox, notes.iter().map(|(lane, _)| lane), done).await?;
    if held.done.is_empty() && !held.busy.is_empty() {
        tokio::time::sleep(BUSY_WAIT).await;
    }
    Ok(held)
}

async fn with_busy(
    outbox: &Outbox,
    lanes: impl Iterator<Item = &LaneRef>,
    done: HashSet<LaneRef>,
) -> Result<Held, DbErr> {
    let others: Vec<LaneRef> = lanes.filter(|lane| !done.contains(lane)).cloned().collect();
    let busy = if others.is_empty() { Vec::new() } else { outbox.held(&others).await? };
    Ok(Held { done, busy: busy.into_iter().collect() })
}

/// If it fails, the core asks again.
async fn check(outbox: &Outbox, lanes: &[LaneRef]) -> Result<HashSet<LaneRef>, DbErr> {
    let mut failures = 0;
    loop {
        match outbox.held(lanes).await {
            Err(_) if failures < TRIES => {
                failures += 1;
                tokio::time::sleep(outage_wait(failures, fastrand::f64())).await;
            }
            held => return held.map(|held| held.into_iter().collect()),
        }
    }
}

/// If it fails, the next delivery finds out again.
async fn tell(assignment: &Assignment, change: Change) {
    let Assignment { outbox, subscription, name, .. } = assignment;
    for failures in 1..=TRIES {
        let told = match change {
            Change::OpenCircuit { wait, failed } => outbox.open_circuit(subscription.now(), wait, failed).await,
            Change::CloseCircuit => outbox.close_circuit(subscription.now()).await,
            Change::Pause => outbox.pause(name).await.map(|_| ()),
        };
        let Err(error) = told else { return };
        tracing::warn!(subscription = &**name, %error, "cannot store the state of the destination");
        tokio::time::sleep(outage_wait(failures, fastrand::f64())).await;
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Claim,
    TakeOver,
    Settle,
    Note,
    Renew,
    Check,
    Change,
}

impl Answer {
    fn kind(&self) -> Kind {
        match self {
            Self::Claimed { .. } => Kind::Claim,
            Self::Taken { .. } => Kind::TakeOver,
            Self::Settled { .. } => Kind::Settle,
            Self::Noted { .. } => Kind::Note,
            Self::Renewed { .. } => Kind::Renew,
            Self::Checked { .. } => Kind::Check,
            Self::Changed => Kind::Change,
        }
    }
}

/// Which calls are under way, and what is still to be told.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    under_way: Vec<Kind>,
    /// What the database is to know about the subscription, one after another.
    changes: VecDeque<Change>,
}

impl Calls {
    pub(crate) fn is_under_way(&self, kind: Kind) -> bool {
        self.under_way.contains(&kind)
    }

    pub(crate) fn begin(&mut self, kind: Kind) {
        self.under_way.push(kind);
    }

    pub(crate) fn answered(&mut self, answer: &Answer) {
        let kind = answer.kind();
        self.under_way.retain(|each| *each != kind);
    }

    pub(crate) fn tell(&mut self, change: Change) {
        self.changes.push_back(change);
    }

    /// What is to be told now.
    pub(crate) fn next_change(&mut self) -> Option<Change> {
        if self.is_under_way(Kind::Change) { None } else { self.changes.pop_front() }
    }

    /// Whether nothing is to be told or answered; leases may be renewed.
    pub(crate) fn are_done(&self) -> bool {
        self.changes.is_empty() && self.under_way.iter().all(|kind| *kind == Kind::Renew)
    }
}

//! The calls to the store, and their answers. Each is a task of its own, so that none is ever dropped halfway; how long it
//! may take is a matter of the connections.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Instant,
};

use outbox_core::{
    AttemptLog,
    store::{
        CircuitState, Claim, ClaimedLane, Holder, LaneRef, LaneReport, LeaseState, Settled, Store, StoreError,
        TakenOver, Wanted,
    },
};

use super::{outage::outage_wait, reports::BUSY_WAIT};
use crate::{
    assignment::{Assignment, Until},
    redis::Job,
};

/// How often a call is tried whose answer is not urgent.
const TRIES: u32 = 3;

/// What the core wants from the store. At most one of each kind is under way.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Claim {
        lanes: usize,
        /// Looks at all lanes, also at those that the claim before has passed.
        all: bool,
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
    Circuit(CircuitState),
    Pause,
}

/// What the store has answered.
#[derive(Debug)]
pub(crate) enum Answer {
    Claimed { asked_at: Instant, capacity: usize, times_down: u32, claim: Result<Claim, StoreError> },
    Taken { asked_at: Instant, taken: Result<Taken, StoreError> },
    Settled { reports: Vec<LaneReport>, settled: Result<Vec<Settled>, StoreError> },
    Noted { asked: Vec<LaneRef>, noted: Result<Vec<LeaseState>, StoreError> },
    Renewed { asked_at: Instant, asked: Vec<LaneRef>, renewed: Result<Vec<LeaseState>, StoreError> },
    Checked { losses: u64, asked: Vec<LaneRef>, held: Result<Vec<bool>, StoreError> },
    Changed,
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

impl Taken {
    /// Only the lease counts, and it counts once: what else a job says, or how often it comes, changes nothing.
    pub(crate) fn sort(jobs: Vec<Job>, taken: TakenOver) -> Self {
        let (total, busy): (usize, HashSet<LaneRef>) = (jobs.len(), taken.busy.into_iter().collect());
        let mut lanes: HashMap<String, ClaimedLane> =
            taken.lanes.into_iter().map(|lane| (lane.lane.key.clone(), lane)).collect();
        let mut sorted = Self::default();
        for job in jobs {
            match lanes.remove(&job.lane.key) {
                Some(mut lane) => {
                    lane.run.truncate(if job.probe { 1 } else { usize::MAX });
                    sorted.lanes.push((lane, job.probe));
                }
                None if busy.contains(&job.lane) => sorted.busy.push(job),
                None => {}
            }
        }
        sorted.void = total - sorted.lanes.len() - sorted.busy.len();
        sorted
    }
}

/// Makes a call, for the subscription of this assignment.
pub(crate) async fn make(assignment: Assignment, call: Call) -> Answer {
    let store = &*assignment.store;
    let asked_at = Instant::now();
    match call {
        Call::Claim { lanes, all, times_down } => {
            let claim = claim(&assignment, Wanted { all, ..wanted(&assignment, lanes) }).await;
            Answer::Claimed { asked_at, capacity: lanes, times_down, claim }
        }
        Call::TakeOver(jobs) => {
            let lanes: Vec<LaneRef> = jobs.iter().map(|job| job.lane.clone()).collect();
            let taken = store.take_over(holder(&assignment), wanted(&assignment, lanes.len()), &lanes).await;
            Answer::Taken { asked_at, taken: taken.map(|taken| Taken::sort(jobs, taken)) }
        }
        Call::Settle(reports) => {
            let settled = store.settle(&reports).await;
            Answer::Settled { reports, settled }
        }
        Call::Note(notes) => {
            let noted = store.note(&notes).await;
            // All of them are about to be asked for again.
            if noted.as_ref().is_ok_and(|states| states.iter().all(|state| *state == LeaseState::Busy)) {
                tokio::time::sleep(BUSY_WAIT).await;
            }
            Answer::Noted { asked: notes.into_iter().map(|(lane, _)| lane).collect(), noted }
        }
        Call::Renew(lanes) => {
            let renewed = store.renew(&lanes, assignment.options.lease).await;
            Answer::Renewed { asked_at, asked: lanes, renewed }
        }
        Call::Check { losses, lanes } => {
            let held = check(store, &lanes).await;
            Answer::Checked { losses, asked: lanes, held }
        }
        Call::Change(change) => {
            tell(&assignment, change).await;
            Answer::Changed
        }
    }
}

async fn claim(assignment: &Assignment, wanted: Wanted) -> Result<Claim, StoreError> {
    if assignment.until != Until::Stopped {
        assignment.store.route().await?;
    }
    let claims = assignment.store.claim(holder(assignment), &[wanted]).await?;
    Ok(claims.into_iter().next().unwrap_or_default())
}

fn holder(assignment: &Assignment) -> Holder<'_> {
    Holder { worker: &assignment.worker, lease: assignment.options.lease }
}

fn wanted(assignment: &Assignment, lanes: usize) -> Wanted {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Wanted {
        subscription: assignment.subscription.now(),
        lanes: count(lanes),
        run: count(assignment.options.batch),
        all: true,
    }
}

/// If it fails, the core asks again.
async fn check(store: &dyn Store, lanes: &[LaneRef]) -> Result<Vec<bool>, StoreError> {
    let mut failures = 0;
    loop {
        match store.held(lanes).await {
            Err(_) if failures < TRIES => {
                failures += 1;
                tokio::time::sleep(outage_wait(failures, fastrand::f64())).await;
            }
            held => return held,
        }
    }
}

/// If it fails, the next delivery finds out again.
async fn tell(assignment: &Assignment, change: Change) {
    let Assignment { store, subscription, name, .. } = assignment;
    for failures in 1..=TRIES {
        let told = match change {
            Change::Circuit(circuit) => store.set_circuit(subscription.now(), circuit).await,
            Change::Pause => store.pause(name).await,
        };
        let Err(error) = told else { return };
        tracing::warn!(subscription = &**name, %error, "cannot store the state of the destination");
        tokio::time::sleep(outage_wait(failures, fastrand::f64())).await;
    }
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
    /// What the store is to know about the subscription, one after another.
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

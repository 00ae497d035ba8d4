//! What a core asks of the store, and the answers.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use outbox_core::{
    AttemptLog,
    store::{CircuitState, Claim, ClaimedLane, LaneRef, LaneReport, LeaseState, Settled, StoreError, TakenOver},
};

use crate::redis::Job;

/// What a core wants from the store. At most one of each kind is under way.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Claim {
        lanes: usize,
        /// So many more of tenants that are not passed.
        others: usize,
        /// Tenants that come last.
        passed: Vec<String>,
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
    /// Reserves so many attempts, of which one begins after so long behind the one before.
    Reserve(u32, Duration),
}

/// Something about the subscription as a whole that was found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Circuit(CircuitState),
    Pause,
}

/// For how many lanes a claim has asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    pub(crate) lanes: usize,
    pub(crate) others: usize,
}

impl Asked {
    /// Whether it was only asked whether the subscription is served.
    pub(crate) fn is_question(self) -> bool {
        self.lanes + self.others == 0
    }
}

/// What the store has answered.
#[derive(Debug)]
pub(crate) enum Answer {
    Claimed { asked_at: Instant, asked: Asked, times_down: u32, claim: Result<Claim, StoreError> },
    Taken { asked_at: Instant, taken: Result<Taken, StoreError> },
    Settled { reports: Vec<LaneReport>, settled: Result<Vec<Settled>, StoreError> },
    Noted { asked: Vec<LaneRef>, noted: Result<Vec<LeaseState>, StoreError> },
    Renewed { asked_at: Instant, asked: Vec<LaneRef>, renewed: Result<Vec<LeaseState>, StoreError> },
    Checked { losses: u64, asked: Vec<LaneRef>, held: Result<Vec<bool>, StoreError> },
    Changed,
    Reserved { asked_at: Instant, attempts: u32, after: Result<Option<Duration>, StoreError> },
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

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Claim,
    TakeOver,
    Settle,
    Note,
    Renew,
    Check,
    Change,
    Reserve,
}

impl Call {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Claim { .. } => Kind::Claim,
            Self::TakeOver(_) => Kind::TakeOver,
            Self::Settle(_) => Kind::Settle,
            Self::Note(_) => Kind::Note,
            Self::Renew(_) => Kind::Renew,
            Self::Check { .. } => Kind::Check,
            Self::Change(_) => Kind::Change,
            Self::Reserve(..) => Kind::Reserve,
        }
    }

    /// How much it asks for.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Claim { lanes, others, .. } => lanes + others,
            Self::TakeOver(jobs) => jobs.len(),
            Self::Settle(reports) => reports.iter().map(|report| report.finished.len().max(1)).sum(),
            Self::Note(notes) => notes.len(),
            Self::Renew(lanes) | Self::Check { lanes, .. } => lanes.len(),
            Self::Change(_) | Self::Reserve(..) => 1,
        }
    }
}

impl Answer {
    /// Whether the store has failed.
    pub(crate) fn is_failure(&self) -> bool {
        match self {
            Self::Claimed { claim, .. } => claim.is_err(),
            Self::Taken { taken, .. } => taken.is_err(),
            Self::Settled { settled, .. } => settled.is_err(),
            Self::Noted { noted, .. } => noted.is_err(),
            Self::Renewed { renewed, .. } => renewed.is_err(),
            Self::Checked { held, .. } => held.is_err(),
            Self::Changed => false,
            Self::Reserved { after, .. } => after.is_err(),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Claimed { .. } => Kind::Claim,
            Self::Taken { .. } => Kind::TakeOver,
            Self::Settled { .. } => Kind::Settle,
            Self::Noted { .. } => Kind::Note,
            Self::Renewed { .. } => Kind::Renew,
            Self::Checked { .. } => Kind::Check,
            Self::Changed => Kind::Change,
            Self::Reserved { .. } => Kind::Reserve,
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

    /// Whether nothing is to be told or answered; leases may be renewed, and attempts reserved.
    pub(crate) fn are_done(&self) -> bool {
        self.changes.is_empty() && self.under_way.iter().all(|kind| matches!(kind, Kind::Renew | Kind::Reserve))
    }
}

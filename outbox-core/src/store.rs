//! Between a worker and the place where deliveries are stored.
//!
//! A [`Store`] leases lanes, the ordered queues of keys, to workers, and stores what becomes of their deliveries. The
//! database is one; `MemoryStore`, with the feature `testing`, is another.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use crate::news::{Announcer, News, NewsItem};
use crate::{AttemptLog, RecordedEvent, Subscription};

/// What a worker needs of a store.
///
/// The rules, which every store keeps:
///
/// - A lane is leased to one holder at a time. Every claim gives it a higher token; what is done with an older one is
///   dropped.
/// - A lease ends by the store's clock. Then the lane is due again, with the attempt counted.
/// - A lane whose head was tried before comes with that one delivery alone; one that has not comes with those behind it.
/// - While a subscription is paused, held, removed or its circuit is open, nothing of it is leased.
///
/// # Cancel safety
///
/// Dropping a future of any of them leaves open whether it has done its work. Run each in a task of its own.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Adds a subscription, or gives it this definition, and returns its id.
    ///
    /// # Errors
    ///
    /// If the store fails, or refuses the definition.
    async fn register(&self, subscription: &Subscription) -> Result<i32, StoreError>;

    /// Leases lanes that are due, of each subscription those that are due longest first. The answers are in the order of
    /// what is wanted, where a subscription stands once.
    ///
    /// The attempt of each first delivery is counted here, so one that kills its worker is counted too. While a
    /// subscription's circuit is open nothing of it is leased; when its time has come one caller gets one lane, as a
    /// [probe](Claim::probe).
    ///
    /// # Errors
    ///
    /// If the store fails; what was leased until then is due again when its lease ends.
    async fn claim(&self, holder: Holder<'_>, wanted: &[Wanted]) -> Result<Vec<Claim>, StoreError>;

    /// Takes over leases of one subscription from a relay: each gets a new token and a new end, and the attempt is counted.
    ///
    /// # Errors
    ///
    /// If the store fails; the leases end when they would have ended.
    async fn take_over(&self, holder: Holder<'_>, wanted: Wanted, lanes: &[LaneRef]) -> Result<TakenOver, StoreError>;

    /// Stores what happened in leased lanes, all or nothing. The answers are in the order of the reports.
    ///
    /// # Errors
    ///
    /// If the store fails; nothing is stored then, and the same reports can be given again.
    async fn settle(&self, reports: &[LaneReport]) -> Result<Vec<Settled>, StoreError>;

    /// Extends leases to `lease` from now.
    ///
    /// # Errors
    ///
    /// If the store fails; the leases end when they would have ended.
    async fn renew(&self, lanes: &[LaneRef], lease: Duration) -> Result<Vec<LeaseState>, StoreError>;

    /// Stores attempt logs of lanes' heads before their attempts begin, so that a crash leaves a trace of them.
    ///
    /// # Errors
    ///
    /// If the store fails; nothing is stored then.
    async fn note(&self, notes: &[(LaneRef, AttemptLog)]) -> Result<Vec<LeaseState>, StoreError>;

    /// Whether nobody has taken over these leases, and their holder has not ended them.
    ///
    /// # Errors
    ///
    /// If the store fails.
    async fn held(&self, lanes: &[LaneRef]) -> Result<Vec<bool>, StoreError>;

    /// Makes lanes of what was committed: for a worker beside which nobody else does. A store that does so as it commits
    /// has nothing to do here.
    ///
    /// # Errors
    ///
    /// If the store fails.
    async fn route(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Says whether the destination of a subscription is down: for every worker, in any process.
    ///
    /// # Errors
    ///
    /// If the store fails.
    async fn set_circuit(&self, subscription: i32, circuit: CircuitState) -> Result<(), StoreError>;

    /// Pauses a subscription until somebody resumes it.
    ///
    /// # Errors
    ///
    /// If the store fails.
    async fn pause(&self, subscription: &str) -> Result<(), StoreError>;

    /// Reserves attempts from the rate that all workers of a subscription have together. The answers are in the order of
    /// what is asked, where a subscription stands once: after how long the first of the attempts may begin, or `None` if
    /// others have reserved for so long ahead that it is too early to ask.
    ///
    /// # Errors
    ///
    /// If the store fails; perhaps it is reserved, and nobody uses it.
    async fn reserve(&self, asked: &[Reservation]) -> Result<Vec<Option<Duration>>, StoreError>;

    /// What happens from now on, in this process and in others.
    fn news(&self) -> News;

    /// How many connections were lost until now, and with each perhaps leases: see [`held`](Self::held).
    fn lost_connections(&self) -> u64;
}

/// Why a store did not do its work: it is out of reach, too slow or broken.
#[derive(Clone, Debug)]
pub struct StoreError(Arc<dyn Error + Send + Sync>);

impl StoreError {
    /// The error of a store.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into().into())
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// Who leases.
#[derive(Clone, Copy, Debug)]
pub struct Holder<'a> {
    /// The name of the worker.
    pub worker: &'a str,
    /// How long its leases last.
    pub lease: Duration,
}

/// What a worker would lease of a subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The subscription.
    pub subscription: i32,
    /// How many lanes at most; none to be told [when the next is due](Claim::next).
    pub lanes: u32,
    /// How many lanes more, of tenants that are not [passed](Self::passed).
    pub others: u32,
    /// Tenants that have enough lanes leased: of every other one a lane that is due comes before all of theirs. What is
    /// without a tenant comes in the order of its time.
    pub passed: Vec<String>,
    /// How many deliveries of each at most.
    pub run: u32,
    /// Looks at all lanes. Otherwise a claim may go on where the one before has ended, for a second at most; what came to
    /// lie behind is found when nothing is left before it.
    pub all: bool,
}

/// Attempts that are to be reserved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reservation {
    /// The subscription.
    pub subscription: i32,
    /// How many.
    pub attempts: u32,
    /// From the begin of one to the begin of the next.
    pub every: Duration,
}

impl Reservation {
    /// So far ahead others may have reserved.
    pub const AHEAD: Duration = Duration::from_secs(1);

    /// How long they take, one after another.
    #[must_use]
    pub fn time(&self) -> Duration {
        self.every.saturating_mul(self.attempts)
    }

    /// What is reserved until then and further ahead than anybody reserves, was reserved before a clock stepped back.
    #[must_use]
    pub fn longest(&self) -> Duration {
        Duration::from_secs(60).saturating_add(self.time().saturating_mul(2))
    }
}

/// What a relay's leases have become.
#[derive(Clone, Debug, Default)]
pub struct TakenOver {
    /// What was taken over.
    pub lanes: Vec<ClaimedLane>,
    /// Still a relay's; a commit has the lanes at this moment. The others are void.
    pub busy: Vec<LaneRef>,
}

/// What has become of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// It is held, and what was asked for is done.
    Done,
    /// It is held, and a commit has the lane at this moment: nothing was done.
    Busy,
    /// It was taken over, or has been ended.
    Lost,
}

/// Whether the destination of a subscription is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CircuitState {
    /// It has answered: everything may be claimed again.
    Closed,
    /// Nobody claims for it until the wait has passed, and then one worker one lane.
    Open {
        /// How long.
        wait: Duration,
        /// Whether this counts towards how often it was found down in a row.
        failed: bool,
    },
}

/// A lease on a lane: the ordered queue of one key of one subscription.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LaneRef {
    /// The subscription.
    pub subscription: i32,
    /// The key.
    pub key: String,
    /// Fences late results: every claim of the lane gets a higher one, and a lane that is created anew starts elsewhere.
    pub token: i64,
    /// Who holds it. After a failover that has lost claims their tokens come again, for others.
    pub worker: String,
}

/// A lane with the deliveries to work on, in their order.
#[derive(Clone, Debug)]
pub struct ClaimedLane {
    /// The lease.
    pub lane: LaneRef,
    /// Which attempt of the first delivery this claim is: 1 for the first.
    pub attempts: u32,
    /// Earlier attempts of the first delivery.
    pub attempt_log: AttemptLog,
    /// The events to deliver. More than one only if the first has not been tried before; none only if the first is
    /// unreadable, or for a relay.
    pub run: Vec<RecordedEvent>,
    /// What is wrong with the first event.
    pub unreadable: Option<Unreadable>,
}

impl ClaimedLane {
    /// The report that gives the lane back, with the attempt that was not made taken off.
    #[must_use]
    pub fn given_back(self) -> LaneReport {
        let next = Next::Release { attempts: self.attempts.saturating_sub(1), log: self.attempt_log };
        LaneReport { lane: self.lane, finished: Vec::new(), next }
    }
}

/// An event whose row cannot be read: somebody changed or deleted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its position.
    pub position: i64,
    /// What is wrong with it.
    pub error: String,
}

/// What a claim has leased of a subscription.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// The lanes, those that are due longest first.
    pub lanes: Vec<ClaimedLane>,
    /// The destination was down; this is one lane to find out whether it still is. Its end must be reported with
    /// [`Store::set_circuit`].
    pub probe: bool,
    /// When the next lane can be claimed; known if none was leased, unless nothing is leased of the subscription: it is
    /// paused, removed, or still being filled.
    pub next: Option<NextDue>,
}

/// When a subscription's next lane can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextDue {
    /// Zero if one is due; `None` if there is none.
    pub after: Option<Duration>,
    /// How often in a row the destination was found down; `None` if its circuit is closed.
    pub circuit: Option<u32>,
}

/// A delivery that is over.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The event's position.
    pub position: i64,
    /// How many attempts it took.
    pub attempts: u32,
    /// Its failed attempts.
    pub log: AttemptLog,
    /// Why it is a dead letter; `None` if it was delivered.
    pub error: Option<String>,
}

/// What comes next in a lane.
#[derive(Clone, Debug)]
pub enum Next {
    /// The lease goes on: the holder works on the next delivery of its run, as its first attempt.
    Keep,
    /// The lease ends; the lane is due as soon as its next delivery is.
    Yield,
    /// The lease ends and the attempt was not made: it is given back.
    Release {
        /// The attempts of the head without this one.
        attempts: u32,
        /// The attempts so far.
        log: AttemptLog,
    },
    /// The lease ends and the lane waits for an operator: its head became a dead letter that holds up what comes after it.
    Hold {
        /// The position of the dead letter.
        position: i64,
    },
    /// The lease ends; the head failed and is due again after a wait.
    Retry {
        /// How long, by the database's clock.
        after: Duration,
        /// The attempts of the head so far.
        attempts: u32,
        /// The text operators see.
        error: String,
        /// The attempts so far.
        log: AttemptLog,
    },
}

/// What happened in a lane since its claim or its last report.
#[derive(Clone, Debug)]
pub struct LaneReport {
    /// The lease.
    pub lane: LaneRef,
    /// Deliveries that are over, in their order, from the head on.
    pub finished: Vec<Finished>,
    /// What comes next.
    pub next: Next,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It is stored.
    Done,
    /// The lease had been taken over: the report was dropped.
    Superseded,
    /// A commit holds the lane at this moment. Nothing of this report was stored; give it again a moment later.
    Busy,
}

//! Between the store and apalis: claims lanes, feeds their deliveries to the worker one at a time for each lane,
//! acknowledges in batches, renews leases.
//!
//! One task for each subscription owns all state, so nothing here is locked. It never waits for the database itself:
//! claim, acknowledgement and renewal run as tasks of their own, at most one of each, so a stalled database stops none
//! of the others and no future of a database call is ever dropped halfway. All of them run on a thread of their own
//! (`thread.rs`), so a handler that blocks its thread does not stop the renewal of leases.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use apalis_core::{
    backend::queue::Queue,
    task::{Task, builder::TaskBuilder, task_id::TaskId},
};
use outbox_core::{AfterDeadLetter, DeliveryError, Outcome, Reason, RecordedEvent, RetryPolicy};
use outbox_seaorm::{Claim, ClaimedLane, Finished, LaneRef, LaneReport, Mark, Next, Outbox, Settled};
use sea_orm::{DbBackend, DbErr};
use tokio::{
    runtime::Handle,
    sync::mpsc,
    task::{JoinError, JoinHandle},
};
use tokio_util::sync::CancellationToken;

use crate::{
    circuit::{Circuit, Failure, PATIENCE, Verdict},
    clock::DatabaseClock,
    desk::Desk,
    destination::{AttemptResult, Destination, End, no_result},
    lane::{Lane, Running, Suspicion},
    listing::task_id,
    metrics::{self, Failed},
    options::Options,
    redis::{Job, Transport},
    task::{Attempt, DeliveryTask},
};

/// How long an event of an unknown type is left alone at first, and at most: another worker may know it.
const UNKNOWN_WAIT: Duration = Duration::from_secs(1);
const LONGEST_UNKNOWN_WAIT: Duration = Duration::from_secs(60);

/// How much later than others a worker looks that has met unknown events lately: those who know them come first.
const UNKNOWN_LAG: Duration = Duration::from_millis(150);

/// How many keys with unknown events are remembered, so that their wait grows.
const UNKNOWN_KEYS: usize = 10_000;

/// How long to wait for lanes that a commit holds.
const BUSY_WAIT: Duration = Duration::from_millis(5);

/// The longest wait between two tries while the database is out of reach.
const LONGEST_OUTAGE_WAIT: Duration = Duration::from_secs(5);

/// The shortest wait between two looks that nothing has brought forward.
const SOON: Duration = Duration::from_millis(10);

/// The shortest time from one claim to the next that only a commit has brought forward: many commits are one look.
const COALESCE: Duration = Duration::from_millis(2);

/// The same, and from one acknowledgement to the next, while this many come together: the load is high, and a few large
/// statements cost less than many small ones.
const COALESCE_LOADED: Duration = Duration::from_millis(10);
const LOADED: usize = 8;

/// Lanes that came full within this time let more be leased in advance; if they took longer, fewer.
const FAST: Duration = Duration::from_millis(100);
const SLOW: Duration = Duration::from_millis(500);

/// How many batches are leased in advance at most, in lanes and in deliveries.
const MOST_AHEAD: usize = 10;

/// How large the payloads of all leased lanes are together when nothing more is leased: each claim adds some MiB.
const MOST_BYTES: usize = 16 << 20;

/// How many tasks wait for the worker at most: enough to keep its threads busy.
const MOST_WAITING: usize = 32;

/// How many suspects are tried as a group at most: few, so that a crash leaves few to be tried alone, and enough to keep
/// the worker busy. A thousand of them are some thirty notes, and as many waits for the last of a group.
const GROUP: usize = 32;

/// Up to so many are tried alone from the start: that is soon done, and if one of them kills the worker, it needs no
/// crash of a group to be found.
const FEW: usize = 6;

/// How long a lane goes on with its run before those that wait get its place. Quick deliveries of a run are so stored
/// together, and slow ones hold nobody up.
const TURN: Duration = Duration::from_millis(10);

/// How long results of handlers in this process wait for the end of their lane's run.
const RUN_ON: Duration = Duration::from_millis(50);

/// How long after the grace a worker that stops goes on trying to store results, if its leases last that long.
const LAST_TRIES: Duration = Duration::from_secs(10);

/// The id of a subscription. Another one, if it is removed and registered again while the worker runs; one that no
/// subscription has, if it is gone.
#[derive(Clone, Debug)]
pub(crate) struct SubscriptionId(Arc<AtomicI32>);

impl SubscriptionId {
    pub(crate) fn new(id: i32) -> Self {
        Self(Arc::new(AtomicI32::new(id)))
    }

    pub(crate) fn now(&self) -> i32 {
        self.0.load(Relaxed)
    }

    /// Returns whether it was another one.
    pub(crate) fn set(&self, id: Option<i32>) -> bool {
        let id = id.unwrap_or(0);
        self.0.swap(id, Relaxed) != id
    }
}

/// What a feed works for.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) outbox: Outbox,
    pub(crate) subscription: SubscriptionId,
    pub(crate) name: Arc<str>,
    pub(crate) worker: Arc<str>,
    pub(crate) retry: RetryPolicy,
    pub(crate) destination: Arc<dyn Destination>,
    pub(crate) after_dead_letter: AfterDeadLetter,
    /// The shortest time between two attempts.
    pub(crate) pace: Duration,
    pub(crate) options: Options,
    /// The longest wait between two looks at the database.
    pub(crate) poll: Duration,
    /// Cancelled when the worker is asked to stop.
    pub(crate) stop: CancellationToken,
    /// Where the feed runs.
    pub(crate) runtime: Handle,
    pub(crate) until: Until,
    pub(crate) counts: Arc<Counts>,
    pub(crate) clock: DatabaseClock,
    /// Cancelled when the feed has nothing to do any more; see [`Until`].
    pub(crate) idle: CancellationToken,
    /// Where lanes come from that routing has leased.
    pub(crate) desk: Arc<Desk>,
    /// Where lanes come from instead of the database, while Redis is up.
    pub(crate) transport: Option<Transport>,
}

/// When a feed has done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Never; it is told to stop.
    Stopped,
    /// When nothing is due.
    Drained,
    /// After what one claim has leased.
    Once,
}

/// What became of deliveries.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) delivered: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) dead: AtomicU64,
}

/// The worker's side of a feed.
pub(crate) struct Ends {
    pub(crate) tasks: mpsc::Receiver<Task<DeliveryTask>>,
    pub(crate) results: mpsc::UnboundedSender<AttemptResult>,
    pub(crate) stop: CancellationToken,
    pub(crate) stopped: JoinHandle<()>,
}

impl Source {
    /// How long a transactional handler may take. While its transaction writes, SQLite lets no lease be renewed.
    fn effect_time(&self) -> Duration {
        match self.outbox.writer().get_database_backend() {
            DbBackend::Sqlite => self.options.timeout().min(self.options.lease / 3),
            _ => self.options.timeout(),
        }
    }
}

struct Feed {
    source: Source,
    tasks: mpsc::Sender<Task<DeliveryTask>>,
    lanes: HashMap<String, Lane>,
    /// Keys whose next delivery can start.
    ready: VecDeque<String>,
    /// Whether the worker has to begin a task before another one can be handed out.
    full: bool,
    /// Deliveries under way.
    running: usize,
    /// Deliveries that were started and whose end is not stored: a crash repeats at most these.
    open: usize,
    reports: Vec<LaneReport>,
    /// When the oldest result came that waits for the end of its lane's run.
    unreported_since: Option<Instant>,
    /// Something else waits for those results.
    report_now: bool,
    /// Reports whose storing failed: tried again as they are.
    unstored: Option<Vec<LaneReport>>,
    claiming: Option<JoinHandle<(usize, Result<Claimed, DbErr>)>>,
    /// Where the next claim goes on.
    mark: Option<Mark>,
    /// Leased lanes that may have more deliveries than their run, and when one of them was last over.
    long: HashSet<LaneRef>,
    returned_at: Instant,
    /// Jobs that came through Redis and could not be taken over yet.
    arrived: Vec<Job>,
    taking: Option<JoinHandle<Result<Taken, DbErr>>>,
    settling: Option<JoinHandle<(Vec<LaneReport>, Result<Vec<Settled>, DbErr>)>>,
    /// Suspects are being tried: nothing else starts until their results are stored.
    trial: bool,
    /// Notes which suspects are about to be tried.
    noting: Option<JoinHandle<(Vec<LaneRef>, Result<Leases, DbErr>)>>,
    renewing: Option<JoinHandle<(Instant, Vec<LaneRef>, Result<Leases, DbErr>)>>,
    renew_at: Instant,
    /// When to look for lanes next.
    look_at: Instant,
    claimed_at: Instant,
    /// Whether the last claim found many.
    loaded: bool,
    /// Whether it came back full: there are more, which come before what is routed now.
    behind: bool,
    /// Lanes that routing has leased with all that they had. Whatever a lane gets later, the feed is woken for.
    fresh: HashSet<LaneRef>,
    woken_at: Option<Instant>,
    /// How many connections had been lost when all leases were there. After another loss nothing begins before they are
    /// checked.
    checked_at: u64,
    checking: Option<JoinHandle<(u64, Vec<LaneRef>, Result<Vec<LaneRef>, DbErr>)>>,
    /// When the last claim that came back full began.
    full_at: Instant,
    /// How many lanes to lease: more while they are soon done.
    ahead: usize,
    idle_wait: Duration,
    claim_failures: u32,
    settle_failures: u32,
    settle_at: Instant,
    circuit: Circuit,
    /// What the database is to know about the subscription, one after another.
    changes: VecDeque<Change>,
    changing: Option<JoinHandle<()>>,
    /// When the pace allows the next attempt.
    next_start: Instant,
    /// How often events of these keys were of an unknown type.
    unknown: HashMap<String, u32>,
    /// Until when events that are unknown here come back.
    unknown_until: Instant,
    claimed_once: bool,
}

/// Something about the subscription as a whole that was found out.
enum Change {
    OpenCircuit { wait: Duration, failed: bool },
    CloseCircuit,
    Pause,
}

/// What became of leases that were to be renewed, or whose attempts were to be noted; those in neither list are lost.
struct Leases {
    done: HashSet<LaneRef>,
    /// Still held; a commit has the lanes at this moment.
    busy: HashSet<LaneRef>,
}

/// What became of jobs that were to be taken over; those in neither list are void.
struct Taken {
    lanes: Vec<(ClaimedLane, bool)>,
    /// A commit has their lanes at this moment.
    busy: Vec<Job>,
    /// How many were not what the database says.
    void: usize,
    asked_at: Instant,
}

struct Claimed {
    claim: Claim,
    asked_at: Instant,
    /// How often the destination had been found down when it was asked for.
    times_down: u32,
}

/// Starts a feed. It ends when its `stop` is cancelled and everything is acknowledged or given back, or when the
/// worker's side is dropped.
pub(crate) fn start(source: Source) -> Ends {
    let (tasks, tasks_end) = mpsc::channel(source.options.concurrency.min(MOST_WAITING));
    let (results, results_end) = mpsc::unbounded_channel();
    let now = Instant::now();
    let source = Source { stop: source.stop.child_token(), ..source };
    let stop = source.stop.clone();
    let feed = Feed {
        tasks,
        lanes: HashMap::new(),
        ready: VecDeque::new(),
        full: false,
        running: 0,
        open: 0,
        reports: Vec::new(),
        unreported_since: None,
        report_now: false,
        unstored: None,
        claiming: None,
        mark: None,
        long: HashSet::new(),
        returned_at: now,
        arrived: Vec::new(),
        taking: None,
        settling: None,
        trial: false,
        noting: None,
        renewing: None,
        renew_at: now,
        look_at: now,
        claimed_at: now,
        loaded: false,
        behind: false,
        fresh: HashSet::new(),
        woken_at: None,
        checked_at: source.outbox.lost_connections(),
        checking: None,
        full_at: now,
        ahead: 0,
        idle_wait: source.poll / 8,
        claim_failures: 0,
        settle_failures: 0,
        settle_at: now,
        circuit: Circuit::new(),
        changes: VecDeque::new(),
        changing: None,
        next_start: now,
        unknown: HashMap::new(),
        unknown_until: now,
        claimed_once: false,
        source,
    };
    let runtime = feed.source.runtime.clone();
    let stopped = runtime.spawn(feed.run(results_end));
    Ends { tasks: tasks_end, results, stop, stopped }
}

impl Feed {
    async fn run(mut self, mut results: mpsc::UnboundedReceiver<AttemptResult>) {
        let options = self.source.options;
        let (outbox, subscription, stop) =
            (self.source.outbox.clone(), self.source.subscription.clone(), self.source.stop.clone());
        let (tasks, desk) = (self.tasks.clone(), self.source.desk.clone());
        let mut tick = tokio::time::interval(options.lease / 10);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut grace_end: Option<Instant> = None;
        let mut grace_is_over = false;
        loop {
            let stopping = grace_end.is_some();
            if stopping {
                self.release_ready();
                self.take_over_the_last();
            } else {
                self.start_ready();
                self.claim();
                self.take_over();
            }
            self.settle();
            self.change();
            self.check(stopping);
            self.source.desk.set_room(if stopping { 0 } else { self.room_for_new() });
            if self.is_done() {
                self.source.idle.cancel();
            }
            let is_empty = self.lanes.is_empty() && self.arrived.is_empty() && self.source.desk.is_closed();
            if stopping && is_empty && !self.has_reports() && self.is_quiet() {
                return;
            }
            let report_at = self.report_at();
            tokio::select! {
                Some(result) = results.recv() => {
                    self.ended(result);
                    while let Ok(result) = results.try_recv() {
                        self.ended(result);
                    }
                }
                (capacity, claimed) = finished(&mut self.claiming) => self.claimed(capacity, claimed, stopping),
                taken = finished(&mut self.taking) => self.taken(taken, stopping),
                () = desk.arrived() => self.routed(stopping),
                (losses, asked, held) = finished(&mut self.checking) => self.checked(losses, &asked, held),
                () = arrived(self.source.transport.as_ref()), if stopping || self.takes_jobs() => {}
                () = health_changes(self.source.transport.as_ref()), if !stopping => self.look_at = Instant::now(),
                (reports, settled) = finished(&mut self.settling) => self.settled(reports, settled),
                (lanes, noted) = finished(&mut self.noting) => self.noted(&lanes, noted),
                (asked_at, lanes, held) = finished(&mut self.renewing) => self.renewed(asked_at, &lanes, held),
                () = finished(&mut self.changing) => {}
                () = outbox.woken(subscription.now()), if !stopping && !self.is_relayed() => {
                    self.woken_at = Some(Instant::now());
                    let coalesce = match self.source.until {
                        Until::Stopped if self.loaded => COALESCE_LOADED,
                        Until::Stopped => COALESCE,
                        _ => Duration::ZERO,
                    };
                    self.look_at = self.look_at.min(Instant::now().max(self.claimed_at + coalesce));
                    self.idle_wait = self.source.poll / 8;
                }
                () = tokio::time::sleep_until(self.look_at.into()), if !stopping && self.wants_lanes() => {}
                () = tokio::time::sleep_until(self.next_start.into()), if !stopping && self.is_paced() => {}
                () = sleep_until(report_at), if self.settling.is_none() => {}
                _ = tasks.reserve(), if self.full => self.full = false,
                _ = tick.tick() => self.guard_leases(),
                () = stop.cancelled(), if !stopping => grace_end = Some(Instant::now() + options.grace),
                () = self.tasks.closed(), if !stopping => grace_end = Some(Instant::now()),
                () = sleep_until(grace_end), if stopping => {
                    if grace_is_over {
                        tracing::warn!(subscription = &*self.source.name, "results could not be stored; leases end by themselves");
                        return;
                    }
                    grace_is_over = true;
                    grace_end = Some(Instant::now() + options.lease.min(LAST_TRIES));
                    self.cancel_all();
                    if self.tasks.is_closed() {
                        self.forget_running();
                    }
                }
            }
        }
    }

    /// How many deliveries may be under way.
    fn concurrency(&self) -> usize {
        self.circuit.limit(self.source.options.concurrency)
    }

    /// How many lanes to lease at least: as many as can be worked on, and as many again in advance.
    fn least_ahead(&self) -> usize {
        2 * self.concurrency()
    }

    /// How many more lanes to lease. None before half of them are done: few large claims cost less than many small ones.
    fn room(&self) -> usize {
        // A destination that comes back is not flooded.
        let outside = self.source.destination.is_outside();
        let limited = outside || self.concurrency() < self.source.options.concurrency;
        let ahead = if limited { self.least_ahead() } else { self.ahead.max(self.least_ahead()) };
        let enough = ahead > self.least_ahead() && self.lanes.len() * 2 > ahead;
        if enough { 0 } else { ahead.saturating_sub(self.lanes.len()) }
    }

    /// How many lanes that are new may be leased by routing: as many as would be claimed, unless there are others.
    fn room_for_new(&self) -> usize {
        let takes =
            self.source.until == Until::Stopped && !self.behind && !self.circuit.is_open() && self.takes_lanes();
        if takes && !self.is_full() { self.room() } else { 0 }
    }

    /// Long runs fill the memory even when their lanes are few, and large payloads even when they are not long.
    fn is_full(&self) -> bool {
        let waiting: usize = self.lanes.values().map(|lane| lane.run.len()).sum();
        let bytes: usize = self.lanes.values().flat_map(|lane| &lane.run).map(|event| event.payload.len()).sum();
        let enough = self.lanes.len() >= self.concurrency() && waiting >= MOST_AHEAD * self.source.options.batch;
        enough || bytes >= MOST_BYTES
    }

    /// How many deliveries may start now. What a crash repeats counts as under way, also when its success is about to be
    /// stored; in this process, where a delivery may take no time at all, that may be what was leased ahead.
    fn free(&self) -> usize {
        self.concurrency().saturating_sub(self.running).min(self.may_repeat().saturating_sub(self.open))
    }

    /// How many deliveries a crash may repeat.
    fn may_repeat(&self) -> usize {
        let spare = if self.source.destination.is_outside() { 0 } else { MOST_AHEAD * self.source.options.batch };
        self.concurrency() + spare
    }

    /// Whether lanes come through Redis.
    fn is_relayed(&self) -> bool {
        self.source.transport.as_ref().is_some_and(|transport| transport.health.is_up())
            && self.source.until == Until::Stopped
    }

    fn takes_jobs(&self) -> bool {
        self.taking.is_none() && self.changing.is_none() && self.can_store() && self.room() > 0 && !self.has_suspects()
    }

    fn wants_lanes(&self) -> bool {
        self.claiming.is_none()
            && !(self.claimed_once && self.source.until == Until::Once)
            && self.takes_lanes()
            && self.room() > 0
    }

    /// Whether lanes may come from the database.
    fn takes_lanes(&self) -> bool {
        !self.is_relayed() && self.changing.is_none() && self.can_store() && !self.has_suspects()
    }

    /// While there are suspects nothing is claimed that a crash could take with it, or could be taken for theirs.
    fn has_suspects(&self) -> bool {
        self.trial || self.lanes.values().any(|lane| lane.suspicion.is_some())
    }

    /// Whether the next attempt waits for the pace.
    fn is_paced(&self) -> bool {
        !self.source.pace.is_zero() && !self.ready.is_empty() && self.next_start > Instant::now()
    }

    /// Whether what the feed was started for is done.
    fn is_done(&self) -> bool {
        let claimed_all = match self.source.until {
            Until::Stopped => false,
            Until::Once => self.claimed_once,
            Until::Drained => self.claimed_once && self.look_at > Instant::now(),
        };
        claimed_all && self.lanes.is_empty() && !self.has_reports() && self.is_quiet()
    }

    /// Nothing is begun while results cannot be stored, or leases are in doubt: it would be repeated.
    fn can_store(&self) -> bool {
        self.settle_failures == 0 && !self.is_in_doubt()
    }

    /// Whether a connection was lost, and with it perhaps leases.
    fn is_in_doubt(&self) -> bool {
        self.checked_at != self.source.outbox.lost_connections()
    }

    fn is_quiet(&self) -> bool {
        self.claiming.is_none()
            && self.taking.is_none()
            && self.settling.is_none()
            && self.noting.is_none()
            && self.checking.is_none()
            && self.changing.is_none()
            && self.changes.is_empty()
    }

    fn has_reports(&self) -> bool {
        self.unstored.is_some() || !self.reports.is_empty() || self.unreported_since.is_some()
    }

    /// When to store results.
    fn report_at(&self) -> Option<Instant> {
        let ended = self.unstored.is_some() || !self.reports.is_empty();
        let at = if ended { Some(self.settle_at) } else { self.runs_reported_at() };
        at.map(|at| at.max(self.settle_at))
    }

    /// When to store results of lanes whose run goes on.
    fn runs_reported_at(&self) -> Option<Instant> {
        let waits = !self.report_now && !self.source.destination.is_outside() && self.open < self.may_repeat();
        self.unreported_since.map(|since| if waits { since + RUN_ON } else { since })
    }

    fn start_ready(&mut self) {
        let options = self.source.options;
        if self.trial && self.noting.is_none() && self.has_stored_all() {
            let noted = |key: &String| self.lanes.get(key).is_some_and(|lane| lane.noted);
            self.trial = self.ready.iter().any(noted);
        }
        let mut waiting = VecDeque::new();
        let mut free = if self.ready.is_empty() || self.full { 0 } else { self.free() };
        while free > 0 && self.can_store() && !self.is_paced() {
            let Some(key) = self.ready.pop_front() else { break };
            // A lane that was lost and claimed again may stand here twice.
            let Some(lane) = self.lanes.get_mut(&key).filter(|lane| lane.running.is_none()) else { continue };
            let Some(event) = lane.run.front().cloned() else { continue };
            if lane.cancelled.is_cancelled() || Instant::now() + options.margin() >= lane.leased_until {
                self.release(&key);
                continue;
            }
            // Losses together with others cost no event its last attempt: only those alone are certainly its own.
            let alone = lane.suspicion == Some(Suspicion::Alone);
            if alone && lane.counted > self.source.retry.attempts(event.max_attempts) {
                let begun = lane.attempts - 1;
                tracing::warn!(subscription = &*self.source.name, event_id = %event.id, begun, "dead letter");
                let log = lane.log.take();
                let error = format!(
                    "attempt {begun} was the last and ended without a result: its worker was killed, or lost its lease"
                );
                self.open += 1;
                self.die(key, begun, log, error);
                continue;
            }
            if !lane.noted && (self.trial || lane.suspicion.is_some()) {
                waiting.push_back(key);
                continue;
            }
            // It acknowledges itself in its own transaction: what came before it in the lane must be stored first.
            let settles = self.source.destination.settles(&event);
            if settles && (lane.unsettled > 0 || !lane.finished.is_empty()) {
                self.report_now = true;
                waiting.push_back(key);
                continue;
            }
            let time = if settles { self.source.effect_time() } else { options.timeout() };
            let running = Running::new(time);
            let attempt = Attempt {
                lane: lane.lane.clone(),
                subscription: self.source.name.clone(),
                number: lane.attempts,
                log: lane.log.clone(),
                last: lane.run.len() == 1,
                time,
                clock: self.source.clock.clone(),
                begun: running.begun().clone(),
                cancelled: lane.cancelled.child_token(),
            };
            lane.running = Some(running);
            lane.turn.get_or_insert_with(Instant::now);
            let task = TaskBuilder::new(DeliveryTask { event: event.clone(), attempt: Some(attempt) })
                .task_id(TaskId::from_string(task_id(&self.source.name, &event)))
                // As apalis' tracing shows it; apalis counts it once more when it begins.
                .attempt(lane.attempts as usize)
                .queue(Queue::from(&*self.source.name))
                .build();
            // Closed when the worker is gone, which ends this feed in its next round.
            if let Err(refused) = self.tasks.try_send(task) {
                self.full = matches!(refused, mpsc::error::TrySendError::Full(_));
                lane.running = None;
                self.ready.push_front(key);
                break;
            }
            self.open += 1;
            self.running += 1;
            free -= 1;
            metrics::attempted(&self.source.name, &event);
            if !self.source.pace.is_zero() {
                self.next_start = self.next_start.max(Instant::now()) + self.source.pace;
            }
        }
        self.ready.append(&mut waiting);
        if !self.trial && self.can_store() && self.has_stored_all() {
            self.try_suspects();
        }
    }

    /// Whether nothing is under way, and no result waits to be stored.
    fn has_stored_all(&self) -> bool {
        self.open == 0 && !self.has_reports() && self.settling.is_none()
    }

    /// Everything else is done: the next suspects are tried, in a group those that were leased when their worker was
    /// killed, alone those that were in such a group. That is stored before they begin. So a crash is put down to those
    /// that were tried, and counts only for one that was alone.
    fn try_suspects(&mut self) {
        let ready = self.ready.iter().filter_map(|key| self.lanes.get(key));
        let suspects: Option<Vec<_>> = ready.map(|lane| Some((lane.suspicion?, lane))).collect();
        // What is no suspect comes first.
        let Some(mut suspects) = suspects.filter(|suspects| !suspects.is_empty()) else { return };
        suspects.sort_by_key(|(suspicion, _)| *suspicion);
        let leased = suspects.iter().filter(|(suspicion, _)| *suspicion == Suspicion::Leased).count();
        let group = if leased > FEW { leased.min(GROUP) } else { 1 };
        let notes: Vec<_> = suspects[..group]
            .iter()
            .map(|(_, lane)| (lane.lane.clone(), lane.begun(&self.source.worker, group)))
            .collect();
        let outbox = self.source.outbox.clone();
        self.trial = true;
        self.noting = Some(tokio::spawn(async move {
            let noted = note(&outbox, &notes).await;
            (notes.into_iter().map(|(lane, _)| lane).collect(), noted)
        }));
    }

    fn noted(&mut self, asked: &[LaneRef], noted: Result<Leases, DbErr>) {
        if let Err(error) = &noted {
            tracing::warn!(subscription = &*self.source.name, %error, "cannot note attempts, trying again later");
        }
        for lease in asked {
            let Some(lane) = self.lanes.get_mut(&lease.key).filter(|lane| lane.lane == *lease) else { continue };
            match &noted {
                Ok(Leases { done, .. }) if done.contains(lease) => lane.noted = true,
                Ok(Leases { busy, .. }) if busy.contains(lease) => {}
                Ok(_) => self.lose(&lease.key),
                Err(_) => self.release(&lease.key),
            }
        }
    }

    fn claim(&mut self) {
        if self.look_at > Instant::now() || !self.wants_lanes() {
            return;
        }
        let capacity = self.room().min(self.ahead.max(self.source.options.batch));
        if self.is_full() {
            self.look_at = Instant::now() + SOON;
            return;
        }
        // A wake-up while the claim is under way brings the next look forward again.
        self.claimed_at = Instant::now();
        self.look_at = self.claimed_at + self.source.poll;
        let times_down = self.circuit.times_down();
        let Source { outbox, subscription, worker, options, until, .. } = self.source.clone();
        let mark = self.mark.take();
        self.claiming = Some(tokio::spawn(async move {
            let asked_at = Instant::now();
            let (lanes, run) = (count(capacity), count(options.batch));
            let claimed = async {
                let id = subscription.now();
                if until != Until::Stopped {
                    outbox.route_waiting().await?;
                }
                let claim = outbox.claim_after(mark, id, &worker, lanes, run, options.lease).await?;
                Ok(Claimed { claim, asked_at, times_down })
            };
            (capacity, claimed.await)
        }));
    }

    fn claimed(&mut self, capacity: usize, claimed: Result<Claimed, DbErr>, stopping: bool) {
        let Claimed { claim, asked_at, times_down } = match claimed {
            Ok(claimed) => claimed,
            Err(error) => {
                self.claim_failures += 1;
                let wait = outage_wait(self.claim_failures);
                tracing::warn!(subscription = &*self.source.name, %error, ?wait, "cannot claim deliveries, trying again");
                self.look_at = Instant::now() + wait;
                return;
            }
        };
        self.claim_failures = 0;
        self.claimed_once = true;
        let Claim { lanes, probe, next, mark } = claim;
        self.mark = mark.filter(|_| self.returned_at < asked_at);
        self.loaded = lanes.len() >= LOADED;
        self.behind = lanes.len() >= capacity;
        // The destination was found down while the claim was under way.
        let too_late = self.circuit.is_open() && self.circuit.times_down() != times_down;
        if probe {
            self.circuit.probing();
        } else if too_late {
            // What it found is old.
        } else if lanes.is_empty() {
            self.circuit.seen(next.and_then(|next| next.circuit));
        } else {
            self.circuit.seen(None);
        }
        if too_late {
            self.look_at = Instant::now() + self.source.retry.delay(1, fastrand::f64());
        } else if lanes.len() == capacity {
            self.look_at = Instant::now();
            self.adapt(asked_at);
        } else {
            let due = if lanes.is_empty() {
                // Due and not claimed: it has just become due, or another worker is at it at this moment.
                let lag = if Instant::now() < self.unknown_until { UNKNOWN_LAG } else { Duration::ZERO };
                next.and_then(|next| next.after).map_or(Duration::MAX, |due| due.max(SOON).saturating_add(lag))
            } else {
                self.idle_wait = self.source.poll / 8;
                SOON
            };
            let jitter = fastrand::f64().mul_add(0.2, 0.9);
            self.look_at = self.look_at.min(Instant::now() + self.idle_wait.mul_f64(jitter).min(due));
            self.idle_wait = (self.idle_wait * 2).min(self.source.poll);
        }
        for claimed in lanes {
            self.begin_lane(claimed, asked_at, probe);
        }
        if stopping || too_late {
            self.release_ready();
        }
    }

    /// Takes what routing has leased to this feed.
    fn routed(&mut self, stopping: bool) {
        for (lane, asked_at) in self.source.desk.take() {
            self.fresh.insert(lane.lane.clone());
            self.begin_lane(lane, asked_at, false);
        }
        if stopping {
            self.release_ready();
        }
    }

    /// After a lost connection: which leases there still are. A crash of the server takes back what routing had leased a
    /// moment before, and another worker may have got it.
    fn check(&mut self, stopping: bool) {
        if !self.is_in_doubt() || self.checking.is_some() {
            return;
        }
        self.routed(stopping);
        let losses = self.source.outbox.lost_connections();
        let lanes: Vec<LaneRef> = self.lanes.values().map(|lane| lane.lane.clone()).collect();
        let outbox = self.source.outbox.clone();
        self.checking = Some(tokio::spawn(async move {
            let mut failures = 0;
            loop {
                match outbox.held(&lanes).await {
                    Err(_) if failures < 3 => {
                        failures += 1;
                        tokio::time::sleep(outage_wait(failures)).await;
                    }
                    held => return (losses, lanes, held),
                }
            }
        }));
    }

    fn checked(&mut self, losses: u64, asked: &[LaneRef], held: Result<Vec<LaneRef>, DbErr>) {
        // Otherwise it is asked again.
        let Ok(held) = held else { return };
        let held: HashSet<LaneRef> = held.into_iter().collect();
        // What came meanwhile may be from before the loss.
        let all: HashSet<&LaneRef> = asked.iter().collect();
        if self.lanes.values().all(|lane| all.contains(&lane.lane)) {
            self.checked_at = losses;
        }
        for lease in asked.iter().filter(|lease| !held.contains(lease)) {
            if self.lanes.get(&lease.key).is_some_and(|lane| lane.lane == *lease && !self.settles_now(lane)) {
                tracing::warn!(subscription = &*self.source.name, "the lease of a lane was lost with the connection");
                self.lose(&lease.key);
            }
        }
    }

    /// Whether an attempt is under way that ends its lease in its own transaction, perhaps just now; if the lease is lost,
    /// its commit fails.
    fn settles_now(&self, lane: &Lane) -> bool {
        let head = lane.run.front().filter(|_| lane.running.is_some());
        head.is_some_and(|event| self.source.destination.settles(event))
    }

    fn begin_lane(&mut self, claimed: ClaimedLane, asked_at: Instant, probe: bool) {
        let key = claimed.lane.key.clone();
        let unreadable = claimed.unreadable.clone();
        let lane = Lane::new(claimed, asked_at + self.source.options.lease, probe);
        // Only after our own lease had ended without our noticing: the old one is void.
        self.lose(&key);
        if lane.run.len() >= self.source.options.batch {
            self.long.insert(lane.lane.clone());
        }
        let (attempts, log) = (lane.attempts, lane.log.clone());
        self.lanes.insert(key.clone(), lane);
        match unreadable {
            None => self.ready.push_back(key),
            Some(unreadable) => {
                self.open += 1;
                self.bury(&key, unreadable.position, attempts, log, unreadable.error);
            }
        }
    }

    /// Takes over what has arrived through Redis, as much as there is room for.
    fn take_over(&mut self) {
        let Some(transport) = &self.source.transport else { return };
        if !self.takes_jobs() {
            return;
        }
        let room = self.room().saturating_sub(self.arrived.len());
        let jobs = transport.jobs.take(room);
        let full = jobs.len() >= room.min(self.source.options.batch);
        self.arrived.extend(jobs);
        if self.arrived.is_empty() {
            return;
        }
        if full {
            self.adapt(Instant::now());
        }
        self.take_over_arrived();
    }

    /// What has come through Redis to a worker that stops is taken over to be given back: only the lease in the database is
    /// true, and others need not wait for its end.
    fn take_over_the_last(&mut self) {
        if let Some(transport) = self.source.transport.as_ref().filter(|_| self.source.stop.is_cancelled()) {
            self.arrived.extend(transport.jobs.take(usize::MAX));
        }
        if self.taking.is_none() && !self.arrived.is_empty() {
            self.take_over_arrived();
        }
    }

    fn take_over_arrived(&mut self) {
        let jobs = std::mem::take(&mut self.arrived);
        let source = self.source.clone();
        self.taking = Some(tokio::spawn(async move { take_over(&source, jobs).await }));
    }

    fn taken(&mut self, taken: Result<Taken, DbErr>, stopping: bool) {
        match taken {
            Ok(Taken { lanes, busy, void, asked_at }) => {
                metrics::dropped_jobs(&self.source.name, "void", void);
                self.arrived.extend(busy);
                for (lane, probe) in lanes {
                    if probe {
                        self.circuit.probing();
                    } else {
                        self.circuit.seen(None);
                    }
                    self.begin_lane(lane, asked_at, probe);
                }
            }
            Err(error) => {
                tracing::warn!(subscription = &*self.source.name, %error, "cannot take over jobs; their leases end by themselves");
            }
        }
        if stopping {
            self.release_ready();
        }
    }

    /// A claim came back full: the next one may be larger if this one came soon after the one before.
    fn adapt(&mut self, asked_at: Instant) {
        let since = asked_at.saturating_duration_since(std::mem::replace(&mut self.full_at, asked_at));
        let (least, most) = (self.least_ahead(), MOST_AHEAD * self.source.options.batch);
        if since < FAST {
            self.ahead = (2 * self.ahead).clamp(least, most.max(least));
        } else if since > SLOW {
            self.ahead = (self.ahead / 2).max(least);
        }
    }

    /// An attempt has ended, or was never begun.
    fn ended(&mut self, AttemptResult { key, token, end, started }: AttemptResult) {
        let lane = self.lanes.get_mut(&key).filter(|lane| lane.lane.token == token && lane.running.is_some());
        let Some(lane) = lane else {
            tracing::warn!(
                subscription = &*self.source.name,
                "the result of an attempt whose lease was lost is dropped"
            );
            metrics::superseded(&self.source.name);
            return;
        };
        lane.running = None;
        self.running -= 1;
        let Some(event) = lane.run.front().cloned() else { return };
        let attempts = lane.attempts;
        match end {
            End::Outcome(Outcome::Delivered) => {
                let log = lane.log.take();
                lane.finish_head(attempts, log, None);
                self.delivered(&event);
                self.answered(&key, started);
                self.go_on(key);
            }
            End::Outcome(Outcome::Retry(error) | Outcome::Permanent(error)) => {
                self.failed(key, &event, &error, started)
            }
            End::Settled => {
                lane.run.pop_front();
                lane.next_head();
                self.open -= 1;
                self.delivered(&event);
                self.answered(&key, started);
                let over = self.lanes.get(&key).filter(|lane| lane.run.is_empty()).map(|lane| lane.lane.clone());
                if let Some(lane) = over {
                    self.lanes.remove(&key);
                    self.yielded(&lane);
                } else {
                    self.go_on(key);
                }
            }
            End::Superseded => {
                metrics::superseded(&self.source.name);
                self.open -= 1;
                self.lose(&key);
            }
            End::Cancelled => {
                // The process slept past its lease: whatever came of the attempt does not count.
                if lane.leased_until <= Instant::now() {
                    metrics::superseded(&self.source.name);
                }
                self.open -= 1;
                self.release(&key);
            }
            End::Unknown => {
                self.open -= 1;
                let error = format!(
                    "no handler in this worker for {} version {}; no attempt was spent",
                    event.event_type, event.schema_version
                );
                let wait = self.unknown_wait(&key);
                self.postpone(&key, wait, error);
            }
            End::Unavailable(error) => self.not_begun(&key, &event, &error),
            // `Outcome` may grow; a future kind is an unknown end.
            End::Outcome(_) => {
                self.open -= 1;
                self.lose(&key);
            }
        }
    }

    fn delivered(&self, event: &RecordedEvent) {
        self.source.counts.delivered.fetch_add(1, Relaxed);
        let since_commit = self.source.clock.now().signed_duration_since(event.recorded_at);
        metrics::published(&self.source.name, event, since_commit.to_std().unwrap_or_default());
    }

    /// An attempt could not begin, which is the fault of neither the event nor its destination.
    fn not_begun(&mut self, key: &str, event: &RecordedEvent, error: &DeliveryError) {
        tracing::warn!(subscription = &*self.source.name, event_id = %event.id, %error, "attempt given back");
        self.open -= 1;
        let wait = self.source.retry.delay(1, fastrand::f64());
        self.postpone(key, wait, format!("{error}; no attempt was spent"));
    }

    /// An attempt has failed. If its destination is down, it is not the event's fault.
    fn failed(&mut self, key: String, event: &RecordedEvent, error: &DeliveryError, started: Instant) {
        if error.reason() == Reason::NotBegun {
            self.not_begun(&key, event, error);
            return;
        }
        if error.reason() == Reason::Gone {
            self.destination_is_gone(&key, event, error);
            return;
        }
        let Some(lane) = self.lanes.get(&key) else { return };
        let (reason, outside, probe) = (error.reason(), self.source.destination.is_outside(), lane.probe);
        let age = self.source.clock.now().signed_duration_since(event.recorded_at).to_std();
        let failure = Failure { reason, outside, probe, old: age.is_ok_and(|age| age > PATIENCE) };
        match self.circuit.failed(&key, failure) {
            Verdict::Down => {
                self.source.counts.failed.fetch_add(1, Relaxed);
                metrics::failed(&self.source.name, event, Failed::Unavailable);
                self.destination_is_down(&key, error);
            }
            verdict => self.attempt_counts(key, event, error, started, verdict == Verdict::Final),
        }
    }

    /// A failed attempt counts. `is_final` says that there is no other.
    fn attempt_counts(
        &mut self,
        key: String,
        event: &RecordedEvent,
        error: &DeliveryError,
        started: Instant,
        is_final: bool,
    ) {
        self.source.counts.failed.fetch_add(u64::from(!is_final), Relaxed);
        if !self.source.destination.is_outside() && error.reason() != Reason::Unavailable {
            self.answered(&key, started);
        }
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let probe = std::mem::take(&mut lane.probe);
        let log = lane.logged(&self.source.worker, error, started);
        let (attempts, counted, permanent) = (lane.attempts, lane.counted, error.is_permanent());
        if is_final || counted >= self.source.retry.attempts(event.max_attempts) {
            tracing::warn!(subscription = &*self.source.name, event_id = %event.id, attempts, %error, "dead letter");
            let failed = if permanent { Failed::Permanent } else { Failed::Dead };
            metrics::failed(&self.source.name, event, failed);
            self.die(key, attempts, Some(log), error.message().to_owned());
        } else {
            metrics::failed(&self.source.name, event, Failed::Retry);
            let wait = self.source.retry.delay(counted, fastrand::f64());
            let after = error.wait().map_or(wait, |asked| asked.max(wait));
            tracing::debug!(subscription = &*self.source.name, event_id = %event.id, attempts, ?after, %error, "attempt failed");
            self.open -= 1;
            let mut error = error.message().to_owned();
            if permanent {
                error.push_str("; tried again until it is known whether it is about this event");
            }
            self.finish_lane(&key, Next::Retry { after, attempts, error, log: Some(log) });
        }
        if probe {
            self.open_circuit(error, self.down_for(error), probe);
        }
    }

    /// The destination has answered, whatever: it is not down.
    fn answered(&mut self, key: &str, begun: Instant) {
        let probe = self.lanes.get_mut(key).is_some_and(|lane| std::mem::take(&mut lane.probe));
        if probe {
            tracing::info!(subscription = &*self.source.name, "the destination is back");
            self.circuit.closed();
            self.changes.push_back(Change::CloseCircuit);
            self.look_at = Instant::now();
        } else {
            self.circuit.succeeded(key, begun);
        }
    }

    fn destination_is_gone(&mut self, key: &str, event: &RecordedEvent, error: &DeliveryError) {
        tracing::error!(subscription = &*self.source.name, %error, "the destination is gone; the subscription is paused");
        self.source.counts.failed.fetch_add(1, Relaxed);
        metrics::failed(&self.source.name, event, Failed::Unavailable);
        self.changes.push_back(Change::Pause);
        self.open -= 1;
        let wait = self.source.retry.delay(1, fastrand::f64());
        self.postpone(key, wait, format!("{error}; the subscription was paused"));
    }

    fn destination_is_down(&mut self, key: &str, error: &DeliveryError) {
        self.open -= 1;
        let probe = self.lanes.get_mut(key).is_some_and(|lane| std::mem::take(&mut lane.probe));
        let wait = self.down_for(error);
        self.postpone(key, wait, format!("{error}; the destination is down, no attempt was spent"));
        self.open_circuit(error, wait, probe);
    }

    fn open_circuit(&mut self, error: &DeliveryError, wait: Duration, probe: bool) {
        if self.circuit.opened(probe) {
            tracing::warn!(subscription = &*self.source.name, %error, ?wait, "the destination is down");
            self.changes.push_back(Change::OpenCircuit { wait, failed: true });
            self.look_at = Instant::now() + wait;
            self.release_ready();
        }
    }

    /// How long nobody delivers.
    fn down_for(&self, error: &DeliveryError) -> Duration {
        let wait = self.source.retry.delay(self.circuit.times_down(), fastrand::f64());
        error.wait().map_or(wait, |asked| asked.max(wait))
    }

    /// Tells the database what was found out about the subscription, one thing after another.
    fn change(&mut self) {
        if self.changing.is_some() {
            return;
        }
        let Some(change) = self.changes.pop_front() else { return };
        let Source { outbox, subscription, name, .. } = self.source.clone();
        self.changing = Some(tokio::spawn(async move {
            for failures in 1..=3 {
                let changed = match change {
                    Change::OpenCircuit { wait, failed } => outbox.open_circuit(subscription.now(), wait, failed).await,
                    Change::CloseCircuit => outbox.close_circuit(subscription.now()).await,
                    Change::Pause => outbox.pause(&name).await.map(|_| ()),
                };
                let Err(error) = changed else { return };
                tracing::warn!(subscription = &*name, %error, "cannot store the state of the destination");
                tokio::time::sleep(outage_wait(failures)).await;
            }
            // The next delivery finds out again.
        }));
    }

    /// How long to leave alone a key whose next event this worker does not know.
    fn unknown_wait(&mut self, key: &str) -> Duration {
        if self.unknown.len() >= UNKNOWN_KEYS {
            self.unknown.clear();
        }
        let times = self.unknown.entry(key.to_owned()).or_default();
        *times += 1;
        let wait = UNKNOWN_WAIT * 2_u32.pow(((*times - 1) / 4).min(10));
        let wait = wait.min(LONGEST_UNKNOWN_WAIT).mul_f64(fastrand::f64().mul_add(0.5, 0.5));
        self.unknown_until = self.unknown_until.max(Instant::now() + wait + 2 * UNKNOWN_LAG);
        wait
    }

    /// The head of a lane becomes a dead letter.
    fn die(&mut self, key: String, attempts: u32, log: Option<String>, error: String) {
        let Some(position) = self.lanes.get(&key).and_then(|lane| lane.run.front()).map(|event| event.position) else {
            return;
        };
        self.bury(&key, position, attempts, log, error);
        self.go_on(key);
    }

    /// As `die`, for an event that perhaps cannot be read.
    fn bury(&mut self, key: &str, position: i64, attempts: u32, log: Option<String>, error: String) {
        self.source.counts.dead.fetch_add(1, Relaxed);
        let Some(lane) = self.lanes.get_mut(key) else { return };
        lane.run.pop_front();
        lane.finished.push(Finished { position, attempts, log, error: Some(error) });
        lane.next_head();
        if self.source.after_dead_letter == AfterDeadLetter::Hold {
            self.finish_lane(key, Next::Hold { position });
        } else if lane.run.is_empty() {
            self.finish_lane(key, Next::Yield);
        }
    }

    /// With the next delivery of a lane, if there is one.
    fn go_on(&mut self, key: String) {
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        if lane.run.is_empty() {
            self.finish_lane(&key, Next::Yield);
            return;
        }
        if !lane.finished.is_empty() {
            self.unreported_since.get_or_insert_with(Instant::now);
        }
        if lane.turn.is_some_and(|turn| turn.elapsed() < TURN) {
            self.ready.push_front(key);
        } else {
            lane.turn = None;
            self.ready.push_back(key);
        }
    }

    /// Gives a lane back with the attempt.
    fn release(&mut self, key: &str) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        if std::mem::take(&mut lane.probe) {
            self.changes.push_back(Change::OpenCircuit { wait: SOON, failed: false });
        }
        let (attempts, log) = (lane.attempts.saturating_sub(1), lane.log.take());
        self.finish_lane(key, Next::Release { attempts, log });
    }

    /// Gives a lane back with the attempt, for a while.
    fn postpone(&mut self, key: &str, after: Duration, error: String) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        if std::mem::take(&mut lane.probe) {
            self.changes.push_back(Change::OpenCircuit { wait: after, failed: false });
        }
        let (attempts, log) = (lane.attempts.saturating_sub(1), lane.log.take());
        self.finish_lane(key, Next::Retry { after, attempts, error, log });
    }

    /// Reports a lane for the last time.
    fn finish_lane(&mut self, key: &str, next: Next) {
        if let Some(lane) = self.lanes.remove(key) {
            self.reports.push(LaneReport { lane: lane.lane, finished: lane.finished, next });
        }
    }

    /// Gives back what was leased and not started.
    fn release_ready(&mut self) {
        let ready: Vec<String> =
            self.lanes.iter().filter(|(_, lane)| lane.running.is_none()).map(|(key, _)| key.clone()).collect();
        self.ready.clear();
        for key in ready {
            self.release(&key);
        }
    }

    fn settle(&mut self) {
        if self.settling.is_some() || self.report_at().is_none_or(|at| at > Instant::now()) {
            return;
        }
        let reports = self.unstored.take().unwrap_or_else(|| self.gather());
        if reports.is_empty() {
            return;
        }
        let outbox = self.source.outbox.clone();
        self.settling = Some(tokio::spawn(async move {
            let settled = outbox.settle(&reports).await;
            (reports, settled)
        }));
    }

    /// What is over and not stored, the older reports of a lane before the newer.
    fn gather(&mut self) -> Vec<LaneReport> {
        let mut reports = std::mem::take(&mut self.reports);
        if self.runs_reported_at().is_none_or(|at| at > Instant::now()) {
            return reports;
        }
        (self.unreported_since, self.report_now) = (None, false);
        for lane in self.lanes.values_mut().filter(|lane| !lane.finished.is_empty()) {
            let finished = std::mem::take(&mut lane.finished);
            lane.unsettled += finished.len();
            reports.push(LaneReport { lane: lane.lane.clone(), finished, next: Next::Keep });
        }
        reports
    }

    fn settled(&mut self, reports: Vec<LaneReport>, settled: Result<Vec<Settled>, DbErr>) {
        let settled = match settled {
            Ok(settled) => settled,
            Err(error) => {
                self.settle_failures += 1;
                let wait = outage_wait(self.settle_failures);
                tracing::warn!(subscription = &*self.source.name, %error, ?wait, "cannot store results, trying again");
                self.settle_at = Instant::now() + wait;
                self.unstored = Some(reports);
                return;
            }
        };
        self.settle_failures = 0;
        // What is outside waits for its results to be stored before the next attempts begin.
        if reports.len() >= LOADED && !self.source.destination.is_outside() {
            self.settle_at = Instant::now() + COALESCE_LOADED;
        }
        let mut busy = Vec::new();
        for (report, settled) in reports.into_iter().zip(settled) {
            if settled == Settled::Busy {
                busy.push(report);
                continue;
            }
            self.open -= report.finished.len();
            // Not the same lane any more if it was lost, and perhaps claimed again, since the report.
            let held = self.lanes.get_mut(&report.lane.key).filter(|lane| lane.lane == report.lane);
            if settled == Settled::Superseded {
                tracing::warn!(
                    subscription = &*self.source.name,
                    "the lease of a lane was lost; its results are dropped"
                );
                let failed_attempt = usize::from(matches!(report.next, Next::Retry { .. }));
                for _ in 0..report.finished.len() + failed_attempt {
                    metrics::superseded(&self.source.name);
                }
                if held.is_some() {
                    self.lose(&report.lane.key);
                }
            } else if let Some(lane) = held {
                lane.unsettled -= report.finished.len();
            }
            match report.next {
                Next::Keep => {}
                Next::Yield => self.yielded(&report.lane),
                _ => self.look_again_for(&report.lane),
            }
        }
        if !busy.is_empty() {
            self.settle_at = Instant::now() + BUSY_WAIT;
            // Before later reports of the same lanes: the last one says what comes next.
            self.reports.splice(0..0, busy);
        }
    }

    /// The lease of a lane was taken over: everything about it is void.
    fn lose(&mut self, key: &str) {
        if let Some(lane) = self.lanes.remove(key) {
            lane.cancelled.cancel();
            self.running -= usize::from(lane.running.is_some());
            self.open -= usize::from(lane.running.is_some()) + lane.finished.len();
            self.look_again_for(&lane.lane);
        }
    }

    /// A lane is over. It may have more: its next delivery, or one that was routed while it was leased.
    fn yielded(&mut self, lane: &LaneRef) {
        let lease = self.source.options.lease;
        let was_quiet = self.woken_at.is_none_or(|at| at.elapsed() > lease);
        if !(self.fresh.remove(lane) && was_quiet) {
            self.look_again_for(lane);
        }
    }

    /// A lease is over. The lane may be due already, and lie behind the mark: it is as old as its next delivery.
    fn look_again_for(&mut self, lane: &LaneRef) {
        self.fresh.remove(lane);
        self.look_at = Instant::now();
        if self.long.remove(lane) {
            (self.mark, self.returned_at) = (None, self.look_at);
        }
    }

    /// Renews leases after a third of their time, and stops attempts whose lease is about to end.
    fn guard_leases(&mut self) {
        let options = self.source.options;
        let now = Instant::now();
        for lane in self.lanes.values().filter(|lane| now + options.margin() >= lane.leased_until) {
            lane.cancelled.cancel();
        }
        self.end_overdue();
        if self.renewing.is_some() || self.lanes.is_empty() || now < self.renew_at {
            return;
        }
        self.renew_at = now + options.lease / 3;
        let outbox = self.source.outbox.clone();
        let lanes: Vec<LaneRef> = self.lanes.values().map(|lane| lane.lane.clone()).collect();
        self.renewing = Some(tokio::spawn(async move {
            let renewal = renew(&outbox, &lanes, options.lease).await;
            (now, lanes, renewal)
        }));
    }

    /// Ends attempts that do not mind their time themselves: their thread is blocked, or they never got one.
    fn end_overdue(&mut self) {
        let margin = self.source.options.margin();
        let running = |lane: &Lane| lane.running.as_ref().is_some_and(|running| running.is_overdue(margin));
        let overdue: Vec<String> =
            self.lanes.iter().filter(|(_, lane)| running(lane)).map(|(key, _)| key.clone()).collect();
        for key in overdue {
            let Some(lane) = self.lanes.get_mut(&key) else { continue };
            let (Some(running), Some(event)) = (lane.running.take(), lane.run.front().cloned()) else { continue };
            self.running -= 1;
            let time = self.source.options.timeout();
            lane.cancelled.cancel();
            lane.cancelled = CancellationToken::new();
            if self.source.destination.settles(&event) {
                // Its commit may be under way: without renewal it is fenced when the lease ends.
                self.open -= 1;
                self.lose(&key);
            } else if running.has_begun() {
                let error = format!("{}; the handler blocks its thread", no_result(time));
                self.failed(key, &event, &DeliveryError::retry(error), Instant::now() - time);
            } else {
                tracing::warn!(subscription = &*self.source.name, "all threads are blocked; an attempt is given back");
                self.open -= 1;
                self.release(&key);
            }
        }
    }

    fn renewed(&mut self, asked_at: Instant, asked: &[LaneRef], renewal: Result<Leases, DbErr>) {
        let Leases { done, busy } = match renewal {
            Ok(renewal) => renewal,
            Err(error) => {
                tracing::warn!(subscription = &*self.source.name, %error, "cannot renew leases, trying again");
                self.renew_at = Instant::now();
                return;
            }
        };
        if !busy.is_empty() {
            self.renew_at = Instant::now();
        }
        for lease in asked {
            let Some(lane) = self.lanes.get_mut(&lease.key).filter(|lane| lane.lane == *lease) else { continue };
            if done.contains(lease) {
                lane.leased_until = asked_at + self.source.options.lease;
                continue;
            }
            // Such an attempt ends its lease in its own transaction, perhaps just now; if the lease is lost, its commit
            // fails.
            let head = lane.run.front().filter(|_| lane.running.is_some());
            let settles = head.is_some_and(|event| self.source.destination.settles(event));
            if !settles && !busy.contains(lease) {
                tracing::warn!(subscription = &*self.source.name, "the lease of a lane was lost");
                self.lose(&lease.key);
            }
        }
    }

    fn cancel_all(&mut self) {
        for lane in self.lanes.values() {
            lane.cancelled.cancel();
        }
    }

    /// The worker is gone and with it its attempts: no result will come.
    fn forget_running(&mut self) {
        for lane in self.lanes.values_mut() {
            let was_running = usize::from(lane.running.take().is_some());
            self.running -= was_running;
            self.open -= was_running;
        }
    }
}

/// Only the lease counts, and it counts once: what else a job says, or how often it comes, changes nothing.
async fn take_over(source: &Source, jobs: Vec<Job>) -> Result<Taken, DbErr> {
    let Source { outbox, subscription, worker, options, .. } = source;
    let subscription = subscription.now();
    let (asked_at, total) = (Instant::now(), jobs.len());
    let refs: Vec<LaneRef> = jobs.iter().map(|job| job.lane.clone()).collect();
    let mut taken: HashMap<String, ClaimedLane> = HashMap::with_capacity(refs.len());
    for lane in outbox.take_over(subscription, worker, &refs, count(options.batch), options.lease).await? {
        taken.insert(lane.lane.key.clone(), lane);
    }
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
    Ok(Taken { lanes, busy, void, asked_at })
}

/// Completes when there may be a job from Redis.
async fn arrived(transport: Option<&Transport>) {
    match transport {
        Some(transport) => transport.jobs.arrived().await,
        None => std::future::pending().await,
    }
}

/// Completes when Redis comes up or goes down.
async fn health_changes(transport: Option<&Transport>) {
    match transport {
        Some(transport) => transport.health.wait_for(!transport.health.is_up()).await,
        None => std::future::pending().await,
    }
}

async fn renew(outbox: &Outbox, lanes: &[LaneRef], lease: Duration) -> Result<Leases, DbErr> {
    let done = outbox.renew(lanes, lease).await?.into_iter().collect();
    with_busy(outbox, lanes.iter(), done).await
}

async fn note(outbox: &Outbox, notes: &[(LaneRef, String)]) -> Result<Leases, DbErr> {
    let done = outbox.note_attempts(notes).await?;
    let leases = with_busy(outbox, notes.iter().map(|(lane, _)| lane), done).await?;
    if leases.done.is_empty() && !leases.busy.is_empty() {
        tokio::time::sleep(BUSY_WAIT).await;
    }
    Ok(leases)
}

async fn with_busy(
    outbox: &Outbox,
    lanes: impl Iterator<Item = &LaneRef>,
    done: HashSet<LaneRef>,
) -> Result<Leases, DbErr> {
    let others: Vec<LaneRef> = lanes.filter(|lane| !done.contains(lane)).cloned().collect();
    let busy = if others.is_empty() { Vec::new() } else { outbox.held(&others).await? };
    Ok(Leases { done, busy: busy.into_iter().collect() })
}

/// The result of a background task; pending while there is none.
async fn finished<T>(task: &mut Option<JoinHandle<T>>) -> T {
    let joined = match task {
        None => std::future::pending().await,
        Some(running) => running.await,
    };
    *task = None;
    match joined.map_err(JoinError::try_into_panic) {
        Ok(value) => value,
        // A bug in the store. Nobody knows what is stored: a new feed begins with what the database says.
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down.
        Err(Err(_)) => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn outage_wait(failures: u32) -> Duration {
    let wait = Duration::from_millis(100) * 2_u32.pow(failures.min(10));
    wait.min(LONGEST_OUTAGE_WAIT).mul_f64(fastrand::f64().mul_add(0.5, 0.5))
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

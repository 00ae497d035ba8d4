//! The lanes that are leased, and what is under way in them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::{
    RecordedEvent,
    store::{ClaimedLane, Finished, LaneRef, LaneReport, Next},
};
use tokio_util::sync::CancellationToken;

use super::{
    ready::{Ready, Tenant},
    running::Running,
    trial::Head,
};

/// How long a lane goes on with its run before those that wait get its place. Quick deliveries of a run are so stored
/// together, and slow ones hold nobody up.
const TURN: Duration = Duration::from_millis(10);

/// A leased lane.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) lane: LaneRef,
    /// The tenant of its head.
    tenant: Tenant,
    pub(crate) head: Head,
    /// What is to be delivered; the first is the head.
    pub(crate) run: VecDeque<Arc<RecordedEvent>>,
    /// Over, and not yet reported.
    finished: Vec<Finished>,
    /// Reported, and not yet stored.
    unsettled: usize,
    running: Option<Running>,
    /// Since when it works on its run without others getting its place.
    turn: Option<Instant>,
    pub(crate) leased_until: Instant,
    pub(crate) cancelled: CancellationToken,
    /// It finds out whether a destination that was down is back.
    pub(crate) probe: bool,
}

impl Lane {
    pub(crate) fn new(claimed: ClaimedLane, leased_until: Instant, probe: bool) -> Self {
        Self {
            lane: claimed.lane,
            tenant: claimed.run.first().and_then(|event| event.tenant.as_deref()).map(Arc::from),
            head: Head::claimed(claimed.attempts, claimed.attempt_log),
            run: claimed.run.into_iter().map(Arc::new).collect(),
            finished: Vec::new(),
            unsettled: 0,
            running: None,
            turn: None,
            leased_until,
            cancelled: CancellationToken::new(),
            probe,
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether results of it are not stored yet.
    pub(crate) fn has_unstored(&self) -> bool {
        self.unsettled > 0 || !self.finished.is_empty()
    }

    fn load(&self) -> (usize, usize) {
        (self.run.len(), self.run.iter().map(|event| event.payload.len()).sum())
    }

    /// The delivery that is under way.
    pub(crate) fn under_way(&self) -> Option<&Arc<RecordedEvent>> {
        self.run.front().filter(|_| self.is_running())
    }
}

/// All lanes that a feed has leased. What it counts, only it changes.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// In the order of their keys: what happens depends on nothing else.
    lanes: BTreeMap<String, Lane>,
    /// Lanes whose next delivery can start.
    ready: Ready,
    /// The number of the last attempt that was handed out.
    attempts: u64,
    /// Deliveries under way.
    running: usize,
    /// Deliveries that are over and not stored.
    unstored: usize,
    /// Deliveries that wait or are under way, and how large their payloads are together.
    deliveries: usize,
    bytes: usize,
    /// Lanes whose head may have killed its worker.
    suspects: usize,
}

impl Table {
    /// Its attempts have higher numbers than this.
    pub(crate) fn numbered_from(attempts: u64) -> Self {
        Self { attempts, ..Self::default() }
    }

    pub(crate) fn len(&self) -> usize {
        self.lanes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    pub(crate) fn running(&self) -> usize {
        self.running
    }

    /// Deliveries that were started and whose end is not stored: a crash repeats at most these.
    pub(crate) fn open(&self) -> usize {
        self.running + self.unstored
    }

    pub(crate) fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.values()
    }

    pub(crate) fn refs(&self) -> Vec<LaneRef> {
        self.lanes.values().map(|lane| lane.lane.clone()).collect()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Lane> {
        self.lanes.get(key)
    }

    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Lane> {
        self.lanes.get_mut(key)
    }

    /// The lane of this lease, if it is held.
    pub(crate) fn held(&mut self, lease: &LaneRef) -> Option<&mut Lane> {
        self.lanes.get_mut(&lease.key).filter(|lane| lane.lane == *lease)
    }

    /// Takes in a lane whose key is not here.
    pub(crate) fn insert(&mut self, lane: Lane, now: Instant) {
        self.ready.sees(&lane.tenant, now);
        let (deliveries, bytes) = lane.load();
        self.deliveries += deliveries;
        self.bytes += bytes;
        self.suspects += usize::from(lane.head.suspicion.is_some());
        self.lanes.insert(lane.lane.key.clone(), lane);
    }

    /// Takes out a lane, and what is counted of it but its results.
    fn take(&mut self, key: &str) -> Option<Lane> {
        let lane = self.lanes.remove(key)?;
        let (deliveries, bytes) = lane.load();
        self.deliveries -= deliveries;
        self.bytes -= bytes;
        self.suspects -= usize::from(lane.head.suspicion.is_some());
        if lane.is_running() {
            self.running -= 1;
            self.ready.ends(&lane.tenant);
        }
        Some(lane)
    }

    /// The head of a lane is over, and the next one has not been tried.
    fn next_head(&mut self, key: &str) -> Option<(&mut Lane, Head)> {
        let lane = self.lanes.get_mut(key)?;
        let head = std::mem::replace(&mut lane.head, Head::fresh());
        self.suspects -= usize::from(head.suspicion.is_some());
        // One that cannot be read is not in its run.
        if let Some(event) = lane.run.pop_front() {
            self.deliveries -= 1;
            self.bytes -= event.payload.len();
        }
        let tenant = lane.run.front().and_then(|event| event.tenant.as_deref());
        if tenant != lane.tenant.as_deref() {
            lane.tenant = tenant.map(Arc::from);
        }
        Some((lane, head))
    }

    /// The next delivery of this lane can start, behind those that wait.
    pub(crate) fn is_ready(&mut self, key: String) {
        if let Some(lane) = self.lanes.get(&key) {
            self.ready.push_back(&lane.tenant, key);
        }
    }

    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The next lane that can start, of a tenant that has less than `most` attempts under way.
    pub(crate) fn next_ready(&mut self, most: usize) -> Option<String> {
        self.ready.pop(most)
    }

    /// How many slots of so many one tenant may take, and of how many its subscription allows.
    pub(crate) fn most_of_one(&self, slots: usize, allowed: usize, now: Instant) -> usize {
        self.ready.most_of_one(slots, allowed, now)
    }

    /// Tenants of which more lanes would only wait.
    pub(crate) fn crowd(&self) -> Vec<String> {
        self.ready.crowd()
    }

    /// The lanes whose next delivery can start; `None` for one that is gone.
    pub(crate) fn ready(&self) -> impl Iterator<Item = &Lane> {
        self.ready.keys().filter_map(|key| self.lanes.get(key))
    }

    /// An attempt of the head is handed out, which may take so long.
    pub(crate) fn begin(&mut self, key: &str, time: Duration, now: Instant) -> Running {
        self.attempts += 1;
        let running = Running::new(self.attempts, now, time);
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.turn.get_or_insert(now);
            lane.running = Some(running.clone());
            self.running += 1;
            self.ready.begins(&lane.tenant);
        }
        running
    }

    /// This attempt has ended; `None` if it is not under way any more.
    pub(crate) fn end(&mut self, key: &str, attempt: u64) -> Option<&mut Lane> {
        let lane = self.lanes.get_mut(key)?;
        lane.running.take_if(|running| running.id() == attempt)?;
        self.running -= 1;
        self.ready.ends(&lane.tenant);
        Some(lane)
    }

    /// Attempts that do not mind their time themselves: their thread is blocked, or they never got one. They are counted as
    /// ended, and cancelled.
    pub(crate) fn end_overdue(&mut self, now: Instant, margin: Duration) -> Vec<(String, Running)> {
        let mut overdue = Vec::new();
        for (key, lane) in &mut self.lanes {
            if let Some(running) = lane.running.take_if(|running| running.is_overdue(now, margin)) {
                self.running -= 1;
                self.ready.ends(&lane.tenant);
                std::mem::take(&mut lane.cancelled).cancel();
                overdue.push((key.clone(), running));
            }
        }
        overdue
    }

    /// The head is over: it is to be stored so. Returns its event.
    pub(crate) fn finish_head(&mut self, key: &str, error: Option<String>) -> Option<Arc<RecordedEvent>> {
        let event = self.lanes.get(key)?.run.front()?.clone();
        self.finish(key, event.position, error);
        Some(event)
    }

    /// As [`finish_head`](Self::finish_head), for an event that perhaps cannot be read.
    pub(crate) fn finish(&mut self, key: &str, position: i64, error: Option<String>) {
        let Some((lane, Head { attempts, log, .. })) = self.next_head(key) else { return };
        lane.finished.push(Finished { position, attempts, log, error });
        self.unstored += 1;
    }

    /// The head is over and stored. Returns the lane if that was all.
    pub(crate) fn head_was_stored(&mut self, key: &str) -> Option<LaneRef> {
        let (lane, _) = self.next_head(key)?;
        if lane.run.is_empty() { self.remove(key) } else { None }
    }

    /// A lane goes on with its run: first of those that wait while it is its turn.
    pub(crate) fn go_on(&mut self, key: String, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        if lane.turn.is_some_and(|since| now.saturating_duration_since(since) < TURN) {
            self.ready.push_front(&lane.tenant, key);
        } else {
            lane.turn = None;
            self.ready.push_back(&lane.tenant, key);
        }
    }

    /// The lease is lost: everything about the lane is void. Returns it if there was one.
    pub(crate) fn remove(&mut self, key: &str) -> Option<LaneRef> {
        let lane = self.take(key)?;
        lane.cancelled.cancel();
        self.unstored -= lane.finished.len();
        Some(lane.lane)
    }

    /// The last report of a lane, in which nothing is under way.
    pub(crate) fn report(&mut self, key: &str, next: impl FnOnce(Head) -> Next) -> Option<LaneReport> {
        let Lane { lane, head, finished, .. } = self.take(key)?;
        Some(LaneReport { lane, finished, next: next(head) })
    }

    /// What is over in lanes whose run goes on.
    pub(crate) fn gather(&mut self, reports: &mut Vec<LaneReport>) {
        for lane in self.lanes.values_mut().filter(|lane| !lane.finished.is_empty()) {
            let finished = std::mem::take(&mut lane.finished);
            lane.unsettled += finished.len();
            reports.push(LaneReport { lane: lane.lane.clone(), finished, next: Next::Keep });
        }
    }

    /// Whether results wait for the end of their lane's run.
    pub(crate) fn has_finished(&self, key: &str) -> bool {
        self.lanes.get(key).is_some_and(|lane| !lane.finished.is_empty())
    }

    /// What a report says is stored, or void.
    pub(crate) fn reported(&mut self, report: &LaneReport) {
        self.unstored -= report.finished.len();
        if let Some(lane) = self.held(&report.lane).filter(|_| matches!(report.next, Next::Keep)) {
            lane.unsettled -= report.finished.len();
        }
    }

    /// Stops looking for what can start; returns the lanes in which nothing is under way.
    pub(crate) fn stop(&mut self) -> Vec<String> {
        self.ready.clear();
        let idle = self.lanes.iter().filter(|(_, lane)| !lane.is_running());
        idle.map(|(key, _)| key.clone()).collect()
    }

    /// Cancels the attempts of leases that end by then; of all, without an end.
    pub(crate) fn cancel(&self, ending_by: Option<Instant>) {
        for lane in self.lanes.values().filter(|lane| ending_by.is_none_or(|end| lane.leased_until <= end)) {
            lane.cancelled.cancel();
        }
    }

    /// The worker is gone and with it its attempts: no result will come.
    pub(crate) fn forget_running(&mut self) {
        for lane in self.lanes.values_mut().filter(|lane| lane.is_running()) {
            lane.running = None;
            self.running -= 1;
            self.ready.ends(&lane.tenant);
        }
    }

    /// Counts anew, and compares.
    #[cfg(test)]
    pub(crate) fn check(&self, reported: usize) {
        let sum = |of: &dyn Fn(&Lane) -> usize| self.lanes.values().map(of).sum::<usize>();
        assert_eq!(self.running, sum(&|lane| usize::from(lane.is_running())), "running");
        assert_eq!(self.running, self.ready.running(), "running by tenant");
        assert_eq!(self.unstored, sum(&|lane| lane.finished.len()) + reported, "unstored");
        assert_eq!(self.load(), (sum(&|lane| lane.load().0), sum(&|lane| lane.load().1)), "load");
        assert_eq!(self.suspects, sum(&|lane| usize::from(lane.head.suspicion.is_some())), "suspects");
        for (key, lane) in &self.lanes {
            assert_eq!(*key, lane.lane.key);
            let waits = self.ready.keys().any(|ready| ready == key);
            assert!(waits || lane.is_running(), "{key} is leased, and nothing will come of it");
        }
    }

    /// Whether a head may have killed its worker.
    pub(crate) fn has_suspects(&self) -> bool {
        self.suspects > 0
    }

    /// How many deliveries wait or are under way, and how large their payloads are together.
    pub(crate) fn load(&self) -> (usize, usize) {
        (self.deliveries, self.bytes)
    }
}

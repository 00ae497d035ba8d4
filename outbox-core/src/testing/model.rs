use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};

use crate::{
    AttemptLog, RecordedEvent,
    store::{
        CircuitState, Claim, ClaimedLane, Finished, Holder, LaneRef, LaneReport, LeaseState, Next, NextDue,
        Reservation, Settled, TakenOver, Wanted,
    },
};

/// When to try again what a probe could not even begin.
const PROBE_AGAIN: Duration = Duration::from_millis(100);

/// Behind the name of a relay: such leases can be taken over, those of workers cannot.
const OF_RELAY: &str = " (relay)";

/// The rules of a store, in memory and without a clock of its own: each call is told what time it is.
///
/// The databases follow the same rules; a test of theirs compares them with this model over random histories. By itself it
/// is for simulations; for tests of applications there is [`MemoryStore`](super::MemoryStore).
#[derive(Clone, Debug, Default)]
pub struct Model {
    subscriptions: BTreeMap<i32, SubscriptionRow>,
    lanes: BTreeMap<(i32, String), LaneRow>,
    finished: BTreeMap<(i32, i64), FinishedDelivery>,
    queued: u64,
    /// Where the tokens of the next lane begin.
    token: i64,
}

#[derive(Clone, Debug)]
struct SubscriptionRow {
    name: String,
    is_paused: bool,
    /// Nobody claims before, except one with a probe afterwards.
    circuit_until: Option<DateTime<Utc>>,
    failures: u32,
    /// Until when its rate is reserved.
    rate_at: Option<DateTime<Utc>>,
}

#[derive(Clone, Debug)]
struct LaneRow {
    /// That of its first event.
    tenant: Option<String>,
    /// When it can be claimed: with its head, or when its lease ends. Never while it is held.
    due_at: Option<DateTime<Utc>>,
    queue: VecDeque<Queued>,
    /// Attempts of the head; 0 for one that came to be the head while another was under way.
    attempts: u32,
    token: i64,
    leased_by: Option<String>,
    log: AttemptLog,
    last_error: Option<String>,
    held_at: Option<i64>,
}

#[derive(Clone, Debug)]
struct Queued {
    seq: i64,
    due_at: DateTime<Utc>,
    event: Arc<RecordedEvent>,
}

/// A delivery that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinishedDelivery {
    /// The key of its lane.
    pub key: String,
    /// How many attempts it took.
    pub attempts: u32,
    /// The failed ones.
    pub log: AttemptLog,
    /// Why it is a dead letter; `None` if it was delivered.
    pub error: Option<String>,
}

/// What a lane looks like: for comparisons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneState {
    /// The positions of what waits, in order.
    pub queue: Vec<i64>,
    /// Attempts of the head, the one under way included.
    pub attempts: u32,
    /// Who holds it.
    pub leased_by: Option<String>,
    /// The dead letter that it waits behind for an operator.
    pub held_at: Option<i64>,
    /// The failed attempts of the head.
    pub log: AttemptLog,
    /// What operators see.
    pub last_error: Option<String>,
}

impl LaneRow {
    fn is_leased_as(&self, lane: &LaneRef) -> bool {
        self.token == lane.token && self.leased_by.as_deref() == Some(&*lane.worker)
    }

    fn lease(&mut self, worker: &str, attempts: u32, until: DateTime<Utc>) {
        self.attempts += attempts;
        self.token += 1;
        self.leased_by = Some(worker.to_owned());
        self.due_at = Some(until);
    }
}

impl Model {
    /// An empty store. Tokens of new lanes are drawn from this number: two stores with the same one behave the same.
    #[must_use]
    pub fn new(token: i64) -> Self {
        Self { token, ..Self::default() }
    }

    /// Adds a subscription.
    pub fn subscribe(&mut self, id: i32, name: &str) {
        let row = SubscriptionRow {
            name: name.to_owned(),
            is_paused: false,
            circuit_until: None,
            failures: 0,
            rate_at: None,
        };
        self.subscriptions.insert(id, row);
    }

    /// Removes a subscription with all its deliveries.
    pub fn remove(&mut self, id: i32) {
        self.subscriptions.remove(&id);
        self.lanes.retain(|(subscription, _), _| *subscription != id);
    }

    /// Pauses or resumes a subscription.
    pub fn set_paused(&mut self, id: i32, is_paused: bool) {
        if let Some(row) = self.subscriptions.get_mut(&id) {
            row.is_paused = is_paused;
        }
    }

    /// The id of a subscription.
    #[must_use]
    pub fn subscription(&self, name: &str) -> Option<i32> {
        self.subscriptions.iter().find(|(_, row)| row.name == name).map(|(id, _)| *id)
    }

    /// Adds a delivery at the end of its lane, due at this time.
    pub fn add(&mut self, subscription: i32, key: &str, event: Arc<RecordedEvent>, due_at: DateTime<Utc>) {
        let seq = i64::try_from(self.queued).unwrap_or(i64::MAX);
        self.queued += 1;
        let token = &mut self.token;
        let lane = self.lanes.entry((subscription, key.to_owned())).or_insert_with(|| {
            // As good as random, and the same each time.
            *token = token.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            LaneRow {
                tenant: event.tenant.clone(),
                due_at: Some(due_at),
                queue: VecDeque::new(),
                attempts: 0,
                token: *token >> 2,
                leased_by: None,
                log: AttemptLog::default(),
                last_error: None,
                held_at: None,
            }
        });
        lane.queue.push_back(Queued { seq, due_at, event });
    }

    /// As [`Store::claim`](crate::store::Store::claim), of one subscription.
    pub fn claim(&mut self, now: DateTime<Utc>, holder: Holder<'_>, wanted: &Wanted) -> Claim {
        let Some(subscription) = self.subscriptions.get(&wanted.subscription).filter(|row| !row.is_paused) else {
            return Claim::default();
        };
        let (circuit_until, failures) = (subscription.circuit_until, subscription.failures);
        let wants = wanted.lanes + wanted.others > 0;
        if circuit_until.is_none() && wants {
            let lanes = self.claim_lanes(now, holder, wanted);
            if !lanes.is_empty() {
                return Claim { lanes, ..Claim::default() };
            }
        }
        let next = self.next_due(now, wanted.subscription);
        let nothing = Claim { next, ..Claim::default() };
        if !wants {
            return nothing;
        }
        let (Some(NextDue { after: Some(Duration::ZERO), .. }), Some(_)) = (next, circuit_until) else {
            return nothing;
        };
        if let Some(subscription) = self.subscriptions.get_mut(&wanted.subscription) {
            (subscription.circuit_until, subscription.failures) = (Some(later(now, holder.lease)), failures);
        }
        let probe = Wanted { subscription: wanted.subscription, lanes: 1, run: wanted.run.min(1), ..Wanted::default() };
        let lanes = self.claim_lanes(now, holder, &probe);
        if lanes.is_empty() {
            let circuit = CircuitState::Open { wait: PROBE_AGAIN, failed: false };
            self.set_circuit(now, wanted.subscription, circuit);
        }
        Claim { probe: !lanes.is_empty(), lanes, ..nothing }
    }

    /// As [`claim`](Self::claim), for a relay of this name: without an attempt, and without the deliveries.
    pub fn claim_for_relay(&mut self, now: DateTime<Utc>, holder: Holder<'_>, wanted: &Wanted) -> Claim {
        let relay = format!("{}{OF_RELAY}", holder.worker);
        self.claim(now, Holder { worker: &relay, ..holder }, &Wanted { run: 0, ..wanted.clone() })
    }

    fn claim_lanes(&mut self, now: DateTime<Utc>, holder: Holder<'_>, wanted: &Wanted) -> Vec<ClaimedLane> {
        let mut keys = self.of_others(now, wanted);
        let left = (wanted.lanes + wanted.others) as usize - keys.len();
        let mut due = self.due(now, wanted.subscription);
        due.retain(|(_, key, _)| !keys.contains(key));
        due.truncate(left.min(wanted.lanes as usize));
        keys.extend(due.into_iter().map(|(_, key, _)| key));
        let attempts = u32::from(wanted.run > 0);
        let mut claimed = Vec::new();
        for key in keys {
            if let Some(lane) = self.lanes.get_mut(&(wanted.subscription, key.clone())) {
                lane.lease(holder.worker, attempts, later(now, holder.lease));
                claimed.extend(self.with_run(now, wanted.subscription, &key, wanted.run, attempts));
            }
        }
        claimed.sort_by_key(|(order, _)| *order);
        claimed.into_iter().map(|(_, lane)| lane).collect()
    }

    /// The lanes of a subscription that are due, those that are due longest first.
    fn due(&self, now: DateTime<Utc>, subscription: i32) -> Vec<(DateTime<Utc>, String, Option<String>)> {
        let of = self.lanes.iter().filter(|((id, _), _)| *id == subscription);
        let due = of.filter_map(|((_, key), lane)| {
            Some((lane.due_at.filter(|due_at| *due_at <= now)?, key.clone(), lane.tenant.clone()))
        });
        let mut due: Vec<_> = due.collect();
        due.sort();
        due
    }

    /// Of each tenant that is not passed the lane that is due longest.
    fn of_others(&self, now: DateTime<Utc>, wanted: &Wanted) -> Vec<String> {
        let mut of: BTreeMap<String, String> = BTreeMap::new();
        if !wanted.passed.is_empty() {
            for (_, key, tenant) in self.due(now, wanted.subscription) {
                if let Some(tenant) = tenant.filter(|tenant| !wanted.passed.contains(tenant)) {
                    of.entry(tenant).or_insert(key);
                }
            }
        }
        of.into_values().take((wanted.lanes + wanted.others) as usize).collect()
    }

    /// A leased lane with its first deliveries. If nothing is due, it is given back.
    fn with_run(
        &mut self,
        now: DateTime<Utc>,
        subscription: i32,
        key: &str,
        run: u32,
        attempts: u32,
    ) -> Option<((DateTime<Utc>, i64), ClaimedLane)> {
        let row = self.lanes.get(&(subscription, key.to_owned()))?;
        let worker = row.leased_by.clone()?;
        let most = if row.attempts > 1 { run.min(1) } else { run };
        let due = row.queue.iter().take(most as usize).take_while(|queued| queued.due_at <= now);
        let lane = ClaimedLane {
            lane: LaneRef { subscription, key: key.to_owned(), token: row.token, worker },
            attempts: row.attempts + 1 - attempts,
            attempt_log: row.log.clone(),
            run: due.map(|queued| (*queued.event).clone()).collect(),
            unreadable: None,
        };
        if lane.run.is_empty() && run > 0 {
            self.settle(now, &[lane.given_back()]);
            return None;
        }
        let first = row.queue.front().map_or((now, 0), |queued| (queued.due_at, queued.seq));
        Some((first, lane))
    }

    /// When the next lane of a subscription can be claimed; `None` if nothing is claimed for it.
    #[must_use]
    pub fn next_due(&self, now: DateTime<Utc>, subscription: i32) -> Option<NextDue> {
        let row = self.subscriptions.get(&subscription).filter(|row| !row.is_paused)?;
        let lanes = self.lanes.iter().filter(|((id, _), _)| *id == subscription);
        let until = |at: DateTime<Utc>| (at - now).to_std().unwrap_or_default();
        let due = lanes.filter_map(|(_, lane)| lane.due_at).min().map(until);
        let closed_for = row.circuit_until.map(until);
        let after = due.map(|due| due.max(closed_for.unwrap_or_default()));
        Some(NextDue { after, circuit: closed_for.map(|_| row.failures) })
    }

    /// As [`Store::reserve`](crate::store::Store::reserve), of one subscription.
    pub fn reserve(&mut self, now: DateTime<Utc>, asked: &Reservation) -> Option<Duration> {
        let row = self.subscriptions.get_mut(&asked.subscription)?;
        let reserved = row.rate_at.filter(|at| *at > now && *at <= later(now, asked.longest())).unwrap_or(now);
        if reserved >= later(now, Reservation::AHEAD) {
            return None;
        }
        row.rate_at = Some(later(reserved, asked.time()));
        (reserved - now).to_std().ok()
    }

    /// As [`Store::take_over`](crate::store::Store::take_over).
    pub fn take_over(
        &mut self,
        now: DateTime<Utc>,
        holder: Holder<'_>,
        wanted: &Wanted,
        lanes: &[LaneRef],
    ) -> TakenOver {
        let mut taken = TakenOver::default();
        for lane in lanes.iter().filter(|lane| lane.subscription == wanted.subscription) {
            let row = self.lanes.get_mut(&(lane.subscription, lane.key.clone()));
            let Some(row) = row.filter(|row| row.is_leased_as(lane) && lane.worker.ends_with(OF_RELAY)) else {
                continue;
            };
            row.lease(holder.worker, 1, later(now, holder.lease));
            let claimed = self.with_run(now, lane.subscription, &lane.key, wanted.run, 1);
            taken.lanes.extend(claimed.map(|(_, lane)| lane));
        }
        taken
    }

    /// As [`Store::settle`](crate::store::Store::settle).
    pub fn settle(&mut self, now: DateTime<Utc>, reports: &[LaneReport]) -> Vec<Settled> {
        // A lane advances once, to where its last report says, however many there are of it.
        let mut last: HashMap<&LaneRef, usize> = HashMap::new();
        reports.iter().enumerate().for_each(|(index, report)| {
            last.insert(&report.lane, index);
        });
        let is_held = |report: &LaneReport| {
            let row = self.lanes.get(&(report.lane.subscription, report.lane.key.clone()));
            row.is_some_and(|row| row.is_leased_as(&report.lane))
        };
        let held: Vec<bool> = reports.iter().map(is_held).collect();
        for (index, report) in reports.iter().enumerate().filter(|(index, _)| held[*index]) {
            self.finish(&report.lane, &report.finished);
            if last.get(&report.lane) == Some(&index) {
                self.advance(now, report);
            }
        }
        held.into_iter().map(|held| if held { Settled::Done } else { Settled::Superseded }).collect()
    }

    /// Moves deliveries to what is over. What is gone already is not moved a second time.
    fn finish(&mut self, lane: &LaneRef, finished: &[Finished]) {
        let Some(row) = self.lanes.get_mut(&(lane.subscription, lane.key.clone())) else { return };
        for Finished { position, attempts, log, error } in finished {
            let Some(index) = row.queue.iter().position(|queued| queued.event.position == *position) else { continue };
            row.queue.remove(index);
            let finished =
                FinishedDelivery { key: lane.key.clone(), attempts: *attempts, log: log.clone(), error: error.clone() };
            self.finished.insert((lane.subscription, *position), finished);
        }
    }

    fn advance(&mut self, now: DateTime<Utc>, report: &LaneReport) {
        let key = (report.lane.subscription, report.lane.key.clone());
        let held_at = if let Next::Hold { position } = report.next { Some(position) } else { None };
        let Some(row) = self.lanes.get_mut(&key) else { return };
        if row.queue.is_empty() && held_at.is_none() {
            self.lanes.remove(&key);
            return;
        }
        let overtaken = row.attempts == 0;
        let (attempts, log, error) = match &report.next {
            Next::Keep => (1, AttemptLog::default(), None),
            Next::Yield | Next::Hold { .. } => (0, AttemptLog::default(), None),
            Next::Release { attempts, log } => (*attempts, log.clone(), row.last_error.clone()),
            Next::Retry { attempts, log, error, .. } => (*attempts, log.clone(), Some(error.clone())),
        };
        let head = row.queue.front().map_or(now, |queued| queued.due_at);
        row.due_at = match &report.next {
            Next::Keep => row.due_at,
            Next::Hold { .. } => None,
            Next::Retry { after, .. } if !overtaken => Some(later(now, *after)),
            _ => Some(head),
        };
        if !matches!(report.next, Next::Keep) {
            row.leased_by = None;
        }
        row.held_at = held_at;
        if overtaken {
            (row.attempts, row.log) = (0, AttemptLog::default());
        } else {
            (row.attempts, row.log, row.last_error) = (attempts, log, error);
        }
    }

    /// As [`Store::renew`](crate::store::Store::renew).
    pub fn renew(&mut self, now: DateTime<Utc>, lanes: &[LaneRef], lease: Duration) -> Vec<LeaseState> {
        self.for_each_held(lanes.iter(), |_, row| row.due_at = Some(later(now, lease)))
    }

    /// As [`Store::note`](crate::store::Store::note).
    pub fn note(&mut self, notes: &[(LaneRef, AttemptLog)]) -> Vec<LeaseState> {
        self.for_each_held(notes.iter().map(|(lane, _)| lane), |index, row| {
            row.log = if row.attempts > 0 { notes[index].1.clone() } else { AttemptLog::default() };
        })
    }

    fn for_each_held<'a>(
        &mut self,
        lanes: impl Iterator<Item = &'a LaneRef>,
        mut change: impl FnMut(usize, &mut LaneRow),
    ) -> Vec<LeaseState> {
        let states = lanes.enumerate().map(|(index, lane)| {
            let row = self.lanes.get_mut(&(lane.subscription, lane.key.clone()));
            let Some(row) = row.filter(|row| row.is_leased_as(lane)) else { return LeaseState::Lost };
            change(index, row);
            LeaseState::Done
        });
        states.collect()
    }

    /// As [`Store::held`](crate::store::Store::held).
    #[must_use]
    pub fn held(&self, lanes: &[LaneRef]) -> Vec<bool> {
        let row = |lane: &LaneRef| self.lanes.get(&(lane.subscription, lane.key.clone()));
        lanes.iter().map(|lane| row(lane).is_some_and(|row| row.is_leased_as(lane))).collect()
    }

    /// As [`Store::set_circuit`](crate::store::Store::set_circuit).
    pub fn set_circuit(&mut self, now: DateTime<Utc>, subscription: i32, circuit: CircuitState) {
        let Some(row) = self.subscriptions.get_mut(&subscription) else { return };
        (row.circuit_until, row.failures) = match circuit {
            CircuitState::Closed => (None, 0),
            CircuitState::Open { wait, failed } => (Some(later(now, wait)), row.failures + u32::from(failed)),
        };
    }

    /// Lets lanes that are held go on, as an operator does.
    pub fn let_go(&mut self, now: DateTime<Utc>, subscription: i32) {
        for (_, lane) in self.lanes.iter_mut().filter(|((id, _), _)| *id == subscription) {
            if lane.held_at.take().is_some() {
                lane.due_at = Some(lane.queue.front().map_or(now, |queued| queued.due_at));
            }
        }
        self.lanes.retain(|_, lane| !lane.queue.is_empty() || lane.held_at.is_some() || lane.leased_by.is_some());
    }

    /// Discards the dead letters of a subscription, as an operator does; the keys that they hold up go on.
    pub fn discard_dead_letters(&mut self, now: DateTime<Utc>, subscription: i32) {
        self.finished.retain(|(id, _), finished| *id != subscription || finished.error.is_none());
        self.let_go(now, subscription);
    }

    /// What is over, of a subscription, by position.
    pub fn finished(&self, subscription: i32) -> impl Iterator<Item = (i64, &FinishedDelivery)> {
        let of = self.finished.range((subscription, i64::MIN)..=(subscription, i64::MAX));
        of.map(|((_, position), finished)| (*position, finished))
    }

    /// The lanes of a subscription, by key.
    pub fn lanes(&self, subscription: i32) -> impl Iterator<Item = (&str, LaneState)> {
        let of = self.lanes.iter().filter(move |((id, _), _)| *id == subscription);
        of.map(|((_, key), row)| {
            let state = LaneState {
                queue: row.queue.iter().map(|queued| queued.event.position).collect(),
                attempts: row.attempts,
                leased_by: row.leased_by.clone(),
                held_at: row.held_at,
                log: row.log.clone(),
                last_error: row.last_error.clone(),
            };
            (key.as_str(), state)
        })
    }
}

fn later(now: DateTime<Utc>, wait: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(wait).ok().and_then(|wait| now.checked_add_signed(wait)).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

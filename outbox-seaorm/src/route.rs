//! Routing: which subscriptions get an event, and in which order. A request stores its events with a mark each, and
//! nothing else; routing takes the marks away and writes deliveries and lanes.
//!
//! One process routes at a time: it has locked the row of `outbox_meta`. The order in which events are routed is the order
//! in which a lane gets them, so an event is routed before those that its writer could not have seen, or beside them, and
//! never after one that was committed after it: what has to come first is visible in every snapshot that shows the later
//! one.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::{AttemptLog, RecordedEvent};
use sea_orm::{ConnectionTrait, DbErr, QueryResult, RuntimeErr, sqlx};
use serde::Serialize;

use crate::{
    ClaimedLane, LaneRef, Outbox,
    deliveries::recorded,
    flush::{json, seconds},
    sql::{Route, RouteStatements},
    subscriptions::KnownSubscriptions,
};

mod ahead;
mod floor;
mod handed;
mod plan;
mod steps;

pub(crate) use handed::{Committed, Handed};
pub(crate) use steps::flush as flush_in_steps;

use floor::Floor;
use plan::{Key, Plan, plan};
pub(crate) use plan::{Waiting, keys};

/// Stands for the router where the ids of subscriptions stand: in wake-ups and notifications.
pub(crate) const ROUTER: i32 = 0;

/// How many events one statement routes at most.
const MOST: usize = 500;

/// How many more are read while some have to wait for a lane that is locked: what they hold up is behind them.
const MOST_LEFT_OUT: usize = 10_000;

/// How long a lane that somebody has locked is left alone.
const BLOCKED_FOR: Duration = Duration::from_secs(1);

/// How long another may be at it before its session is looked at.
const STUCK_AFTER: Duration = Duration::from_secs(3);

/// So many events may be set aside with none routed in between. Then it is not about the events.
const MOST_REJECTED: u32 = 3;

/// So many events at once are a high load: some of those that were committed beside them are not handed over yet, and what
/// waits is looked for at once.
const LOADED: usize = 4;

/// After so many false alarms in a row the router looks first, for a while.
const FALSE_ALARMS: u32 = 3;
const LOOKS_FIRST: u32 = 16;

/// What a worker of this process would take at once: lanes that routing creates may be leased to it by the same
/// statement.
#[derive(Clone, Debug)]
pub struct Taker {
    /// The subscription.
    pub subscription: i32,
    /// Who would hold the leases.
    pub worker: Arc<str>,
    /// How many lanes at most.
    pub lanes: u32,
    /// Tenants whose lanes it does not take.
    pub passed: Vec<String>,
    /// How many deliveries of each at most.
    pub run: u32,
    /// How long the leases last.
    pub lease: Duration,
}

/// When to look for events again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextLook {
    /// At once: more is waiting.
    Now,
    /// In some milliseconds: another process was at it, or an event has to wait for a lane that somebody has locked.
    Soon,
    /// When something wakes the router: nothing is waiting.
    Woken,
}

/// What one look has done.
#[derive(Debug)]
pub struct Routed {
    /// How many events are routed.
    pub events: usize,
    /// Lanes that were leased with it, to their takers, those that are due longest first.
    pub leased: Vec<ClaimedLane>,
    /// When to look again.
    pub next: NextLook,
}

impl Routed {
    fn nothing(next: NextLook) -> Self {
        Self { events: 0, leased: Vec::new(), next }
    }
}

/// Routes the events of this process' commits, and those that it finds.
#[derive(Debug)]
pub struct Router {
    outbox: Outbox,
    /// Whether the commits of this process hand their events to it.
    takes: bool,
    /// Handed over, and not seen to be routed.
    mine: Vec<Committed>,
    floor: Floor,
    /// Lanes and marks that somebody has locked, and since when.
    blocked: HashMap<Key, Instant>,
    blocked_marks: HashMap<i64, Instant>,
    left_out: usize,
    /// How many events to route at once: fewer after an error that is about one of them.
    size: usize,
    rejected: u32,
    /// Since when others have been at it, each time.
    skipped_since: Option<Instant>,
    false_alarms: u32,
    ahead: ahead::Pace,
    steps: steps::Pace,
}

/// What became of a statement.
enum Done {
    Routed(Routed),
    /// Another process is at it.
    Skipped,
    /// Something may have to come first.
    FalseAlarm,
}

impl Outbox {
    /// A router, on PostgreSQL with a connection of its own. While it lives, commits of this process hand their events to
    /// it; a second one only looks.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn router(&self) -> Router {
        self.with_own_connection().new_router(self.handed().claim())
    }

    fn new_router(&self, takes: bool) -> Router {
        Router {
            outbox: self.clone(),
            takes,
            mine: Vec::new(),
            floor: Floor::default(),
            blocked: HashMap::new(),
            blocked_marks: HashMap::new(),
            left_out: 0,
            size: MOST,
            rejected: 0,
            skipped_since: None,
            false_alarms: 0,
            ahead: ahead::Pace::default(),
            steps: steps::Pace::default(),
        }
    }

    /// Routes all events that wait at this moment, beside the workers that do the same: for programs and tests without a
    /// worker. Returns how many this call has routed.
    ///
    /// # Errors
    ///
    /// If the database fails; what was routed until then is.
    ///
    /// # Cancel safety
    ///
    /// Safe: as a crash.
    pub async fn route_waiting(&self) -> Result<usize, DbErr> {
        match self.last_unrouted().await? {
            Some(last) => self.route_until(last).await,
            None => Ok(0),
        }
    }

    pub(crate) async fn last_unrouted(&self) -> Result<Option<i64>, DbErr> {
        let row = self.query_one(self.store_reader(), self.sql().last_unrouted, [0_i64.into()]).await?;
        row.map(|row| row.try_get("", "position")).transpose()
    }

    /// Routes until no visible event up to this position waits.
    pub(crate) async fn route_until(&self, last: i64) -> Result<usize, DbErr> {
        let mut router = self.new_router(false);
        let (mut events, mut wait, began, mut said_at) = (0, Duration::from_millis(1), Instant::now(), Instant::now());
        loop {
            let routed = router.route(&[], MOST).await?;
            events += routed.events;
            let values = [router.floor.position().into(), last.into()];
            if self.query_one(self.store_reader(), self.sql().unrouted_until, values).await?.is_none() {
                return Ok(events);
            }
            if said_at.elapsed() > Duration::from_secs(5) {
                said_at = Instant::now();
                tracing::info!(events, waited = ?began.elapsed(), "routing what waits");
            }
            if routed.events > 0 {
                wait = Duration::from_millis(1);
                continue;
            }
            tokio::time::sleep(wait).await;
            wait = (2 * wait).min(Duration::from_millis(20));
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if self.takes {
            self.outbox.handed().give_up();
        }
    }
}

impl Router {
    /// Waits until there may be something to route: a commit of this process, a notification, an event that was put back.
    ///
    /// # Cancel safety
    ///
    /// Safe: a wake-up that was not returned is returned by the next call.
    pub async fn woken(&self) {
        self.outbox.woken(ROUTER).await;
    }

    /// Looks for events that are not routed, and routes up to `most` of them, 500 at most.
    ///
    /// Lanes that are new are leased to the takers, as far as a [claim](Outbox::claim) would lease them. A crash of the
    /// database server may take such a lease back: see [`held`](Outbox::held).
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is routed then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open what is routed and leased. Run it in a task of its own.
    pub async fn route(&mut self, takers: &[Taker], most: usize) -> Result<Routed, DbErr> {
        let most = most.clamp(1, MOST);
        match &self.outbox.sql().route {
            Route::AtOnce(sql) => self.at_once(sql, takers, most).await,
            Route::InSteps { .. } => steps::route(&self.outbox, &mut self.steps, most).await,
        }
    }

    async fn at_once(&mut self, sql: &RouteStatements, takers: &[Taker], most: usize) -> Result<Routed, DbErr> {
        self.forget_blocked();
        let mut look = true;
        if self.takes {
            let (events, others) = self.outbox.handed().take(most.saturating_sub(self.mine.len()));
            self.mine.extend(events);
            look = others || self.mine.is_empty();
        }
        let is_whole = self.size >= MOST && self.blocked.is_empty() && self.blocked_marks.is_empty();
        let is_quiet = self.mine.len() < LOADED;
        if !look && is_whole && is_quiet && self.hopes() {
            let mut events: Vec<Waiting> = std::mem::take(&mut self.mine).into_iter().map(Waiting::from).collect();
            events.sort_unstable_by_key(|waiting| waiting.position);
            match self.try_route(sql, takers, &events, true).await? {
                Done::Routed(mut routed) => {
                    self.false_alarms = 0;
                    if routed.next == NextLook::Woken && self.outbox.handed().has_more() {
                        routed.next = NextLook::Now;
                    }
                    return Ok(routed);
                }
                Done::Skipped => {
                    self.mine = events.into_iter().filter_map(Waiting::into_committed).collect();
                    return self.skipped(sql).await;
                }
                Done::FalseAlarm => {
                    self.false_alarms += 1;
                    self.mine = events.into_iter().filter_map(Waiting::into_committed).collect();
                }
            }
        }
        self.look(sql, takers, most).await
    }

    /// Whether what was handed over is probably all that is next.
    fn hopes(&mut self) -> bool {
        if self.false_alarms < FALSE_ALARMS {
            return true;
        }
        self.false_alarms = if self.false_alarms >= FALSE_ALARMS + LOOKS_FIRST { 0 } else { self.false_alarms + 1 };
        false
    }

    /// Reads what waits, and routes it.
    async fn look(&mut self, sql: &RouteStatements, takers: &[Taker], most: usize) -> Result<Routed, DbErr> {
        let size = most.min(self.size);
        let page = size + self.left_out.min(MOST_LEFT_OUT);
        let began = Instant::now();
        // Of what this process has committed it has the payloads.
        let whole = self.mine.is_empty() && self.left_out == 0 && takers.iter().any(|taker| taker.lanes > 0);
        let (mut events, generation) = self.read(whole.then_some(sql), page).await?;
        let walk = began.elapsed();
        self.raise_floor(sql, walk).await?;
        if events.is_empty() {
            self.mine.clear();
            self.left_out = 0;
            return Ok(Routed::nothing(if self.outbox.handed().has_more() { NextLook::Now } else { NextLook::Woken }));
        }
        if generation != Some(self.outbox.known().generation) {
            self.reload().await?;
        }
        let full = events.len() >= page;
        set_gone_aside(&self.outbox, self.outbox.store(), &mut events).await?;
        self.fill_in(&mut events);
        let last = events.last().map_or(0, |waiting| waiting.position);
        let mut routed = match self.try_route(sql, takers, &events, false).await? {
            Done::Routed(routed) => routed,
            Done::Skipped | Done::FalseAlarm => return self.skipped(sql).await,
        };
        if full && self.left_out == 0 {
            let ahead = ahead::find(&self.outbox, &mut self.ahead, last).await?;
            if let Some(ahead) = ahead
                && let Done::Routed(more) = self.try_route(sql, takers, &ahead, false).await?
            {
                routed.events += more.events;
                routed.leased.splice(0..0, more.leased);
            }
        }
        routed.next = match routed.next {
            NextLook::Woken if full || self.outbox.handed().has_more() => NextLook::Now,
            next => next,
        };
        Ok(routed)
    }

    /// What is next; whole events with these statements.
    async fn read(&self, whole: Option<&RouteStatements>, page: usize) -> Result<(Vec<Waiting>, Option<i64>), DbErr> {
        let page = i64::try_from(page).unwrap_or(i64::MAX);
        let values = [self.floor.position().into(), page.into()];
        let statement = whole.map_or(self.outbox.sql().unrouted, |sql| sql.unrouted_whole);
        let rows = self.outbox.query_all(self.outbox.store(), statement, values).await?;
        let generation = rows.first().map_or(Ok(None), |row| row.try_get("", "generation"))?;
        let read = if whole.is_some() { Waiting::read_whole } else { Waiting::read };
        Ok((rows.iter().map(read).collect::<Result<_, _>>()?, generation))
    }

    async fn reload(&self) -> Result<(), DbErr> {
        self.outbox.current_known(self.outbox.store()).await.map(|_| ())
    }

    /// Payloads that this process has need not be read again.
    fn fill_in(&mut self, events: &mut [Waiting]) {
        let mut mine: HashMap<i64, RecordedEvent> =
            self.mine.drain(..).map(|Committed { event, .. }| (event.position, event)).collect();
        for waiting in events {
            if let Some(event) = mine.remove(&waiting.position) {
                (waiting.event, waiting.has_payload) = (Some(event), true);
            }
        }
    }

    /// One statement. `hoped` says that the events were not read, so that another may have to come first.
    async fn try_route(
        &mut self,
        sql: &RouteStatements,
        takers: &[Taker],
        events: &[Waiting],
        hoped: bool,
    ) -> Result<Done, DbErr> {
        for _ in 0..3 {
            let known = self.outbox.known();
            let (lanes, marks) = (self.blocked.keys().cloned().collect(), self.blocked_marks.keys().copied().collect());
            let plan = plan(events, &known, self.size, &lanes, &marks);
            self.left_out = plan.left_out;
            let next = match plan.left_out {
                _ if plan.is_cut => NextLook::Now,
                0 => NextLook::Woken,
                _ => NextLook::Soon,
            };
            if plan.events.is_empty() {
                return Ok(Done::Routed(Routed::nothing(next)));
            }
            let answer = match self.statement(sql, &known, takers, &plan, hoped).await {
                Ok(answer) => answer,
                Err(error) => return self.refused(sql, &plan, events, error).await,
            };
            let Some(answer) = answer else {
                self.outbox.restore_meta(self.outbox.store()).await?;
                self.reload().await?;
                continue;
            };
            if !answer.locked && answer.generation != known.generation {
                self.reload().await?;
                continue;
            }
            if !answer.locked {
                return Ok(Done::Skipped);
            }
            self.skipped_since = None;
            if !answer.complete {
                return Ok(Done::FalseAlarm);
            }
            (self.size, self.rejected) = (MOST, 0);
            self.outbox.wake(&answer.others);
            let (leased, unfinished) = self.leased(takers, &plan, events, &answer).await?;
            self.outbox.wake(&unfinished);
            return Ok(Done::Routed(Routed { events: answer.taken, leased, next }));
        }
        Ok(Done::Skipped)
    }

    /// `None` if the row of `outbox_meta` is missing.
    async fn statement(
        &self,
        sql: &RouteStatements,
        known: &KnownSubscriptions,
        takers: &[Taker],
        plan: &Plan,
        hoped: bool,
    ) -> Result<Option<Answer>, DbErr> {
        let store = self.outbox.store();
        let takers: Vec<TakerRow<'_>> = takers.iter().map(|taker| self.taker(taker)).collect();
        let floor = self.floor.position();
        if let [event] = &*plan.events {
            let lanes: Vec<OneLane<'_>> = plan.lanes.iter().map(|lane| OneLane::of(lane, &takers)).collect();
            let values = [
                known.generation.into(),
                event.position.into(),
                event.due.into(),
                json(&lanes)?.into(),
                hoped.then_some(floor).into(),
            ];
            return Answer::of_one(&self.outbox.query_all(store, sql.route_one, values).await?, &lanes);
        }
        let number = i64::try_from(plan.events.len()).unwrap_or(i64::MAX);
        let values = [
            known.generation.into(),
            json(&plan.events)?.into(),
            json(&plan.lanes.iter().map(|lane| PlannedLane::of(lane, &takers)).collect::<Vec<_>>())?.into(),
            json(&plan.matches)?.into(),
            json(&takers)?.into(),
            floor.into(),
            plan.last().into(),
            hoped.then_some(number).into(),
        ];
        let row = self.outbox.query_one(store, sql.route, values).await?;
        row.map_or(Err(no_answer()), |row| Answer::of_many(&row))
    }

    fn taker<'a>(&self, taker: &'a Taker) -> TakerRow<'a> {
        let (lanes, _) = self.outbox.fitting(taker.subscription, taker.lanes, taker.run);
        TakerRow {
            subscription: taker.subscription,
            worker: &taker.worker,
            lanes,
            lease: seconds(taker.lease),
            passed: &taker.passed,
        }
    }

    /// The new leases with their events: those of this process' commits are here, others are read. Also the subscriptions of
    /// lanes that have more than comes along.
    async fn leased(
        &self,
        takers: &[Taker],
        plan: &Plan,
        events: &[Waiting],
        answer: &Answer,
    ) -> Result<(Vec<ClaimedLane>, Vec<i32>), DbErr> {
        let (mut complete, mut unfinished) = (Vec::new(), Vec::new());
        let mut whole: HashMap<(i32, String), usize> = HashMap::new();
        let mut others: HashMap<i32, Vec<ClaimedLane>> = HashMap::new();
        for (n, token) in &answer.leased {
            let (Some(lane), Some(run)) = (plan.lanes.get(*n), plan.runs.get(*n)) else { continue };
            let Some(taker) = takers.iter().find(|taker| taker.subscription == lane.subscription) else { continue };
            let lease = LaneRef {
                subscription: lane.subscription,
                key: lane.key.clone(),
                token: *token,
                worker: taker.worker.to_string(),
            };
            let due = run.iter().take(taker.run as usize).take_while(|index| events[**index].due <= answer.now);
            let all = run.len();
            let run: Vec<&Waiting> = due.map(|index| &events[*index]).collect();
            if run.len() < all {
                unfinished.push(lane.subscription);
            }
            let mut claimed = ClaimedLane {
                lane: lease,
                attempts: 1,
                attempt_log: AttemptLog::default(),
                run: Vec::new(),
                unreadable: None,
            };
            if run.iter().all(|waiting| waiting.has_payload) {
                let first = run.first().map_or(0.0, |waiting| waiting.due);
                claimed.run = run.into_iter().filter_map(|waiting| waiting.event.clone()).collect();
                complete.push((first, claimed));
            } else {
                whole.insert((lane.subscription, lane.key.clone()), all);
                others.entry(lane.subscription).or_default().push(claimed);
            }
        }
        complete.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let mut leased: Vec<ClaimedLane> = complete.into_iter().map(|(_, lane)| lane).collect();
        for (subscription, lanes) in others {
            let run = takers.iter().find(|taker| taker.subscription == subscription).map_or(1, |taker| taker.run);
            let (_, run) = self.outbox.fitting(subscription, u32::try_from(lanes.len()).unwrap_or(u32::MAX), run);
            let given = lanes.len();
            let found = self.outbox.with_runs(lanes, |_| run).await?;
            let is_whole =
                |lane: &ClaimedLane| whole.get(&(subscription, lane.lane.key.clone())) == Some(&lane.run.len());
            if found.len() < given || !found.iter().all(is_whole) {
                unfinished.push(subscription);
            }
            leased.extend(found);
        }
        Ok((leased, unfinished))
    }

    /// Another process is at it; or its client is frozen, and the server has not noticed.
    async fn skipped(&mut self, sql: &RouteStatements) -> Result<Routed, DbErr> {
        let since = *self.skipped_since.get_or_insert_with(Instant::now);
        if since.elapsed() > STUCK_AFTER {
            self.skipped_since = None;
            let ended = self.outbox.query_all(self.outbox.store(), sql.end_stuck, []).await?;
            if !ended.is_empty() {
                tracing::warn!(sessions = ended.len(), "a session that has held up routing for 3 s was ended");
            }
        }
        Ok(Routed::nothing(NextLook::Soon))
    }

    /// The statement has failed: nothing is routed. What is about a lock, or about one event, holds up no others.
    async fn refused(
        &mut self,
        sql: &RouteStatements,
        plan: &Plan,
        events: &[Waiting],
        error: DbErr,
    ) -> Result<Done, DbErr> {
        let code = sqlstate(&error).unwrap_or_default();
        if code == LOCK_TIMEOUT {
            self.find_blocked(sql, plan, events).await?;
            return Ok(Done::Routed(Routed::nothing(NextLook::Soon)));
        }
        let about_data = code.starts_with("22") || code.starts_with("23") || code == "54000";
        if !about_data {
            return Err(error);
        }
        if plan.events.len() > 1 {
            self.size = plan.events.len().div_ceil(2);
        } else if self.rejected >= MOST_REJECTED {
            tracing::error!(%error, "routing stands still: one event after another is refused, so it is not about them");
            return Err(error);
        } else {
            let position = plan.last();
            tracing::error!(position, %error, "an event cannot be routed and is set aside");
            self.rejected += 1;
            let values = [position.into(), outbox_core::one_line(error.to_string()).into()];
            self.outbox.execute(self.outbox.store(), self.outbox.sql().set_aside, values).await?;
        }
        Ok(Done::Routed(Routed::nothing(NextLook::Now)))
    }

    /// After a lock timeout: finds out at once which lanes and marks are locked, and leaves them alone for a while.
    async fn find_blocked(&mut self, sql: &RouteStatements, plan: &Plan, events: &[Waiting]) -> Result<(), DbErr> {
        let (store, now) = (self.outbox.store(), Instant::now());
        let mut found = 0;
        for row in self.outbox.query_all(store, sql.held_lanes, [json(&plan.lanes)?.into()]).await? {
            let n: i32 = row.try_get("", "n")?;
            if let Some(lane) = usize::try_from(n).ok().and_then(|n| plan.lanes.get(n)) {
                self.blocked.insert((lane.subscription, lane.key.clone()), now);
                found += 1;
            }
        }
        let positions: Vec<i64> = plan.positions().collect();
        for row in self.outbox.query_all(store, sql.held_marks, [json(&positions)?.into()]).await? {
            self.blocked_marks.insert(row.try_get("", "position")?, now);
            found += 1;
        }
        tracing::debug!(found, "somebody has locked rows that routing needs; they wait, and what follows them");
        if found == 0 && plan.events.len() > 1 {
            // A lane that is being inserted cannot be seen.
            self.size = plan.events.len().div_ceil(2);
        } else if found == 0 {
            self.blocked_marks.insert(plan.last(), now);
            self.size = events.len().clamp(1, MOST);
        }
        Ok(())
    }

    fn forget_blocked(&mut self) {
        self.blocked.retain(|_, since| since.elapsed() < BLOCKED_FOR);
        self.blocked_marks.retain(|_, since| since.elapsed() < BLOCKED_FOR);
    }

    async fn raise_floor(&mut self, sql: &RouteStatements, walk: Duration) -> Result<(), DbErr> {
        if !self.floor.asks(walk, Instant::now()) {
            return Ok(());
        }
        let store = self.outbox.store();
        let rows = self.outbox.query_all(store, sql.writers, []).await?;
        let writers = rows.iter().map(|row| row.try_get("", "writer")).collect::<Result<HashSet<String>, _>>()?;
        let last = self.outbox.query_one(store, self.outbox.sql().last_position, []).await?;
        let last = last.map_or(Ok(None), |row| row.try_get::<Option<i64>>("", "last"))?.unwrap_or(0);
        if let Some(candidate) = self.floor.writers(writers, last) {
            let values = [self.floor.position().into(), candidate.into()];
            let found = self.outbox.query_one(store, self.outbox.sql().unrouted_until, values).await?;
            self.floor.walked(found.is_none());
        }
        Ok(())
    }
}

/// Marks of events that somebody has deleted: nobody knows whose they are, so an operator decides.
async fn set_gone_aside(outbox: &Outbox, db: &impl ConnectionTrait, events: &mut Vec<Waiting>) -> Result<(), DbErr> {
    for gone in events.extract_if(.., |waiting| waiting.event.is_none()) {
        tracing::error!(position = gone.position, "an event is gone before it was routed; its mark is set aside");
        let values = [gone.position.into(), "the event's row is gone".into()];
        outbox.execute(db, outbox.sql().set_aside, values).await?;
    }
    Ok(())
}

/// PostgreSQL's code for a lock that was not there in time.
const LOCK_TIMEOUT: &str = "55P03";

fn sqlstate(error: &DbErr) -> Option<String> {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return None;
    };
    let error = error.as_database_error().map(sqlx::error::DatabaseError::code)?;
    error.map(std::borrow::Cow::into_owned)
}

#[derive(Serialize)]
struct TakerRow<'a> {
    subscription: i32,
    worker: &'a str,
    lanes: u32,
    lease: f64,
    #[serde(skip)]
    passed: &'a [String],
}

impl TakerRow<'_> {
    fn passes(&self, lane: &plan::LaneRow) -> bool {
        lane.tenant.as_ref().is_some_and(|tenant| self.passed.contains(tenant))
    }
}

/// A lane, and whether nobody takes it because of its tenant.
#[derive(Serialize)]
struct PlannedLane<'a> {
    #[serde(flatten)]
    lane: &'a plan::LaneRow,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    passed: bool,
}

impl<'a> PlannedLane<'a> {
    fn of(lane: &'a plan::LaneRow, takers: &[TakerRow<'_>]) -> Self {
        let passed = takers.iter().any(|taker| taker.subscription == lane.subscription && taker.passes(lane));
        Self { lane, passed }
    }
}

/// A lane of a single event, and who leases it if it is new.
#[derive(Serialize)]
struct OneLane<'a> {
    subscription: i32,
    key: &'a str,
    tenant: Option<&'a str>,
    token: i64,
    worker: Option<&'a str>,
    lease: f64,
}

impl<'a> OneLane<'a> {
    fn of(lane: &'a plan::LaneRow, takers: &[TakerRow<'a>]) -> Self {
        let taker = takers.iter().find(|taker| taker.subscription == lane.subscription);
        let taker = taker.filter(|taker| taker.lanes > 0 && !taker.passes(lane));
        Self {
            subscription: lane.subscription,
            key: &lane.key,
            tenant: lane.tenant.as_deref(),
            // As the database draws them: there is room for all that are counted up from it.
            token: fastrand::i64(0..4_000_000_000_000_000_000),
            worker: taker.map(|taker| taker.worker),
            lease: taker.map_or(0.0, |taker| taker.lease),
        }
    }
}

/// What the statement answers.
#[derive(Debug)]
struct Answer {
    generation: i64,
    locked: bool,
    complete: bool,
    taken: usize,
    /// In seconds, by the database's clock.
    now: f64,
    /// New lanes, by their number, with their tokens.
    leased: Vec<(usize, i64)>,
    /// Subscriptions of which other lanes have got something.
    others: Vec<i32>,
}

impl Answer {
    /// `None` if the row of `outbox_meta` is missing.
    fn read(row: &QueryResult) -> Result<Option<Self>, DbErr> {
        let Some(generation) = row.try_get("", "generation")? else { return Ok(None) };
        Ok(Some(Self {
            generation,
            locked: row.try_get("", "locked")?,
            complete: row.try_get("", "complete")?,
            taken: usize::try_from(row.try_get::<i64>("", "taken")?).unwrap_or(0),
            now: row.try_get("", "now")?,
            leased: Vec::new(),
            others: Vec::new(),
        }))
    }

    fn of_many(row: &QueryResult) -> Result<Option<Self>, DbErr> {
        let Some(answer) = Self::read(row)? else { return Ok(None) };
        Ok(Some(Self { leased: list(row, "leased")?, others: list(row, "others")?, ..answer }))
    }

    fn of_one(rows: &[QueryResult], lanes: &[OneLane<'_>]) -> Result<Option<Self>, DbErr> {
        let Some(mut answer) = Self::read(rows.first().ok_or_else(no_answer)?)? else { return Ok(None) };
        for row in rows {
            let Some(subscription) = row.try_get::<Option<i32>>("", "subscription_id")? else { continue };
            let token: i64 = row.try_get("", "lease_token")?;
            let leased = row.try_get("", "leased")?;
            let new = lanes.iter().position(|lane| lane.subscription == subscription && lane.token == token);
            match new.filter(|_| leased) {
                Some(lane) => answer.leased.push((lane, token)),
                None => answer.others.push(subscription),
            }
        }
        Ok(Some(answer))
    }
}

fn no_answer() -> DbErr {
    DbErr::RecordNotFound("the answer of routing".to_owned())
}

fn list<T: serde::de::DeserializeOwned>(row: &QueryResult, column: &str) -> Result<Vec<T>, DbErr> {
    let text: Option<String> = row.try_get("", column)?;
    text.map_or(Ok(Vec::new()), |text| serde_json::from_str(&text).map_err(|error| DbErr::Json(error.to_string())))
}

impl From<Committed> for Waiting {
    fn from(Committed { event, due }: Committed) -> Self {
        Self { position: event.position, event: Some(event), has_payload: true, due }
    }
}

impl Waiting {
    fn into_committed(self) -> Option<Committed> {
        let due = self.due;
        self.event.filter(|_| self.has_payload).map(|event| Committed { event, due })
    }

    /// A mark with its whole event; with what routing needs of it, if the payload was too large to come along.
    fn read_whole(row: &QueryResult) -> Result<Self, DbErr> {
        let Ok(event) = recorded(row) else { return Self::read(row) };
        Ok(Self { position: row.try_get("", "mark")?, event: Some(event), has_payload: true, due: due(row) })
    }

    /// A mark with what routing needs of its event. What cannot be read of a damaged row is as if it were not there.
    pub(crate) fn read(row: &QueryResult) -> Result<Self, DbErr> {
        let position = row.try_get("", "mark")?;
        let found = row.try_get::<Option<i64>>("", "position")?;
        let event = found.map(|position| {
            let text = |column: &str| row.try_get::<Option<String>>("", column).ok().flatten();
            let tags = text("tags").and_then(|tags| serde_json::from_str(&tags).ok());
            RecordedEvent {
                position,
                id: row.try_get("", "event_id").unwrap_or_default(),
                event_type: text("event_type").unwrap_or_default(),
                schema_version: 0,
                aggregate_type: text("aggregate_type").unwrap_or_default(),
                aggregate_id: text("aggregate_id").unwrap_or_default(),
                payload: String::new(),
                occurred_at: chrono::DateTime::UNIX_EPOCH,
                recorded_at: chrono::DateTime::UNIX_EPOCH,
                tenant: text("tenant"),
                actor: None,
                correlation_id: None,
                causation_id: None,
                traceparent: None,
                tracestate: None,
                tags: tags.unwrap_or_default(),
                max_attempts: None,
            }
        });
        Ok(Self { position, event, has_payload: false, due: due(row) })
    }
}

fn due(row: &QueryResult) -> f64 {
    row.try_get::<Option<f64>>("", "due").ok().flatten().unwrap_or(0.0)
}

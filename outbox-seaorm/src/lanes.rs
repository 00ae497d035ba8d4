use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use outbox_core::{
    AttemptLog, RecordedEvent,
    store::{Claim, ClaimedLane, LaneRef, LaneReport, Next, NextDue, Settled, Unreadable},
};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, QueryResult};
use serde::Serialize;

use crate::{
    Outbox,
    deliveries::recorded,
    flush::{json, seconds},
    sql::{Settle, SettleSteps},
};

/// When to try again what a probe could not even begin.
const PROBE_AGAIN: Duration = Duration::from_millis(100);

/// How long claims go on from where the one before has ended, at most, without a look at what came to lie behind.
const MARK_LASTS: Duration = Duration::from_secs(1);

/// How large the payloads of one claim are together, if there is more than one: what a claim takes of the memory is a
/// few times as much.
const CLAIM_BYTES: usize = 8 << 20;

/// Where a claim has ended. PostgreSQL keeps entries of the lanes that were claimed in the index, all of them as long as
/// anybody has an older snapshot; the next claim need not walk over them.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    due_at: DateTime<Utc>,
    key: String,
    /// When a claim last began with the lane that was due longest.
    since: Instant,
}

#[derive(Serialize)]
struct FinishedRow<'a> {
    subscription: i32,
    key: &'a str,
    position: i64,
    attempts: u32,
    log: Option<String>,
    error: Option<&'a str>,
}

/// A finished delivery and the index of its lease.
#[derive(Serialize)]
struct LeasedRow<'a> {
    lease: usize,
    position: i64,
    attempts: u32,
    log: Option<String>,
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct LaneRow<'a> {
    subscription: i32,
    key: &'a str,
    token: i64,
    worker: &'a str,
    finished: usize,
    next: &'static str,
    attempts: u32,
    wait: f64,
    error: Option<&'a str>,
    log: Option<String>,
    held_at: Option<i64>,
}

impl<'a> From<&'a LaneReport> for LaneRow<'a> {
    fn from(report: &'a LaneReport) -> Self {
        let (next, attempts, wait, error, log) = match &report.next {
            Next::Keep => ("keep", 1, 0.0, None, None),
            Next::Yield => ("yield", 0, 0.0, None, None),
            Next::Hold { .. } => ("hold", 0, 0.0, None, None),
            Next::Release { attempts, log } => ("release", *attempts, 0.0, None, log.to_json()),
            Next::Retry { after, attempts, error, log } => {
                ("retry", *attempts, seconds(*after), Some(error.as_str()), log.to_json())
            }
        };
        let held_at = if let Next::Hold { position } = report.next { Some(position) } else { None };
        let LaneRef { subscription, key, token, worker } = &report.lane;
        Self {
            subscription: *subscription,
            key,
            token: *token,
            worker,
            finished: 0,
            next,
            attempts,
            wait,
            error,
            log,
            held_at,
        }
    }
}

/// What claims differ in.
#[derive(Clone, Copy)]
struct How<'a> {
    /// How many attempts to count.
    attempts: i32,
    probe: bool,
    mark: Option<&'a Mark>,
}

const ATTEMPT: How<'static> = How { attempts: 1, probe: false, mark: None };

/// Behind the name of a relay, so that its leases can be taken over and those of workers cannot. The statements know it.
pub(crate) const OF_RELAY: &str = " (relay)";

/// An outbox among others.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Instance {
    /// A name that no other outbox has, for what several of them share.
    pub name: String,
    /// The database's time.
    pub now: DateTime<Utc>,
}

impl Outbox {
    /// Leases up to `lanes` lanes that are due, oldest first, with up to `run` deliveries of each. It ends earlier when
    /// the payloads are 8 MiB together: it may so find fewer lanes than are due.
    ///
    /// The attempt of each first delivery is counted here, so one that kills its worker is counted too. A lane whose
    /// first delivery was tried before comes with that one alone. While the subscription's circuit is open nothing is
    /// leased; when its time has come one caller gets one lane, as a [probe](Claim::probe). Asked for no lanes, it only says
    /// when the next is due.
    ///
    /// # Errors
    ///
    /// If the database fails; what was leased until then is due again when its lease ends.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future may leave lanes leased until their lease ends. Run it in a task of its own.
    pub async fn claim(
        &self,
        subscription: i32,
        worker: &str,
        lanes: u32,
        run: u32,
        lease: Duration,
    ) -> Result<Claim, DbErr> {
        self.claim_from(None, subscription, worker, lanes, run, lease).await
    }

    /// As [`claim`](Self::claim), from where the last claim of this process has ended.
    ///
    /// Lanes may come to lie behind that: with a commit that took long, a priority, or more deliveries than fit in a run.
    /// They are found when nothing is left before it, and at the latest after a second: then it looks at all.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # Cancel safety
    ///
    /// As [`claim`](Self::claim).
    pub async fn claim_on(
        &self,
        subscription: i32,
        worker: &str,
        lanes: u32,
        run: u32,
        lease: Duration,
    ) -> Result<Claim, DbErr> {
        let mark = self.take_mark(subscription).filter(|mark| mark.since.elapsed() < MARK_LASTS);
        self.claim_from(mark, subscription, worker, lanes, run, lease).await
    }

    async fn claim_from(
        &self,
        mark: Option<Mark>,
        subscription: i32,
        worker: &str,
        lanes: u32,
        run: u32,
        lease: Duration,
    ) -> Result<Claim, DbErr> {
        let how = How { mark: mark.as_ref(), ..ATTEMPT };
        let (mut claim, mut next) = self.claim_counting(subscription, worker, lanes, run, lease, how).await?;
        if mark.is_some() && claim.lanes.is_empty() {
            (claim, next) = self.claim_counting(subscription, worker, lanes, run, lease, ATTEMPT).await?;
        }
        self.set_mark(subscription, next);
        Ok(claim)
    }

    /// As [`claim`](Self::claim), without counting an attempt and without the deliveries: for a relay, which hands the
    /// lanes to workers that [take them over](Self::take_over). Only such leases can be taken over.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # Cancel safety
    ///
    /// As [`claim`](Self::claim).
    pub async fn claim_for_relay(
        &self,
        subscription: i32,
        relay: &str,
        lanes: u32,
        lease: Duration,
    ) -> Result<Claim, DbErr> {
        let relay = format!("{relay}{OF_RELAY}");
        let how = How { attempts: 0, ..ATTEMPT };
        Ok(self.claim_counting(subscription, &relay, lanes, 0, lease, how).await?.0)
    }

    async fn claim_counting(
        &self,
        subscription: i32,
        worker: &str,
        lanes: u32,
        run: u32,
        lease: Duration,
        how: How<'_>,
    ) -> Result<(Claim, Option<Mark>), DbErr> {
        // On SQLite a claim that finds nothing takes the write lock all the same, so it is asked first.
        let asks_first = self.backend() == DbBackend::Sqlite || lanes == 0;
        if !asks_first {
            let (lanes, mark) = self.claim_lanes(subscription, worker, lanes, run, lease, how).await?;
            if !lanes.is_empty() {
                return Ok((Claim { lanes, ..Claim::default() }, mark));
            }
        }
        let next = self.next_due(subscription).await?;
        let nothing = Claim { next, ..Claim::default() };
        let Some(NextDue { after: Some(Duration::ZERO), circuit }) = next.filter(|_| lanes > 0) else {
            return Ok((nothing, None));
        };
        let Some(failures) = circuit else {
            if !asks_first {
                return Ok((nothing, None));
            }
            let (lanes, _) = self.claim_lanes(subscription, worker, lanes, run, lease, how).await?;
            return Ok((Claim { lanes, ..nothing }, None));
        };
        let values = [subscription.into(), seconds(lease).into()];
        if self.execute(self.store(), self.sql().take_probe, values).await? == 0 {
            // Another worker probes.
            return Ok((Claim { next: self.next_due(subscription).await?, ..nothing }, None));
        }
        let how = How { probe: true, ..how };
        let (lanes, _) = self.claim_lanes(subscription, worker, 1, run.min(1), lease, how).await?;
        if lanes.is_empty() {
            // Somebody holds the lanes at this moment: nothing was found out.
            tracing::debug!(subscription, failures, "nothing to probe the destination with");
            self.open_circuit(subscription, PROBE_AGAIN, false).await?;
        }
        Ok((Claim { probe: !lanes.is_empty(), lanes, ..nothing }, None))
    }

    async fn claim_lanes(
        &self,
        subscription: i32,
        worker: &str,
        lanes: u32,
        run: u32,
        lease: Duration,
        How { attempts, probe, mark }: How<'_>,
    ) -> Result<(Vec<ClaimedLane>, Option<Mark>), DbErr> {
        let begun = Instant::now();
        let (lanes, run) = self.fitting(subscription, lanes, run);
        let lease = seconds(lease).into();
        let (after, key) = (mark.map(|mark| mark.due_at), mark.map_or("", |mark| &mark.key));
        let values = [
            subscription.into(),
            lanes.into(),
            lease,
            worker.into(),
            probe.into(),
            attempts.into(),
            after.into(),
            key.into(),
        ];
        let rows = self.query_all(self.store(), self.sql().claim, values).await?;
        if rows.is_empty() {
            return Ok((Vec::new(), None));
        }
        let is_full = rows.len() >= lanes as usize;
        let since = mark.map_or(begun, |mark| mark.since);
        let mut next = None;
        let mut claimed = Vec::with_capacity(rows.len());
        for row in &rows {
            let lane = leased(subscription, row)?;
            if is_full && let Some(due_at) = row.try_get("", "was_due_at")? {
                next = Some(Mark { due_at, key: lane.lane.key.clone(), since });
            }
            claimed.push(lane);
        }
        if run == 0 {
            return Ok((claimed, next));
        }
        Ok((self.with_runs(subscription, claimed, run).await?, next))
    }

    /// Leased lanes with their first deliveries. Those that have nothing due are given back.
    pub(crate) async fn with_runs(
        &self,
        subscription: i32,
        lanes: Vec<ClaimedLane>,
        run: u32,
    ) -> Result<Vec<ClaimedLane>, DbErr> {
        let order = (f64::INFINITY, i64::MAX);
        let mut claimed: HashMap<String, _> =
            lanes.into_iter().map(|lane| (lane.lane.key.clone(), (order, lane))).collect();
        let keys: Vec<&String> = claimed.keys().collect();
        // A statement of its own: what it sees is from after the claim, so nothing that was finished before.
        let values = [subscription.into(), json(&keys)?.into(), run.into(), (CLAIM_BYTES as i64).into()];
        let rows = self.query_all(self.store_reader(), self.sql().runs, values).await?;
        let mut complete = Vec::with_capacity(claimed.len());
        for row in &rows {
            let key: String = row.try_get("", "key")?;
            let Some((order, lane)) = claimed.get_mut(&key) else { continue };
            // A lease that ended without a result may mean that the head kills its worker: nothing else goes with it.
            let tried_before = lane.attempts > 1 && !lane.run.is_empty();
            // What waits for its time holds back all that comes after it.
            if tried_before || !row.try_get::<bool>("", "due")? {
                complete.extend(claimed.remove(&key));
                continue;
            }
            let position = row.try_get("", "queued")?;
            if lane.run.is_empty() {
                *order = (row.try_get("", "since")?, position);
            }
            match recorded(row) {
                Ok(event) => lane.run.push(event),
                Err(error) => {
                    if lane.run.is_empty() {
                        let missing = row.try_get::<Option<i64>>("", "position").is_ok_and(|found| found.is_none());
                        let error =
                            if missing { "the event's row cannot be read: it is gone".to_owned() } else { error };
                        lane.unreadable = Some(Unreadable { position, error });
                    }
                    // Its turn comes when it is the head.
                    complete.extend(claimed.remove(&key));
                }
            }
        }
        complete.extend(claimed.into_values());
        self.note_size(subscription, complete.iter().flat_map(|(_, lane)| &lane.run));
        let (mut complete, empty): (Vec<_>, Vec<_>) =
            complete.into_iter().partition(|(_, lane)| !lane.run.is_empty() || lane.unreadable.is_some());
        self.give_back(empty.into_iter().map(|(_, lane)| lane)).await?;
        complete.sort_by(|((since_a, a), _), ((since_b, b), _)| since_a.total_cmp(since_b).then(a.cmp(b)));
        Ok(complete.into_iter().map(|(_, lane)| lane).collect())
    }

    /// How many lanes to claim, and how much of each, so that about as much comes as one claim may carry, if events are as
    /// large as those of the claim before.
    pub(crate) fn fitting(&self, subscription: i32, lanes: u32, run: u32) -> (u32, u32) {
        let events = self
            .claimed_size(subscription)
            .map_or(u32::MAX, |size| u32::try_from(CLAIM_BYTES / size.max(1)).unwrap_or(u32::MAX).max(1));
        let lanes = lanes.min(events);
        (lanes, run.min((events / lanes.max(1)).max(1)))
    }

    fn note_size<'a>(&self, subscription: i32, events: impl Iterator<Item = &'a RecordedEvent>) {
        let (events, bytes) =
            events.fold((0_usize, 0_usize), |(events, bytes), event| (events + 1, bytes + event.payload.len()));
        if let Some(size) = bytes.checked_div(events) {
            self.set_claimed_size(subscription, size);
        }
    }

    /// Gives back lanes of which nothing came along: their head waits for its time, or the claim was too large.
    async fn give_back(&self, lanes: impl Iterator<Item = ClaimedLane>) -> Result<(), DbErr> {
        let reports: Vec<LaneReport> = lanes
            .map(|lane| {
                let next = Next::Release { attempts: lane.attempts.saturating_sub(1), log: lane.attempt_log };
                LaneReport { lane: lane.lane, finished: Vec::new(), next }
            })
            .collect();
        if !reports.is_empty() {
            self.settle(&reports).await?;
        }
        Ok(())
    }

    /// When the next lane of a subscription can be claimed, by the database's clock; `None` if the subscription is paused,
    /// is still being filled, or does not exist.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn next_due(&self, subscription: i32) -> Result<Option<NextDue>, DbErr> {
        let row = self.query_one(self.store_reader(), self.sql().next_due, [subscription.into()]).await?;
        let Some(row) = row else { return Ok(None) };
        let wait = |seconds: f64| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
        let due = row.try_get::<Option<f64>>("", "seconds")?.map(wait);
        let closed_for = row.try_get::<Option<f64>>("", "circuit_seconds")?.map(wait);
        let failures = row.try_get::<i32>("", "circuit_failures")?.unsigned_abs();
        let after = due.map(|due| due.max(closed_for.unwrap_or_default()));
        Ok(Some(NextDue { after, circuit: closed_for.map(|_| failures) }))
    }

    /// The destination of a subscription is down: no process claims for it until `wait` has passed, and then one process
    /// one lane. `failed` counts towards how often it was found down in a row.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn open_circuit(&self, subscription: i32, wait: Duration, failed: bool) -> Result<(), DbErr> {
        let values = [subscription.into(), seconds(wait).into(), i32::from(failed).into()];
        self.execute(self.store(), self.sql().open_circuit, values).await.map(|_| ())
    }

    /// The destination of a subscription has answered: everything may be claimed again.
    ///
    /// # Errors
    ///
    /// If the database fails.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether it is stored.
    pub async fn close_circuit(&self, subscription: i32) -> Result<(), DbErr> {
        self.execute(self.store(), self.sql().close_circuit, [subscription.into()]).await.map(|_| ())
    }

    /// Stores what happened in leased lanes, all in one transaction: finished deliveries move to the history or to the
    /// dead letters, and each lane gets its next due time. The answers are in the order of the reports.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is stored then and the same reports can be given again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether the reports are stored. Run it in a task of its own.
    pub async fn settle(&self, reports: &[LaneReport]) -> Result<Vec<Settled>, DbErr> {
        if let Settle::AtOnce(sql) = self.sql().settle {
            return settle_at_once(self, self.store(), reports, sql).await;
        }
        let tx = self.begin_write().await?;
        let settled = settle_in(self, &tx, reports).await?;
        tx.commit().await?;
        Ok(settled)
    }

    /// Takes over leases of this subscription from a relay: each gets a new token, so nobody else can take it over again, a
    /// new end, and the attempt is counted. What is to be delivered comes from the database, as with [`claim`](Self::claim).
    /// Lanes that are missing in the answer were lost, belong to another subscription, have nothing due, or a commit holds
    /// them at this moment; [`relayed`](Self::relayed) tells which.
    ///
    /// # Errors
    ///
    /// If the database fails; the leases end when they would have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether the leases are taken over. Run it in a task of its own.
    pub async fn take_over(
        &self,
        subscription: i32,
        worker: &str,
        lanes: &[LaneRef],
        run: u32,
        lease: Duration,
    ) -> Result<Vec<ClaimedLane>, DbErr> {
        let own: Vec<LaneRef> = lanes.iter().filter(|lane| lane.subscription == subscription).cloned().collect();
        let values = [leases(&own)?.into(), seconds(lease).into(), worker.into()];
        let rows = self.query_all(self.store(), self.sql().take_over, values).await?;
        let taken: Vec<_> = rows.iter().map(|row| leased(subscription, row)).collect::<Result<_, _>>()?;
        if taken.is_empty() {
            return Ok(taken);
        }
        let (_, run) = self.fitting(subscription, u32::try_from(taken.len()).unwrap_or(u32::MAX), run);
        self.with_runs(subscription, taken, run).await
    }

    /// Returns the leases that are still a relay's.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn relayed(&self, lanes: &[LaneRef]) -> Result<Vec<LaneRef>, DbErr> {
        self.still(self.sql().relayed, lanes).await
    }

    /// The name of this outbox, and the database's time.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn instance(&self) -> Result<Instance, DbErr> {
        let row = self.query_one(self.store_reader(), self.sql().instance, []).await?;
        let row = row.ok_or_else(|| DbErr::RecordNotFound("outbox_meta".to_owned()))?;
        Ok(Instance { name: row.try_get("", "instance")?, now: row.try_get("", "now")? })
    }

    /// Extends leases to `lease` from now and returns those that were extended. The others were taken over, or a commit
    /// holds their lanes at this moment; [`held`](Self::held) tells which.
    ///
    /// # Errors
    ///
    /// If the database fails; the leases end when they would have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether the leases are extended.
    pub async fn renew(&self, lanes: &[LaneRef], lease: Duration) -> Result<Vec<LaneRef>, DbErr> {
        let values = [leases(lanes)?.into(), seconds(lease).into()];
        let extended = lane_refs(&self.query_all(self.store(), self.sql().renew, values).await?)?;
        Ok(lanes.iter().filter(|lane| extended.contains(lane)).cloned().collect())
    }

    /// Stores attempt logs of lanes' heads before their attempts begin, so that a crash leaves a trace of them, and returns
    /// the leases of those that are stored. The others were taken over, or a commit holds their lanes at this moment;
    /// [`held`](Self::held) tells which.
    ///
    /// # Errors
    ///
    /// If the database fails; nothing is stored then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves open whether the logs are stored.
    pub async fn note_attempts(&self, notes: &[(LaneRef, AttemptLog)]) -> Result<HashSet<LaneRef>, DbErr> {
        let notes: Vec<_> = notes
            .iter()
            .map(|(LaneRef { subscription, key, token, worker }, log)| {
                serde_json::json!({
                    "subscription": subscription, "key": key, "token": token, "worker": worker, "log": log.to_json(),
                })
            })
            .collect();
        lane_refs(&self.query_all(self.store(), self.sql().note_attempts, [json(&notes)?.into()]).await?)
    }

    /// Returns the leases that nobody has taken over and their holder has not ended.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn held(&self, lanes: &[LaneRef]) -> Result<Vec<LaneRef>, DbErr> {
        self.still(self.sql().held, lanes).await
    }

    async fn still(&self, sql: &'static str, lanes: &[LaneRef]) -> Result<Vec<LaneRef>, DbErr> {
        let rows = self.query_all(self.store_reader(), sql, [leases(lanes)?.into()]).await?;
        let held = rows.iter().map(|row| {
            let index: i64 = row.try_get("", "report")?;
            Ok(usize::try_from(index).ok().and_then(|index| lanes.get(index)).cloned())
        });
        held.filter_map(Result::transpose).collect()
    }
}

/// A lane as the statements lease it, without what is to be delivered.
fn leased(subscription: i32, row: &QueryResult) -> Result<ClaimedLane, DbErr> {
    let log: Option<String> = row.try_get("", "attempt_log")?;
    Ok(ClaimedLane {
        lane: LaneRef {
            subscription,
            key: row.try_get("", "key")?,
            token: row.try_get("", "lease_token")?,
            worker: row.try_get("", "leased_by")?,
        },
        attempts: row.try_get::<i32>("", "attempts")?.unsigned_abs(),
        attempt_log: log.map_or_else(AttemptLog::default, |log| AttemptLog::parse(&log)),
        run: Vec::new(),
        unreadable: None,
    })
}

/// Leases as the statements take them.
fn leases(lanes: &[LaneRef]) -> Result<String, DbErr> {
    json(lanes)
}

/// Leases as the statements return them.
fn lane_refs(rows: &[QueryResult]) -> Result<HashSet<LaneRef>, DbErr> {
    rows.iter().map(lane_ref).collect()
}

fn lane_ref(row: &QueryResult) -> Result<LaneRef, DbErr> {
    Ok(LaneRef {
        subscription: row.try_get("", "subscription_id")?,
        key: row.try_get("", "key")?,
        token: row.try_get("", "lease_token")?,
        worker: row.try_get("", "leased_by")?,
    })
}

pub(crate) async fn settle_in(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    reports: &[LaneReport],
) -> Result<Vec<Settled>, DbErr> {
    match &outbox.sql().settle {
        Settle::AtOnce(sql) => settle_at_once(outbox, tx, reports, sql).await,
        Settle::InSteps(steps) => settle_in_steps(outbox, tx, reports, steps).await,
    }
}

async fn settle_at_once(
    outbox: &Outbox,
    db: &impl ConnectionTrait,
    reports: &[LaneReport],
    sql: &'static str,
) -> Result<Vec<Settled>, DbErr> {
    let mut leases: Vec<LaneRow<'_>> = Vec::with_capacity(reports.len());
    let mut indexes: HashMap<&LaneRef, usize> = HashMap::with_capacity(reports.len());
    let mut finished = Vec::with_capacity(reports.len());
    let mut lease_of = Vec::with_capacity(reports.len());
    for report in reports {
        let index = *indexes.entry(&report.lane).or_insert(leases.len());
        // A lane advances once, to where its last report says, however many there are of it.
        match leases.get_mut(index) {
            Some(lease) => *lease = LaneRow::from(report),
            None => leases.push(LaneRow::from(report)),
        }
        lease_of.push(index);
        finished.extend(report.finished.iter().map(|delivery| LeasedRow {
            lease: index,
            position: delivery.position,
            attempts: delivery.attempts,
            log: delivery.log.to_json(),
            error: delivery.error.as_deref(),
        }));
    }
    let mut settled = vec![Settled::Superseded; leases.len()];
    for row in outbox.query_all(db, sql, [json(&leases)?.into(), json(&finished)?.into()]).await? {
        let lease: i64 = row.try_get("", "lease")?;
        if let Some(settled) = usize::try_from(lease).ok().and_then(|lease| settled.get_mut(lease)) {
            *settled = if row.try_get("", "done")? { Settled::Done } else { Settled::Busy };
        }
    }
    Ok(lease_of.into_iter().map(|lease| settled[lease]).collect())
}

/// Where nobody else can write while this does: what is held is as good as locked.
async fn settle_in_steps(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    reports: &[LaneReport],
    steps: &SettleSteps,
) -> Result<Vec<Settled>, DbErr> {
    let lanes: Vec<LaneRow<'_>> = reports.iter().map(LaneRow::from).collect();
    let mut settled = vec![Settled::Superseded; reports.len()];
    for row in outbox.query_all(tx, outbox.sql().held, [json(&lanes)?.into()]).await? {
        let report: i64 = row.try_get("", "report")?;
        if let Some(settled) = usize::try_from(report).ok().and_then(|report| settled.get_mut(report)) {
            *settled = Settled::Done;
        }
    }
    let held = |index: &usize| settled[*index] == Settled::Done;
    let finished: Vec<FinishedRow<'_>> = (0..reports.len())
        .filter(held)
        .flat_map(|index| {
            let LaneReport { lane, finished, .. } = &reports[index];
            finished.iter().map(move |delivery| FinishedRow {
                subscription: lane.subscription,
                key: &lane.key,
                position: delivery.position,
                attempts: delivery.attempts,
                log: delivery.log.to_json(),
                error: delivery.error.as_deref(),
            })
        })
        .collect();
    let moved = finish(outbox, tx, finished, steps).await?;
    // A lane advances once, to where its last report says, however many there are of it.
    let mut advanced: HashMap<(i32, &str), LaneRow<'_>> = HashMap::with_capacity(lanes.len());
    for (_, lane) in lanes.into_iter().enumerate().filter(|(index, _)| held(index)) {
        advanced.insert((lane.subscription, lane.key), lane);
    }
    for (subscription, key) in &moved {
        if let Some(lane) = advanced.get_mut(&(*subscription, key.as_str())) {
            lane.finished += 1;
        }
    }
    if !advanced.is_empty() {
        let advanced = json(&advanced.values().collect::<Vec<_>>())?;
        outbox.execute(tx, steps.advance_lanes, [advanced.as_str().into()]).await?;
        outbox.execute(tx, outbox.sql().delete_empty_lanes, [advanced.into()]).await?;
    }
    Ok(settled)
}

/// Moves deliveries to the history or to the dead letters, and returns the lane of each that was moved. A commit whose
/// answer was lost is reported again: what is gone already is not moved, and not subtracted from its lane, a second time.
async fn finish(
    outbox: &Outbox,
    tx: &DatabaseTransaction,
    mut finished: Vec<FinishedRow<'_>>,
    steps: &SettleSteps,
) -> Result<Vec<(i32, String)>, DbErr> {
    if finished.is_empty() {
        return Ok(Vec::new());
    }
    let deleted = outbox.query_all(tx, steps.delete_deliveries, [json(&finished)?.into()]).await?;
    let gone = deleted
        .iter()
        .map(|row| Ok((row.try_get("", "subscription_id")?, row.try_get("", "position")?)))
        .collect::<Result<HashSet<(i32, i64)>, DbErr>>()?;
    finished.retain(|delivery| gone.contains(&(delivery.subscription, delivery.position)));
    let dead = finished.iter().any(|delivery| delivery.error.is_some());
    let finished = json(&finished)?;
    outbox.execute(tx, steps.insert_delivered, [finished.as_str().into()]).await?;
    if dead {
        outbox.execute(tx, steps.insert_dead_letters, [finished.into()]).await?;
    }
    deleted.iter().map(|row| Ok((row.try_get("", "subscription_id")?, row.try_get("", "key")?))).collect()
}

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use chrono::{DateTime, Utc};
use outbox_core::{
    AttemptLog,
    store::{ClaimedLane, LaneRef, LaneReport, Next, Settled},
};
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbErr, QueryResult};
use serde::Serialize;

use crate::{
    Outbox,
    claim::leased,
    flush::{json, seconds},
    sql::{Settle, SettleSteps},
};

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
        let taken: Vec<_> = rows.iter().map(leased).collect::<Result<_, _>>()?;
        if taken.is_empty() {
            return Ok(taken);
        }
        let (_, run) = self.fitting(subscription, u32::try_from(taken.len()).unwrap_or(u32::MAX), run);
        self.with_runs(taken, |_| run).await
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

/// Leases as the statements take them.
fn leases(lanes: &[LaneRef]) -> Result<String, DbErr> {
    json(lanes)
}

/// Leases as the statements return them.
fn lane_refs(rows: &[QueryResult]) -> Result<HashSet<LaneRef>, DbErr> {
    rows.iter().map(lane_ref).collect()
}

pub(crate) fn lane_ref(row: &QueryResult) -> Result<LaneRef, DbErr> {
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

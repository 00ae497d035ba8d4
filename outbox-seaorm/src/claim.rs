//! Claims: lanes that are due are leased to a worker or a relay, those of many subscriptions in one statement.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use outbox_core::{
    AttemptLog, RecordedEvent,
    store::{Claim, ClaimedLane, Holder, LaneRef, LaneReport, NextDue, Unreadable, Wanted},
};
use sea_orm::{DbBackend, DbErr, QueryResult};
use serde::Serialize;

use crate::{
    Outbox,
    deliveries::recorded,
    flush::{json, seconds},
    lanes::lane_ref,
};

/// When to try again what a probe could not even begin.
const PROBE_AGAIN: Duration = Duration::from_millis(100);

/// How long claims go on from where the one before has ended, at most, without a look at what came to lie behind.
const MARK_LASTS: Duration = Duration::from_secs(1);

/// How large the payloads of one claim are together, if there is more than one: what a claim takes of the memory is a
/// few times as much. Each of many subscriptions has its share, and this at least.
const CLAIM_BYTES: usize = 8 << 20;
const LEAST_BYTES: usize = 64 << 10;

/// Behind the name of a relay, so that its leases can be taken over and those of workers cannot. The statements know it.
pub(crate) const OF_RELAY: &str = " (relay)";

/// Where a claim has ended. PostgreSQL keeps entries of the lanes that were claimed in the index, all of them as long as
/// anybody has an older snapshot; the next claim need not walk over them.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    due_at: DateTime<Utc>,
    key: String,
    /// When a claim last began with the lane that was due longest.
    since: Instant,
}

/// What is asked of one subscription.
#[derive(Clone, Debug)]
struct Asked {
    wanted: Wanted,
    mark: Option<Mark>,
    probe: bool,
}

/// The same, as the statement takes it.
#[derive(Serialize)]
struct AskedRow<'a> {
    subscription: i32,
    lanes: u32,
    probe: bool,
    after: Option<DateTime<Utc>>,
    key: &'a str,
}

/// What a claim has found of one subscription.
#[derive(Debug, Default)]
struct Answer {
    claim: Claim,
    /// Where it has ended, if there may be more.
    mark: Option<Mark>,
}

/// A claim counts an attempt of each lane, that of a relay does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    Attempts,
    Nothing,
}

#[derive(Serialize)]
struct RunRow<'a> {
    subscription: i32,
    key: &'a str,
    run: u32,
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
        let wanted = Wanted { subscription, lanes, run, all: true, ..Wanted::default() };
        let claims = self.claim_of(Holder { worker, lease }, &[wanted]).await?;
        Ok(claims.into_iter().next().unwrap_or_default())
    }

    /// As [`claim`](Self::claim), of several subscriptions at once. The answers are in the order of what is wanted, where
    /// a subscription stands once.
    ///
    /// Unless [all](Wanted::all) lanes are to be looked at, it goes on where the last claim of this process has ended. Lanes
    /// may come to lie behind that: with a commit that took long, a priority, or more deliveries than fit in a run. They are
    /// found when nothing is left before it, and at the latest after a second: then it looks at all.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    ///
    /// # Cancel safety
    ///
    /// As [`claim`](Self::claim).
    pub async fn claim_of(&self, holder: Holder<'_>, wanted: &[Wanted]) -> Result<Vec<Claim>, DbErr> {
        let asked: Vec<Asked> = wanted
            .iter()
            .map(|wanted| Asked { wanted: wanted.clone(), mark: self.usable_mark(wanted), probe: false })
            .collect();
        let mut answers = self.claim_counting(holder, &asked, Counts::Attempts).await?;
        let is_in_vain = |(asked, answer): &(&Asked, &Answer)| asked.mark.is_some() && answer.claim.lanes.is_empty();
        let again = indexes(asked.iter().zip(&answers), is_in_vain);
        if !again.is_empty() {
            let all: Vec<Asked> = again.iter().map(|index| Asked { mark: None, ..asked[*index].clone() }).collect();
            let found = self.claim_counting(holder, &all, Counts::Attempts).await?;
            again.into_iter().zip(found).for_each(|(index, answer)| answers[index] = answer);
        }
        let claims = wanted.iter().zip(answers).map(|(wanted, Answer { claim, mark })| {
            if wanted.lanes > 0 {
                self.set_mark(wanted.subscription, mark);
            }
            claim
        });
        Ok(claims.collect())
    }

    fn usable_mark(&self, Wanted { subscription, lanes, all, .. }: &Wanted) -> Option<Mark> {
        let mark = (*lanes > 0).then(|| self.take_mark(*subscription)).flatten();
        mark.filter(|mark| !all && mark.since.elapsed() < MARK_LASTS)
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
        let holder = Holder { worker: &format!("{relay}{OF_RELAY}"), lease };
        let wanted = Wanted { subscription, lanes, all: true, ..Wanted::default() };
        let asked = Asked { wanted, mark: None, probe: false };
        let answers = self.claim_counting(holder, &[asked], Counts::Nothing).await?;
        Ok(answers.into_iter().next().unwrap_or_default().claim)
    }

    async fn claim_counting(&self, holder: Holder<'_>, asked: &[Asked], counts: Counts) -> Result<Vec<Answer>, DbErr> {
        let mut answers: Vec<Answer> = asked.iter().map(|_| Answer::default()).collect();
        let lease = async |indexes: &[usize], answers: &mut Vec<Answer>| {
            let some: Vec<Asked> = indexes.iter().map(|index| asked[*index].clone()).collect();
            let found = self.claim_lanes(holder, &some, counts).await?;
            for (index, (lanes, mark)) in indexes.iter().zip(found) {
                (answers[*index].claim.lanes, answers[*index].mark) = (lanes, mark);
            }
            Ok::<_, DbErr>(())
        };
        // On SQLite a claim that finds nothing takes the write lock all the same, so it is asked first.
        let asks_first = self.backend() == DbBackend::Sqlite;
        if !asks_first {
            lease(&indexes(asked, |asked| asked.wants_lanes()), &mut answers).await?;
        }
        let without = indexes(&answers, |answer| answer.claim.lanes.is_empty());
        self.ask_when(asked, &without, &mut answers).await?;
        let is_due = |index: &usize| {
            let next = answers[*index].claim.next.filter(|next| next.after == Some(Duration::ZERO));
            next.filter(|_| asked[*index].wants_lanes()).map(|next| (*index, next.circuit.is_some()))
        };
        let due: Vec<(usize, bool)> = without.iter().filter_map(is_due).collect();
        if asks_first {
            let now: Vec<usize> = due.iter().filter(|(_, was_down)| !was_down).map(|(index, _)| *index).collect();
            lease(&now, &mut answers).await?;
        }
        for (index, _) in due.into_iter().filter(|(_, was_down)| *was_down) {
            self.probe(holder, &asked[index], counts, &mut answers[index].claim).await?;
        }
        Ok(answers)
    }

    /// Asks when the next lanes are due, of these.
    async fn ask_when(&self, asked: &[Asked], indexes: &[usize], answers: &mut [Answer]) -> Result<(), DbErr> {
        let subscriptions: Vec<i32> = indexes.iter().map(|index| asked[*index].wanted.subscription).collect();
        let next = self.next_due_of(&subscriptions).await?;
        for index in indexes {
            answers[*index].claim.next = next.get(&asked[*index].wanted.subscription).copied();
        }
        Ok(())
    }

    /// The circuit's time has come: one worker finds out with one lane.
    async fn probe(&self, holder: Holder<'_>, asked: &Asked, counts: Counts, claim: &mut Claim) -> Result<(), DbErr> {
        let Wanted { subscription, run, .. } = asked.wanted;
        let values = [subscription.into(), seconds(holder.lease).into()];
        if self.execute(self.store(), self.sql().take_probe, values).await? == 0 {
            // Another worker probes.
            claim.next = self.next_due(subscription).await?;
            return Ok(());
        }
        let wanted = Wanted { subscription, lanes: 1, run: run.min(1), ..Wanted::default() };
        let found = self.claim_lanes(holder, &[Asked { wanted, probe: true, ..asked.clone() }], counts).await?;
        let lanes = found.into_iter().next().map(|(lanes, _)| lanes).unwrap_or_default();
        if lanes.is_empty() {
            // Somebody holds the lanes at this moment: nothing was found out.
            tracing::debug!(subscription, "nothing to probe the destination with");
            self.open_circuit(subscription, PROBE_AGAIN, false).await?;
        }
        (claim.probe, claim.lanes) = (!lanes.is_empty(), lanes);
        Ok(())
    }

    async fn claim_lanes(
        &self,
        holder: Holder<'_>,
        asked: &[Asked],
        counts: Counts,
    ) -> Result<Vec<(Vec<ClaimedLane>, Option<Mark>)>, DbErr> {
        let begun = Instant::now();
        let mut asked: Vec<Asked> = asked.iter().map(|asked| self.fitted(asked)).collect();
        let others = self.claim_others(holder, &mut asked).await?;
        let rows: Vec<AskedRow<'_>> = asked.iter().filter(|asked| asked.wanted.lanes > 0).map(AskedRow::from).collect();
        let claimed = self.execute_claim(holder, &rows, counts).await?;
        if claimed.is_empty() && others.is_empty() {
            return Ok(asked.iter().map(|_| (Vec::new(), None)).collect());
        }
        let index: HashMap<i32, usize> =
            asked.iter().enumerate().map(|(index, asked)| (asked.wanted.subscription, index)).collect();
        let mut ends: Vec<(u32, Option<(DateTime<Utc>, String)>)> = asked.iter().map(|_| (0, None)).collect();
        let mut lanes = others;
        for row in &claimed {
            let lane = leased(row)?;
            let (found, end) = &mut ends[index[&lane.lane.subscription]];
            *found += 1;
            if let Some(due_at) = row.try_get("", "was_due_at")? {
                *end = Some((due_at, lane.lane.key.clone()));
            }
            lanes.push(lane);
        }
        if counts == Counts::Attempts {
            lanes = self.with_runs(lanes, |subscription| asked[index[&subscription]].wanted.run).await?;
        }
        let mut found: Vec<Vec<ClaimedLane>> = asked.iter().map(|_| Vec::new()).collect();
        lanes.into_iter().for_each(|lane| found[index[&lane.lane.subscription]].push(lane));
        let marks = asked.iter().zip(ends).map(|(asked, (found, end))| {
            let since = asked.mark.as_ref().map_or(begun, |mark| mark.since);
            end.filter(|_| found >= asked.wanted.lanes && found > 0).map(|(due_at, key)| Mark { due_at, key, since })
        });
        Ok(found.into_iter().zip(marks).collect())
    }

    /// Where tenants crowd the others out, these come first. What they get is taken off of what is asked for all.
    async fn claim_others(&self, holder: Holder<'_>, asked: &mut [Asked]) -> Result<Vec<ClaimedLane>, DbErr> {
        let mut claimed = Vec::new();
        for Asked { wanted, .. } in asked.iter_mut().filter(|asked| !asked.wanted.passed.is_empty()) {
            let mut left = wanted.lanes + wanted.others;
            // From where it ended the last time, and then from the first on.
            let last = self.last_turn(wanted.subscription);
            let begins = if last.is_empty() { vec![last] } else { vec![last, String::new()] };
            for begin in begins {
                let values = [
                    wanted.subscription.into(),
                    begin.into(),
                    json(&wanted.passed)?.into(),
                    left.into(),
                    seconds(holder.lease).into(),
                    holder.worker.into(),
                ];
                let rows = self.query_all(self.store(), self.sql().claim_others, values).await?;
                let tenants = rows.iter().map(|row| row.try_get::<String>("", "tenant"));
                let turn = tenants.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or_default();
                self.set_last_turn(wanted.subscription, turn);
                for row in &rows {
                    claimed.push(leased(row)?);
                }
                left = left.saturating_sub(u32::try_from(rows.len()).unwrap_or(u32::MAX));
                if left == 0 {
                    break;
                }
            }
            wanted.lanes = wanted.lanes.min(left);
        }
        Ok(claimed)
    }

    /// SQLite claims of one subscription after another: nobody else writes in between.
    async fn execute_claim(
        &self,
        holder: Holder<'_>,
        rows: &[AskedRow<'_>],
        counts: Counts,
    ) -> Result<Vec<QueryResult>, DbErr> {
        let values = |rows: &[AskedRow<'_>]| {
            let attempts = i32::from(counts == Counts::Attempts);
            Ok::<_, DbErr>([json(rows)?.into(), seconds(holder.lease).into(), holder.worker.into(), attempts.into()])
        };
        let sql = self.sql().claim;
        match (self.backend(), rows) {
            (_, []) => Ok(Vec::new()),
            (DbBackend::Sqlite, [_, _, ..]) => {
                let tx = self.begin_write().await?;
                let mut claimed = Vec::new();
                for row in rows {
                    claimed.extend(self.query_all(&tx, sql, values(std::slice::from_ref(row))?).await?);
                }
                tx.commit().await?;
                Ok(claimed)
            }
            _ => self.query_all(self.store(), sql, values(rows)?).await,
        }
    }

    /// Leased lanes with their first deliveries, `run` of each of a subscription. Those that have nothing due are given back.
    pub(crate) async fn with_runs(
        &self,
        lanes: Vec<ClaimedLane>,
        run: impl Fn(i32) -> u32,
    ) -> Result<Vec<ClaimedLane>, DbErr> {
        let order = (f64::INFINITY, i64::MAX);
        let id = |lane: &LaneRef| (lane.subscription, lane.key.clone());
        let mut claimed: HashMap<(i32, String), _> =
            lanes.into_iter().map(|lane| (id(&lane.lane), (order, lane))).collect();
        let rows = self.runs(claimed.values().map(|(_, lane)| &lane.lane), run).await?;
        let mut complete = Vec::with_capacity(claimed.len());
        for row in &rows {
            let key = (row.try_get("", "subscription")?, row.try_get("", "key")?);
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
        self.note_sizes(complete.iter().map(|(_, lane)| lane));
        let (mut complete, empty): (Vec<_>, Vec<_>) =
            complete.into_iter().partition(|(_, lane)| !lane.run.is_empty() || lane.unreadable.is_some());
        self.give_back(empty.into_iter().map(|(_, lane)| lane)).await?;
        complete.sort_by(|((since_a, a), _), ((since_b, b), _)| since_a.total_cmp(since_b).then(a.cmp(b)));
        Ok(complete.into_iter().map(|(_, lane)| lane).collect())
    }

    /// The rows of the first deliveries of lanes.
    async fn runs<'a>(
        &self,
        lanes: impl Iterator<Item = &'a LaneRef>,
        run: impl Fn(i32) -> u32,
    ) -> Result<Vec<QueryResult>, DbErr> {
        let row =
            |lane: &'a LaneRef| RunRow { subscription: lane.subscription, key: &lane.key, run: run(lane.subscription) };
        let lanes: Vec<RunRow<'_>> = lanes.map(row).collect();
        let mut subscriptions: Vec<i32> = lanes.iter().map(|lane| lane.subscription).collect();
        subscriptions.sort_unstable();
        subscriptions.dedup();
        let bytes = (CLAIM_BYTES / subscriptions.len().max(1)).max(LEAST_BYTES);
        let longest = lanes.iter().map(|lane| lane.run).max().unwrap_or(0);
        // A statement of its own: what it sees is from after the claim, so nothing that was finished before.
        let values = [json(&lanes)?.into(), (bytes as i64).into(), longest.into()];
        self.query_all(self.store_reader(), self.sql().runs, values).await
    }

    fn fitted(&self, asked: &Asked) -> Asked {
        let mut asked = asked.clone();
        let wanted = &mut asked.wanted;
        (wanted.lanes, wanted.run) = self.fitting(wanted.subscription, wanted.lanes, wanted.run);
        asked
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

    fn note_sizes<'a>(&self, lanes: impl Iterator<Item = &'a ClaimedLane>) {
        let mut sizes: HashMap<i32, (usize, usize)> = HashMap::new();
        for lane in lanes {
            let (events, bytes) = sizes.entry(lane.lane.subscription).or_default();
            *events += lane.run.len();
            *bytes += lane.run.iter().map(|event: &RecordedEvent| event.payload.len()).sum::<usize>();
        }
        for (subscription, (events, bytes)) in sizes {
            if let Some(size) = bytes.checked_div(events) {
                self.set_claimed_size(subscription, size);
            }
        }
    }

    /// Gives back lanes of which nothing came along: their head waits for its time, or the claim was too large.
    async fn give_back(&self, lanes: impl Iterator<Item = ClaimedLane>) -> Result<(), DbErr> {
        let reports: Vec<LaneReport> = lanes.map(ClaimedLane::given_back).collect();
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
        Ok(self.next_due_of(&[subscription]).await?.remove(&subscription))
    }

    async fn next_due_of(&self, subscriptions: &[i32]) -> Result<HashMap<i32, NextDue>, DbErr> {
        if subscriptions.is_empty() {
            return Ok(HashMap::new());
        }
        let wait = |seconds: f64| Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
        let rows = self.query_all(self.store_reader(), self.sql().next_due, [json(subscriptions)?.into()]).await?;
        let next = rows.iter().map(|row| {
            let due = row.try_get::<Option<f64>>("", "seconds")?.map(wait);
            let closed_for = row.try_get::<Option<f64>>("", "circuit_seconds")?.map(wait);
            let failures = row.try_get::<i32>("", "circuit_failures")?.unsigned_abs();
            let after = due.map(|due| due.max(closed_for.unwrap_or_default()));
            Ok((row.try_get("", "id")?, NextDue { after, circuit: closed_for.map(|_| failures) }))
        });
        next.collect()
    }
}

impl Asked {
    fn wants_lanes(&self) -> bool {
        self.wanted.lanes + self.wanted.others > 0
    }
}

impl<'a> From<&'a Asked> for AskedRow<'a> {
    fn from(Asked { wanted, mark, probe }: &'a Asked) -> Self {
        let (after, key) = mark.as_ref().map_or((None, ""), |mark| (Some(mark.due_at), mark.key.as_str()));
        Self { subscription: wanted.subscription, lanes: wanted.lanes, probe: *probe, after, key }
    }
}

/// The indexes of those for which it is true.
fn indexes<T>(all: impl IntoIterator<Item = T>, is_one: impl Fn(&T) -> bool) -> Vec<usize> {
    all.into_iter().enumerate().filter(|(_, each)| is_one(each)).map(|(index, _)| index).collect()
}

/// A lane as the statements lease it, without what is to be delivered.
pub(crate) fn leased(row: &QueryResult) -> Result<ClaimedLane, DbErr> {
    let log: Option<String> = row.try_get("", "attempt_log")?;
    Ok(ClaimedLane {
        lane: lane_ref(row)?,
        attempts: row.try_get::<i32>("", "attempts")?.unsigned_abs(),
        attempt_log: log.map_or_else(AttemptLog::default, |log| AttemptLog::parse(&log)),
        run: Vec::new(),
        unreadable: None,
    })
}

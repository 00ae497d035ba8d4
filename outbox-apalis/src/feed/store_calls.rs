//! The calls to the store. Each is a task of its own, so that none is ever dropped halfway; how long it may take is a
//! matter of the connections.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use outbox_core::{
    AttemptLog,
    store::{Claim, Holder, LaneRef, LaneReport, LeaseState, Reservation, Store, StoreError, Wanted},
};

use super::{
    calls::{Answer, Asked, Call, Change, Kind, Taken},
    outage::outage_wait,
    reports::BUSY_WAIT,
    together::Batch,
};
use crate::{
    assignment::{Assignment, Until},
    redis::Job,
};

/// How often a call is tried whose answer is not urgent.
const TRIES: u32 = 3;

/// Makes the calls of a batch, each for the assignment beside it.
pub(crate) async fn make(batch: Batch, assignments: Vec<Assignment>) -> Vec<(usize, Answer)> {
    let Batch { kind, calls } = batch;
    let (indexes, calls): (Vec<usize>, Vec<Call>) = calls.into_iter().unzip();
    let Some(one) = assignments.first() else { return Vec::new() };
    let answers = match kind {
        Kind::Claim => claim(&assignments, calls).await,
        Kind::TakeOver => one_by_one(&assignments, calls, take_over).await,
        Kind::Settle => settle(&*one.store, calls).await,
        Kind::Note => note(&*one.store, calls).await,
        Kind::Renew => renew(one, calls).await,
        Kind::Check => check(&*one.store, calls).await,
        Kind::Change => one_by_one(&assignments, calls, change).await,
        Kind::Reserve => reserve(&assignments, calls).await,
    };
    indexes.into_iter().zip(answers).collect()
}

async fn one_by_one<'a, F: Future<Output = Option<Answer>>>(
    assignments: &'a [Assignment],
    calls: Vec<Call>,
    make: impl Fn(&'a Assignment, Call) -> F,
) -> Vec<Answer> {
    let mut answers = Vec::new();
    for (assignment, call) in assignments.iter().zip(calls) {
        answers.extend(make(assignment, call).await);
    }
    answers
}

async fn claim(assignments: &[Assignment], calls: Vec<Call>) -> Vec<Answer> {
    let asked_at = Instant::now();
    let wanted = assignments.iter().zip(&calls).filter_map(|(assignment, call)| match call {
        Call::Claim { lanes, others, passed, all, .. } => {
            Some(Wanted { others: count(*others), passed: passed.clone(), all: *all, ..wanted(assignment, *lanes) })
        }
        _ => None,
    });
    let claims = claims(assignments, &wanted.collect::<Vec<_>>()).await;
    let mut claims = each(claims, &vec![1; calls.len()]).into_iter();
    let answer = |call| match call {
        Call::Claim { lanes, others, times_down, .. } => {
            let claim = claims.next()?.map(|mut claims| claims.pop().unwrap_or_default());
            Some(Answer::Claimed { asked_at, asked: Asked { lanes, others }, times_down, claim })
        }
        _ => None,
    };
    calls.into_iter().filter_map(answer).collect()
}

async fn claims(assignments: &[Assignment], wanted: &[Wanted]) -> Result<Vec<Claim>, StoreError> {
    let Some(one) = assignments.first() else { return Ok(Vec::new()) };
    if one.until != Until::Stopped {
        one.store.route().await?;
    }
    one.store.claim(holder(one), wanted).await
}

async fn take_over(assignment: &Assignment, call: Call) -> Option<Answer> {
    let Call::TakeOver(jobs) = call else { return None };
    let asked_at = Instant::now();
    let lanes: Vec<LaneRef> = jobs.iter().map(|job: &Job| job.lane.clone()).collect();
    let taken = assignment.store.take_over(holder(assignment), wanted(assignment, lanes.len()), &lanes).await;
    Some(Answer::Taken { asked_at, taken: taken.map(|taken| Taken::sort(jobs, taken)) })
}

async fn settle(store: &dyn Store, calls: Vec<Call>) -> Vec<Answer> {
    let reports =
        calls.into_iter().filter_map(|call| if let Call::Settle(reports) = call { Some(reports) } else { None });
    let (parts, reports): (Vec<usize>, Vec<LaneReport>) = joined(reports);
    let each = each(store.settle(&reports).await, &parts);
    split(reports, &parts).zip(each).map(|(reports, settled)| Answer::Settled { reports, settled }).collect()
}

async fn note(store: &dyn Store, calls: Vec<Call>) -> Vec<Answer> {
    let notes = calls.into_iter().filter_map(|call| if let Call::Note(notes) = call { Some(notes) } else { None });
    let (parts, notes): (Vec<usize>, Vec<(LaneRef, AttemptLog)>) = joined(notes);
    let noted = store.note(&notes).await;
    // All of them are about to be asked for again.
    if noted.as_ref().is_ok_and(|states| states.iter().all(|state| *state == LeaseState::Busy)) {
        tokio::time::sleep(BUSY_WAIT).await;
    }
    let asked = split(notes.into_iter().map(|(lane, _)| lane).collect(), &parts);
    asked.zip(each(noted, &parts)).map(|(asked, noted)| Answer::Noted { asked, noted }).collect()
}

async fn renew(assignment: &Assignment, calls: Vec<Call>) -> Vec<Answer> {
    let asked_at = Instant::now();
    let lanes = calls.into_iter().filter_map(|call| if let Call::Renew(lanes) = call { Some(lanes) } else { None });
    let (parts, lanes): (Vec<usize>, Vec<LaneRef>) = joined(lanes);
    let each = each(assignment.store.renew(&lanes, assignment.options.lease).await, &parts);
    split(lanes, &parts).zip(each).map(|(asked, renewed)| Answer::Renewed { asked_at, asked, renewed }).collect()
}

async fn check(store: &dyn Store, calls: Vec<Call>) -> Vec<Answer> {
    let asked = calls.into_iter().filter_map(|call| match call {
        Call::Check { losses, lanes } => Some((losses, lanes)),
        _ => None,
    });
    let (losses, asked): (Vec<u64>, Vec<Vec<LaneRef>>) = asked.unzip();
    let (parts, lanes): (Vec<usize>, Vec<LaneRef>) = joined(asked.into_iter());
    let each = each(held(store, &lanes).await, &parts);
    let asked = losses.into_iter().zip(split(lanes, &parts));
    asked.zip(each).map(|((losses, asked), held)| Answer::Checked { losses, asked, held }).collect()
}

/// If it fails, the cores ask again.
async fn held(store: &dyn Store, lanes: &[LaneRef]) -> Result<Vec<bool>, StoreError> {
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

async fn reserve(assignments: &[Assignment], calls: Vec<Call>) -> Vec<Answer> {
    let asked_at = Instant::now();
    let asked = assignments.iter().zip(calls).filter_map(|(assignment, call)| match call {
        Call::Reserve(attempts, every) => {
            Some(Reservation { subscription: assignment.subscription.now(), attempts, every })
        }
        _ => None,
    });
    let asked: Vec<Reservation> = asked.collect();
    let Some(one) = assignments.first() else { return Vec::new() };
    let reserved = each(one.store.reserve(&asked).await, &vec![1; asked.len()]);
    let answer = |(asked, after): (Reservation, Result<Vec<Option<Duration>>, StoreError>)| Answer::Reserved {
        asked_at,
        attempts: asked.attempts,
        after: after.map(|mut after| after.pop().flatten()),
    };
    asked.into_iter().zip(reserved).map(answer).collect()
}

/// If it fails, the next delivery finds out again.
async fn change(assignment: &Assignment, call: Call) -> Option<Answer> {
    let Call::Change(change) = call else { return None };
    let Assignment { store, subscription, name, .. } = assignment;
    for failures in 1..=TRIES {
        let told = match change {
            Change::Circuit(circuit) => store.set_circuit(subscription.now(), circuit).await,
            Change::Pause => store.pause(name).await,
        };
        let Err(error) = told else { break };
        tracing::warn!(subscription = &**name, %error, "cannot store the state of the destination");
        tokio::time::sleep(outage_wait(failures, fastrand::f64())).await;
    }
    Some(Answer::Changed)
}

/// Lists as one, and how long each of them is.
fn joined<T>(lists: impl Iterator<Item = Vec<T>>) -> (Vec<usize>, Vec<T>) {
    let (mut parts, mut all) = (Vec::new(), Vec::new());
    for mut list in lists {
        parts.push(list.len());
        all.append(&mut list);
    }
    (parts, all)
}

/// The lists again that were joined.
fn split<T>(all: Vec<T>, parts: &[usize]) -> impl Iterator<Item = Vec<T>> {
    let mut all = all.into_iter();
    parts.iter().map(move |part| all.by_ref().take(*part).collect())
}

/// An answer for all is one for each, of so many parts; an error is everybody's.
fn each<T>(all: Result<Vec<T>, StoreError>, parts: &[usize]) -> Vec<Result<Vec<T>, StoreError>> {
    match all {
        Ok(all) => split(all, parts).map(Ok).collect(),
        Err(error) => parts.iter().map(|_| Err(error.clone())).collect(),
    }
}

fn holder(assignment: &Assignment) -> Holder<'_> {
    Holder { worker: &assignment.worker, lease: assignment.options.lease }
}

fn wanted(assignment: &Assignment, lanes: usize) -> Wanted {
    Wanted {
        subscription: assignment.subscription.now(),
        lanes: count(lanes),
        run: count(assignment.options.batch),
        all: true,
        ..Wanted::default()
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

//! Events that need not wait for their turn: those with a head start, and those that an operator has put back. One is
//! routed before what waits in front of it if none of that has a key of it.

use std::{
    collections::{HashSet, hash_map::RandomState},
    hash::BuildHasher,
    time::{Duration, Instant},
};

use sea_orm::DbErr;

use super::{
    Waiting,
    plan::{Key, keys},
};
use crate::Outbox;

/// How many such events are routed at once.
const MOST: i64 = 100;

/// How many events are in memory while what waits is walked through.
const PAGE: i64 = 5000;

/// A walk may take a fifth of the time.
const SHARE: u32 = 5;
const EVERY: Duration = Duration::from_millis(100);

/// When to look again.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: Option<Instant>,
}

/// Which may be routed now, of those after `last`; everything up to there is routed.
pub(super) async fn find(outbox: &Outbox, pace: &mut Pace, last: i64) -> Result<Option<Vec<Waiting>>, DbErr> {
    let began = Instant::now();
    if pace.next.is_some_and(|next| began < next) {
        return Ok(None);
    }
    let rows = outbox.query_all(outbox.store(), outbox.sql().unrouted_ahead, [last.into(), MOST.into()]).await?;
    let ahead: Vec<Waiting> = rows.iter().map(Waiting::read).collect::<Result<_, _>>()?;
    let found = if ahead.is_empty() { None } else { Some(unhindered(outbox, last, ahead).await?) };
    pace.next = Some(Instant::now() + EVERY.max(began.elapsed() * SHARE));
    Ok(found.filter(|found| !found.is_empty()))
}

/// Those of which no key is among what waits in front of them. What has to come before one is visible, as it is.
async fn unhindered(outbox: &Outbox, last: i64, ahead: Vec<Waiting>) -> Result<Vec<Waiting>, DbErr> {
    let known = outbox.known();
    let state = RandomState::new();
    // Hashes, since a million keys fill the memory. One that is taken for another waits for its turn.
    let mut before: HashSet<u64> = HashSet::new();
    let mut found = Vec::new();
    let (mut after, mut ahead) = (last, ahead.into_iter().peekable());
    'walk: loop {
        let rows = outbox.query_all(outbox.store(), outbox.sql().unrouted, [after.into(), PAGE.into()]).await?;
        let page: Vec<Waiting> = rows.iter().map(Waiting::read).collect::<Result<_, _>>()?;
        let full = page.len() >= usize::try_from(PAGE).unwrap_or(usize::MAX);
        // What was put back below is not among what waits in front, and routing it comes first anyway.
        let began_after = after;
        for waiting in page.into_iter().filter(|waiting| waiting.position > began_after) {
            let keys: Vec<Key> = waiting.event.as_ref().map(|event| keys(event, &known)).unwrap_or_default();
            let hashes: Vec<u64> = keys.iter().map(|key| state.hash_one(key)).collect();
            after = waiting.position;
            while ahead.next_if(|next| next.position < waiting.position).is_some() {}
            let is_next = ahead.peek().is_some_and(|next| next.position == waiting.position);
            if is_next && !hashes.iter().any(|hash| before.contains(hash)) {
                found.extend(ahead.next());
                continue;
            }
            if is_next {
                ahead.next();
            }
            before.extend(hashes);
            if ahead.peek().is_none() {
                break 'walk;
            }
        }
        if !full || ahead.peek().is_none() {
            break;
        }
    }
    Ok(found)
}

use std::time::Duration;

use outbox_seaorm::{ClaimedLane, LaneReport, Outbox};
use tokio::time::sleep;

use super::{Job, Transport};
use crate::assignment::Assignment;

/// A relay's lease, in leases of a worker: the job waits in Redis for that long.
pub(crate) const RELAY_LEASES: u32 = 2;

/// How many lanes one push moves.
pub(super) const BATCH: usize = 500;

/// While Redis holds as many jobs as it may, or another relay pushes.
const FULL_WAIT: Duration = Duration::from_millis(10);

/// Moves due lanes into Redis, until the future is dropped.
pub(crate) async fn relay(outbox: &Outbox, assignment: &Assignment, transport: &Transport) {
    let mut idle = assignment.poll / 8;
    loop {
        transport.health.wait_for(true).await;
        if assignment.stop.is_cancelled() {
            return;
        }
        // In a task of its own: a claim that was begun must end.
        let moving = tokio::spawn({
            let (outbox, assignment, transport) = (outbox.clone(), assignment.clone(), transport.clone());
            async move { move_batch(&outbox, &assignment, &transport).await }
        });
        let wait = match moving.await {
            Ok(Moved::More) => {
                idle = assignment.poll / 8;
                continue;
            }
            Ok(Moved::Full) => {
                sleep(FULL_WAIT).await;
                continue;
            }
            Ok(Moved::All(next)) => next,
            Ok(Moved::Failed) | Err(_) => Some(Duration::from_millis(100)),
        };
        let jitter = fastrand::f64().mul_add(0.2, 0.9);
        let wait = wait.unwrap_or(Duration::MAX).max(FULL_WAIT).min(idle.mul_f64(jitter));
        idle = (idle * 2).min(assignment.poll);
        tokio::select! {
            () = sleep(wait) => {}
            () = outbox.woken(assignment.subscription.now()) => idle = assignment.poll / 8,
            () = transport.health.wait_for(false) => {}
            () = assignment.stop.cancelled() => return,
        }
    }
}

enum Moved {
    /// There may be more.
    More,
    /// All that was due; the next is due after this.
    All(Option<Duration>),
    /// There is no room in Redis, or it is another relay's turn.
    Full,
    /// The database or Redis did not do its part.
    Failed,
}

async fn move_batch(outbox: &Outbox, assignment: &Assignment, transport: &Transport) -> Moved {
    let queue = &transport.queue;
    let turn = format!("{}-{:08x}", assignment.worker, fastrand::u32(..));
    let room = match queue.begin_turn(&turn).await {
        Ok(Some(room)) => room.min(BATCH),
        Ok(None) => return Moved::Full,
        Err(error) => {
            tracing::warn!(subscription = &*assignment.name, %error, "Redis does not answer the relay");
            transport.health.report_trouble();
            return Moved::Failed;
        }
    };
    let moved = if room == 0 { Moved::Full } else { claim_and_push(outbox, assignment, transport, room).await };
    queue.end_turn(&turn).await;
    moved
}

async fn claim_and_push(outbox: &Outbox, assignment: &Assignment, transport: &Transport, room: usize) -> Moved {
    let Assignment { subscription, worker, options, .. } = assignment;
    let lanes = u32::try_from(room).unwrap_or(u32::MAX);
    let lease = options.lease * RELAY_LEASES;
    let claim = match outbox.claim_for_relay(subscription.now(), worker, lanes, lease).await {
        Ok(claim) => claim,
        Err(error) => {
            tracing::warn!(subscription = &*assignment.name, %error, "cannot claim deliveries for Redis, trying again");
            return Moved::Failed;
        }
    };
    let (claimed, probe) = (claim.lanes, claim.probe);
    if claimed.is_empty() {
        return Moved::All(claim.next.and_then(|next| next.after));
    }
    let full = claimed.len() == room;
    let jobs = claimed.iter().map(|lane| Job { lane: lane.lane.clone(), probe }).collect();
    if let Err(error) = transport.queue.push(jobs).await {
        tracing::warn!(subscription = &*assignment.name, error, "Redis did not take jobs; they are given back");
        // Some may have arrived: their leases are over now, so nobody can take them over.
        give_back(outbox, assignment, claimed, probe).await;
        transport.health.report_trouble();
        return Moved::Failed;
    }
    if full { Moved::More } else { Moved::All(Some(Duration::ZERO)) }
}

/// Ends leases of lanes that nobody has begun.
async fn give_back(outbox: &Outbox, assignment: &Assignment, lanes: Vec<ClaimedLane>, probe: bool) {
    let reports: Vec<LaneReport> = lanes.into_iter().map(ClaimedLane::given_back).collect();
    let given_back = async {
        outbox.settle(&reports).await?;
        if probe { outbox.open_circuit(assignment.subscription.now(), FULL_WAIT, false).await } else { Ok(()) }
    };
    if let Err(error) = given_back.await {
        tracing::warn!(subscription = &*assignment.name, %error, "lanes could not be given back; their leases end by themselves");
    }
}

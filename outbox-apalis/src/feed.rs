//! Between the store and apalis: claims lanes, feeds their deliveries to the worker one at a time for each lane,
//! acknowledges in batches, renews leases.
//!
//! The [core](core::Core) decides, and waits for nothing; the [driver] tells it what happens and does what it wants. One
//! task for each subscription owns both, so nothing here is locked. All of them run on a thread of their own
//! (`thread.rs`), so a handler that blocks its thread does not stop the renewal of leases.

use apalis_core::task::Task;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{assignment::Assignment, destination::AttemptResult, redis::Transport, task::DeliveryTask};

mod ahead;
mod calls;
mod circuit;
mod core;
mod driver;
mod leases;
mod outage;
mod pace;
mod reports;
mod schedule;
#[cfg(test)]
mod simulation;
mod table;
mod told;
mod trial;
mod unknown;
mod verdict;

/// How many tasks wait for the worker at most: enough to keep its threads busy.
const MOST_WAITING: usize = 32;

/// The worker's side of a feed.
pub(crate) struct Ends {
    pub(crate) tasks: mpsc::Receiver<Task<DeliveryTask>>,
    pub(crate) results: mpsc::UnboundedSender<AttemptResult>,
    pub(crate) stop: CancellationToken,
    pub(crate) stopped: JoinHandle<()>,
}

/// Starts a feed. It ends when its `stop` is cancelled and everything is acknowledged or given back, or when the
/// worker's side is dropped. With a transport, lanes come through Redis instead of from the database while that is up.
pub(crate) fn start(assignment: Assignment, transport: Option<Transport>) -> Ends {
    let (tasks, tasks_end) = mpsc::channel(assignment.options.concurrency.min(MOST_WAITING));
    let (results, results_end) = mpsc::unbounded_channel();
    let assignment = Assignment { stop: assignment.stop.child_token(), ..assignment };
    let (stop, runtime) = (assignment.stop.clone(), assignment.runtime.clone());
    let stopped = runtime.spawn(driver::run(assignment, transport, tasks, results_end));
    Ends { tasks: tasks_end, results, stop, stopped }
}

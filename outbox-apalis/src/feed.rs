//! Between the store and apalis: claims lanes, feeds their deliveries to the worker one at a time for each lane,
//! acknowledges in batches, renews leases.
//!
//! The [core](core::Core) decides, and waits for nothing; the [driver] tells it what happens and does what it wants. One
//! task for each subscription owns both, so nothing here is locked. All of them run on a thread of their own
//! (`thread.rs`), so a handler that blocks its thread does not stop the renewal of leases.

use std::time::Duration;

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

/// The longest wait between two tries while the database is out of reach.
const LONGEST_OUTAGE_WAIT: Duration = Duration::from_secs(5);

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

/// How long to wait after so many failures in a row.
fn outage_wait(failures: u32, chance: f64) -> Duration {
    let wait = Duration::from_millis(100) * 2_u32.pow(failures.min(10));
    wait.min(LONGEST_OUTAGE_WAIT).mul_f64(chance.mul_add(0.5, 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_asked_about_less_and_less_often() {
        let waits: Vec<u128> = (1..8).map(|failures| outage_wait(failures, 1.0).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(outage_wait(1, 0.0), Duration::from_millis(100));
    }
}

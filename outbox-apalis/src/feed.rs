//! Between the store and apalis: claims lanes, feeds their deliveries to the apalis workers one at a time for each lane,
//! acknowledges in batches, renews leases.
//!
//! A [core](core::Core) decides for one subscription, and waits for nothing. The [dispatch] has those of all subscriptions
//! of a process, and gathers what they want of the store, so that it travels together. The [driver] tells them what happens
//! and does what they want. One task owns all of it, so nothing here is locked. It runs on a thread of its own
//! (`thread.rs`), so a handler that blocks its thread does not stop the renewal of leases.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use apalis_core::task::Task;
use tokio::sync::mpsc;

use crate::{assignment::Assignment, destination::AttemptResult, redis::Transport, task::DeliveryTask};

mod ahead;
mod calls;
mod circuit;
mod core;
mod dispatch;
mod driver;
mod leases;
mod outage;
mod pace;
mod ready;
mod reports;
mod running;
mod schedule;
#[cfg(test)]
mod simulation;
mod store_calls;
mod table;
mod together;
mod told;
mod trial;
mod unknown;
mod verdict;

pub(crate) use pace::Every;

/// How many tasks wait for a worker at most: enough to keep its threads busy.
const MOST_WAITING: usize = 32;

/// A subscription that is served, and how its lanes come; through Redis with a transport.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) assignment: Assignment,
    pub(crate) transport: Option<Transport>,
}

/// What the dispatcher hears of apalis' workers, each by the index of its subscription.
enum Message {
    /// A worker begins, and takes tasks from here.
    Begins(usize, Hatch),
    Ended(usize, AttemptResult),
    /// It has taken a task from where there was no room, or takes no more.
    Changed(usize),
    /// It is told to stop.
    Stops(usize),
}

/// The dispatcher's side of the place where tasks are handed out.
struct Hatch {
    tasks: mpsc::Sender<Task<DeliveryTask>>,
    /// Whether the dispatcher wants to hear of room.
    full: Arc<AtomicBool>,
}

/// A worker's side of a feed.
pub(crate) struct Ends {
    tasks: mpsc::Receiver<Task<DeliveryTask>>,
    line: Line,
}

/// How a worker reaches the dispatcher.
#[derive(Clone)]
pub(crate) struct Line {
    index: usize,
    messages: mpsc::UnboundedSender<Message>,
    full: Arc<AtomicBool>,
}

impl Line {
    /// An attempt has ended.
    pub(crate) fn ended(&self, result: AttemptResult) {
        // A dispatcher that is gone has panicked, and the leases end by themselves.
        let _ = self.messages.send(Message::Ended(self.index, result));
    }
}

impl Ends {
    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    /// The next task; `None` when the feed has ended.
    pub(crate) fn poll_task(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Task<DeliveryTask>>> {
        let polled = self.tasks.poll_recv(context);
        if polled.is_ready() && self.line.full.swap(false, Ordering::AcqRel) {
            let _ = self.line.messages.send(Message::Changed(self.line.index));
        }
        polled
    }

    /// Nothing more is to begin; what is under way may go on for the grace.
    pub(crate) fn stop(&self) {
        let _ = self.line.messages.send(Message::Stops(self.line.index));
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.tasks.close();
        let _ = self.line.messages.send(Message::Changed(self.line.index));
    }
}

/// The feeds of all subscriptions of a worker.
pub(crate) struct Feeds {
    served: Arc<[Served]>,
    dispatcher: Mutex<Option<mpsc::UnboundedSender<Message>>>,
}

impl Feeds {
    pub(crate) fn new(served: Vec<Served>) -> Self {
        Self { served: served.into(), dispatcher: Mutex::default() }
    }

    pub(crate) fn served(&self) -> &[Served] {
        &self.served
    }

    /// Begins to feed a subscription. The feed ends when it is told to stop and everything is acknowledged or given back,
    /// or when the ends are dropped.
    pub(crate) fn begin(&self, index: usize) -> Ends {
        let assignment = &self.served[index].assignment;
        let (tasks, tasks_end) = mpsc::channel(assignment.options.concurrency.min(MOST_WAITING));
        let mut dispatcher = self.dispatcher.lock().unwrap_or_else(PoisonError::into_inner);
        let messages = match dispatcher.take().filter(|messages| !messages.is_closed()) {
            Some(messages) => messages,
            None => {
                let (messages, inbox) = mpsc::unbounded_channel();
                assignment.runtime.spawn(driver::run(self.served.clone(), inbox));
                messages
            }
        };
        let full = Arc::<AtomicBool>::default();
        let hatch = Hatch { tasks, full: full.clone() };
        // One that has just ended drops the hatch: so the feed has ended too.
        let _ = messages.send(Message::Begins(index, hatch));
        *dispatcher = Some(messages.clone());
        Ends { tasks: tasks_end, line: Line { index, messages, full } }
    }
}

/// The dispatcher's side, for tests of a worker's.
#[cfg(test)]
pub(crate) struct Dispatcher {
    pub(crate) tasks: mpsc::Sender<Task<DeliveryTask>>,
    messages: mpsc::UnboundedReceiver<Message>,
}

#[cfg(test)]
pub(crate) fn ends() -> (Ends, Dispatcher) {
    let ((tasks, tasks_end), (line, messages)) = (mpsc::channel(2), mpsc::unbounded_channel());
    let ends = Ends { tasks: tasks_end, line: Line { index: 0, messages: line, full: Arc::default() } };
    (ends, Dispatcher { tasks, messages })
}

#[cfg(test)]
impl Dispatcher {
    pub(crate) async fn is_told_to_stop(&mut self) -> bool {
        matches!(self.messages.recv().await, Some(Message::Stops(_)))
    }

    pub(crate) async fn result(&mut self) -> AttemptResult {
        loop {
            match self.messages.recv().await.expect("a worker that closes") {
                Message::Ended(_, result) => return result,
                Message::Begins(..) | Message::Changed(_) | Message::Stops(_) => {}
            }
        }
    }
}

//! The one place of a feed that waits: for attempts that end, answers of the store, commits, Redis and the clock.

use std::time::{Duration, Instant};

use apalis_core::{
    backend::queue::Queue,
    task::{Task, builder::TaskBuilder, task_id::TaskId},
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinHandle},
    time::sleep_until,
};

use super::{
    calls::{self, Answer},
    core::{Core, Moment, Settings, Start},
};
use crate::{
    assignment::Assignment,
    destination::AttemptResult,
    listing::task_id,
    redis::Transport,
    task::{Attempt, DeliveryTask},
};

struct Driver {
    assignment: Assignment,
    transport: Option<Transport>,
    core: Core,
    tasks: mpsc::Sender<Task<DeliveryTask>>,
    /// Calls that are under way. If the feed panics, they go on.
    calls: FuturesUnordered<JoinHandle<Answer>>,
    /// Whether the worker has to begin a task before another one can be handed out.
    full: bool,
}

pub(super) async fn run(
    assignment: Assignment,
    transport: Option<Transport>,
    tasks: mpsc::Sender<Task<DeliveryTask>>,
    mut results: mpsc::UnboundedReceiver<AttemptResult>,
) {
    let core = Core::new(settings(&assignment), assignment.store.lost_connections(), Instant::now());
    let (store, subscription) = (assignment.store.clone(), assignment.subscription.clone());
    let (stop, desk, redis) = (assignment.stop.clone(), assignment.desk.clone(), transport.clone());
    let (handed_out, grace) = (tasks.clone(), assignment.options.grace);
    let mut driver = Driver { assignment, transport, core, tasks, calls: FuturesUnordered::new(), full: false };
    loop {
        driver.act();
        if driver.is_over() {
            return;
        }
        let timeout = driver.core.next_timeout(Instant::now());
        let working = driver.core.is_working();
        tokio::select! {
            Some(result) = results.recv() => {
                driver.ended(result);
                while let Ok(result) = results.try_recv() {
                    driver.ended(result);
                }
            }
            Some(answer) = driver.calls.next() => driver.answered(answer).await,
            () = desk.arrived() => {}
            () = arrived(redis.as_ref()), if !working || driver.core.takes_jobs() => {}
            () = health_changes(redis.as_ref()), if working => {}
            () = store.woken(subscription.now()), if working && !driver.core.is_relayed() => {
                driver.core.woken(Instant::now());
            }
            () = store.state_changed(subscription.now()), if working => driver.core.state_changed(Instant::now()),
            _ = handed_out.reserve(), if driver.full => {}
            () = stop.cancelled(), if working => driver.core.stop(grace, Instant::now()),
            () = handed_out.closed(), if working => driver.core.stop(Duration::ZERO, Instant::now()),
            () = sleep_until(timeout.into()) => {}
        }
    }
}

fn settings(assignment: &Assignment) -> Settings {
    Settings {
        worker: assignment.worker.clone(),
        retry: assignment.retry,
        after_dead_letter: assignment.after_dead_letter,
        destination: assignment.destination.clone(),
        options: assignment.options,
        effect_time: assignment.effect_time,
        poll: assignment.poll,
        pace: assignment.pace,
        until: assignment.until,
    }
}

impl Driver {
    fn moment(&self) -> Moment {
        Moment { now: Instant::now(), utc: self.assignment.clock.now(), chance: fastrand::f64() }
    }

    /// Tells the core what can be seen at any time, and does what it wants.
    fn act(&mut self) {
        let at = self.moment();
        self.core.lost_connections(self.assignment.store.lost_connections());
        self.core.time_passes(self.tasks.is_closed(), at);
        self.core.routed(self.assignment.desk.take(), at.now);
        self.take_jobs(at);
        let room = self.tasks.capacity();
        let starts = self.core.start(room, at);
        self.full = starts.len() == room && self.core.may_start(at);
        for start in starts {
            self.hand_out(start);
        }
        while let Some(call) = self.core.next_call(at) {
            self.calls.push(tokio::spawn(calls::make(self.assignment.clone(), call)));
        }
        for told in self.core.told() {
            told.tell(&self.assignment);
        }
        self.assignment.desk.set_room(self.core.room_for_new());
        if self.core.is_done(at.now) {
            self.assignment.idle.cancel();
        }
    }

    fn take_jobs(&mut self, at: Moment) {
        let Some(transport) = &self.transport else { return };
        self.core.redis_is_up(transport.health.is_up(), at.now);
        // Of a worker that has ended on its own the next one takes them.
        if self.core.is_working() || self.assignment.stop.is_cancelled() {
            let room = self.core.room_for_jobs();
            let jobs = transport.jobs.take(room);
            let many = jobs.len() >= room.min(self.assignment.options.batch);
            self.core.arrived(jobs, many, at.now);
        }
    }

    fn hand_out(&self, start: Start) {
        let Start { event, lane, number, log, last, time, running, cancelled } = start;
        let name = &self.assignment.name;
        let attempt = Attempt {
            id: running.id(),
            lane,
            subscription: name.clone(),
            number,
            log,
            last,
            time,
            clock: self.assignment.clock.clone(),
            begun: running.begun().clone(),
            cancelled,
        };
        let id = task_id(name, &event);
        let task = TaskBuilder::new(DeliveryTask { event, attempt: Some(attempt) })
            .task_id(TaskId::from_string(id))
            // As apalis' tracing shows it; apalis counts it once more when it begins.
            .attempt(number as usize)
            .queue(Queue::from(&**name))
            .build();
        // There is room. Closed when the worker is gone, which ends this feed.
        let _ = self.tasks.try_send(task);
    }

    fn ended(&mut self, result: AttemptResult) {
        let at = self.moment();
        self.core.ended(result, at);
    }

    async fn answered(&mut self, answer: Result<Answer, JoinError>) {
        match answer.map_err(JoinError::try_into_panic) {
            Ok(answer) => {
                let at = self.moment();
                self.core.answered(answer, at);
            }
            // A bug in the store. Nobody knows what is stored: a new feed begins with what the database says.
            Err(Ok(panic)) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(Err(_)) => std::future::pending().await,
        }
    }

    fn is_over(&self) -> bool {
        self.core.has_given_up() || self.core.is_over() && self.assignment.desk.is_closed()
    }
}

/// Completes when there may be a job from Redis.
async fn arrived(transport: Option<&Transport>) {
    match transport {
        Some(transport) => transport.jobs.arrived().await,
        None => std::future::pending().await,
    }
}

/// Completes when Redis comes up or goes down.
async fn health_changes(transport: Option<&Transport>) {
    match transport {
        Some(transport) => transport.health.wait_for(!transport.health.is_up()).await,
        None => std::future::pending().await,
    }
}

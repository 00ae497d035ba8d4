//! The one place that waits: for attempts that end, answers of the store, commits, Redis and the clock.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use apalis_core::{
    backend::queue::Queue,
    task::{Task, builder::TaskBuilder, task_id::TaskId},
};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use outbox_core::store::NewsItem;
use tokio::{sync::mpsc, task::JoinError, time::sleep_until};

use super::{
    Hatch, Message, Served,
    calls::{Answer, Kind},
    core::{Core, Moment, Settings, Start},
    dispatch::Dispatch,
    store_calls,
    together::Batch,
};
use crate::{
    assignment::Assignment,
    desk::Room,
    listing::task_id,
    redis::{Health, Jobs},
    task::{Attempt, DeliveryTask},
};

/// Without anything to wait for, it looks at the time.
const LONGEST: Duration = Duration::from_secs(3600);

/// A batch that is under way, and whose calls it has.
struct Done {
    kind: Kind,
    indexes: Vec<usize>,
    answers: Result<Vec<(usize, Answer)>, JoinError>,
}

struct Driver {
    served: Arc<[Served]>,
    dispatch: Dispatch,
    hatches: Vec<Option<Hatch>>,
    /// Calls that are under way. If the driver panics, they go on.
    calls: FuturesUnordered<BoxFuture<'static, Done>>,
    losses: u64,
    /// How many cores have begun.
    begun: u64,
    /// All are told to stop.
    stopping: bool,
}

pub(super) async fn run(served: Arc<[Served]>, mut inbox: mpsc::UnboundedReceiver<Message>) {
    let Some(Served { assignment, transport }) = served.first().cloned() else { return };
    let Assignment { store, stop, desk, .. } = assignment;
    let (mut news, redis) = (store.news(), transport.map(|transport| transport.health));
    let jobs = served.iter().find_map(|served| Some(served.transport.as_ref()?.jobs.clone()));
    let mut driver = Driver {
        dispatch: Dispatch::default(),
        hatches: served.iter().map(|_| None).collect(),
        calls: FuturesUnordered::new(),
        losses: store.lost_connections(),
        begun: 0,
        stopping: false,
        served,
    };
    loop {
        driver.act();
        if driver.is_over() {
            return;
        }
        let timeout = driver.dispatch.next_timeout().unwrap_or_else(|| Instant::now() + LONGEST);
        tokio::select! {
            Some(message) = inbox.recv() => {
                driver.hears(message);
                while let Ok(message) = inbox.try_recv() {
                    driver.hears(message);
                }
            }
            Some(done) = driver.calls.next() => {
                driver.answered(done);
                while let Some(Some(done)) = driver.calls.next().now_or_never() {
                    driver.answered(done);
                }
            }
            items = news.next() => driver.reads(&items),
            () = desk.arrived() => if desk.concerns_all() {
                driver.dispatch.touch_all(|_| {});
            },
            () = arrived(jobs.as_deref()) => driver.jobs_arrived(),
            () = health_changes(redis.as_ref()) => driver.dispatch.touch_all(|_| {}),
            () = stop.cancelled(), if !driver.stopping => driver.stop(),
            () = sleep_until(timeout.into()) => {}
        }
    }
}

fn settings(assignment: &Assignment, numbered_from: u64) -> Settings {
    Settings {
        worker: assignment.worker.clone(),
        retry: assignment.retry,
        after_dead_letter: assignment.after_dead_letter,
        destination: assignment.destination.clone(),
        options: assignment.options,
        effect_time: assignment.effect_time,
        poll: assignment.poll,
        every: assignment.every,
        until: assignment.until,
        numbered_from,
    }
}

impl Driver {
    fn moment(&self) -> Moment {
        moment(&self.served)
    }

    // What happens

    fn hears(&mut self, message: Message) {
        let at = self.moment();
        match message {
            Message::Begins(index, hatch) => self.begin(index, hatch, at.now),
            Message::Ended(index, result) => {
                self.dispatch.touch(index, |core| core.ended(result, at));
            }
            Message::Changed(index) => {
                self.dispatch.touch(index, |_| {});
            }
            Message::Stops(index) => {
                let grace = self.served[index].assignment.options.grace;
                self.dispatch.touch(index, |core| core.stop(grace, at.now));
            }
        }
    }

    fn begin(&mut self, index: usize, hatch: Hatch, now: Instant) {
        let assignment = &self.served[index].assignment;
        // Far more than one core hands out.
        let settings = settings(assignment, self.begun << 40);
        self.begun += 1;
        let mut core = Core::new(settings, assignment.store.lost_connections(), now);
        if self.stopping {
            core.stop(assignment.options.grace, now);
        }
        self.dispatch.begin(index, core);
        self.hatches[index] = Some(hatch);
    }

    fn stop(&mut self) {
        self.stopping = true;
        let (grace, now) = (self.served[0].assignment.options.grace, Instant::now());
        self.dispatch.touch_all(|core| core.stop(grace, now));
    }

    fn reads(&mut self, items: &BTreeSet<NewsItem>) {
        let (now, all) = (Instant::now(), items.contains(&NewsItem::Anything));
        for index in self.dispatch.indexes() {
            let id = self.served[index].assignment.subscription.now();
            if all || items.contains(&NewsItem::Deliveries(id)) {
                self.dispatch.touch(index, |core| core.woken(now));
            }
            if all || items.contains(&NewsItem::State(id)) {
                self.dispatch.touch(index, |core| core.state_changed(now));
            }
        }
    }

    fn jobs_arrived(&mut self) {
        for index in self.dispatch.indexes() {
            if self.served[index].transport.as_ref().is_some_and(|transport| transport.jobs.are_waiting()) {
                self.dispatch.touch(index, |_| {});
            }
        }
    }

    fn answered(&mut self, Done { kind, indexes, answers }: Done) {
        let answers =
            answers.inspect_err(|error| tracing::error!(%error, ?kind, "a call to the store panicked: a bug")).ok();
        let served = self.served.clone();
        self.dispatch.answered(kind, &indexes, answers, || moment(&served));
    }

    // What the cores want

    fn act(&mut self) {
        let now = Instant::now();
        let assignment = &self.served[0].assignment;
        let losses = assignment.store.lost_connections();
        if std::mem::replace(&mut self.losses, losses) != losses {
            self.dispatch.touch_all(|_| {});
        }
        for (index, lanes) in assignment.desk.clone().take() {
            // If nobody serves the subscription any more, the leases end by themselves.
            self.dispatch.touch(index, |core| core.routed(lanes, now));
        }
        self.dispatch.time_passes(now);
        while let Some(index) = self.dispatch.next_touched() {
            self.serve(index);
        }
        for batch in self.dispatch.batches(self.moment()) {
            self.call(batch);
        }
        for index in self.dispatch.broken() {
            tracing::error!(
                subscription = &*self.served[index].assignment.name,
                "what feeds the worker panicked: a bug; it begins again with what the database says"
            );
            self.end(index);
        }
    }

    fn call(&self, batch: Batch) {
        let assignments = batch.calls.iter().map(|(index, _)| self.served[*index].assignment.clone()).collect();
        let (kind, indexes) = (batch.kind, batch.indexes());
        let call = tokio::spawn(store_calls::make(batch, assignments));
        self.calls.push(async move { Done { kind, indexes, answers: call.await } }.boxed());
    }

    /// Does what a core wants, after telling it what can be seen at any time.
    fn serve(&mut self, index: usize) {
        let (at, losses) = (self.moment(), self.losses);
        let served = self.served.clone();
        let Served { assignment, transport } = &served[index];
        let Some(Hatch { tasks, full }) = &self.hatches[index] else { return };
        let (is_gone, room) = (tasks.is_closed(), tasks.capacity());
        let stopping = self.stopping;
        let wants = self.dispatch.touch(index, |core| {
            core.lost_connections(losses);
            core.set_share(assignment.share.now());
            if is_gone {
                core.stop(Duration::ZERO, at.now);
            }
            core.time_passes(is_gone, at);
            if let Some(transport) = transport {
                core.redis_is_up(transport.health.is_up(), at.now);
                // Of a worker that has ended on its own the next one takes them.
                if core.is_working() || stopping {
                    let room = core.room_for_jobs();
                    let jobs = transport.jobs.take(room);
                    let many = jobs.len() >= room.min(assignment.options.batch);
                    core.arrived(jobs, many, at.now);
                }
            }
            let starts = core.start(room, at);
            let is_full = starts.len() == room && core.may_start(at);
            (starts, is_full)
        });
        let Some((starts, is_full)) = wants else { return };
        for start in starts {
            // There is room. Closed when the worker is gone, which ends this feed.
            let _ = tasks.try_send(task(assignment, start));
        }
        if is_full {
            full.store(true, Ordering::Release);
            if tasks.capacity() > 0 && full.swap(false, Ordering::AcqRel) {
                // It took one before it knew.
                self.dispatch.touch(index, |_| {});
                return;
            }
        }
        self.dispatch.gather(index, at);
        let Some((told, room, is_done, is_over)) = self.dispatch.look(index, |core| {
            let is_over = core.has_given_up() || core.is_over() && assignment.desk.is_closed();
            (core.told(), core.room_for_new(), core.is_done(at.now), is_over)
        }) else {
            return;
        };
        for told in told {
            told.tell(assignment);
        }
        assignment.desk.set_room(index, room);
        if is_done {
            assignment.idle.cancel();
        }
        if is_over {
            self.dispatch.end(index);
            self.end(index);
        }
    }

    /// A feed has ended: its worker gets no more tasks.
    fn end(&mut self, index: usize) {
        self.served[index].assignment.desk.set_room(index, Room::default());
        self.hatches[index] = None;
    }

    fn is_over(&self) -> bool {
        self.stopping && self.hatches.iter().all(Option::is_none)
    }
}

fn moment(served: &[Served]) -> Moment {
    Moment { now: Instant::now(), utc: served[0].assignment.clock.now(), chance: fastrand::f64() }
}

fn task(assignment: &Assignment, start: Start) -> Task<DeliveryTask> {
    let Start { event, lane, number, log, last, time, running, cancelled } = start;
    let name = &assignment.name;
    let attempt = Attempt {
        id: running.id(),
        lane,
        subscription: name.clone(),
        number,
        log,
        last,
        time,
        clock: assignment.clock.clone(),
        begun: running.begun().clone(),
        cancelled,
    };
    let id = task_id(name, &event);
    TaskBuilder::new(DeliveryTask { event, attempt: Some(attempt) })
        .task_id(TaskId::from_string(id))
        // As apalis' tracing shows it; apalis counts it once more when it begins.
        .attempt(number as usize)
        .queue(Queue::from(&**name))
        .build()
}

/// Completes when there may be jobs from Redis, of any subscription.
async fn arrived(jobs: Option<&Jobs>) {
    match jobs {
        Some(jobs) => jobs.arrived().await,
        None => std::future::pending().await,
    }
}

/// Completes when Redis comes up or goes down.
async fn health_changes(health: Option<&Health>) {
    match health {
        Some(health) => health.wait_for(!health.is_up()).await,
        None => std::future::pending().await,
    }
}

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use apalis_core::{
    backend::{
        TaskSink,
        ext::{BackendExt, with_codec::WithCodec},
    },
    task::{Task, builder::TaskBuilder, task_id::TaskId},
};
use apalis_redis::{Config, RedisError, RedisStorage};
use redis::aio::ConnectionManager;

use super::{
    Job, Transport,
    job::{JobCodec, Readable},
    relay::BATCH,
};

/// Between two sweeps of finished jobs, and of what crashes have left.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
const SEARCH_EVERY: u32 = 20;

/// How many finished jobs one call removes.
const SWEEP: usize = 1000;

/// How few jobs may wait at least, however long they do.
const FEWEST: usize = 10;

/// How often a worker shows Redis that it lives, and when it counts as dead.
const HEARTBEAT: Duration = Duration::from_secs(10);
const DEAD_AFTER: Duration = Duration::from_secs(120);

/// A relay that holds the right to push longer than this has died; the others wait for so long. One that was only slow
/// exceeds the limit by what it pushes late, a batch.
const TURN: Duration = Duration::from_secs(2);

/// What clocks of several machines may differ by before one throws away another's jobs.
const VOID_MARGIN: Duration = Duration::from_secs(60);

/// The jobs of one subscription in Redis.
#[derive(Clone)]
pub(crate) struct Queue {
    connection: ConnectionManager,
    config: Config,
    window: Arc<Mutex<Window>>,
    /// Of a relay.
    lease: Duration,
}

/// How many jobs may wait: no more than are taken out well before their leases end. Those that wait longer are due
/// again, and pushed again and again.
#[derive(Debug)]
struct Window {
    jobs: usize,
    limit: usize,
    changed_at: Duration,
}

impl Window {
    fn new(limit: usize) -> Self {
        Self { jobs: limit.min(BATCH), limit, changed_at: Duration::ZERO }
    }

    /// With so many jobs that wait, of which the first was pushed then; the time is since the epoch.
    fn adapt(&mut self, waiting: usize, first_at: Option<Duration>, now: Duration, lease: Duration) {
        // Only what was pushed since the last change says what came of it.
        let Some(first_at) = first_at.filter(|first_at| *first_at > self.changed_at) else { return };
        let waits = now.saturating_sub(first_at);
        let jobs = match self.jobs {
            jobs if waits > lease / 2 => (jobs / 2).max(FEWEST),
            jobs if waits < lease / 8 && waiting + BATCH > jobs => jobs * 2,
            _ => return,
        };
        self.jobs = jobs.min(self.limit);
        self.changed_at = now;
    }
}

/// The jobs that nobody has taken out. What a killed worker had taken, or a list that was evicted, is no reason to wait.
struct Waiting {
    jobs: usize,
    /// The one that waits longest, or nothing.
    first: String,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("config", &self.config).field("window", &self.window).finish_non_exhaustive()
    }
}

impl Queue {
    /// `instance` and `subscription` name the queue; nothing of an event does. `lease` is that of a relay.
    pub(crate) fn new(
        connection: ConnectionManager,
        instance: &str,
        subscription: &str,
        limit: usize,
        batch: usize,
        lease: Duration,
    ) -> Self {
        let config = Config::default()
            // In braces: all keys of a queue are in one slot.
            .queue(format!("{{outbox:{instance}:{subscription}}}"))
            .batch_size(batch)
            .heartbeat_interval(HEARTBEAT)
            // A worker that died leaves nothing to give to others: the leases of its jobs end in the database.
            .missed_heartbeats(1_000_000)
            .lock_tasks(false)
            .emit_events(false);
        Self { connection, config, window: Arc::new(Mutex::new(Window::new(limit))), lease }
    }

    pub(crate) fn storage(&self) -> WithCodec<RedisStorage<Readable>, JobCodec> {
        RedisStorage::new(self.connection.clone()).with_config(self.config.clone()).with_codec(JobCodec)
    }

    /// The right to push so many jobs, for one relay at a time: together they keep the limit. `None` if another has it.
    pub(crate) async fn begin_turn(&self, relay: &str) -> Result<Option<usize>, RedisError> {
        let mut set = redis::cmd("SET");
        let set = set.arg(self.turn()).arg(relay).arg("NX").arg("PX").arg(TURN.as_millis() as u64);
        if set.query_async::<Option<String>>(&mut self.connection.clone()).await?.is_none() {
            return Ok(None);
        }
        // Finished jobs take no room: what is waited for is work, not the next sweep.
        let Waiting { jobs, first } = self.remove_finished().await?;
        let first_at = first.split('-').next().and_then(|at| at.parse().ok()).map(Duration::from_millis);
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.adapt(jobs, first_at, since_epoch(), self.lease);
        Ok(Some(window.jobs.saturating_sub(jobs)))
    }

    pub(crate) async fn end_turn(&self, relay: &str) {
        let script = "if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end";
        let ended: Result<(), RedisError> =
            redis::Script::new(script).key(self.turn()).arg(relay).invoke_async(&mut self.connection.clone()).await;
        if let Err(error) = ended {
            tracing::debug!(%error, "the turn of a relay ends by itself");
        }
    }

    fn turn(&self) -> String {
        format!("{}:relay", self.config.queue)
    }

    /// Pushes jobs, all or none of those that arrive.
    pub(crate) async fn push(&self, jobs: Vec<Job>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let now = since_epoch().as_millis();
        let tasks = jobs.into_iter().map(|job| -> Task<Readable> {
            TaskBuilder::new(Readable(Some(job)))
                .task_id(TaskId::from_string(format!("{now:013}-{:016x}", fastrand::u64(..))))
                .build()
        });
        self.storage().push_all(futures_util::stream::iter(tasks)).await.map_err(|error| error.to_string().into())
    }

    /// Takes a worker that has ended out of Redis.
    pub(crate) async fn forget(&self, worker: &str) {
        let mut pipe = redis::pipe();
        pipe.zrem(self.config.workers_set(), worker)
            .del(format!("{}:{worker}", self.config.inflight_jobs_set()))
            .del(format!("{}:workers:metadata:{worker}", self.config.queue));
        if let Err(error) = pipe.query_async::<()>(&mut self.connection.clone()).await {
            tracing::debug!(%error, "a worker that has ended is still listed in Redis");
        }
    }

    /// Takes jobs out of the line whose data was evicted: each of them ends the worker that fetches it.
    pub(crate) async fn remove_evicted(&self) {
        let script = redis::Script::new(
            "for _, id in ipairs(redis.call('lrange', KEYS[1], 0, -1)) do
               if redis.call('hexists', KEYS[3], id) == 0 then redis.call('lrem', KEYS[1], 1, id) end
             end
             for _, id in ipairs(redis.call('zrange', KEYS[2], 0, -1)) do
               if redis.call('hexists', KEYS[3], id) == 0 then redis.call('zrem', KEYS[2], id) end
             end",
        );
        let removed: Result<(), RedisError> = script
            .key(self.config.active_jobs_list())
            .key(self.config.scheduled_jobs_set())
            .key(self.config.job_data_hash())
            .invoke_async(&mut self.connection.clone())
            .await;
        if let Err(error) = removed {
            tracing::debug!(%error, "jobs that were evicted are still listed in Redis");
        }
    }

    /// Removes finished jobs, which apalis-redis keeps for ever; returns what waits.
    async fn remove_finished(&self) -> Result<Waiting, RedisError> {
        let script = redis::Script::new(
            "for _, set in ipairs({KEYS[2], KEYS[3]}) do
               local ids = redis.call('spop', set, ARGV[1])
               for _, id in ipairs(ids) do
                 redis.call('hdel', KEYS[1], id)
                 redis.call('del', KEYS[4] .. ':' .. id)
               end
             end
             local first = redis.call('lindex', KEYS[5], 0) or redis.call('zrange', KEYS[6], 0, 0)[1]
             local waiting = redis.call('llen', KEYS[5]) + redis.call('zcard', KEYS[6])
             return {waiting, first or ''}",
        );
        let (jobs, first) = script
            .key(self.config.job_data_hash())
            .key(self.config.done_jobs_set())
            .key(self.config.dead_jobs_set())
            .key(self.config.job_meta_hash())
            .key(self.config.active_jobs_list())
            .key(self.config.scheduled_jobs_set())
            .arg(SWEEP)
            .invoke_async(&mut self.connection.clone())
            .await?;
        Ok(Waiting { jobs, first })
    }

    /// Removes jobs whose lease has ended, whatever list they are in, and workers that died.
    async fn remove_void(&self) -> Result<(), RedisError> {
        let connection = &mut self.connection.clone();
        let oldest = since_epoch().saturating_sub(self.lease * 2 + VOID_MARGIN).as_millis();
        let oldest = format!("{oldest:013}");
        let mut ids: Vec<String> = redis::cmd("HKEYS").arg(self.config.job_data_hash()).query_async(connection).await?;
        // The list may hold ids whose data was evicted.
        ids.extend(
            redis::cmd("LRANGE")
                .arg(self.config.active_jobs_list())
                .arg(0)
                .arg(SWEEP)
                .query_async::<Vec<String>>(connection)
                .await?,
        );
        let mut pipe = redis::pipe();
        for id in ids.iter().filter(|id| **id < oldest) {
            pipe.lrem(self.config.active_jobs_list(), 0, id)
                .zrem(self.config.scheduled_jobs_set(), id)
                .hdel(self.config.job_data_hash(), id)
                .del(format!("{}:{id}", self.config.job_meta_hash()));
        }
        pipe.query_async::<()>(connection).await?;
        let dead = since_epoch().saturating_sub(DEAD_AFTER).as_secs();
        let mut workers = redis::cmd("ZRANGEBYSCORE");
        let workers = workers.arg(self.config.workers_set()).arg(0).arg(dead);
        for worker in workers.query_async::<Vec<String>>(connection).await? {
            self.forget(&worker).await;
        }
        Ok(())
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Keeps Redis clean until the future is dropped.
pub(crate) async fn sweep(transport: &Transport) {
    for round in 0_u32.. {
        transport.health.wait_for(true).await;
        let queue = &transport.queue;
        let swept = async {
            queue.remove_finished().await?;
            if round.is_multiple_of(SEARCH_EVERY) { queue.remove_void().await } else { Ok(()) }
        };
        if let Err(error) = swept.await {
            tracing::debug!(%error, "Redis was not swept");
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const LEASE: Duration = Duration::from_secs(2);

    /// A queue that is always full, of which so many jobs a second are taken out: how many may wait in the end.
    fn settled(limit: usize, rate: usize) -> usize {
        let (mut window, mut waiting) = (Window::new(limit), VecDeque::new());
        for tick in 1..20_000_u64 {
            let now = Duration::from_secs(1_000_000) + Duration::from_millis(10 * tick);
            window.adapt(waiting.len(), waiting.front().copied(), now, LEASE);
            let room = window.jobs.saturating_sub(waiting.len()).min(BATCH);
            waiting.extend(std::iter::repeat_n(now, room));
            let taken = rate * tick as usize / 100 - rate * (tick as usize - 1) / 100;
            // Those whose lease has ended are passed over.
            while waiting.front().is_some_and(|at| *at + LEASE < now) {
                waiting.pop_front();
            }
            waiting.drain(..taken.min(waiting.len()));
        }
        window.jobs
    }

    #[test]
    fn as_many_jobs_wait_as_are_taken_out_within_half_of_their_lease() {
        assert_eq!(settled(1000, 5_000), 1000);
        assert!((50..=100).contains(&settled(1000, 100)), "{}", settled(1000, 100));
        assert_eq!(settled(1000, 1), FEWEST);
        assert_eq!(settled(5, 1), 5);
    }
}

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
};

/// Between two sweeps of finished jobs, and of what crashes have left.
const SWEEP_EVERY: Duration = Duration::from_millis(500);
const SEARCH_EVERY: u32 = 20;

/// How many finished jobs one call removes.
const SWEEP: usize = 1000;

/// How often a worker shows Redis that it lives, and when it counts as dead.
const HEARTBEAT: Duration = Duration::from_secs(10);
const DEAD_AFTER: Duration = Duration::from_secs(120);

/// A relay that holds the right to push longer than this has died; the others wait for so long. One that was only slow
/// exceeds the limit by what it pushes late, a batch.
const TURN: Duration = Duration::from_secs(2);

/// The jobs of one subscription in Redis.
#[derive(Clone)]
pub(crate) struct Queue {
    connection: ConnectionManager,
    config: Config,
    limit: usize,
    /// A job that is older is void: its lease has ended.
    void_after: Duration,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("config", &self.config).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Queue {
    /// `instance` and `subscription` name the queue; nothing of an event does.
    pub(crate) fn new(
        connection: ConnectionManager,
        instance: &str,
        subscription: &str,
        limit: usize,
        batch: usize,
        void_after: Duration,
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
        Self { connection, config, limit, void_after }
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
        let held = self.remove_finished().await?;
        Ok(Some(self.limit.saturating_sub(held)))
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

    /// Removes finished jobs, which apalis-redis keeps for ever; returns how many jobs are left.
    async fn remove_finished(&self) -> Result<usize, RedisError> {
        let script = redis::Script::new(
            "for _, set in ipairs({KEYS[2], KEYS[3]}) do
               local ids = redis.call('spop', set, ARGV[1])
               for _, id in ipairs(ids) do
                 redis.call('hdel', KEYS[1], id)
                 redis.call('del', KEYS[4] .. ':' .. id)
               end
             end
             return redis.call('hlen', KEYS[1])",
        );
        script
            .key(self.config.job_data_hash())
            .key(self.config.done_jobs_set())
            .key(self.config.dead_jobs_set())
            .key(self.config.job_meta_hash())
            .arg(SWEEP)
            .invoke_async(&mut self.connection.clone())
            .await
    }

    /// Removes jobs whose lease has ended, whatever list they are in, and workers that died.
    async fn remove_void(&self) -> Result<(), RedisError> {
        let connection = &mut self.connection.clone();
        let oldest = since_epoch().saturating_sub(self.void_after).as_millis();
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

//! Redis is flushed, killed, paused, cut off, filled up and garbled under load; the ledger says what came of it.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use outbox_test_servers::{Fault, Proxy, Redis};
use outbox_tests::{
    Process, eventually,
    ledger::{Answer, Ledger, Load, op_body},
    sink::Mood,
};
use tokio::task::JoinSet;

use crate::{
    delivery::{a_worker_sleeps_past_its_lease, counter},
    truth::{Range, sized},
};

const LEASE: &[(&str, &str)] = &[("OUTBOX_LEASE_MS", "1000"), ("OUTBOX_POLL_MS", "100")];

/// An API, two workers with Redis, and a load.
struct Shop {
    range: Range,
    api: Process,
    workers: Vec<Process>,
    settings: Vec<(&'static str, String)>,
}

impl Shop {
    async fn open(redis_url: &str) -> Self {
        Self::open_with(vec![("REDIS_URL", redis_url.to_owned())]).await
    }

    /// `settings` are those of the workers.
    async fn open_with(settings: Vec<(&'static str, String)>) -> Self {
        let range = Range::new().await;
        let api = range.start("serve", LEASE).await;
        let mut shop = Self { range, api, workers: Vec::new(), settings };
        for _ in 0..2 {
            shop.start_worker().await;
        }
        shop.range.ledger.send_to(&[&shop.api.http]);
        shop
    }

    async fn start_worker(&mut self) {
        let own = self.settings.iter().map(|(name, value)| (*name, value.as_str()));
        let settings: Vec<_> = LEASE.iter().copied().chain(own).collect();
        self.workers.push(self.range.start("worker", &settings).await);
    }

    fn ledger(&self) -> &Ledger {
        &self.range.ledger
    }

    /// Ops before `harm` and as long as it goes on, then the ledger.
    async fn survives(mut self, harm: impl AsyncFnOnce(&mut Self)) -> Self {
        let load = self.ledger().load(&Load { clients: 2, ..Load::default() });
        eventually(Duration::from_secs(10), "the first arrival", || async {
            !self.range.sink.first_arrivals().is_empty()
        })
        .await;
        let _ = self.ledger().p99();
        tokio::time::sleep(sized(Duration::from_secs(1), Duration::from_secs(10))).await;
        let before = self.ledger().p99();
        harm(&mut self).await;
        let during = self.ledger().p99();
        self.ledger().clone().stop(load).await;
        let stopped = Instant::now();
        self.range.assert_clean().await;
        println!("p99 {before:?} before, {during:?} during; all settled {:?} after the last op", stopped.elapsed());
        // Requests never ask Redis. Clients, servers and processes that start share the machine: that is the factor, and
        // below a quarter of a second a p99 says more about the machine than about the requests.
        assert!(during <= (3 * before).max(Duration::from_millis(250)), "p99 {before:?} before, {during:?} during");
        self.range.assert_nothing_was_given_up().await;
        for worker in &mut self.workers {
            assert!(worker.is_running(), "no worker was restarted from outside");
        }
        self
    }
}

/// The numbers of a counter in what `INFO` says, added up: `name:…=12,…` or `name:12`.
fn count(info: &str, name: &str) -> u64 {
    let values = info.lines().filter_map(|line| line.strip_prefix(name)?.trim().strip_prefix(':'));
    values.filter_map(|value| value.trim_start_matches("count=").split(',').next()?.parse::<u64>().ok()).sum()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port()
}

/// Ops of so many events each, of keys of their own.
async fn fill(range: &Range, api: &Process, ops: usize, events: u32) {
    let mut clients = JoinSet::new();
    for client in 0..4 {
        let (ledger, url) = (range.ledger.clone(), format!("{}/op", api.http));
        clients.spawn(async move {
            let http = reqwest::Client::new();
            for op in (client..ops).step_by(4).map(|n| format!("op{n}")) {
                ledger.note(&op, events, Answer::Ok);
                let answer = http.post(&url).json(&op_body(&op, &op, events, "ok")).send().await.unwrap();
                assert!(answer.status().is_success());
            }
        });
    }
    clients.join_all().await;
}

/// What stands in Redis.
async fn queues(redis: &Redis) -> String {
    redis.command(&["KEYS", "*"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_go_through_redis_and_leave_nothing_there() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    let shop = shop.survives(async |_| tokio::time::sleep(Duration::from_secs(2)).await).await;
    assert!(queues(&redis).await.contains(":sink}:workers"), "{}", queues(&redis).await);
    let calls = redis.command(&["INFO", "commandstats"]);
    assert!(calls.contains("cmdstat_zadd"), "jobs were pushed: {calls}");
    let jobs = ["sink", "effects"].map(|name| format!(":{name}}}:data"));
    eventually(Duration::from_secs(10), "finished jobs are removed", || async {
        let keys = queues(&redis).await;
        !jobs.iter().any(|job| keys.contains(job)) && !keys.contains(":done") && !keys.contains(":meta:")
    })
    .await;
    for worker in shop.workers {
        assert_eq!(worker.terminate(Duration::from_secs(12)).await.0.code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_picks_up_at_once() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let http = reqwest::Client::new();
    for n in 0..20 {
        let body = op_body(&n.to_string(), &n.to_string(), 1, "ok");
        http.post(format!("{}/op", shop.api.http)).json(&body).send().await.unwrap();
        let sent = Instant::now();
        let come = || async { shop.range.sink.first_arrivals().len() > n };
        eventually(Duration::from_secs(2), "the event arrives without waiting for a heartbeat", come).await;
        println!("{n}: {:?}", sent.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_go_through_redis_with_tls_if_its_certificate_is_trusted() {
    let (directory, port) = (tempfile::tempdir().unwrap(), free_port());
    let certificates = concat!(env!("CARGO_MANIFEST_DIR"), "/../outbox-apalis/tests/webhook/tls");
    let key = BASE64_STANDARD.encode(std::fs::read(format!("{certificates}/localhost.key.der")).unwrap());
    let key_file = directory.path().join("key.pem");
    std::fs::write(&key_file, format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n")).unwrap();
    for trusted in [true, false] {
        // What the test itself asks goes past TLS.
        let redis = Redis::start(&[
            &format!("tls-port {port}"),
            &format!("tls-cert-file {certificates}/localhost.pem"),
            &format!("tls-key-file {}", key_file.display()),
            "tls-auth-clients no",
        ]);
        let mut settings = vec![("REDIS_URL", format!("rediss://localhost:{port}"))];
        if trusted {
            settings.push(("SSL_CERT_FILE", format!("{certificates}/authority.pem")));
        }
        let shop = Shop::open_with(settings).await;
        shop.survives(async |_| tokio::time::sleep(Duration::from_secs(2)).await).await;
        let calls = redis.command(&["INFO", "commandstats"]);
        assert_eq!(calls.contains("cmdstat_zadd"), trusted, "{calls}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_8_the_database_is_the_truth_redis_is_flushed_again_and_again() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |_| {
        for _ in 0..sized(6, 12) {
            tokio::time::sleep(sized(Duration::from_secs(1), Duration::from_secs(5))).await;
            redis.command(&["FLUSHALL"]);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_restarted_without_persistence() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |_| {
        for _ in 0..sized(3, 10) {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            redis.stop();
            tokio::time::sleep(Duration::from_millis(500)).await;
            redis.launch();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_stalls_again_and_again() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |_| {
        for _ in 0..sized(1, 6) {
            redis.command(&["CLIENT", "PAUSE", "2000", "ALL"]);
            tokio::time::sleep(sized(Duration::from_secs(4), Duration::from_secs(10))).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_disappears_in_a_black_hole() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port()).await;
    let shop = Shop::open(&format!("redis://127.0.0.1:{}", proxy.port())).await;
    shop.survives(async |_| {
        proxy.set(Fault::Freeze);
        tokio::time::sleep(sized(Duration::from_secs(5), Duration::from_secs(60))).await;
        proxy.set(Fault::None);
        tokio::time::sleep(Duration::from_secs(2)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_full_and_refuses_jobs() {
    let info = with_too_little_memory("noeviction").await;
    assert!(count(&info, "errorstat_OOM") > 0, "Redis was large enough: {info}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_full_and_evicts_jobs() {
    let info = with_too_little_memory("allkeys-lru").await;
    assert!(count(&info, "evicted_keys") > 0, "Redis was large enough: {info}");
}

/// Large events, of which few have room at the same time. Returns what Redis counted.
async fn with_too_little_memory(policy: &str) -> String {
    let redis = Redis::start(&["maxmemory 3mb", &format!("maxmemory-policy {policy}")]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |shop| {
        // Of somebody else, so that there is no room left even for jobs, which are small.
        let used = count(&redis.command(&["INFO", "memory"]), "used_memory");
        let rest = (3_u64 << 20).saturating_sub(used);
        redis.command(&["SETRANGE", "neighbour", &rest.saturating_sub(1000).to_string(), "x"]);
        let http = reqwest::Client::new();
        let until = Instant::now() + sized(Duration::from_secs(5), Duration::from_secs(60));
        for n in 0.. {
            let op = format!("big{n}");
            shop.ledger().note(&op, 2, Answer::Ok);
            let body = op_body(&op, &op, 1, "big:200000");
            let answer = http.post(format!("{}/op", shop.api.http)).json(&body).send().await.unwrap();
            assert!(answer.status().is_success());
            if Instant::now() > until {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    redis.command(&["INFO", "everything"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_are_garbled() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    // Jobs wait in Redis, so that all of them are met there.
    shop.range.sink.set(Mood::Answer { status: 204, after: Duration::from_millis(20) });
    shop.survives(async |_| {
        let garble = "math.randomseed(tonumber(ARGV[1]))
                      for _, key in ipairs(redis.call('keys', '*:data')) do
                        for _, id in ipairs(redis.call('hkeys', key)) do
                          if redis.call('sadd', 'met', id) == 1 and math.random(10) == 1 then
                            redis.call('hset', key, id, '{garbled')
                            redis.call('incr', 'garbled')
                          end
                        end
                      end";
        let until = Instant::now() + sized(Duration::from_secs(5), Duration::from_secs(60));
        while Instant::now() < until {
            redis.command(&["EVAL", garble, "0", &fastrand::u32(..).to_string()]);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let (met, garbled) = (redis.command(&["SCARD", "met"]), redis.command(&["GET", "garbled"]));
    println!("{garbled} of {met} jobs were garbled");
    assert!(garbled.parse::<u32>().is_ok_and(|garbled| garbled > 0));
}

/// What somebody does to a job who can write to Redis: each kind by its number, and only to what it finds.
const FORGE: &str = r#"
    math.randomseed(tonumber(ARGV[1]))
    -- A job like that one, in this queue.
    local function add(queue, id, data, like_queue, like)
      local meta = redis.call('hgetall', like_queue:gsub(':data$', ':meta:') .. like)
      if #meta > 0 then redis.call('hset', queue:gsub(':data$', ':meta:') .. id, unpack(meta)) end
      redis.call('hset', queue, id, data)
      redis.call('rpush', (queue:gsub(':data$', ':active')), id)
    end
    for _, key in ipairs(redis.call('keys', '*:data')) do
      for _, id in ipairs(redis.call('hkeys', key)) do
        if redis.call('sadd', 'met', id) == 1 then
          local job = redis.call('hget', key, id)
          local kind, forged, n = math.random(40), nil, 0
          if kind == 1 then forged, n = job:gsub('"op":', '"forged":')
          elseif kind == 2 then forged, n = job:gsub('"event_type":"order', '"event_type":"forged')
          elseif kind == 3 then forged, n = job:gsub('"run":%[.*%],"unreadable"', '"run":[],"unreadable"')
          elseif kind == 4 then forged, n = job:gsub('"unreadable":null', '"unreadable":{"position":1,"error":"forged"}')
          elseif kind == 5 then forged, n = job:gsub('"position":(%d+)', '"position":1%1')
          elseif kind == 6 then forged, n = job:gsub('"token":(%d-)%d([,}])', '"token":%19%2')
          elseif kind == 7 then forged, n = job:gsub('"key":"', '"key":"forged')
          elseif kind == 8 then forged, n = job:gsub('"subscription":(%d+)', function(s) return '"subscription":' .. (s % 3 + 1) end)
          elseif kind == 9 then forged, n = job:gsub('"probe":false', '"probe":true')
          elseif kind == 10 then forged, n = '{}', 1
          elseif kind == 11 then add(key, id .. 'twice', job, key, id) redis.call('hincrby', 'forged', kind, 1)
          elseif kind == 12 then
            -- The token that the job's lease has when a worker has taken it over.
            local next, found = job:gsub('"token":(%d-)([0-8])([,}])', function(t, d, e) return '"token":' .. t .. (d + 1) .. e end)
            if found == 1 then add(key, id .. 'stolen', next, key, id) redis.call('hincrby', 'forged', kind, 1) end
          elseif kind == 13 then
            -- Into the queue of another subscription.
            for _, other in ipairs(redis.call('keys', '*:data')) do
              if other ~= key then add(other, id .. 'moved', job, key, id) redis.call('hincrby', 'forged', kind, 1) end
            end
          end
          if n > 0 then
            redis.call('hset', key, id, forged)
            redis.call('hincrby', 'forged', kind, 1)
          end
        end
      end
    end"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_are_forged() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    // Jobs wait in Redis, so that all of them are met there.
    shop.range.sink.set(Mood::Answer { status: 204, after: Duration::from_millis(20) });
    let shop = shop
        .survives(async |_| {
            let until = Instant::now() + sized(Duration::from_secs(6), Duration::from_secs(60));
            while Instant::now() < until {
                let done = redis.command(&["EVAL", FORGE, "0", &fastrand::u32(..).to_string()]);
                assert!(done.trim().is_empty(), "{done}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    let (met, forged) = (redis.command(&["SCARD", "met"]), redis.command(&["HGETALL", "forged"]));
    println!("{met} jobs, forged:\n{forged}");
    // What a job can have of an event, it does not have.
    let kinds: Vec<&str> = forged.lines().step_by(2).collect();
    assert!(["1", "2", "3", "4", "5"].iter().all(|kind| !kinds.contains(kind)), "{forged}");
    assert!(["6", "7", "8", "9", "10", "11", "12", "13"].iter().all(|kind| kinds.contains(kind)), "{forged}");
    let mut dropped = 0.0;
    for worker in &shop.workers {
        dropped += counter(worker, "outbox_redis_jobs_dropped_total").await;
    }
    assert!(dropped > 0.0, "what is dropped is counted");
    let leased = "select key from outbox_lanes where leased_by is not null";
    eventually(Duration::from_secs(10), "no lease is kept for ever", || async {
        shop.range.texts(leased).await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_with_redis_are_killed_and_restarted_under_load() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |shop| {
        for round in 0..sized(5, 60) {
            tokio::time::sleep(Duration::from_millis(1000)).await;
            let worker = shop.workers.remove(0);
            if round % 2 == 0 {
                worker.kill().await;
            } else {
                assert_eq!(worker.terminate(Duration::from_secs(12)).await.0.code(), Some(0));
            }
            shop.start_worker().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_redis_that_slept_past_its_lease_changes_nothing() {
    let redis = Redis::start(&[]);
    a_worker_sleeps_past_its_lease(&[("REDIS_URL", &redis.url())]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_never_fills_redis_nor_a_worker() {
    let redis = Redis::start(&[]);
    let range = Range::new().await;
    let api = range.start("serve", LEASE).await;
    // Register the subscriptions, then nobody works.
    range.start("worker", LEASE).await.terminate(Duration::from_secs(12)).await;
    fill(&range, &api, sized(200, 2000), 10).await;
    let url = redis.url();
    let settings: Vec<_> = LEASE.iter().copied().chain([("REDIS_URL", url.as_str())]).collect();
    let (started, worker) = (Instant::now(), range.start("worker", &settings).await);
    let mut most = 0;
    let left = "select (select count(*) from outbox_deliveries) + (select count(*) from outbox_unrouted) || ''";
    while range.texts(left).await[0] != "0" {
        for name in ["sink", "effects"] {
            let waiting = [("LLEN", "active"), ("ZCARD", "scheduled")].map(|(count, list)| {
                let key = redis.command(&["KEYS", &format!("*:{name}}}:{list}")]);
                redis.command(&[count, key.trim()]).parse::<u32>().unwrap_or(0)
            });
            most = most.max(waiting.iter().sum());
        }
        assert!(
            started.elapsed() < sized(Duration::from_secs(60), Duration::from_secs(300)),
            "{} are left",
            range.texts(left).await[0]
        );
    }
    println!("{most} jobs at most, {} MB, {:?}", worker.most_memory(), started.elapsed());
    assert!((1..=1000).contains(&most), "{most} jobs at most");
    assert!(worker.most_memory() < 256, "{} MB", worker.most_memory());
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
    // A script that Redis does not have yet is sent again; none has failed.
    let info = redis.command(&["INFO", "everything"]);
    let scripts = info.lines().filter(|line| line.starts_with("cmdstat_eval"));
    let failed: u64 = scripts.filter_map(|line| line.rsplit("failed_calls=").next()?.parse::<u64>().ok()).sum();
    assert_eq!(failed, count(&info, "errorstat_NOSCRIPT"), "{info}");
}

/// Each delivery takes a while, and a worker has few under way: workers are what limits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_need_less_time_than_one_and_repeat_nothing() {
    let (ops, events) = (sized(80, 500), 4);
    let mut needed = Vec::new();
    for count in [1, 2] {
        let redis = Redis::start(&[]);
        let range = Range::new().await;
        range.sink.set(Mood::Answer { status: 204, after: Duration::from_millis(50) });
        let url = redis.url();
        // A lease that no delivery of a busy machine outlasts.
        let settings = [("OUTBOX_CONCURRENCY", "4"), ("OUTBOX_POLL_MS", "100"), ("REDIS_URL", url.as_str())];
        let api = range.start("serve", &[]).await;
        let mut workers = Vec::new();
        for _ in 0..count {
            workers.push(range.start("worker", &settings).await);
        }
        range.witness.pause("sink").await.unwrap();
        fill(&range, &api, ops, events).await;
        let effects = "select key from outbox_lanes l join outbox_subscriptions s on s.id = l.subscription_id
                        where s.name = 'effects' union all select position::text from outbox_unrouted";
        eventually(Duration::from_secs(60), "the effects", || async { range.texts(effects).await.is_empty() }).await;
        let resumed = Instant::now();
        range.witness.resume("sink").await.unwrap();
        let left = "select key from outbox_lanes union all select position::text from outbox_unrouted";
        eventually(Duration::from_secs(120), "all arrive", || async { range.texts(left).await.is_empty() }).await;
        needed.push(resumed.elapsed());
        range.assert_clean().await;
        range.assert_no_attempt_was_burnt().await;
        assert_eq!(range.sink.arrivals().len(), range.sink.first_arrivals().len(), "nothing is repeated");
        for worker in &workers {
            assert_eq!(counter(worker, "outbox_superseded_total").await, 0.0);
            assert!(counter(worker, "outbox_messages_published_total").await > 0.0, "each worker has its share");
        }
    }
    println!("one worker {:?}, two {:?}", needed[0], needed[1]);
    assert!(needed[1] < needed[0].mul_f64(0.75), "one worker {:?}, two {:?}", needed[0], needed[1]);
}

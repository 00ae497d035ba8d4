//! Redis is flushed, killed, paused, cut off, filled up and garbled under load; the ledger says what came of it.

use std::time::{Duration, Instant};

use outbox_test_servers::{Fault, Proxy, Redis};
use outbox_tests::{
    Process, eventually,
    ledger::{Ledger, Load},
};

use crate::truth::{Range, sized};

const LEASE: &[(&str, &str)] = &[("OUTBOX_LEASE_MS", "1000"), ("OUTBOX_POLL_MS", "100")];

/// An API, two workers with Redis, and a load.
struct Shop {
    range: Range,
    api: Process,
    workers: Vec<Process>,
}

impl Shop {
    async fn open(redis_url: &str) -> Self {
        let range = Range::new().await;
        let api = range.start("serve", LEASE).await;
        let mut shop = Self { range, api, workers: Vec::new() };
        for _ in 0..2 {
            shop.start_worker(redis_url).await;
        }
        shop.range.ledger.send_to(&[&shop.api.http]);
        shop
    }

    async fn start_worker(&mut self, redis_url: &str) {
        let settings: Vec<_> = LEASE.iter().copied().chain([("REDIS_URL", redis_url)]).collect();
        self.workers.push(self.range.start("worker", &settings).await);
    }

    fn ledger(&self) -> &Ledger {
        &self.range.ledger
    }

    /// Ops as long as `harm` goes on, then the ledger.
    async fn survives(mut self, harm: impl AsyncFnOnce(&mut Self)) -> Self {
        let load = self.ledger().load(&Load { clients: 2, ..Load::default() });
        eventually(Duration::from_secs(10), "the first arrival", || async {
            !self.range.sink.first_arrivals().is_empty()
        })
        .await;
        harm(&mut self).await;
        self.ledger().clone().stop(load).await;
        self.range.assert_clean().await;
        self.range.assert_nothing_was_given_up().await;
        for worker in &mut self.workers {
            assert!(worker.is_running(), "no worker was restarted from outside");
        }
        self
    }
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
        let body = outbox_tests::ledger::op_body(&n.to_string(), &n.to_string(), 1, "ok");
        http.post(format!("{}/op", shop.api.http)).json(&body).send().await.unwrap();
        let sent = Instant::now();
        let come = || async { shop.range.sink.first_arrivals().len() > n };
        eventually(Duration::from_secs(2), "the event arrives without waiting for a heartbeat", come).await;
        println!("{n}: {:?}", sent.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_8_the_database_is_the_truth_redis_is_flushed_again_and_again() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |_| {
        for _ in 0..sized(6, 60) {
            tokio::time::sleep(Duration::from_secs(1)).await;
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
async fn redis_stalls_and_disappears_in_a_black_hole() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port()).await;
    let shop = Shop::open(&format!("redis://127.0.0.1:{}", proxy.port())).await;
    shop.survives(async |_| {
        redis.command(&["CLIENT", "PAUSE", "2000", "ALL"]);
        tokio::time::sleep(Duration::from_secs(4)).await;
        proxy.set(Fault::Freeze);
        tokio::time::sleep(sized(Duration::from_secs(5), Duration::from_secs(60))).await;
        proxy.set(Fault::None);
        tokio::time::sleep(Duration::from_secs(2)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_too_small() {
    for policy in ["maxmemory-policy noeviction", "maxmemory-policy allkeys-lru"] {
        let redis = Redis::start(&["maxmemory 2mb", policy]);
        let shop = Shop::open(&redis.url()).await;
        shop.survives(async |_| tokio::time::sleep(sized(Duration::from_secs(4), Duration::from_secs(30))).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_are_garbled() {
    let redis = Redis::start(&[]);
    let shop = Shop::open(&redis.url()).await;
    shop.survives(async |_| {
        let garble = "for _, key in ipairs(redis.call('keys', '*:data')) do
                        for _, id in ipairs(redis.call('hkeys', key)) do
                          if math.random(10) == 1 then redis.call('hset', key, id, '{garbled') end
                        end
                      end";
        let until = Instant::now() + sized(Duration::from_secs(5), Duration::from_secs(60));
        while Instant::now() < until {
            redis.command(&["EVAL", garble, "0"]);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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
            shop.start_worker(&redis.url()).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_never_fills_redis() {
    let redis = Redis::start(&[]);
    let range = Range::new().await;
    let api = range.start("serve", LEASE).await;
    // Register the subscriptions, then nobody works.
    range.start("worker", LEASE).await.terminate(Duration::from_secs(12)).await;
    let http = reqwest::Client::new();
    for op in 0..sized(4, 20) {
        let body = outbox_tests::ledger::op_body(&format!("op{op}"), &format!("k{op}"), 1, "many:999");
        range.ledger.note(&format!("op{op}"), 1000, outbox_tests::ledger::Answer::Ok);
        assert!(http.post(format!("{}/op", api.http)).json(&body).send().await.unwrap().status().is_success());
    }
    let settings: Vec<_> = LEASE.iter().copied().chain([("REDIS_URL", redis.url().leak() as &str)]).collect();
    let _worker = range.start("worker", &settings).await;
    let mut most = 0;
    let left = "select count(*)::text from outbox_deliveries";
    while range.texts(left).await[0] != "0" {
        for name in ["sink", "effects"] {
            let keys = redis.command(&["KEYS", &format!("*:{name}}}:data")]);
            let held: u32 = redis.command(&["HLEN", keys.trim()]).parse().unwrap_or(0);
            most = most.max(held);
        }
    }
    assert!((1..=1000).contains(&most), "{most} jobs at most");
}

//! Workers are killed, stopped and asked to end, and destinations fail, under load; the ledger says what came of it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use outbox_test_servers::{Destination, Fault, Manner, Proxy};
use outbox_tests::{
    Process, eventually,
    ledger::{Answer, Load, op_body},
    sink::Mood,
};
use reqwest::Client;
use serde_json::json;
use tokio::net::TcpSocket;

use crate::truth::{OPS_TOKEN, Range, sized};

const QUICK: &[(&str, &str)] = &[
    ("OUTBOX_LEASE_MS", "1000"),
    ("OUTBOX_POLL_MS", "50"),
    ("OUTBOX_BACKOFF_BASE_MS", "50"),
    ("OUTBOX_BACKOFF_MAX_MS", "500"),
];

/// The concurrency of a worker that was not told another.
const CONCURRENCY: usize = 10;

async fn post(url: &str, body: &serde_json::Value) {
    let answer = Client::new().post(url).json(body).send().await.unwrap();
    assert!(answer.status().is_success(), "{}", answer.status());
}

/// The sum of a counter of one process, over all its labels.
pub(crate) async fn counter(process: &Process, name: &str) -> f64 {
    let metrics = Client::new().get(format!("{}/metrics", process.ops)).bearer_auth(OPS_TOKEN).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let lines = metrics.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

async fn workers(range: &Range, settings: &[(&str, &str)], count: usize) -> Vec<Process> {
    let mut workers = Vec::new();
    for _ in 0..count {
        workers.push(range.start("worker", settings).await);
    }
    workers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_3_nothing_lost_when_workers_are_killed_and_little_is_repeated() {
    let range = Range::new().await;
    let api = range.start("serve", QUICK).await;
    let mut workers = workers(&range, QUICK, 4).await;
    range.ledger.send_to(&[&api.http]);
    let load = range.ledger.load(&Load { clients: 4, keys: 200, ..Load::default() });
    let kills = sized(6, 60);
    for _ in 0..kills {
        tokio::time::sleep(Duration::from_millis(800)).await;
        workers.swap_remove(fastrand::usize(..workers.len())).kill().await;
        workers.push(range.start("worker", QUICK).await);
    }
    range.ledger.clone().stop(load).await;
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
    let repeated = range.sink.arrivals().len() - range.sink.first_arrivals().len();
    assert!(repeated <= kills * CONCURRENCY, "{repeated} arrivals too many");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_5_ordered_per_key_whatever_fails_or_is_killed_while_many_are_under_way() {
    let range = Range::new().await;
    let settings: Vec<_> = QUICK.iter().copied().chain([("OUTBOX_MAX_ATTEMPTS", "100")]).collect();
    let api = range.start("serve", &settings).await;
    let mut workers = workers(&range, &settings, 4).await;
    range.sink.set(Mood::Fail { percent: 20, after: Duration::from_millis(60) });
    range.ledger.send_to(&[&api.http]);
    let load = range.ledger.load(&Load { clients: 8, keys: 200, ..Load::default() });
    for _ in 0..sized(3, 30) {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        workers.swap_remove(fastrand::usize(..workers.len())).kill().await;
        workers.push(range.start("worker", &settings).await);
    }
    range.ledger.clone().stop(load).await;
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
    assert!(range.sink.most_at_work() >= 20, "{} at most", range.sink.most_at_work());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_6_fenced_a_worker_that_slept_past_its_lease_changes_nothing() {
    a_worker_sleeps_past_its_lease(&[]).await;
}

/// One of two workers with these settings, again and again.
pub(crate) async fn a_worker_sleeps_past_its_lease(settings: &[(&str, &str)]) {
    let range = Range::new().await;
    let settings = [QUICK, settings].concat();
    let api = range.start("serve", &settings).await;
    let mut workers = workers(&range, &settings, 2).await;
    // The workers take turns.
    let round_of = |round: u32| round % 2;
    let mut dropped_before: HashMap<u32, f64> = HashMap::new();
    for round in 0..sized(4, 30) {
        // One worker is at it when it is stopped; its call is answered while it sleeps.
        let (sleeper, other, started) = (&workers[0], &workers[1], Instant::now());
        other.signal("STOP");
        range
            .sink
            .set(Mood::Answer { status: if round % 2 == 0 { 204 } else { 500 }, after: Duration::from_millis(300) });
        let before = range.sink.arrivals().len();
        let op = format!("op{round}");
        range.ledger.note(&op, 1, Answer::Ok);
        post(&format!("{}/op", api.http), &op_body(&op, "k", 1, "ok")).await;
        eventually(Duration::from_secs(5), "it arrives", || async { range.sink.arrivals().len() > before }).await;
        sleeper.signal("STOP");
        range.sink.set(Mood::Take);
        other.signal("CONT");
        let delivered = format!(
            "select d.attempts::text from outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id
               join outbox_events e on e.position = d.position where s.name = 'sink' and e.payload->>'op' = '{op}'"
        );
        eventually(Duration::from_secs(10), "the other worker delivers", || async {
            range.texts(&delivered).await == ["2"]
        })
        .await;
        let dropped = dropped_before.remove(&round_of(round)).unwrap_or_default();
        sleeper.signal("CONT");
        eventually(Duration::from_secs(5), "the late result is dropped and counted", || async {
            counter(sleeper, "outbox_superseded_total").await > dropped
        })
        .await;
        dropped_before.insert(round_of(round), counter(sleeper, "outbox_superseded_total").await);
        assert_eq!(range.texts(&delivered).await, ["2"]);
        workers.swap(0, 1);
        println!("round {round}: {:?}", started.elapsed());
    }
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
}

/// The sink takes each event and never answers, one key of another subscription fails for ever, and a key of the same
/// subscription is none the worse.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_7_isolated_a_destination_that_hangs_and_a_key_that_fails_delay_only_themselves() {
    let range = Range::new().await;
    let settings: Vec<_> = QUICK.iter().copied().chain([("OUTBOX_MAX_ATTEMPTS", "1000")]).collect();
    let app = range.start("all", &settings).await;
    let hangs = Duration::from_secs(60);
    range.sink.set(Mood::Answer { status: 204, after: hangs });
    let poison = |key: &'static str, kind: &'static str| {
        let url = format!("{}/poison", app.http);
        async move { post(&url, &json!({ "op": format!("{key}-{kind}"), "key": key, "kind": kind })).await }
    };
    poison("sick", "error").await;
    let started = Instant::now();
    for op in 0..100 {
        post(&format!("{}/op", app.http), &op_body(&op.to_string(), &format!("k{}", op % 10), 1, "ok")).await;
    }
    // Another key of the subscription that fails: it comes to its own end.
    poison("other", "permanent").await;
    let (effects, dead) =
        ("select event_id::text from effects", "select error from outbox_dead_letters where key like '%other'");
    eventually(Duration::from_secs(10), "all effects, and the end of the other key", || async {
        range.texts(effects).await.len() == 100 && range.texts(dead).await.len() == 1
    })
    .await;
    println!("{:?}", started.elapsed());
    assert!(!range.sink.arrivals().is_empty(), "the destination hangs");
    let pending = "select s.name from outbox_deliveries d join outbox_subscriptions s on s.id = d.subscription_id";
    let pending = range.texts(pending).await;
    assert_eq!(pending.iter().filter(|name| *name == "sink").count(), 100);
    assert_eq!(pending.iter().filter(|name| *name == "poison").count(), 1);
    assert!(started.elapsed() < hangs);
}

/// Commits events, one after another, and returns the 99th percentile of the times from the commit to the arrival, and how
/// many sockets the worker had open at most.
async fn lateness(range: &Range, api: &Process, worker: &Process, name: &str) -> (Duration, usize) {
    let (mut committed, mut sockets) = (HashMap::new(), 0);
    let expected = range.sink.arrivals().len() + 300;
    for n in 0..300 {
        let op = format!("{name} {n}");
        post(&format!("{}/op", api.http), &op_body(&op, &op, 1, "ok")).await;
        committed.insert(op, Instant::now());
        sockets = sockets.max(open_sockets(worker));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    eventually(Duration::from_secs(30), "all arrive", || async { range.sink.arrivals().len() >= expected }).await;
    let arrivals = range.sink.arrivals();
    let late = |op: &str, at: Instant| committed.get(op).map(|committed| at.saturating_duration_since(*committed));
    let arrivals = arrivals.iter().map(|arrival| (arrival.event["data"]["op"].as_str().unwrap(), arrival.at));
    let mut late: Vec<_> = arrivals.filter_map(|(op, at)| late(op, at)).collect();
    late.sort_unstable();
    (late[late.len() * 99 / 100], sockets)
}

fn open_sockets(process: &Process) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap();
    let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_7_isolated_destinations_that_misbehave_do_not_delay_one_that_does_not() {
    let range = Range::new().await;
    let mut settings: Vec<_> = QUICK.to_vec();
    // Each refusal would be a line. An attempt that hangs lasts as long as the lease.
    let hang = Duration::from_secs(4);
    settings.extend([("OUTBOX_LEASE_MS", "4000"), ("OUTBOX_MAX_ATTEMPTS", "1000"), ("RUST_LOG", "off")]);
    let api = range.start("serve", &settings).await;
    let worker = range.start("worker", &settings).await;
    let waiting = sized(400, 2000);
    for op in 0..waiting / 10 {
        let op = op.to_string();
        post(&format!("{}/op", api.http), &op_body(&op, &op, 10, "ok")).await;
    }
    eventually(Duration::from_secs(60), "they arrive", || async { range.sink.arrivals().len() == waiting }).await;
    let (alone, sockets_alone) = lateness(&range, &api, &worker, "alone").await;
    worker.terminate(Duration::from_secs(15)).await;

    let mut bad = Vec::new();
    for manner in [Manner::Silent, Manner::Dripping, Manner::Endless, Manner::Circular] {
        bad.push(Destination::start(manner).await);
    }
    let urls = bad.iter().map(|destination| destination.url.as_str()).collect::<Vec<_>>().join(",");
    settings.push(("MORE_SINK_URLS", &urls));
    // Their subscriptions start at the beginning: all that was committed so far waits for them.
    let mut worker = range.start("worker", &settings).await;
    let (beside, sockets) = lateness(&range, &api, &worker, "beside").await;
    let memory = worker.most_memory();
    println!("p99 {alone:?} alone, {beside:?} beside; {sockets_alone} and {sockets} sockets; {memory} MB");
    assert!(worker.is_running());
    assert_eq!(range.sink.first_arrivals().len(), waiting + 600);
    // What waits behind an attempt that hangs is as late as that; less is what a busy machine may add.
    assert!(beside < hang * 3 / 4, "{alone:?} alone, {beside:?} beside");
    // As many connections to each destination as may be under way, the two pools of the database, and a few of the
    // process itself.
    assert!(sockets <= (1 + bad.len()) * CONCURRENCY + 10 + 6 + 10, "{sockets} sockets, {bad:?}");
    assert!(memory < 100, "{memory} MB: less than a single one of the endless answers");
    // All may still come to their senses, and have lost nothing.
    let left = "select s.name from outbox_deliveries d join outbox_subscriptions s on s.id = d.subscription_id
                 where s.name in ('sink-2', 'sink-3', 'sink-4', 'sink-5')";
    assert_eq!(range.texts(left).await.len(), 4 * (waiting + 600));
    range.assert_nothing_was_given_up().await;
}

/// Exactly 1,000 events, one of each kind of poison among them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_of_every_kind_dies_alone() {
    let range = Range::new().await;
    let settings: Vec<_> = QUICK.iter().copied().chain([("OUTBOX_MAX_ATTEMPTS", "3")]).collect();
    let api = range.start("serve", &settings).await;
    let mut worker = range.start("worker", &settings).await;
    let mut kinds = ["error", "panic", "abort", "hang", "block", "permanent"].into_iter();
    for op in 0..142 {
        let op = op.to_string();
        range.ledger.note(&op, 7, Answer::Ok);
        post(&format!("{}/op", api.http), &op_body(&op, &op, 7, "ok")).await;
        if let Some(kind) = kinds.next() {
            post(&format!("{}/poison", api.http), &json!({ "op": kind, "key": kind, "kind": kind })).await;
        }
    }
    let dead = "select e.payload->>'kind' from outbox_dead_letters d join outbox_events e on e.position = d.position";
    let (mut ended, started) = (0, Instant::now());
    while range.texts(dead).await.len() < 6 {
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", range.texts(dead).await);
        if !worker.is_running() {
            ended += 1;
            worker = range.start("worker", &settings).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    range.assert_clean().await;
    assert_eq!(range.texts(dead).await, ["abort", "block", "error", "hang", "panic", "permanent"]);
    assert_eq!(range.texts("select count(*)::text from outbox_events").await, ["1000"]);
    let delivered = "select s.name || ' ' || count(*) from outbox_delivered d
                       join outbox_subscriptions s on s.id = d.subscription_id group by s.name";
    assert_eq!(range.texts(delivered).await, ["effects 994", "sink 994"]);
    assert!(ended <= 3, "the process ended {ended} times");
}

/// One lane, and whoever has it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_global_order_goes_on_in_order_when_the_worker_that_holds_it_is_killed() {
    let range = Range::new().await;
    let settings: Vec<_> = QUICK.iter().copied().chain([("SINK_ORDERING", "global")]).collect();
    let api = range.start("serve", &settings).await;
    let mut workers = workers(&range, &settings, 2).await;
    range.sink.set(Mood::Fail { percent: 0, after: Duration::from_millis(10) });
    range.ledger.send_to(&[&api.http]);
    // One client, since what runs side by side may be delivered in any order.
    let load = range.ledger.load(&Load { clients: 1, ..Load::default() });
    let holder = "select leased_by from outbox_lanes l join outbox_subscriptions s on s.id = l.subscription_id
                   where s.name = 'sink' and leased_by is not null";
    for _ in 0..sized(3, 30) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        eventually(Duration::from_secs(5), "a worker has the lane", || async { !range.texts(holder).await.is_empty() })
            .await;
        let first = range.texts(holder).await.remove(0);
        let index = workers.iter().position(|worker| first.contains(&format!("-{}-", worker.id()))).unwrap();
        workers.swap_remove(index).kill().await;
        let killed = Instant::now();
        let is_the_others = || async { range.texts(holder).await.first().is_some_and(|holder| *holder != first) };
        // The lease, the poll, and a second.
        let limit = Duration::from_millis(1000 + 50 + 1000);
        eventually(limit, "the other has the lane", is_the_others).await;
        let before = range.sink.arrivals().len();
        let limit = limit.saturating_sub(killed.elapsed());
        eventually(limit, "it goes on", || async { range.sink.arrivals().len() > before }).await;
        println!("{:?}", killed.elapsed());
        workers.push(range.start("worker", &settings).await);
    }
    range.ledger.clone().stop(load).await;
    range.sink.set(Mood::Take);
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
    let committed = "select to_char(position, '0000000') || ' ' || (payload->>'op') || ' ' || (payload->>'i')
                       from outbox_events";
    let committed = range.texts(committed).await;
    let arrived = range.sink.first_arrivals();
    let arrived =
        arrived.iter().map(|event| format!("{} {}", event["data"]["op"].as_str().unwrap(), event["data"]["i"]));
    for (committed, arrived) in committed.iter().zip(arrived) {
        assert_eq!(committed.trim_start().split_once(' ').unwrap().1, arrived);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_are_asked_to_end_repeat_nothing_and_leave_no_lease() {
    let range = Range::new().await;
    let settings: Vec<_> = QUICK.iter().copied().chain([("OUTBOX_SHUTDOWN_GRACE_MS", "2000")]).collect();
    let api = range.start("serve", &settings).await;
    let mut workers = workers(&range, &settings, 2).await;
    range.ledger.send_to(&[&api.http]);
    let load = range.ledger.load(&Load { clients: 2, keys: 50, ..Load::default() });
    for _ in 0..sized(6, 30) {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (status, _) = workers.remove(0).terminate(Duration::from_millis(3000)).await;
        assert_eq!(status.code(), Some(0));
        workers.push(range.start("worker", &settings).await);
    }
    range.ledger.clone().stop(load).await;
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
    assert_eq!(range.sink.arrivals().len(), range.sink.first_arrivals().len(), "nothing is repeated");
    post(&format!("{}/poison", api.http), &json!({ "op": "hang", "key": "hang", "kind": "hang" })).await;
    let leased = "select key from outbox_lanes where leased_by is not null";
    eventually(Duration::from_secs(5), "a handler hangs", || async { !range.texts(leased).await.is_empty() }).await;
    for worker in workers {
        assert_eq!(worker.terminate(Duration::from_millis(4000)).await.0.code(), Some(0));
    }
    assert_eq!(range.texts(leased).await, Vec::<String>::new());
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Down {
    PortClosed,
    /// It accepts connections and closes them.
    HangsUp,
    Answers503,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_is_down_costs_no_attempts() {
    for down in [Down::PortClosed, Down::HangsUp, Down::Answers503] {
        let range = Range::new().await;
        let proxy = Proxy::start(range.sink_port()).await;
        // Taken, so that nobody else gets the port, and not listening: who connects is refused.
        let closed = TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = if down == Down::PortClosed { closed.local_addr().unwrap().port() } else { proxy.port() };
        let sink_url = format!("http://127.0.0.1:{port}/sink");
        let mut settings: Vec<_> = QUICK.to_vec();
        settings.push(("SINK_URL", sink_url.as_str()));
        let api = range.start("serve", &settings).await;
        match down {
            Down::PortClosed => {}
            Down::HangsUp => proxy.set(Fault::Refuse),
            Down::Answers503 => range.sink.set(Mood::Status(503)),
        }
        let _workers = workers(&range, &settings, 2).await;
        for op in 0..sized(30, 300) {
            let op = format!("op{op}");
            range.ledger.note(&op, 10, Answer::Ok);
            post(&format!("{}/op", api.http), &op_body(&op, &op, 10, "ok")).await;
        }
        tokio::time::sleep(sized(Duration::from_secs(4), Duration::from_secs(120))).await;
        let open = "select circuit_failures::text from outbox_subscriptions where circuit_until is not null";
        assert_eq!(range.texts(open).await.len(), 1, "the circuit is open");
        match down {
            Down::PortClosed => drop(range.sink.serve(closed.listen(1024).unwrap())),
            Down::HangsUp => proxy.set(Fault::None),
            Down::Answers503 => range.sink.set(Mood::Take),
        }
        range.assert_clean().await;
        range.assert_nothing_was_given_up().await;
        let attempts = "select d.attempts::text from outbox_delivered d
                          join outbox_subscriptions s on s.id = d.subscription_id where s.name = 'sink'";
        let mut spent: HashMap<String, usize> = HashMap::new();
        for attempts in range.texts(attempts).await {
            *spent.entry(attempts).or_default() += 1;
        }
        let more_than_one: usize = spent.iter().filter(|(attempts, _)| *attempts != "1").map(|(_, count)| count).sum();
        // A destination that answers is down after five failures of different keys; until then they count.
        let until_open = if down == Down::PortClosed { 0 } else { 2 * (5 + CONCURRENCY) };
        assert!(more_than_one <= until_open, "{down:?}: {spent:?}");
    }
}

/// While it is deployed, or its credentials have expired: whatever the status, it is about the receiver and not about the
/// events, and nothing is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_refuses_everything_costs_no_event() {
    const PROCESSES: usize = 2;
    for status in [500, 404, 401] {
        let range = Range::new().await;
        let settings = sized(QUICK, &[]);
        let api = range.start("serve", settings).await;
        let _workers = workers(&range, settings, PROCESSES).await;
        let op = format!("{}/op", api.http);
        let write = async |round: u32| {
            for key in 0..20 {
                let name = format!("{round} {key}");
                range.ledger.note(&name, 2, Answer::Ok);
                post(&op, &op_body(&name, &format!("k{key}"), 2, "ok")).await;
            }
        };
        // It was well before.
        write(0).await;
        eventually(Duration::from_secs(10), "they arrive", || async { range.sink.arrivals().len() == 40 }).await;
        range.sink.set(Mood::Status(status));
        let (before, broken) = (range.sink.asked(), Instant::now());
        let mut round = 1;
        while broken.elapsed() < sized(Duration::from_secs(5), Duration::from_secs(60)) {
            write(round).await;
            round += 1;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        range.assert_nothing_was_given_up().await;
        let probes = "select circuit_failures::text from outbox_subscriptions where circuit_until is not null";
        let probes = range.texts(probes).await;
        let (asked, probes) = (range.sink.asked() - before, probes.first().and_then(|n| n.parse::<usize>().ok()));
        println!("{status}: {asked} requests, {probes:?} times found down, {round} rounds");
        let probes = probes.expect("the circuit is open");
        // Until it is found down: four other keys, and what is under way; afterwards one at a time.
        assert!(asked <= PROCESSES * (4 + CONCURRENCY) + probes + 1, "{asked} requests, {probes} times found down");
        range.sink.set(Mood::Take);
        range.assert_clean().await;
        range.assert_nothing_was_given_up().await;
    }
}

/// The clock of the process is ten minutes slow, or fast. A receiver that minds its tolerance refuses what is signed with
/// such a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_is_signed_with_the_time_of_the_database() {
    for minutes in [10, -10] {
        let range = Range::new().await;
        range.let_the_clock_jump().await;
        range.jump(&format!("{minutes} minutes")).await;
        let app = range.start("all", QUICK).await;
        for op in 0..30 {
            let op = op.to_string();
            range.ledger.note(&op, 1, Answer::Ok);
            post(&format!("{}/op", app.http), &op_body(&op, &op, 1, "ok")).await;
        }
        range.assert_clean().await;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let expected = i64::try_from(now).unwrap() + minutes * 60;
        let off: Vec<i64> = range.sink.arrivals().iter().map(|arrival| arrival.timestamp - expected).collect();
        assert!(off.iter().all(|off| off.abs() < 120), "{minutes}: {off:?}");
    }
}

/// The database's clock jumps by an hour. What was due then is due now, for processes whose own clocks say otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promise_9_one_clock_schedules_retries_and_leases_follow_the_database() {
    let range = Range::new().await;
    range.let_the_clock_jump().await;
    let hour = "3600000";
    let settings = [
        ("OUTBOX_LEASE_MS", hour),
        ("OUTBOX_POLL_MS", "50"),
        ("OUTBOX_BACKOFF_BASE_MS", hour),
        ("OUTBOX_BACKOFF_MAX_MS", hour),
    ];
    let jump = async || {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = range.sink.arrivals().len();
        range.jump("61 minutes").await;
        before
    };
    let api = range.start("serve", &settings).await;
    let mut worker = range.start("worker", &settings).await;

    let op = format!("{}/op", api.http);
    range.ledger.note("scheduled", 1, Answer::Ok);
    post(&op, &op_body("scheduled", "k", 1, &format!("delay:{hour}"))).await;
    assert_eq!(jump().await, 0, "it is not due");
    eventually(Duration::from_secs(5), "its time has come", || async { range.sink.arrivals().len() == 1 }).await;

    range.sink.set(Mood::Answer { status: 500, after: Duration::ZERO });
    range.ledger.note("retried", 1, Answer::Ok);
    post(&op, &op_body("retried", "k", 1, "ok")).await;
    eventually(Duration::from_secs(5), "it fails", || async { range.sink.arrivals().len() == 2 }).await;
    range.sink.set(Mood::Take);
    assert_eq!(jump().await, 2, "it waits after the failure");
    eventually(Duration::from_secs(5), "it is tried again", || async { range.sink.arrivals().len() == 3 }).await;

    range.sink.set(Mood::Answer { status: 204, after: Duration::from_secs(60) });
    range.ledger.note("leased", 1, Answer::Ok);
    post(&op, &op_body("leased", "k", 1, "ok")).await;
    eventually(Duration::from_secs(5), "a worker has it", || async { range.sink.arrivals().len() == 4 }).await;
    worker.kill().await;
    range.sink.set(Mood::Take);
    worker = range.start("worker", &settings).await;
    assert_eq!(jump().await, 4, "the lease of the killed worker lasts");
    eventually(Duration::from_secs(5), "the lease has ended", || async { range.sink.arrivals().len() == 5 }).await;
    range.assert_clean().await;
    assert!(worker.is_running());
}

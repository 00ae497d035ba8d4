//! Many routers, writers and workers at once, and subscriptions that come and go.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_apalis::Worker;
use outbox_core::{
    AttemptLog, Context, Delivery, DeliveryError, NewEvent, Ordering as Order, Publisher, Subscription,
    testing::RecordingPublisher,
};
use outbox_migrations::sea_orm_migration::sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox, Settled};
use outbox_tests::{Database, eventually, ledger::Load, texts};
use serde_json::json;
use tokio::{sync::Notify, task::JoinSet};

use crate::{
    postgres::{Migrator, assert_whole},
    truth::{Range, sized},
};

/// Short leases, so that what a frozen process holds is due again soon.
const QUICK: &[(&str, &str)] = &[("OUTBOX_LEASE_MS", "500"), ("OUTBOX_POLL_MS", "50")];

const KEYS: [&str; 5] = ["a", "b", "c", "d", "e"];

async fn migrated() -> (Database, Outbox) {
    let database = Database::postgres();
    let outbox = database.open().await;
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    (database, outbox)
}

/// Number `n` of a line whose events see each other: of a key whose row its writers lock, or of one writer.
fn event(line: &str, n: i64) -> NewEvent {
    NewEvent::dynamic("line.continued", "line", line, &json!({ "line": line, "n": n })).unwrap()
}

/// Takes the next number of a key in the request's transaction.
async fn commit_locked(outbox: &Outbox, key: &'static str) {
    let commit = outbox.transaction(Context::default(), |tx, events| async move {
        let next = Statement::from_sql_and_values(
            DbBackend::Postgres,
            "update counters set n = n + 1 where key = $1 returning n",
            [key.into()],
        );
        let row = tx.query_one_raw(next).await?.ok_or_else(|| DbErr::RecordNotFound(key.to_owned()))?;
        let _ = events.push(event(key, row.try_get("", "n")?));
        Ok::<_, DbErr>(())
    });
    commit.await.unwrap();
}

async fn commit(outbox: &Outbox, event: NewEvent) {
    outbox.transaction(Context::default(), |_, events| async move { events.push(event) }).await.unwrap();
}

/// Claims and settles until told, and then until nothing is left; what it got, in its order.
async fn work(outbox: Outbox, id: i32, name: String, over: Arc<AtomicBool>, seen: Arc<Mutex<Vec<(String, i64)>>>) {
    loop {
        let last = over.load(Ordering::SeqCst);
        let lanes = outbox.claim(id, &name, 3, 10, Duration::from_secs(60)).await.unwrap().lanes;
        if lanes.is_empty() {
            if last {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for lane in lanes {
            for event in &lane.run {
                let payload: serde_json::Value = serde_json::from_str(&event.payload).unwrap();
                let line = payload["line"].as_str().unwrap().to_owned();
                seen.lock().unwrap().push((line, payload["n"].as_i64().unwrap()));
            }
            let finished = lane.run.iter().map(|event| event.position);
            let finished = finished
                .map(|position| Finished { position, attempts: 1, log: AttemptLog::default(), error: None })
                .collect();
            let report = [LaneReport { lane: lane.lane, finished, next: Next::Yield }];
            while outbox.settle(&report).await.unwrap() != [Settled::Done] {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
}

/// Four routers, of which each is cut off in the middle again and again. Events of which one could see the other are
/// delivered in their order, by key and all in one line; none is lost, and none comes twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routers_that_are_cut_off_lose_nothing_and_turn_no_line_around() {
    let (database, outbox) = migrated().await;
    outbox
        .writer()
        .execute_unprepared("create table counters (key text primary key, n bigint not null)")
        .await
        .unwrap();
    for key in KEYS {
        outbox.writer().execute_unprepared(&format!("insert into counters values ('{key}', 0)")).await.unwrap();
    }
    let by_key = outbox.register(&Subscription::new("keys").unwrap()).await.unwrap();
    let in_one_line = Subscription::new("all").unwrap().ordering(Order::Global);
    let in_one_line = outbox.register(&in_one_line).await.unwrap();
    let (over, quiet) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut writers = JoinSet::new();
    let mut of_writers = Vec::new();
    for writer in 0..16 {
        let outbox = database.open().await;
        of_writers.push(outbox.clone());
        writers.spawn(async move {
            let (mut n, line) = (0, format!("writer {writer}"));
            while Instant::now() < deadline {
                n += 1;
                if writer % 2 == 0 {
                    commit_locked(&outbox, KEYS[fastrand::usize(..KEYS.len())]).await;
                } else {
                    commit(&outbox, event(&line, n)).await;
                }
            }
            n
        });
    }
    let mut routers = JoinSet::new();
    // Two of them get the events of a writer in memory.
    let of_others = [database.open().await, database.open().await];
    for outbox in of_writers.into_iter().take(2).chain(of_others) {
        let over = over.clone();
        routers.spawn(async move {
            while !over.load(Ordering::SeqCst) {
                let outbox = outbox.clone();
                let routing = tokio::spawn(async move {
                    let mut router = outbox.router();
                    loop {
                        router.route(&[], fastrand::usize(1..500)).await.unwrap();
                        tokio::time::sleep(Duration::from_micros(fastrand::u64(..2000))).await;
                    }
                });
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..60))).await;
                routing.abort();
                let _ = routing.await;
            }
        });
    }
    let mut workers = JoinSet::new();
    let seen: [Arc<Mutex<Vec<(String, i64)>>>; 2] = Default::default();
    for (id, seen) in [by_key, in_one_line].into_iter().zip(&seen) {
        for worker in 0..2 {
            let name = format!("w{worker}");
            workers.spawn(work(database.open().await, id, name, quiet.clone(), seen.clone()));
        }
    }
    let pushed: i64 = writers.join_all().await.into_iter().sum();
    over.store(true, Ordering::SeqCst);
    routers.join_all().await;
    outbox.route_waiting().await.unwrap();
    quiet.store(true, Ordering::SeqCst);
    workers.join_all().await;
    for (name, seen) in ["keys", "all"].into_iter().zip(&seen) {
        let seen = seen.lock().unwrap();
        assert_eq!(i64::try_from(seen.len()).unwrap(), pushed, "{name}: lost or doubled");
        let mut last: BTreeMap<&str, i64> = BTreeMap::new();
        for (line, n) in seen.iter() {
            let before = last.insert(line, *n).unwrap_or(0);
            assert_eq!(before + 1, *n, "{name}: {line}");
        }
    }
    println!("{pushed} events");
    assert_eq!(texts(&outbox, "select position::text from outbox_unrouted").await, Vec::<String>::new());
    assert_whole(&outbox).await;
}

/// An event as its writer saw it.
struct Written {
    id: String,
    began: Instant,
    confirmed: Instant,
}

/// A subscription that is registered, changed, and removed again and again, beside 16 writers at two isolation levels:
/// it gets everything that commits in its time, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_comes_and_goes_gets_exactly_what_commits_in_its_time() {
    let (database, outbox) = migrated().await;
    outbox.register(&Subscription::new("always").unwrap()).await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let (outbox, over) = (database.open().await, over.clone());
        writers.spawn(async move {
            let mut written = Vec::new();
            while !over.load(Ordering::SeqCst) {
                let event = event(&format!("k{}", writer % 5), 0);
                let (id, began) = (event.id().to_string(), Instant::now());
                let commit = outbox.transaction(Context::default(), |tx, events| async move {
                    if writer % 2 == 0 {
                        tx.execute_unprepared("set transaction isolation level repeatable read").await?;
                    }
                    tx.execute_unprepared("select count(*) from outbox_subscriptions").await?;
                    let _ = events.push(event);
                    Ok::<_, DbErr>(())
                });
                commit.await.unwrap();
                written.push(Written { id, began, confirmed: Instant::now() });
            }
            written
        });
    }
    let changing = database.open().await;
    let mut lives = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline || lives.len() < 5 {
        let asked = Instant::now();
        let narrow = Subscription::new("sometimes").unwrap().events(["other"]).unwrap();
        let id = changing.register(&narrow).await.unwrap();
        assert_eq!(changing.register(&Subscription::new("sometimes").unwrap()).await.unwrap(), id);
        let registered = Instant::now();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let ends = Instant::now();
        changing.route_waiting().await.unwrap();
        let got = format!(
            "select e.event_id::text from outbox_deliveries d join outbox_events e using (position)
              where d.subscription_id = {id}"
        );
        let got: HashSet<String> = texts(&changing, &got).await.into_iter().collect();
        let gone = Instant::now();
        assert!(changing.remove("sometimes").await.unwrap());
        lives.push((asked, registered, ends, gone, got));
    }
    over.store(true, Ordering::SeqCst);
    let written: Vec<Written> = writers.join_all().await.into_iter().flatten().collect();
    let ids: HashMap<&str, &Written> = written.iter().map(|each| (each.id.as_str(), each)).collect();
    for (asked, registered, ends, gone, got) in &lives {
        for each in written.iter().filter(|each| each.began >= *registered && each.confirmed <= *ends) {
            assert!(got.contains(&each.id), "an event was committed in its time and is missing");
        }
        for id in got {
            let each = ids[id.as_str()];
            assert!(each.confirmed >= *asked && each.began <= *gone, "an event from before or after its time");
        }
    }
    println!("{} lives, {} events", lives.len(), written.len());
    outbox.route_waiting().await.unwrap();
    outbox.sweep_removed().await.unwrap();
    let others = "select key from outbox_deliveries where subscription_id not in (select id from outbox_subscriptions)";
    assert_eq!(texts(&outbox, others).await, Vec::<String>::new());
    assert_whole(&outbox).await;
}

/// Two workers, of which one or the other is frozen again and again, in the middle of whatever it does: routing, a
/// settlement, a handler between its settlement and its COMMIT. Once it is for longer than others wait for a session that
/// holds up routing.
#[tokio::test]
async fn workers_that_are_frozen_in_the_middle_lose_nothing_and_hold_up_nobody_for_long() {
    let range = Range::new().await;
    let api = range.start("serve", QUICK).await;
    let workers = [range.start("worker", QUICK).await, range.start("worker", QUICK).await];
    range.ledger.send_to(&[&api.http]);
    let load = range.ledger.load(&Load { clients: 16, keys: 5, sleeps: 0..20, ..Load::default() });
    let ended = Instant::now() + sized(Duration::from_secs(6), Duration::from_secs(60));
    let mut times = 0_u64;
    while Instant::now() < ended || times < 12 {
        let frozen = &workers[fastrand::usize(..2)];
        frozen.signal("STOP");
        let time = if times == 10 { 4000 } else { fastrand::u64(5..150) };
        tokio::time::sleep(Duration::from_millis(time)).await;
        frozen.signal("CONT");
        tokio::time::sleep(Duration::from_millis(fastrand::u64(5..100))).await;
        times += 1;
    }
    range.ledger.stop(load).await;
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
}

/// Takes its time with the first event, until it is told to go on.
struct SlowAtFirst {
    begun: Arc<Mutex<Vec<String>>>,
    go_on: Arc<Notify>,
}

impl Publisher for SlowAtFirst {
    async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
        let first = {
            let mut begun = self.begun.lock().unwrap();
            begun.push(delivery.event().aggregate_id.clone());
            begun.len() == 1
        };
        if first {
            self.go_on.notified().await;
        }
        Ok(())
    }
}

/// A crash of the server takes back what routing has leased a moment before, and another worker may have it then. Here that
/// is done by hand, while the first of four lanes is worked on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_that_are_gone_with_the_connection_are_not_worked_on() {
    let (_database, outbox) = migrated().await;
    let (begun, go_on) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
    let publisher = SlowAtFirst { begun: begun.clone(), go_on: go_on.clone() };
    let worker = Worker::new(outbox.clone()).concurrency(1).unwrap();
    let worker = worker.publisher(Subscription::new("s").unwrap(), publisher).start().await.unwrap();
    let test = async {
        let four = outbox.transaction(Context::default(), |_, events| async move {
            ["a", "b", "c", "d"].into_iter().try_for_each(|key| events.push(event(key, 1)).map(|_| ()))
        });
        four.await.unwrap();
        let leased = "select key from outbox_lanes where leased_by is not null";
        eventually(Duration::from_secs(10), "two lanes are leased", || async {
            texts(&outbox, leased).await.len() >= 2
        })
        .await;
        eventually(Duration::from_secs(10), "the first has begun", || async { !begun.lock().unwrap().is_empty() })
            .await;
        let first = begun.lock().unwrap()[0].clone();
        let taken_back = format!(
            "update outbox_lanes set lease_token = lease_token + 1, leased_by = 'another', due_at = now() + interval '1 hour'
              where key <> 'line/{first}'"
        );
        outbox.writer().execute_unprepared(&taken_back).await.unwrap();
        let cut = "select pg_terminate_backend(pid) from pg_stat_activity
                    where datname = current_database() and pid <> pg_backend_pid()";
        outbox.writer().execute_unprepared(cut).await.unwrap();
        // The router finds out, and the feed asks which leases there are.
        let late = async || {
            outbox.transaction(Context::default(), |_, events| async move { events.push(event("e", 1)) }).await
        };
        eventually(Duration::from_secs(10), "a commit after the cut", || async { late().await.is_ok() }).await;
        let routed = "select 1::text from outbox_unrouted";
        eventually(Duration::from_secs(10), "it is routed", || async { texts(&outbox, routed).await.is_empty() }).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        go_on.notify_one();
        eventually(Duration::from_secs(20), "the others", || async {
            begun.lock().unwrap().iter().any(|key| key == "e")
        })
        .await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        first
    };
    let (sender, first) = tokio::sync::oneshot::channel();
    worker.run_until(async { drop(sender.send(test.await)) }).await;
    let first = first.await.unwrap();
    let begun = begun.lock().unwrap().clone();
    assert!(begun.iter().all(|key| *key == first || key == "e"), "the leases of the others are gone: {begun:?}");
}

const LOW: usize = 100_000;

/// Many events of low priority, as requests store them.
async fn many_low(outbox: &Outbox) {
    let fill = format!(
        "with event as (
            insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
                                       occurred_at)
            select gen_random_uuid(), 'line.continued', 1, 'line', n::text, '{{}}', clock_timestamp()
              from generate_series(1, {LOW}) n returning position)
         insert into outbox_unrouted (position) select position from event"
    );
    outbox.writer().execute_unprepared(&fill).await.unwrap();
}

/// How many others are delivered before one of high priority that comes last.
async fn delivered_before_the_high_one(outbox: &Outbox) -> usize {
    let publisher = RecordingPublisher::new();
    let worker = Worker::new(outbox.clone()).publisher(Subscription::new("s").unwrap(), publisher.clone());
    let worker = worker.start().await.unwrap();
    let place = async || {
        let deliveries = publisher.deliveries();
        deliveries.iter().position(|delivery| delivery.event().aggregate_id == "high")
    };
    let arrived = async {
        publisher.arrived(1).await;
        let began = Instant::now();
        commit(outbox, event("high", 1).priority(10)).await;
        eventually(Duration::from_secs(60), "the high one", || async { place().await.is_some() }).await;
        println!("after {:?}", began.elapsed());
    };
    worker.run_until(arrived).await;
    place().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_high_priority_comes_before_a_hundred_thousand_low_ones_routed_or_not() {
    for routed in [false, true] {
        let (_database, outbox) = migrated().await;
        outbox.register(&Subscription::new("s").unwrap()).await.unwrap();
        many_low(&outbox).await;
        if routed {
            outbox.route_waiting().await.unwrap();
        }
        let before = delivered_before_the_high_one(&outbox).await;
        println!("routed {routed}: {before} before it");
        assert!(before < LOW / 2, "{before} of {LOW} came before it");
    }
}

/// What the programs of the two databases write, by the recipe of the guide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_from_psql_and_sqlite3_are_delivered_in_order_with_those_of_requests() {
    let guide = include_str!("../../../docs/guide.md");
    let recipe = guide.split("```sql\n").find(|code| code.starts_with("create function record_order")).unwrap();
    let recipe = recipe.split("```").next().unwrap();
    for database in [Database::postgres(), Database::sqlite()] {
        let outbox = database.open().await;
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        outbox.register(&Subscription::new("s").unwrap()).await.unwrap();
        let request = |n: i64| NewEvent::dynamic("order.touched", "order", "7", &json!({ "n": n })).unwrap();
        commit(&outbox, request(1)).await;
        let (wrote, refused, expected) = match &database {
            Database::Postgres(url) => {
                let psql = |sql: &str| program("psql", &["-v", "ON_ERROR_STOP=1", "-d", url.as_str(), "-c", sql]);
                psql("create table orders (id int primary key, total int)").unwrap();
                psql(recipe).unwrap();
                let wrote =
                    psql("insert into orders values (7, 12)").and_then(|_| psql("update orders set total = 13"));
                let wrote =
                    wrote.and_then(|_| psql("select outbox_record('order.paid', 'order', '7', '{\"by\":\"hand\"}')"));
                let refused = [
                    psql("select outbox_record('bad name', 'order', '7', '{}')"),
                    psql("select outbox_record('order.paid', 'order', repeat('7', 300), '{}')"),
                    psql("select outbox_record('order.paid', 'order', '7', to_json(repeat('x', 2000000)))"),
                ];
                (wrote, refused, vec!["order.touched", "order.placed", "order.changed", "order.paid", "order.touched"])
            }
            Database::Sqlite(folder) => {
                let file = folder.path().join("test.db").display().to_string();
                let sqlite3 = |sql: &str| program("sqlite3", &[&file, ".timeout 5000", sql]);
                let record = "insert into outbox_record (event_type, aggregate_type, aggregate_id, payload) values";
                let wrote = sqlite3(&format!("{record} ('order.paid', 'order', '7', '{{\"by\":\"hand\"}}')"));
                let refused = [
                    sqlite3(&format!("{record} ('bad name', 'order', '7', '{{}}')")),
                    sqlite3(&format!("{record} ('order.paid', 'order', printf('%300d', 7), '{{}}')")),
                    sqlite3(&format!("{record} ('order.paid', 'order', '7', json_quote(printf('%2000000d', 7)))")),
                ];
                (wrote, refused, vec!["order.touched", "order.paid", "order.touched"])
            }
        };
        wrote.unwrap();
        for (refused, why) in refused.into_iter().zip(["the event type has", "the aggregate id has", "the payload has"])
        {
            let error = refused.unwrap_err();
            assert!(error.contains("outbox_record: ") && error.contains(why), "{error}");
        }
        commit(&outbox, request(2)).await;
        let publisher = RecordingPublisher::new();
        let worker = Worker::new(outbox.clone()).publisher(Subscription::new("s").unwrap(), publisher.clone());
        let worker = worker.start().await.unwrap();
        let arrived = async { tokio::time::timeout(Duration::from_secs(20), publisher.arrived(expected.len())).await };
        worker.run_until(async { assert!(arrived.await.is_ok(), "not in time") }).await;
        let deliveries = publisher.deliveries();
        let types: Vec<&str> = deliveries.iter().map(|delivery| delivery.event().event_type.as_str()).collect();
        assert_eq!(types, expected);
        if matches!(database, Database::Postgres(_)) {
            let changed: serde_json::Value = serde_json::from_str(&deliveries[2].event().payload).unwrap();
            assert_eq!(changed, json!({ "data": { "id": 7, "total": 13 }, "previous": { "id": 7, "total": 12 } }));
        }
    }
}

/// Its output, or what it says on standard error. It is installed where it is missing and that can be done.
fn program(name: &str, arguments: &[&str]) -> Result<String, String> {
    let run = |arguments: &[&str]| std::process::Command::new(name).args(arguments).output();
    outbox_test_servers::install(if name == "psql" { "postgresql-client" } else { name }, || {
        run(&["--version"]).is_ok()
    });
    let output = run(arguments).unwrap_or_else(|error| panic!("this test needs the program {name}: {error}"));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

//! What only a server can do: lose its connections, crash, and let many transactions run at once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_apalis::{Effect, Handlers, Worker};
use outbox_core::{AttemptLog, Context, Event, NewEvent, StartPosition, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox, Settled, TransactionError};
use outbox_test_servers::{Fault, Postgres, Proxy};
use outbox_tests::{Database, eventually, texts};
use reqwest::{Client, StatusCode};
use sea_orm::{ConnectionTrait, DbErr};
use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    example::start,
    faults::{Ledger, QUICK, assert_consistent},
};

pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

async fn migrated() -> (Database, Outbox) {
    let database = Database::postgres();
    let outbox = database.open().await;
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    (database, outbox)
}

/// Each lane counts its deliveries, and each delivery has its lane.
pub(crate) async fn assert_whole(outbox: &Outbox) {
    let wrong = "select coalesce(l.key, d.key) || ': ' || coalesce(l.pending, 0) || ' for ' || coalesce(d.n, 0)
                   from outbox_lanes l
                   full join (select subscription_id, key, count(*) as n from outbox_deliveries group by 1, 2) d
                     on d.subscription_id = l.subscription_id and d.key = l.key
                  where l.pending is distinct from d.n";
    assert_eq!(texts(outbox, wrong).await, Vec::<String>::new());
}

#[tokio::test]
async fn migrations_go_up_and_down_and_up_and_eight_processes_may_start_them_at_once() {
    let database = Database::postgres();
    let mut running = JoinSet::new();
    for _ in 0..8 {
        let outbox = database.open().await;
        running.spawn(async move { outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap() });
    }
    running.join_all().await;
    let outbox = database.open().await;
    let tables = "select table_name::text from information_schema.tables where table_name like 'outbox%'";
    let first = texts(&outbox, tables).await;
    assert_eq!(first.len(), 12, "{first:?}");
    outbox_migrations::down::<Migrator>(outbox.writer(), outbox_migrations::all().len() as u32).await.unwrap();
    assert_eq!(texts(&outbox, tables).await, Vec::<String>::new());
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    assert_eq!(texts(&outbox, tables).await, first);
}

/// The connection is cut 100 times before and 100 times after the server has got the COMMIT. The layer finds out over
/// another connection: a success is stored, a failure is not.
#[tokio::test]
async fn promise_2_truthful_a_commit_whose_answer_is_lost_is_found_out() {
    let server = Postgres::shared();
    let url = server.database();
    let proxy = Proxy::start(server.port()).await;
    let database = Database::Postgres(proxy.url(&url, server.port()));
    let api = start("serve", &database, &[]).await;
    let client = Client::new();
    let mut answers = BTreeMap::new();
    for (fault, name) in [(Fault::CutBeforeCommit, "before"), (Fault::CutAfterCommit, "after")] {
        for n in 0..100 {
            proxy.set(fault);
            let title = format!("{name} {n:03}");
            let answer =
                client.post(format!("{}/todos", api.http)).json(&json!({ "title": title })).send().await.unwrap();
            let outcome = answer.headers()["outbox-outcome"].to_str().unwrap().to_owned();
            answers.insert(title, (answer.status(), outcome));
        }
    }
    proxy.set(Fault::None);
    assert!(proxy.cuts() >= 200, "{}", proxy.cuts());
    let direct = Database::Postgres(url).open().await;
    let todos = texts(&direct, "select title from todos").await;
    let events = texts(&direct, "select payload->'data'->>'title' from outbox_events").await;
    assert_eq!(todos, events);
    for (title, (status, outcome)) in answers {
        let stored = todos.binary_search(&title).is_ok();
        let expected = if stored { (StatusCode::CREATED, "committed") } else { (status, "rolled-back") };
        assert_eq!((status, outcome.as_str()), expected, "{title} is stored: {stored}");
        assert!(stored || status.is_server_error(), "{title}: {status}");
        assert_eq!(stored, title.starts_with("after"), "{title}");
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Paid;

impl Event for Paid {
    const TYPE: &'static str = "bill.paid";
    const AGGREGATE_TYPE: &'static str = "bill";

    fn aggregate_id(&self) -> String {
        "1".to_owned()
    }
}

/// What the handler does with the error.
#[derive(Clone, Copy, Debug)]
enum Reaction {
    PassesOn,
    Ignores,
    Panics,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_handler_that_loses_its_connection_gets_its_attempt_back() {
    let (_database, outbox) = migrated().await;
    let lost = Arc::new(AtomicBool::new(false));
    let handler = |reaction: Reaction| {
        let lost = lost.clone();
        Handlers::new().on_tx(move |_: Paid, effect: Effect| {
            let lost = lost.clone();
            async move {
                if lost.fetch_not(Ordering::SeqCst) {
                    return Ok(());
                }
                let end = "select pg_terminate_backend(pg_backend_pid())";
                let ended = effect.tx().execute_unprepared(end).await;
                assert!(ended.is_err());
                match reaction {
                    Reaction::PassesOn => ended.map(|_| ())?,
                    Reaction::Ignores => {}
                    Reaction::Panics => panic!("{ended:?}"),
                }
                Ok(())
            }
        })
    };
    for reaction in [Reaction::PassesOn, Reaction::Ignores, Reaction::Panics] {
        let name = format!("{reaction:?}").to_lowercase();
        let subscription = Subscription::new(&name).unwrap();
        let worker = Worker::new(outbox.clone()).handlers(subscription, handler(reaction)).start().await.unwrap();
        outbox.transaction(Context::default(), |_, events| async move { events.push(Paid).map(|_| ()) }).await.unwrap();
        let attempts = format!(
            "select d.attempts::text from outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id
              where s.name = '{name}'"
        );
        worker
            .run_until(eventually(Duration::from_secs(10), "it is delivered", || async {
                !texts(&outbox, &attempts).await.is_empty()
            }))
            .await;
        assert_eq!(texts(&outbox, &attempts).await, ["1"], "{name}");
    }
}

/// The server is stopped and crashed under load: no process ends, service is back soon, nothing is lost or doubled, and
/// no attempt is spent on it.
#[tokio::test]
async fn a_restarted_server_loses_nothing_and_costs_no_attempt() {
    let server = Postgres::start(&[]);
    let database = Database::Postgres(server.database());
    let ledger = Ledger::default();
    let app = start("all", &database, QUICK).await;
    let clients = ledger.load_through_errors(&app, 4);
    for mode in ["fast", "immediate", "immediate"] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        server.stop(mode);
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.launch();
        let (back, before) = (Instant::now(), ledger.confirmed().len());
        eventually(Duration::from_secs(10), "service is back", || async { ledger.confirmed().len() > before }).await;
        println!("{mode}: back after {:?}", back.elapsed());
    }
    ledger.stop();
    clients.join_all().await;
    assert_consistent(&database, &ledger, &app).await;
    // An attempt that failed is in the log with its time; a claim whose answer was lost is none, though it is counted.
    let failed = r#"select attempt_log::text from outbox_delivered where attempt_log::text ~ '"milliseconds": *[0-9]'"#;
    assert_eq!(texts(&database.open().await, failed).await, Vec::<String>::new());
}

#[tokio::test]
async fn terminated_sessions_lose_nothing() {
    let database = Database::postgres();
    let ledger = Ledger::default();
    let app = start("all", &database, QUICK).await;
    let clients = ledger.load_through_errors(&app, 4);
    let outbox = database.open().await;
    let ended = Instant::now() + Duration::from_secs(10);
    while Instant::now() < ended {
        let one = "select pg_terminate_backend(pid) from pg_stat_activity
                    where datname = current_database() and pid <> pg_backend_pid() order by random() limit 1";
        let _ = outbox.reader().execute_unprepared(one).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..200))).await;
    }
    ledger.stop();
    clients.join_all().await;
    assert_consistent(&database, &ledger, &app).await;
}

fn happened(key: &str, n: usize) -> NewEvent {
    NewEvent::dynamic("key.happened", "key", key, &json!({ "n": n })).unwrap()
}

/// Writers take several of five keys in random order, workers claim and settle the same keys: no deadlock, nothing
/// lost, nothing twice.
#[tokio::test]
async fn writers_and_workers_on_five_hot_keys_never_deadlock() {
    let (database, outbox) = migrated().await;
    let id = outbox.register(&Subscription::new("hot").unwrap()).await.unwrap();
    outbox.writer().execute_unprepared("create table seqs (key text primary key, seq bigint not null)").await.unwrap();
    let keys = ["a", "b", "c", "d", "e"];
    let done = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    for _ in 0..8 {
        let outbox = database.open().await;
        writers.spawn(async move {
            let mut pushed = 0;
            while Instant::now() < deadline {
                let mut chosen = keys;
                fastrand::shuffle(&mut chosen);
                let chosen: Vec<_> = chosen.into_iter().take(fastrand::usize(1..=4)).collect();
                let commit = outbox.transaction(Context::default(), |_, events| async move {
                    for (n, key) in chosen.iter().enumerate() {
                        events.push(happened(key, n)).unwrap();
                    }
                    Ok::<_, DbErr>(chosen.len())
                });
                match commit.await {
                    Ok(n) => pushed += n,
                    Err(TransactionError::Commit(error)) => panic!("a writer was the victim: {error:?}"),
                    Err(error) => panic!("{error:?}"),
                }
            }
            pushed
        });
    }
    let mut workers = JoinSet::new();
    for name in ["w1", "w2", "w3", "w4"] {
        let (outbox, done) = (database.open().await, done.clone());
        workers.spawn(async move {
            let mut delivered = Vec::new();
            loop {
                let over = done.load(Ordering::SeqCst);
                outbox.route_waiting().await.unwrap();
                let lanes = outbox.claim(id, name, 3, 10, Duration::from_secs(60)).await.unwrap().lanes;
                if lanes.is_empty() && over {
                    return delivered;
                }
                let mut reports: Vec<LaneReport> = lanes
                    .into_iter()
                    .map(|lane| {
                        delivered.extend(lane.run.iter().map(|event| event.position));
                        let finished = lane.run.iter().map(|event| event.position);
                        let finished = finished
                            .map(|position| Finished { position, attempts: 1, log: AttemptLog::default(), error: None })
                            .collect();
                        LaneReport { lane: lane.lane, finished, next: Next::Yield }
                    })
                    .collect();
                while !reports.is_empty() {
                    let settled = outbox.settle(&reports).await.unwrap();
                    assert!(!settled.contains(&Settled::Superseded));
                    let mut settled = settled.into_iter();
                    reports.retain(|_| settled.next() == Some(Settled::Busy));
                }
            }
        });
    }
    let pushed: usize = writers.join_all().await.into_iter().sum();
    done.store(true, Ordering::SeqCst);
    let mut delivered: Vec<i64> = workers.join_all().await.into_iter().flatten().collect();
    delivered.sort_unstable();
    let arrivals = delivered.len();
    delivered.dedup();
    println!("{pushed} events on 5 keys");
    assert_eq!((arrivals, delivered.len()), (pushed, pushed), "lost or doubled");
    assert_whole(&outbox).await;
    assert_eq!(texts(&outbox, "select key from outbox_lanes").await, Vec::<String>::new());
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Ticked {
    key: String,
}

impl Event for Ticked {
    const TYPE: &'static str = "clock.ticked";
    const AGGREGATE_TYPE: &'static str = "clock";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

/// Its runs of ten come back behind the mark of the claims for the others. At one run in a second it would be the last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_lane_goes_on_while_there_is_a_backlog_of_others() {
    const LONG: usize = 100;
    const OTHERS: usize = 3000;
    let (_database, outbox) = migrated().await;
    outbox.register(&Subscription::new("ticks").unwrap()).await.unwrap();
    let tick = |key: String| NewEvent::of(&Ticked { key }).unwrap();
    for ticks in [vec!["long".to_owned(); LONG], (0..OTHERS).map(|n| n.to_string()).collect()] {
        for ticks in ticks.chunks(1000) {
            let events: Vec<_> = ticks.iter().cloned().map(tick).collect();
            let commit = outbox.transaction(Context::default(), |_, collector| async move {
                events.into_iter().try_for_each(|event| collector.push(event).map(|_| ()))
            });
            commit.await.unwrap();
        }
    }
    let delivered: Arc<Mutex<Vec<String>>> = Arc::default();
    let handlers = Handlers::new().on({
        let delivered = delivered.clone();
        move |event: Ticked, _| {
            let delivered = delivered.clone();
            async move {
                if event.key != "long" {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                delivered.lock().unwrap().push(event.key);
                Ok(())
            }
        }
    });
    let worker = Worker::new(outbox.clone()).batch(10).unwrap();
    let worker = worker.handlers(Subscription::new("ticks").unwrap(), handlers).start().await.unwrap();
    worker
        .run_until(eventually(Duration::from_secs(60), "all are delivered", || async {
            delivered.lock().unwrap().len() == LONG + OTHERS
        }))
        .await;
    let last = delivered.lock().unwrap().iter().rposition(|key| key == "long").unwrap();
    println!("{last} of {} before the last of the long lane", LONG + OTHERS);
    assert!(last < LONG + OTHERS * 9 / 10, "{last}");
    assert_whole(&outbox).await;
}

/// Transactions of up to half a second are under way while a subscription is added from the beginning: every event is
/// in it exactly once.
#[tokio::test]
async fn a_subscription_added_while_writers_run_misses_nothing() {
    let (database, outbox) = migrated().await;
    let deadline = Instant::now() + Duration::from_secs(4);
    let mut writers = JoinSet::new();
    for writer in 0..16 {
        let outbox = database.open().await;
        writers.spawn(async move {
            while Instant::now() < deadline {
                let _ = outbox
                    .transaction(Context::default(), |tx, events| async move {
                        tx.execute_unprepared("select pg_current_xact_id()").await?;
                        events.push(happened(&format!("k{writer}"), 0)).unwrap();
                        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..500))).await;
                        // A fifth is rolled back.
                        if fastrand::u8(..5) == 0 { Err(DbErr::Custom("rolled back".to_owned())) } else { Ok(()) }
                    })
                    .await;
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let late = Subscription::new("late").unwrap().start(StartPosition::Beginning);
    let registering = database.open().await;
    registering.register(&late).await.unwrap();
    writers.join_all().await;
    outbox.route_waiting().await.unwrap();
    let events = texts(&outbox, "select position::text from outbox_events").await;
    let deliveries = texts(&outbox, "select position::text from outbox_deliveries").await;
    assert!(events.len() > 100, "{}", events.len());
    assert_eq!(events, deliveries);
    assert_whole(&outbox).await;
}

/// Two subscriptions come and go together every 100 ms: each event has the deliveries of one consistent set.
#[tokio::test]
async fn subscriptions_that_come_and_go_leave_no_half_sets() {
    let (database, outbox) = migrated().await;
    let always = outbox.register(&Subscription::new("always").unwrap()).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(4);
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        let outbox = database.open().await;
        writers.spawn(async move {
            while Instant::now() < deadline {
                let push = |_, events: outbox_core::Events| async move {
                    events.push(happened(&format!("k{writer}"), 0)).unwrap();
                    Ok::<_, DbErr>(())
                };
                outbox.transaction(Context::default(), push).await.unwrap();
            }
        });
    }
    let changing = database.open().await;
    while Instant::now() < deadline {
        changing.register(&Subscription::new("sometimes").unwrap()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(changing.remove("sometimes").await.unwrap());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    writers.join_all().await;
    outbox.route_waiting().await.unwrap();
    outbox.sweep_removed().await.unwrap();
    let events = texts(&outbox, "select position::text from outbox_events").await;
    let of_always = format!("select position::text from outbox_deliveries where subscription_id = {always}");
    assert_eq!(events, texts(&outbox, &of_always).await);
    let of_others = format!("select key from outbox_deliveries where subscription_id <> {always}");
    assert_eq!(texts(&outbox, &of_others).await, Vec::<String>::new(), "deliveries of a subscription that is gone");
    assert_whole(&outbox).await;
}

/// The old cluster has given out many more transaction ids, which mean nothing in the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_in_a_new_cluster_is_delivered_once() {
    let (old, new) = (Postgres::start(&["fsync=off"]), Postgres::start(&["fsync=off"]));
    let url = old.database();
    let outbox = Database::Postgres(url.clone()).open().await;
    let burn = "do $$ begin for i in 1..50000 loop perform pg_current_xact_id(); commit; end loop; end $$";
    outbox.writer().execute_unprepared(burn).await.unwrap();
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    let push = async |outbox: &Outbox, n: usize| {
        for key in 0..n {
            let key = key.to_string();
            let tick = |_, events: outbox_core::Events| async move { events.push(Ticked { key }).map(|_| ()) };
            outbox.transaction(Context::default(), tick).await.unwrap();
        }
    };
    let subscription = |name: &str| Subscription::new(name).unwrap();
    let leased = outbox.register(&subscription("leased")).await.unwrap();
    outbox.register(&subscription("pending")).await.unwrap();
    push(&outbox, 20).await;
    // By a worker that does not come along.
    outbox.route_waiting().await.unwrap();
    assert_eq!(outbox.claim(leased, "old", 10, 1, Duration::from_secs(3)).await.unwrap().lanes.len(), 10);
    for name in ["fresh", "noted"] {
        outbox.register(&subscription(name)).await.unwrap();
    }
    drop(outbox);
    let outbox = Database::Postgres(old.dump_into(&url, &new)).open().await;
    let mut worker = Worker::new(outbox.clone());
    for name in ["leased", "pending", "fresh", "noted", "late"] {
        worker = worker.handlers(subscription(name), Handlers::new().on(|_: Ticked, _| async { Ok(()) }));
    }
    let started = worker.start().await.unwrap();
    push(&outbox, 5).await;
    started
        .run_until(eventually(Duration::from_secs(60), "all is delivered", || async {
            texts(&outbox, "select position::text from outbox_unrouted").await.is_empty()
                && texts(&outbox, "select key from outbox_deliveries").await.is_empty()
        }))
        .await;
    let counts = "select s.name || ' ' || count(*) from outbox_delivered d
                    join outbox_subscriptions s on s.id = d.subscription_id group by s.name";
    assert_eq!(texts(&outbox, counts).await, ["fresh 5", "late 5", "leased 25", "noted 5", "pending 25"]);
    assert_whole(&outbox).await;
}

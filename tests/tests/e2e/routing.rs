//! Many routers, writers and workers at once, and subscriptions that come and go.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_core::{Context, NewEvent, Ordering as Order, Subscription};
use outbox_migrations::sea_orm_migration::sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox, Settled};
use outbox_tests::{Database, texts};
use serde_json::json;
use tokio::task::JoinSet;

use crate::postgres::{Migrator, assert_whole};

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
            let finished =
                finished.map(|position| Finished { position, attempts: 1, log: None, error: None }).collect();
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

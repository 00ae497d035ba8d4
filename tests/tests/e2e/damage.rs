//! Rows that somebody has damaged by hand, among many that are whole.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use outbox_apalis::{Deliveries, Handlers, Worker};
use outbox_core::{Context, Event, Events, Subscription};
use outbox_seaorm::Outbox;
use outbox_tests::{Database, texts};
use sea_orm::ConnectionTrait;
use serde::{Deserialize, Serialize};

use crate::postgres::Migrator;

const EVENTS: usize = 1000;

/// How many events a key has.
const RUN: usize = 10;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Counted {
    key: String,
    n: usize,
}

impl Event for Counted {
    const TYPE: &'static str = "counter.counted";
    const AGGREGATE_TYPE: &'static str = "counter";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

/// What the handler got of each key.
type Seen = Arc<Mutex<HashMap<String, Vec<usize>>>>;

/// Delivers all that is due.
async fn drain(outbox: &Outbox, seen: &Seen) -> (Deliveries, Duration) {
    let seen = seen.clone();
    let handlers = Handlers::new().on(move |event: Counted, _| {
        seen.lock().unwrap().entry(event.key).or_default().push(event.n);
        async { Ok(()) }
    });
    let worker = Worker::new(outbox.clone()).handlers(Subscription::new("s").unwrap(), handlers);
    let started = Instant::now();
    (worker.drain().await.unwrap(), started.elapsed())
}

async fn record(outbox: &Outbox) {
    let push = |events: Events| {
        (0..EVENTS).try_for_each(|n| events.push(Counted { key: (n / RUN).to_string(), n }).map(|_| ()))
    };
    outbox.transaction(Context::default(), |_, events| async move { push(events) }).await.unwrap();
}

/// Ten events of ten keys, one the first of its key, one the last, are damaged in ten ways: each is a dead letter that
/// says what is wrong, all others are delivered in their order, and it takes no longer than without.
async fn damaged_rows_harm_only_themselves(database: &Database, damage: [(&str, &str); 10]) {
    let outbox = database.open().await;
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    drain(&outbox, &Seen::default()).await;
    record(&outbox).await;
    let (whole, time) = drain(&outbox, &Seen::default()).await;
    assert_eq!((whole.delivered, whole.dead), (1000, 0));

    record(&outbox).await;
    outbox.route_waiting().await.unwrap();
    let damaged: Vec<usize> = (0..10).map(|n| n * 101).collect();
    for (n, (change, _)) in damaged.iter().zip(damage) {
        let sql = format!("{change} where position = {}", EVENTS + n + 1);
        outbox.writer().execute_unprepared(&sql).await.unwrap();
    }
    let seen = Seen::default();
    let (done, time_damaged) = drain(&outbox, &seen).await;
    println!("{time:?} for whole rows, {time_damaged:?} with damaged ones");
    let errors = texts(&outbox, "select cast(position as text) || ' ' || error from outbox_dead_letters").await;
    assert_eq!((done.delivered, done.dead), (990, 10));
    for (error, (change, expected)) in errors.iter().zip(damage) {
        assert!(error.contains(expected), "{change}: {error}");
    }
    assert_eq!(texts(&outbox, "select key from outbox_lanes").await, Vec::<String>::new());
    // All but those whose event is gone are listed.
    let gone = damage.iter().filter(|(_, expected)| *expected == "it is gone").count();
    let mut listed = 0;
    for offset in (0..2000).step_by(500) {
        listed += outbox.deliveries(Some("s"), None, offset, 500).await.unwrap().len();
    }
    assert_eq!(listed, 2 * EVENTS - gone);
    let seen = seen.lock().unwrap();
    for key in 0..EVENTS / RUN {
        let expected = (key * RUN..(key + 1) * RUN).filter(|n| !damaged.contains(n));
        assert_eq!(seen[&key.to_string()], expected.collect::<Vec<_>>(), "{key}");
    }
    // A damaged row costs its key one more claim; half a second is what a busy machine may add.
    assert!(time_damaged < time * 2 + Duration::from_millis(500), "{time:?}, {time_damaged:?} with damage");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_damaged_rows_of_a_thousand_harm_only_themselves_on_sqlite() {
    let damage = [
        ("delete from outbox_events", "it is gone"),
        ("update outbox_events set payload = '{'", "EOF"),
        ("update outbox_events set payload = x'ff00ff'", "payload"),
        ("update outbox_events set payload = '{\"key\": 7}'", "invalid type: integer `7`"),
        ("update outbox_events set tags = '[1]'", "tags: invalid type"),
        ("update outbox_events set event_id = x'00'", "event_id"),
        ("update outbox_events set occurred_at = 'yesterday'", "occurred_at"),
        ("update outbox_events set schema_version = 'two'", "schema_version"),
        ("update outbox_events set position = position + 100000", "it is gone"),
        ("update outbox_events set max_attempts = 'many'", "max_attempts"),
    ];
    damaged_rows_harm_only_themselves(&Database::sqlite(), damage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_damaged_rows_of_a_thousand_harm_only_themselves_on_postgres() {
    let damage = [
        ("delete from outbox_events", "it is gone"),
        ("update outbox_events set payload = '7'", "invalid type: integer `7`"),
        ("update outbox_events set payload = 'null'", "invalid type: null"),
        ("update outbox_events set payload = '{\"key\": 7}'", "invalid type: integer `7`"),
        ("update outbox_events set payload = '{\"key\": \"a\"}'", "missing field `n`"),
        ("update outbox_events set payload = '{\"key\": \"\\ud800\"}'", "hex escape"),
        ("update outbox_events set tags = '[1]'", "tags: invalid type"),
        ("update outbox_events set occurred_at = 'infinity'", "occurred_at is not a point in time"),
        ("update outbox_events set recorded_at = '-infinity'", "recorded_at is not a point in time"),
        ("update outbox_events set occurred_at = '290000-01-01'", "occurred_at is not a point in time"),
    ];
    damaged_rows_harm_only_themselves(&Database::postgres(), damage).await;
}

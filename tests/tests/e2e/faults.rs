//! Processes are killed and stopped under load; the database is the witness.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use outbox_tests::{Database, Process, eventually, texts};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::example::{drained, get, start};

/// Short leases, so that what a killed process held is due again soon.
pub(crate) const QUICK: &[(&str, &str)] = &[("OUTBOX_LEASE_MS", "500"), ("OUTBOX_POLL_MS", "50")];

/// What clients saw: title and whether the todo was confirmed. A request that was cut off may have worked or not.
#[derive(Clone, Default)]
pub(crate) struct Ledger {
    answers: Arc<Mutex<HashMap<String, StatusCode>>>,
    stopped: Arc<AtomicBool>,
}

impl Ledger {
    /// Creates todos until the process is gone or the load is stopped.
    fn load(&self, app: &Process, clients: usize) -> JoinSet<()> {
        self.run(app, clients, false)
    }

    /// Creates todos until the load is stopped, whatever the answers are.
    pub(crate) fn load_through_errors(&self, app: &Process, clients: usize) -> JoinSet<()> {
        self.run(app, clients, true)
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
    }

    fn run(&self, app: &Process, clients: usize, through_errors: bool) -> JoinSet<()> {
        let mut running = JoinSet::new();
        for client in 0..clients {
            let (ledger, url) = (self.clone(), format!("{}/todos", app.http));
            running.spawn(async move {
                let http = Client::new();
                while !ledger.stopped.load(Ordering::SeqCst) {
                    let title = format!("{client}-{:016x}", fastrand::u64(..));
                    let Ok(answer) = http.post(&url).json(&json!({ "title": title })).send().await else {
                        assert!(!through_errors, "the API is gone");
                        return;
                    };
                    let unknown = answer.headers().get("outbox-outcome").is_some_and(|outcome| outcome == "unknown");
                    if !unknown {
                        ledger.answers.lock().unwrap().insert(title, answer.status());
                    }
                }
            });
        }
        running
    }

    pub(crate) fn confirmed(&self) -> Vec<String> {
        let answers = self.answers.lock().unwrap();
        answers.iter().filter(|(_, status)| **status == StatusCode::CREATED).map(|(title, _)| title.clone()).collect()
    }

    fn refused(&self) -> Vec<String> {
        let answers = self.answers.lock().unwrap();
        answers.iter().filter(|(_, status)| !status.is_success()).map(|(title, _)| title.clone()).collect()
    }
}

/// Every stored todo has its event, every event its effects exactly once, and every confirmed todo is stored.
pub(crate) async fn assert_consistent(database: &Database, ledger: &Ledger, app: &Process) {
    drained(app).await;
    let outbox = database.open().await;
    let todos = texts(&outbox, "select title from todos").await;
    let titles = match database {
        Database::Sqlite(_) => "select payload->>'$.data.title' from outbox_events",
        Database::Postgres(_) => "select payload->'data'->>'title' from outbox_events",
    };
    let events = texts(&outbox, titles).await;
    let activity = texts(&outbox, "select title from activity").await;
    assert_eq!(todos, events, "a todo without its event, or an event without its todo");
    assert_eq!(todos, activity, "an effect is missing or doubled");
    assert_eq!(get(&format!("{}/stats", app.http)).await["created"], todos.len());
    for title in ledger.confirmed() {
        assert!(todos.binary_search(&title).is_ok(), "{title} was confirmed and is not stored");
    }
    for title in ledger.refused() {
        assert!(todos.binary_search(&title).is_err(), "{title} was refused and is stored");
    }
    let dead = texts(&outbox, "select error from outbox_dead_letters").await;
    assert_eq!(dead, Vec::<String>::new());
    let wrong = "select key from outbox_lanes l where pending <> (select count(*) from outbox_deliveries d
                 where d.subscription_id = l.subscription_id and d.key = l.key)";
    assert_eq!(texts(&outbox, wrong).await, Vec::<String>::new());
}

#[tokio::test]
async fn killed_50_times_under_load_every_todo_has_its_event_and_every_event_its_effect_once() {
    killed(Database::sqlite()).await;
}

#[tokio::test]
async fn promise_4_effect_exactly_once_although_the_process_is_killed_50_times_under_load() {
    killed(Database::postgres()).await;
}

async fn killed(database: Database) {
    let ledger = Ledger::default();
    for round in 0..50 {
        let app = start("all", &database, QUICK).await;
        let (clients, before) = (ledger.load(&app, 4), ledger.confirmed().len());
        // However busy the machine is: every other one has done something when it is killed.
        if round % 2 == 0 {
            let confirms = || async { ledger.confirmed().len() > before + 2 };
            eventually(Duration::from_secs(20), "todos are confirmed", confirms).await;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(5..120))).await;
        app.kill().await;
        clients.join_all().await;
    }
    let app = start("all", &database, QUICK).await;
    assert_consistent(&database, &ledger, &app).await;
    println!("{} todos confirmed over 50 kills", ledger.confirmed().len());
    assert!(ledger.confirmed().len() > 50, "the load was no load");
}

#[tokio::test]
async fn sigterm_under_load_ends_in_time_without_a_lease_and_nothing_is_delivered_twice() {
    sigterm(Database::sqlite()).await;
}

#[tokio::test]
async fn sigterm_under_load_ends_in_time_without_a_lease_and_nothing_is_delivered_twice_on_postgres() {
    sigterm(Database::postgres()).await;
}

async fn sigterm(database: Database) {
    let ledger = Ledger::default();
    for _ in 0..5 {
        let app = start("all", &database, &[("OUTBOX_SHUTDOWN_GRACE_MS", "3000")]).await;
        let clients = ledger.load(&app, 4);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..300))).await;
        let (status, took) = app.terminate(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(0));
        assert!(took < Duration::from_secs(3), "{took:?}");
        clients.join_all().await;
        let outbox = database.open().await;
        let leased = "select key from outbox_lanes where leased_by is not null";
        assert_eq!(texts(&outbox, leased).await, Vec::<String>::new(), "a lease is left");
        let repeated = "select cast(position as text) from outbox_delivered where attempts > 1";
        assert_eq!(texts(&outbox, repeated).await, Vec::<String>::new(), "an attempt was wasted");
        assert_eq!(texts(&outbox, "select id from outbox_workers").await, Vec::<String>::new());
    }
    let app = start("all", &database, QUICK).await;
    assert_consistent(&database, &ledger, &app).await;
}

#[tokio::test]
async fn killed_workers_beside_a_living_api_lose_nothing() {
    killed_workers(Database::sqlite()).await;
}

#[tokio::test]
async fn killed_workers_beside_a_living_api_lose_nothing_on_postgres() {
    killed_workers(Database::postgres()).await;
}

async fn killed_workers(database: Database) {
    let ledger = Ledger::default();
    let api = start("serve", &database, &[]).await;
    start("worker", &database, QUICK).await.kill().await;
    let clients = ledger.load(&api, 2);
    for _ in 0..15 {
        let worker = start("worker", &database, QUICK).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(5..150))).await;
        worker.kill().await;
    }
    ledger.stop();
    clients.join_all().await;
    let refused: Vec<StatusCode> =
        ledger.answers.lock().unwrap().values().copied().filter(|status| *status != StatusCode::CREATED).collect();
    assert_eq!(refused, Vec::<StatusCode>::new(), "the API is not disturbed by its workers");
    api.kill().await;
    let app = start("all", &database, QUICK).await;
    assert_consistent(&database, &ledger, &app).await;
    let stats: Value = get(&format!("{}/stats", app.http)).await;
    println!("{stats}");
}

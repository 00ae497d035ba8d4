//! What a user of the example sees.

use std::time::{Duration, Instant};

use outbox_tests::{Database, Process, TOKEN, eventually};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

pub(crate) async fn start(mode: &str, database: &Database, settings: &[(&str, &str)]) -> Process {
    let url = database.url();
    let mut all = vec![("DATABASE_URL", url.as_str())];
    all.extend_from_slice(settings);
    Process::start("todo-app", mode, &all).await
}

pub(crate) async fn get(url: &str) -> Value {
    Client::new().get(url).send().await.unwrap().json().await.unwrap()
}

pub(crate) async fn status(process: &Process) -> Value {
    let url = format!("{}/outbox/api/status", process.ops);
    Client::new().get(url).bearer_auth(TOKEN).send().await.unwrap().json().await.unwrap()
}

pub(crate) async fn drained(process: &Process) {
    eventually(Duration::from_secs(60), "nothing is pending", || async {
        let status = status(process).await;
        status["subscriptions"]
            .as_array()
            .is_some_and(|all| all.len() == 2 && all.iter().all(|each| each["pending"] == 0 && each["leased"] == 0))
    })
    .await;
}

#[tokio::test]
async fn a_todo_is_in_stats_and_activity_long_before_the_next_poll() {
    let database = Database::sqlite();
    // The poll is far away: what is seen is the wake-up after the commit.
    let app = start("all", &database, &[("OUTBOX_POLL_MS", "60000")]).await;
    let client = Client::new();
    let mut worst = Duration::ZERO;
    for n in 1..=10 {
        let answer = client
            .post(format!("{}/todos", app.http))
            .json(&json!({ "title": format!("todo {n}") }))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED);
        assert_eq!(answer.headers()["outbox-outcome"], "committed");
        let committed = Instant::now();
        eventually(Duration::from_secs(5), "the event has its effects", || async {
            get(&format!("{}/stats", app.http)).await["created"] == n
                && get(&format!("{}/activity", app.http)).await.as_array().unwrap().len() == n
        })
        .await;
        worst = worst.max(committed.elapsed());
    }
    // Far above what it takes (a few milliseconds), far below the poll.
    assert!(worst < Duration::from_secs(3), "{worst:?}");
    println!("slowest of 10: {worst:?}");
}

#[tokio::test]
async fn the_life_of_a_todo_is_told_in_order() {
    let database = Database::sqlite();
    let app = start("all", &database, &[]).await;
    let (client, todos) = (Client::new(), format!("{}/todos", app.http));
    let todo: Value = client.post(&todos).json(&json!({"title": " a "})).send().await.unwrap().json().await.unwrap();
    assert_eq!(todo, json!({"id": 1, "title": "a", "completed": false, "version": 1}));
    let one = format!("{todos}/1");
    let renamed = client.patch(&one).json(&json!({"title": "b", "completed": true})).send().await.unwrap();
    assert_eq!(renamed.json::<Value>().await.unwrap()["version"], 3);
    client.patch(&one).json(&json!({"completed": false})).send().await.unwrap();
    // Nothing changes: no event.
    client.patch(&one).json(&json!({"completed": false, "title": "b"})).send().await.unwrap();
    assert_eq!(get(&one).await["version"], 4);
    assert_eq!(client.delete(&one).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    assert_eq!(client.get(&one).send().await.unwrap().status(), StatusCode::NOT_FOUND);
    drained(&app).await;
    let activity = get(&format!("{}/activity", app.http)).await;
    let types: Vec<_> = activity.as_array().unwrap().iter().map(|entry| entry["event_type"].clone()).collect();
    assert_eq!(types, ["todo.deleted", "todo.reopened", "todo.completed", "todo.renamed", "todo.created"]);
    let stats = get(&format!("{}/stats", app.http)).await;
    assert_eq!(stats, json!({"created": 1, "completed": 1, "renamed": 1, "deleted": 1, "open": 0}));
    let tasks = format!("{}/api/v1/queues/stats/tasks?status=Done", app.ops);
    let tasks: Value =
        Client::new().get(tasks).basic_auth("me", Some(TOKEN)).send().await.unwrap().json().await.unwrap();
    let payload = &tasks[3]["args"]["payload"];
    assert_eq!(
        *payload,
        json!({
            "data": {"id": 1, "title": "b", "completed": false, "version": 2},
            "previous": {"title": "a", "version": 1}
        })
    );
}

#[tokio::test]
async fn an_import_is_all_or_nothing() {
    let database = Database::sqlite();
    let app = start("all", &database, &[]).await;
    let (client, import) = (Client::new(), format!("{}/todos/import", app.http));
    let send = |titles: Value| client.post(&import).json(&titles).send();
    let bad = send(json!([{"title": "a"}, {"title": " "}])).await.unwrap();
    assert_eq!(bad.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(bad.headers()["outbox-outcome"], "rolled-back");
    assert_eq!(bad.json::<Value>().await.unwrap(), json!({"error": "a todo needs a title"}));
    assert_eq!(send(json!([{"title": "a"}, {"title": "b"}])).await.unwrap().status(), StatusCode::CREATED);
    assert_eq!(send(json!([{"title": "c"}, {"title": "b"}])).await.unwrap().status(), StatusCode::CONFLICT);
    assert_eq!(send(json!([{"title": "d"}, {"title": "d"}])).await.unwrap().status(), StatusCode::CONFLICT);
    assert_eq!(get(&format!("{}/todos", app.http)).await.as_array().unwrap().len(), 2);
    drained(&app).await;
    assert_eq!(get(&format!("{}/stats", app.http)).await["created"], 2);
    assert_eq!(get(&format!("{}/activity", app.http)).await.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn the_page_follows_the_events_live() {
    let database = Database::sqlite();
    let app = start("all", &database, &[]).await;
    let page = Client::new().get(&app.http).send().await.unwrap();
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    let mut live = Client::new().get(format!("{}/activity/live", app.http)).send().await.unwrap();
    Client::new().post(format!("{}/todos", app.http)).json(&json!({"title": "live"})).send().await.unwrap();
    let mut received = String::new();
    let read = async {
        while !received.contains("todo.created") {
            received.push_str(std::str::from_utf8(&live.chunk().await.unwrap().expect("the stream goes on")).unwrap());
        }
    };
    tokio::time::timeout(Duration::from_secs(5), read).await.expect("the event arrives");
    // An open page does not hold up the shutdown.
    let (status, took) = app.terminate(Duration::from_secs(9)).await;
    assert!(status.success() && took < Duration::from_secs(5), "{status} after {took:?}");
}

#[tokio::test]
async fn api_and_worker_are_two_processes_on_one_sqlite_file() {
    api_and_worker_are_two_processes(Database::sqlite()).await;
}

#[tokio::test]
async fn api_and_worker_are_two_processes_on_postgres() {
    api_and_worker_are_two_processes(Database::postgres()).await;
}

async fn api_and_worker_are_two_processes(database: Database) {
    // Events of a process that started before the worker's first start are not lost.
    let api = start("serve", &database, &[]).await;
    assert_eq!(api.ops, "http://-");
    let client = Client::new();
    let create = |n: usize| client.post(format!("{}/todos", api.http)).json(&json!({"title": n.to_string()})).send();
    for n in 0..5 {
        assert_eq!(create(n).await.unwrap().status(), StatusCode::CREATED);
    }
    let worker = start("worker", &database, &[("OUTBOX_POLL_MS", "50")]).await;
    assert_eq!(worker.http, "http://-");
    for n in 5..10 {
        assert_eq!(create(n).await.unwrap().status(), StatusCode::CREATED);
    }
    eventually(Duration::from_secs(10), "all ten are counted", || async {
        get(&format!("{}/stats", api.http)).await["created"] == 10
    })
    .await;
}

#[tokio::test]
async fn operators_need_the_token() {
    let database = Database::sqlite();
    let app = start("worker", &database, &[]).await;
    let client = Client::new();
    for path in ["/", "/outbox/api/status", "/api/v1/tasks", "/outbox", "/nothing"] {
        let url = format!("{}{path}", app.ops);
        let answer = client.get(&url).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert!(answer.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"), "{path}");
        assert_eq!(client.get(&url).bearer_auth("wrong").send().await.unwrap().status(), 401, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(client.get(format!("{}{path}", app.ops)).send().await.unwrap().status(), 200, "{path}");
    }
    for path in ["/", "/api/v1/queues", "/api/v1/workers"] {
        let answer = client.get(format!("{}{path}", app.ops)).basic_auth("anyone", Some(TOKEN)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }
    let push = client.put(format!("{}/api/v1/queues/stats/tasks", app.ops)).bearer_auth(TOKEN);
    assert_eq!(push.json(&json!({})).send().await.unwrap().status(), StatusCode::METHOD_NOT_ALLOWED);
}

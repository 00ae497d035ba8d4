use std::{
    fmt::Debug,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, BodyDataStream, to_bytes},
    http::{Method, Request, StatusCode},
};
use futures_util::StreamExt;
use outbox_apalis::{board_events, dashboard};
use outbox_core::DeliveryError;
use serde_json::{Value, json};
use tower::ServiceExt;
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{Layer, filter::filter_fn, layer::Context, layer::SubscriberExt};

use crate::fixture::{Fixture, MS, NEVER, Running, Seen, eventually, noted, policy, run, subscription};

type Tasks = Arc<Mutex<Vec<(String, String)>>>;

/// The tasks that apalis has begun in this process: id and number of the attempt.
pub(crate) fn apalis_tasks() -> Tasks {
    static TASKS: OnceLock<Tasks> = OnceLock::new();
    let tasks = TASKS.get_or_init(|| {
        let tasks = Tasks::default();
        let spans = filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("apalis"));
        let subscriber = tracing_subscriber::registry().with(Spans(tasks.clone()).with_filter(spans));
        tracing::subscriber::set_global_default(subscriber).unwrap();
        tasks
    });
    tasks.clone()
}

struct Spans(Tasks);

impl<S: Subscriber> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let mut task = Task::default();
        attributes.record(&mut task);
        self.0.lock().unwrap().push((task.id, task.attempt));
    }
}

#[derive(Default)]
struct Task {
    id: String,
    attempt: String,
}

impl Visit for Task {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "task_id" {
            self.id = value.to_owned();
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "task_id" => self.id = format!("{value:?}"),
            "attempt" => self.attempt = format!("{value:?}"),
            _ => {}
        }
    }
}

async fn send(board: &Router, method: Method, path: &str, body: &str) -> (StatusCode, String) {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let response = board.clone().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap();
    let status = response.status();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, String::from_utf8_lossy(&body).into_owned())
}

async fn get(board: &Router, path: &str) -> Value {
    let (status, body) = send(board, Method::GET, path, "").await;
    assert_eq!(status, StatusCode::OK, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

/// A worker with one delivery in each state, the keys named after them, and the dashboard.
async fn every_state(fixture: &Fixture) -> (Running, Router) {
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        outbox_apalis::Handlers::new().on(move |event: crate::fixture::Noted, delivery| {
            seen.add(&event, &delivery);
            async move {
                match event.key.as_str() {
                    "leased" => std::future::pending().await,
                    "dead" => Err(DeliveryError::permanent("no such address")),
                    _ => Ok(()),
                }
            }
        })
    };
    let worker = fixture.worker().lease(NEVER).unwrap().shutdown_grace(MS);
    let worker = worker.handlers(subscription("mails").retry(policy(3)), handlers);
    let worker = run(worker.publisher(subscription("log"), outbox_core::LogPublisher)).await;
    let delayed = noted("pending", 0).delay(NEVER).max_attempts(7);
    fixture.push([noted("delivered", 0), noted("dead", 0), noted("leased", 0), delayed]).await;
    fixture.delivered(4).await;
    fixture.dead(1).await;
    eventually("one is at work", || async { seen.len() == 3 }).await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    (worker, board)
}

fn keys(tasks: &Value) -> Vec<&str> {
    tasks.as_array().unwrap().iter().map(|task| task["args"]["aggregate_id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_lists_the_deliveries_of_each_state() {
    let fixture = Fixture::new().await;
    let (worker, board) = every_state(&fixture).await;
    let tasks = get(&board, "/api/v1/queues/mails/tasks").await;
    assert_eq!(keys(&tasks), ["pending", "leased", "dead", "delivered"]);
    let statuses: Vec<&Value> = tasks.as_array().unwrap().iter().map(|task| &task["ctx"]["status"]).collect();
    assert_eq!(statuses, ["Pending", "Running", "Killed", "Done"]);
    for (status, key) in
        [("Pending", "pending"), ("Running", "leased"), ("Killed", "dead"), ("Failed", "dead"), ("Done", "delivered")]
    {
        assert_eq!(keys(&get(&board, &format!("/api/v1/queues/mails/tasks?status={status}")).await), [key]);
    }
    let dead = &tasks[2];
    let id = dead["ctx"]["task_id"].as_str().unwrap();
    assert_eq!(id, format!("mails:{}", dead["args"]["id"].as_str().unwrap()));
    assert_eq!(dead["args"]["payload"], json!({"key": "dead", "n": 0}));
    assert_eq!((&dead["ctx"]["attempt"], &dead["ctx"]["queue"]), (&json!(1), &json!("mails")));
    assert!(dead["ctx"].to_string().contains("no such address"), "{dead}");
    assert_eq!(tasks[0]["ctx"]["max_attempts"], json!(7));
    assert!(tasks[1]["ctx"]["lock_by"].is_string());
    assert_eq!(get(&board, &format!("/api/v1/queues/mails/tasks/{id}")).await, *dead);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_lists_damaged_events_among_the_others() {
    let fixture = Fixture::new().await;
    let (worker, board) = every_state(&fixture).await;
    for (key, damage) in [
        ("pending", "payload = '{'"),
        ("leased", "tags = '[1]'"),
        ("dead", "recorded_at = 'never', payload = x'ff'"),
        ("delivered", "event_id = x'00'"),
    ] {
        fixture.execute(&format!("update outbox_events set {damage} where aggregate_id = '{key}'")).await;
    }
    let tasks = get(&board, "/api/v1/queues/mails/tasks").await;
    assert_eq!(keys(&tasks), ["pending", "leased", "dead", "delivered"]);
    for (task, wrong) in tasks.as_array().unwrap().iter().zip(["payload", "tags", "recorded_at", "event_id"]) {
        let told = task["ctx"].to_string();
        assert!(told.contains("the event's row cannot be read") && told.contains(wrong), "{told}");
    }
    assert_eq!(tasks[0]["args"]["payload"], json!("{"));
    let id = tasks[2]["ctx"]["task_id"].as_str().unwrap();
    assert_eq!(get(&board, &format!("/api/v1/queues/mails/tasks/{id}")).await, tasks[2]);
    assert_eq!(get(&board, "/api/v1/tasks").await.as_array().unwrap().len(), 8);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_pages_through_all_subscriptions() {
    let fixture = Fixture::new().await;
    let (worker, board) = every_state(&fixture).await;
    assert_eq!(get(&board, "/api/v1/tasks").await.as_array().unwrap().len(), 8);
    assert_eq!(get(&board, "/api/v1/tasks?status=Done").await.as_array().unwrap().len(), 4);
    let first = get(&board, "/api/v1/tasks?page=1&page_size=5").await;
    let second = get(&board, "/api/v1/tasks?page=2&page_size=5").await;
    assert_eq!((first.as_array().unwrap().len(), second.as_array().unwrap().len()), (5, 3));
    assert_eq!(get(&board, "/api/v1/tasks?page=0&page_size=5").await, first);
    for path in [
        "/api/v1/tasks?page=4294967295",
        "/api/v1/tasks?page=4294967295&page_size=4294967295",
        "/api/v1/tasks?page=3&page_size=5",
        "/api/v1/tasks?page_size=0",
        "/api/v1/queues/mails/tasks?page=4294967295&status=Done",
    ] {
        assert_eq!(get(&board, path).await, json!([]), "{path}");
    }
    assert_eq!(get(&board, "/api/v1/tasks?page_size=4294967295").await.as_array().unwrap().len(), 8);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_shows_queues_workers_and_counts() {
    let fixture = Fixture::new().await;
    let (worker, board) = every_state(&fixture).await;
    eventually("the heartbeat", || async { fixture.count("outbox_workers").await == 1 }).await;
    let queues = get(&board, "/api/v1/queues").await;
    let queues: Vec<_> = queues.as_array().unwrap().iter().map(|queue| (&queue["name"], &queue["workers"])).collect();
    assert_eq!(queues.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["log", "mails"]);
    assert!(queues.iter().all(|(_, workers)| workers.as_array().unwrap().len() == 1));
    for (path, values) in [
        ("/api/v1/queues/mails/stats", ["4", "1", "1", "1", "1"]),
        ("/api/v1/queues/log/stats", ["4", "1", "0", "3", "0"]),
        ("/api/v1/overview", ["8", "2", "1", "4", "1"]),
    ] {
        let statistics = get(&board, path).await;
        let titles = ["TOTAL_JOBS", "PENDING_JOBS", "RUNNING_JOBS", "DONE_JOBS", "KILLED_JOBS"];
        for (statistic, (title, value)) in statistics.as_array().unwrap().iter().zip(titles.iter().zip(values)) {
            assert_eq!((&statistic["title"], &statistic["value"]), (&json!(title), &json!(value)), "{path}");
        }
        assert_eq!(statistics.as_array().unwrap().len(), 5);
    }
    assert_eq!(get(&board, "/api/v1/workers").await.as_array().unwrap().len(), 2);
    let workers = get(&board, "/api/v1/queues/mails/workers").await;
    assert_eq!((workers.as_array().unwrap().len(), &workers[0]["queue"]), (1, &json!("mails")));
    worker.stop().await;
    assert_eq!(get(&board, "/api/v1/workers").await, json!([]), "a worker that has stopped is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_pushes_nothing() {
    let fixture = Fixture::new().await;
    let (worker, board) = every_state(&fixture).await;
    let events = fixture.count("outbox_events").await;
    let event = get(&board, "/api/v1/queues/mails/tasks").await[0]["args"].to_string();
    let (status, body) = send(&board, Method::PUT, "/api/v1/queues/mails/tasks", &event).await;
    assert!(!status.is_success(), "{status} {body}");
    assert!(body.contains("deliveries come from committed events"), "{body}");
    let (status, _) = send(&board, Method::PUT, "/api/v1/queues/mails/tasks", "{}").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(fixture.count("outbox_events").await, events);
    assert_eq!(fixture.count("outbox_deliveries").await, 3);
    worker.stop().await;
}

#[tokio::test]
async fn the_dashboard_of_an_outbox_without_subscriptions_is_empty() {
    let fixture = Fixture::new().await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    for path in ["/api/v1/queues", "/api/v1/tasks", "/api/v1/workers", "/api/v1/queues/none/tasks"] {
        assert_eq!(get(&board, path).await, json!([]), "{path}");
    }
}

#[tokio::test]
async fn the_dashboard_answers_what_is_unknown_without_a_success() {
    let fixture = Fixture::new().await;
    fixture.outbox.register(&subscription("mails")).await.unwrap();
    let board = dashboard(&fixture.outbox).await.unwrap();
    let other_forms = ["7", "mails:x", "mails:", ":", "%00", "mails:00000000-0000-7000-8000-00000000000g"];
    for id in ["mails:00000000-0000-7000-8000-000000000000", "log:00000000-0000-7000-8000-000000000000"]
        .into_iter()
        .chain(other_forms)
    {
        let (status, body) = send(&board, Method::GET, &format!("/api/v1/queues/mails/tasks/{id}"), "").await;
        assert_eq!((status, body.as_str()), (StatusCode::NOT_FOUND, ""), "{id}");
    }
    for path in ["/api/v1/queues/other/tasks", "/api/v1/queues/mails/tasks/mails:00000000-0000-7000-8000-000000000000"]
    {
        let (status, body) = send(&board, Method::GET, path, "").await;
        assert_eq!((status, body.as_str()), (StatusCode::NOT_FOUND, ""), "{path}");
    }
    let (status, _) = send(&board, Method::GET, "/api/v1/tasks?page=x", "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn the_dashboard_has_its_page_at_the_root() {
    let fixture = Fixture::new().await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    for path in ["/", "/queues/mails"] {
        let (status, body) = send(&board, Method::GET, path, "").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.contains("<html"), "{path}: {body:.200}");
    }
}

#[tokio::test]
async fn the_dashboard_runs_only_its_own_scripts() {
    let fixture = Fixture::new().await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    for path in ["/", "/queues/mails", "/api/v1/queues"] {
        let response = board.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
        let policy = response.headers()["content-security-policy"].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self' 'wasm-unsafe-eval' 'sha256-"), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
    }
}

#[tokio::test]
async fn the_dashboard_shows_live_what_is_logged_about_attempts() {
    let fixture = Fixture::new().await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    let _logging = tracing::subscriber::set_default(tracing_subscriber::registry().with(board_events()));
    let request = Request::builder().uri("/api/v1/events").body(Body::empty()).unwrap();
    let response = board.oneshot(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut lines = response.into_body().into_data_stream();
    tracing::info_span!(target: "apalis", "task", task_id = "mails:7", attempt = 2).in_scope(|| {
        tracing::info!(target: "somewhere", "not about an attempt");
        tracing::info!(target: "outbox_apalis", "the mail server is away");
    });
    let line = next_with(&mut lines, "task_id\":\"mails:7").await;
    assert!(line.contains("the mail server is away"), "{line}");
}

#[tokio::test]
async fn a_page_that_does_not_read_silences_no_other() {
    let fixture = Fixture::new().await;
    let board = dashboard(&fixture.outbox).await.unwrap();
    let _logging = tracing::subscriber::set_default(tracing_subscriber::registry().with(board_events()));
    let open = async || {
        let request = Request::get("/api/v1/events").body(Body::empty()).unwrap();
        board.clone().oneshot(request).await.unwrap().into_body().into_data_stream()
    };
    let (_stalled, mut reading) = (open().await, open().await);
    let span = tracing::info_span!(target: "apalis", "task", task_id = "mails:8", attempt = 2);
    for n in 0..2000 {
        span.in_scope(|| tracing::info!(target: "outbox_apalis", "line {n}."));
        next_with(&mut reading, &format!("line {n}.")).await;
    }
}

/// The next line that has this text: other tests of this process may log as well.
async fn next_with(lines: &mut BodyDataStream, text: &str) -> String {
    let reading = async {
        loop {
            let line = lines.next().await.expect("the stream goes on").expect("it does not break");
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains(text) {
                return line;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), reading).await.expect("the line arrives")
}

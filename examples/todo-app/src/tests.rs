//! The API and its subscriptions together, in one process, on a temporary file.

use axum::{
    body::{Body, to_bytes},
    http::{Method, Request, StatusCode, header},
};
use outbox_apalis::{Deliveries, Worker};
use outbox_core::{StartPosition, Subscription};
use outbox_seaorm::{
    Outbox,
    testing::{TestOutbox, assert_nothing_recorded, recorded},
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt;

use crate::{
    App, activity,
    events::{TodoCreated, TodoRenamed},
    migrations::Migrator,
};

async fn outbox() -> TestOutbox {
    let outbox = TestOutbox::sqlite().await.unwrap();
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    outbox
}

async fn send(outbox: &Outbox, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
    let app = App { outbox: outbox.clone(), ops_url: None, stopped: watch::channel(false).1 };
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    let response = app.router().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

#[tokio::test]
async fn a_todo_that_is_refused_is_no_event() {
    let outbox = outbox().await;
    for body in [json!([{"title": "a"}, {"title": ""}]), json!([{"title": "a"}, {"title": "a"}])] {
        let (status, _) = send(&outbox, Method::POST, "/todos/import", body).await;
        assert!(status.is_client_error(), "{status}");
    }
    assert_nothing_recorded(&outbox).await;
}

#[tokio::test]
async fn a_renamed_todo_tells_its_old_title() {
    let outbox = outbox().await;
    assert_eq!(send(&outbox, Method::POST, "/todos", json!({"title": "a"})).await.0, StatusCode::CREATED);
    assert_eq!(send(&outbox, Method::PATCH, "/todos/1", json!({"title": "b"})).await.0, StatusCode::OK);
    assert_eq!(recorded::<TodoCreated>(&outbox).await.len(), 1);
    let [TodoRenamed(change)] = &recorded::<TodoRenamed>(&outbox).await[..] else { panic!("not one event") };
    assert_eq!((change.data.title.as_str(), change.data.version), ("b", 2));
    assert_eq!(change.previous.clone().map(Value::from), Some(json!({"title": "a", "version": 1})));
}

#[tokio::test]
async fn stats_follow_what_was_delivered() {
    let outbox = outbox().await;
    for title in ["a", "b"] {
        send(&outbox, Method::POST, "/todos", json!({"title": title})).await;
    }
    send(&outbox, Method::PATCH, "/todos/1", json!({"completed": true})).await;
    assert_eq!(send(&outbox, Method::GET, "/stats", json!(null)).await.1["created"], 0);
    let stats = Subscription::new("stats").unwrap().start(StartPosition::Beginning);
    let worker = Worker::new(outbox.clone()).handlers(stats, activity::stats_handlers());
    assert_eq!(worker.drain().await.unwrap(), Deliveries { delivered: 3, failed: 0, dead: 0 });
    let (_, stats) = send(&outbox, Method::GET, "/stats", json!(null)).await;
    assert_eq!(stats, json!({"created": 2, "completed": 1, "renamed": 0, "deleted": 0, "open": 1}));
}

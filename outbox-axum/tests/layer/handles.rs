//! Handles that outlive the handler.

use std::sync::Arc;

use axum::{Router, body::Body, response::IntoResponse, routing::post as post_to};
use futures_util::{StreamExt, stream};
use http::StatusCode;
use outbox_axum::{Events, Tx};
use outbox_core::PushError;
use sea_orm::{ConnectionTrait, DbErr};
use tokio::sync::{Notify, mpsc};

use crate::support::{Store, insert, place, placed, post, route, send};

#[tokio::test]
async fn a_handle_held_by_a_task_is_a_500_and_the_tasks_use_fails() {
    let store = Store::new().await;
    let (report, mut reported) = mpsc::channel::<Result<(), DbErr>>(1);
    let answered = Arc::new(Notify::new());
    let wait = answered.clone();
    let handler = move |tx: Tx| {
        let (report, wait) = (report.clone(), wait.clone());
        async move {
            place(&tx, "a").await;
            tokio::spawn(async move {
                wait.notified().await;
                report.send(insert(&tx, "late").await).await.unwrap();
            });
            StatusCode::CREATED
        }
    };
    let router = route(store.layer(), handler);
    assert_eq!(send(&router, post()).await.facts(), (500, "rolled-back"));
    assert!(store.is_empty().await && store.can_write().await);
    answered.notify_one();
    let error = reported.recv().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("the transaction has ended"), "{error}");
    assert!(store.is_empty().await && store.can_write().await);
}

/// As a data loader does: the task sends what the request waits for, and goes a moment later.
#[tokio::test]
async fn a_task_that_has_just_answered_is_no_obstacle() {
    let handler = |tx: Tx| async move {
        let (tell, told) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            place(&tx, "a").await;
            tell.send(()).unwrap();
            tokio::task::yield_now().await;
            drop(tx);
        });
        told.await.unwrap();
        StatusCode::CREATED
    };
    let store = Store::new().await;
    let router = route(store.layer(), handler);
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
    assert_eq!(store.orders().await, ["a"]);
}

#[tokio::test]
async fn handles_are_optional_where_the_layer_is() {
    let handler = |tx: Option<Tx>, events: Option<Events>| async move {
        let (Some(tx), Some(events)) = (tx, events) else { return StatusCode::NO_CONTENT };
        insert(&tx, "a").await.unwrap();
        events.push(placed("a")).unwrap();
        StatusCode::CREATED
    };
    let store = Store::new().await;
    let bare = Router::new().route("/", post_to(handler));
    assert_eq!(send(&bare, post()).await.status, StatusCode::NO_CONTENT);
    assert_eq!(send(&route(store.layer(), handler), post()).await.facts(), (201, "committed"));
    assert_eq!(store.orders().await, ["a"]);
}

#[tokio::test]
async fn a_handler_is_a_function_in_a_unit_test() {
    async fn create(tx: Tx, events: Events) -> StatusCode {
        insert(&tx, "a").await.unwrap();
        events.push(placed("a")).unwrap();
        StatusCode::CREATED
    }
    let store = Store::new().await;
    let unit = store.outbox.begin(outbox_core::Context::default());
    assert_eq!(create(Tx::from(&unit), Events::from(&unit)).await, StatusCode::CREATED);
    unit.commit().await.unwrap();
    assert_eq!(store.orders().await, ["a"]);
    assert_eq!(store.payloads().await, [r#"{"op":"a"}"#]);
}

#[tokio::test]
async fn handles_in_a_log_show_no_payload() {
    let store = Store::new().await;
    let unit = store.outbox.begin(outbox_core::Context::default());
    let (tx, events) = (Tx::from(&unit), Events::from(&unit));
    events.push(placed("secret")).unwrap();
    let shown = format!("{tx:?} {events:?}");
    assert!(!shown.contains("secret"), "{shown}");
}

#[tokio::test]
async fn a_task_that_finished_with_the_handle_is_no_obstacle() {
    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        let by_task = tokio::spawn({
            let tx = tx.clone();
            async move { insert(&tx, "b").await }
        });
        by_task.await.unwrap().unwrap();
        StatusCode::CREATED
    };
    let store = Store::new().await;
    let router = route(store.layer(), handler);
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
    assert_eq!(store.orders().await, ["a", "b"]);
}

#[tokio::test]
async fn a_response_stream_that_holds_the_handle_is_a_500() {
    let store = Store::new().await;
    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        let writes = stream::iter(["b", "c"]).then(move |op| {
            let tx = tx.clone();
            async move { insert(&tx, op).await.map(|()| op) }
        });
        Body::from_stream(writes).into_response()
    };
    let router = route(store.layer(), handler);
    assert_eq!(send(&router, post()).await.facts(), (500, "rolled-back"));
    assert!(store.is_empty().await && store.can_write().await);
}

#[tokio::test]
async fn a_late_push_is_refused() {
    let store = Store::new().await;
    let (report, mut reported) = mpsc::channel(1);
    let answered = Arc::new(Notify::new());
    let wait = answered.clone();
    let handler = move |events: Events| {
        let (report, wait) = (report.clone(), wait.clone());
        async move {
            events.push(placed("a")).unwrap();
            tokio::spawn(async move {
                wait.notified().await;
                report.send(events.push(placed("late"))).await.unwrap();
            });
            StatusCode::CREATED
        }
    };
    let router = route(store.layer(), handler);
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
    answered.notify_one();
    assert!(matches!(reported.recv().await.unwrap(), Err(PushError::Closed)));
    assert_eq!(store.payloads().await, [r#"{"op":"a"}"#]);
}

#[tokio::test]
async fn a_request_kept_by_a_middleware_is_no_obstacle_and_of_no_use() {
    use axum::{
        extract::{FromRequestParts, Request},
        middleware::{Next, from_fn},
    };
    let store = Store::new().await;
    let (keep, mut kept) = mpsc::channel(1);
    let keeps = move |request: Request, next: Next| {
        let keep = keep.clone();
        async move {
            keep.send(request.extensions().clone()).await.unwrap();
            next.run(request).await
        }
    };
    let handler = |tx: Tx| async move { place(&tx, "a").await };
    let router = Router::new().route("/", post_to(handler)).layer(from_fn(keeps)).layer(store.layer());
    assert_eq!(send(&router, post()).await.facts(), (200, "committed"));
    let mut parts = post().into_parts().0;
    parts.extensions = kept.recv().await.unwrap();
    let tx = Tx::from_request_parts(&mut parts, &()).await.unwrap();
    let error = tx.execute_unprepared("delete from orders").await.unwrap_err();
    assert!(error.to_string().contains("the transaction has ended"), "{error}");
    assert_eq!(store.orders().await, ["a"]);
}

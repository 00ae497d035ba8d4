//! Clients that hang up: the future of the response is dropped.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use axum::{Router, routing::post as post_to};
use outbox_axum::{OutboxLayer, Tx};
use tokio::sync::Notify;
use tower::ServiceExt;

use crate::support::{Store, build_app, eventually, place, post};

#[tokio::test]
async fn rolls_back_when_the_client_disconnects_in_the_middle() {
    let store = Store::new().await;
    let (reached, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (reached, go_on) = (reached.clone(), go_on.clone());
        move |tx: Tx| {
            let (reached, go_on) = (reached.clone(), go_on.clone());
            async move {
                place(&tx, "a").await;
                reached.notify_one();
                go_on.notified().await;
            }
        }
    };
    let router = Router::new().route("/", post_to(handler)).layer(OutboxLayer::new(store.outbox.clone()));
    tokio::select! {
        _ = router.clone().oneshot(post()) => panic!("the handler has not been told to go on"),
        () = reached.notified() => {}
    }
    // A handler that lived on would commit now.
    go_on.notify_one();
    assert!(store.can_write().await, "the connection comes back, without the transaction");
    assert!(store.is_empty().await);
}

#[tokio::test]
async fn a_disconnect_at_any_moment_stores_all_or_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        place(&tx, "b").await;
    })
    .await;
    let mut committed = 0;
    for polls in 0.. {
        let finished = {
            let mut response = pin!(app.router.clone().oneshot(post()));
            let mut left = polls;
            poll_fn(|cx| {
                if left == 0 {
                    return Poll::Ready(false);
                }
                left -= 1;
                response.as_mut().poll(cx).map(|_| true)
            })
            .await
        };
        // The one write connection is free again when a commit that had started has ended.
        assert!(app.store.can_write().await, "after {polls} polls");
        let orders = app.store.orders().await;
        assert!(orders.is_empty() || orders == ["a", "b"], "{orders:?} after {polls} polls");
        assert_eq!(app.store.payloads().await.len(), orders.len(), "after {polls} polls");
        committed += usize::from(!orders.is_empty());
        sea_orm::ConnectionTrait::execute_unprepared(
            app.store.outbox.writer(),
            "delete from orders; delete from outbox_events",
        )
        .await
        .unwrap();
        if finished {
            break;
        }
    }
    assert!(committed > 0, "the last one was not cut off");
}

#[tokio::test]
async fn a_commit_that_has_started_ends_by_itself() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        tx.events().clone()
    }
    .map_into_signal())
    .await;
    drop(app);
}

//! Clients that hang up: the future of the response is dropped.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
};

use outbox_axum::{Events, Tx};
use sea_orm::ConnectionTrait;
use tokio::sync::{Notify, mpsc};
use tower::ServiceExt;

use crate::support::{Store, build_app, eventually, place, post, route};

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
    let router = route(store.layer(), handler);
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
        let clear = "delete from orders; delete from outbox_events";
        app.store.outbox.writer().execute_unprepared(clear).await.unwrap();
        if finished {
            break;
        }
    }
    assert!(committed > 0, "the last one was not cut off");
}

#[tokio::test]
async fn a_commit_that_has_started_ends_by_itself() {
    let (hand_out, mut handed_out) = mpsc::channel(1);
    let store = Store::new().await;
    let handler = move |tx: Tx, events: Events| {
        let hand_out = hand_out.clone();
        async move {
            place(&tx, "a").await;
            hand_out.send(events).await.unwrap();
        }
    };
    let router = route(store.layer(), handler);
    let mut response = Box::pin(router.oneshot(post()));
    let mut events = None;
    // The commit closes the collector first.
    while events.as_ref().is_none_or(|events: &Events| events.set_tenant("t").is_ok()) {
        assert!(poll_once(&mut response).await.is_pending(), "hung up too late");
        tokio::task::yield_now().await;
        events = events.or_else(|| handed_out.try_recv().ok());
    }
    drop(response);
    eventually("the commit ends", async || store.orders().await == ["a"] && store.payloads().await.len() == 1).await;
    assert!(store.can_write().await);
}

async fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(pin!(&mut *future).poll(cx))).await
}

//! Modes whose tasks and bodies outlive the request.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use outbox_tests::eventually;

use crate::support::{App, a_moment, op};

#[tokio::test]
async fn a_handle_held_by_a_spawned_task_is_a_500_that_stores_nothing_also_when_the_task_uses_it() {
    for mode in ["spawn_hold:0", "spawn_hold:50"] {
        for app in App::each().await {
            app.op(mode).await.assert_rolled_back(500);
            a_moment().await;
            app.assert_nothing_stored().await;
        }
    }
}

#[tokio::test]
async fn an_event_pushed_after_the_response_is_refused_and_the_op_is_committed_without_it() {
    for mode in ["push_late:0", "push_late:50"] {
        for app in App::each().await {
            assert_eq!(app.get("/late_push_errors").await, 0);
            app.op(mode).await.assert_committed(201);
            eventually(Duration::from_secs(5), "the late push is refused", || async {
                app.get("/late_push_errors").await == 1
            })
            .await;
            app.assert_stored(&[]).await;
        }
    }
}

#[tokio::test]
async fn a_streamed_answer_is_committed_before_its_first_byte() {
    for app in App::each().await {
        let response = app.respond("/op", &op("stream")).await;
        app.assert_stored(&[]).await;
        let started = Instant::now();
        let (parts, body) = response.into_parts();
        let chunks: Vec<_> = body.into_data_stream().collect().await;
        assert!(chunks.len() > 1 && started.elapsed() >= Duration::from_millis(190), "{chunks:?}");
        assert_eq!(parts.status, 200);
        assert_eq!(parts.headers["outbox-outcome"], "committed");
    }
}

#[tokio::test]
async fn a_body_that_writes_through_the_handle_is_refused_as_a_whole() {
    for app in App::each().await {
        app.op("stream_write").await.assert_rolled_back(500);
        a_moment().await;
        app.assert_nothing_stored().await;
    }
}

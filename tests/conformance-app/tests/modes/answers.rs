//! Modes that decide with the answer.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{App, op};

#[tokio::test]
async fn ok_answers_201_and_is_committed() {
    for app in App::each().await {
        let answer = app.op("ok").await;
        answer.assert_committed(201);
        assert_eq!(answer.body, json!({ "op": "a" }));
        app.assert_stored(&[]).await;
        assert_eq!(app.get("/orders").await, json!(["a"]));
    }
}

#[tokio::test]
async fn the_numbers_of_a_key_go_on_with_its_next_op() {
    for app in App::each().await {
        app.op("ok").await.assert_committed(201);
        app.op("status:500").await.assert_rolled_back(409);
        let next = json!({ "op": "b", "key": "k", "n": 1, "mode": "ok", "arg": "" });
        app.post("/op", &next).await.assert_committed(201);
        assert_eq!(app.numbers().await, [(0, Some(1)), (1, Some(2)), (0, Some(3))]);
    }
}

#[tokio::test]
async fn a_status_below_400_is_committed() {
    for status in [101, 200, 204, 299, 302, 304, 399] {
        for app in App::each().await {
            app.op(&format!("status:{status}")).await.assert_committed(status);
            app.assert_stored(&[]).await;
        }
    }
}

#[tokio::test]
async fn a_status_from_400_stores_nothing() {
    for status in [400, 404, 409, 418, 500, 503, 599, 999] {
        for app in App::each().await {
            app.op(&format!("status:{status}")).await.assert_rolled_back(status);
            app.assert_nothing_stored().await;
        }
    }
}

#[tokio::test]
async fn rollback_200_answers_200_and_stores_nothing() {
    for app in App::each().await {
        app.op("rollback_200").await.assert_rolled_back(200);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn commit_409_answers_409_and_is_committed() {
    for app in App::each().await {
        app.op("commit_409").await.assert_committed(409);
        app.assert_stored(&[]).await;
    }
}

#[tokio::test]
async fn a_panic_after_writing_is_a_500_that_stores_nothing() {
    for app in App::each().await {
        app.op("panic").await.assert_rolled_back(500);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_panic_before_writing_is_a_500_that_stores_nothing() {
    for app in App::each().await {
        app.op("panic_before").await.assert_rolled_back(500);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_sleep_is_committed_if_the_client_stays() {
    for mode in ["sleep_before:20", "sleep_after:20"] {
        for app in App::each().await {
            app.op(mode).await.assert_committed(201);
            app.assert_stored(&[]).await;
        }
    }
}

#[tokio::test]
async fn a_sleep_stores_nothing_if_the_client_hangs_up() {
    for mode in ["sleep_before:60000", "sleep_after:60000"] {
        for app in App::each().await {
            timeout(Duration::from_millis(300), app.op(mode)).await.unwrap_err();
            app.assert_nothing_stored().await;
        }
    }
}

#[tokio::test]
async fn a_failed_statement_in_the_middle_whose_error_is_ignored_is_a_500_that_stores_nothing() {
    for app in App::each().await {
        app.op("swallow").await.assert_rolled_back(500);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_failed_last_statement_whose_error_is_ignored_is_a_500_that_stores_nothing() {
    for app in App::each().await {
        app.op("swallow_last").await.assert_rolled_back(500);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_deferred_constraint_that_refuses_the_commit_is_a_409_that_stores_nothing() {
    for app in App::each().await {
        app.op("deferred").await.assert_rolled_back(409);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn an_op_that_exists_is_a_409_and_the_first_stays_as_it_is() {
    for app in App::each().await {
        app.op("ok").await.assert_committed(201);
        app.op("ok").await.assert_rolled_back(409);
        app.assert_stored(&[]).await;
    }
}

#[tokio::test]
async fn a_request_that_makes_no_sense_is_a_4xx_that_stores_nothing() {
    for app in App::each().await {
        let with = |name: &str, value: Value| {
            let mut op = op("ok");
            op[name] = value;
            op
        };
        for bad in [
            json!([]),
            with("mode", json!("fly")),
            with("mode", json!("status:100")),
            with("mode", json!("sleep_after:soon")),
            with("n", json!(-1)),
            with("n", json!("2")),
            with("op", json!("")),
            with("op", json!("a\0")),
            with("key", json!("")),
            with("key", json!("k".repeat(256))),
        ] {
            app.post("/op", &bad).await.assert_rolled_back(422);
        }
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_direct_op_is_stored_without_events_and_only_once() {
    for app in App::each().await {
        let answer = app.post("/direct", &json!({ "op": "d" })).await;
        assert_eq!((answer.status, answer.outcome.as_str()), (201, "none"));
        assert_eq!(app.post("/direct", &json!({ "op": "d" })).await.status, 409);
        assert_eq!((app.orders().await, app.numbers().await), (vec!["d".to_owned()], vec![]));
    }
}

#[tokio::test]
async fn poison_is_an_event_of_its_own_type_without_an_order() {
    for app in App::each().await {
        for kind in ["error", "panic", "abort", "hang", "block", "permanent"] {
            let answer = app.post("/poison", &json!({ "op": kind, "key": "k", "kind": kind })).await;
            answer.assert_committed(201);
            assert_eq!(answer.body, json!({ "op": kind }));
        }
        app.post("/poison", &json!({ "op": "x", "key": "k", "kind": "arsenic" })).await.assert_rolled_back(422);
        let events = app.events().await;
        assert_eq!(events.len(), 6);
        assert!(events.iter().all(|event| event.event_type == "order.poisoned" && event.aggregate_id == "k"));
        assert_eq!(events[2].payload, json!({ "op": "abort", "key": "k", "kind": "abort" }));
        assert_eq!(app.orders().await, Vec::<String>::new());
    }
}

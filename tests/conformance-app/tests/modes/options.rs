//! Modes that choose what is pushed, and which connections are used.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use outbox_tests::Database;
use sea_orm::{
    ConnectionTrait, DbBackend, SqliteTransactionMode, TransactionOptions, TransactionTrait, prelude::DateTimeUtc,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{Answer, App, op};

#[tokio::test]
async fn a_second_connection_of_the_pool_can_be_read_meanwhile() {
    for app in App::each().await {
        app.op("other_pool").await.assert_committed(201);
        app.assert_stored(&[]).await;
    }
}

#[tokio::test]
async fn no_second_connection_within_the_acquire_timeout_is_a_503_that_stores_nothing() {
    // On SQLite the connections for reading are not those of the transactions.
    let app = App::on(Database::postgres(), 1).await;
    let answer = timeout(Duration::from_secs(8), app.op("other_pool")).await.expect("nobody waits for ever");
    answer.assert_rolled_back(503);
    app.assert_nothing_stored().await;
}

#[tokio::test]
async fn only_events_are_stored_without_an_order() {
    for app in App::each().await {
        app.op("only_events").await.assert_committed(201);
        assert_eq!(app.orders().await, Vec::<String>::new());
        assert_eq!(app.numbers().await, [(0, Some(1)), (1, Some(2))]);
        assert_eq!(app.events().await[0].payload["op"], "a");
    }
}

#[tokio::test]
async fn only_read_opens_no_write_transaction_and_stores_nothing() {
    for app in App::each().await {
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let writing = app.witness.writer().begin_with_options(options).await.unwrap();
        if writing.get_database_backend() == DbBackend::Postgres {
            writing.execute_unprepared("lock table orders, keys, outbox_events in exclusive mode").await.unwrap();
        }
        let answer = timeout(Duration::from_secs(2), app.op("only_read")).await.expect("it waits for no writer");
        answer.assert_committed(200);
        writing.rollback().await.unwrap();
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn many_more_events_are_committed() {
    for app in App::each().await {
        app.op("many:500").await.assert_committed(201);
        app.assert_stored(&(2..502).collect::<Vec<_>>()).await;
    }
}

#[tokio::test]
async fn ten_thousand_events_are_committed_as_a_whole_and_are_all_to_be_delivered() {
    for app in App::each().await {
        app.op("many:9998").await.assert_committed(201);
        app.assert_stored(&(2..10_000).collect::<Vec<_>>()).await;
        app.outbox.route_waiting().await.unwrap();
        let claimed = app.outbox.claim(app.effects, "w", 20_000, 10, Duration::from_secs(60)).await.unwrap();
        let positions: BTreeSet<i64> = claimed.lanes.iter().map(|lane| lane.run[0].position).collect();
        assert_eq!((claimed.lanes.len(), positions.len()), (10_000, 10_000));
    }
}

#[tokio::test]
async fn too_many_events_are_a_413_that_stores_nothing() {
    for app in App::each().await {
        for mode in ["many:20000", "many:4294967295"] {
            app.op(mode).await.assert_rolled_back(413);
        }
        let mut op = op("ok");
        op["n"] = json!(u32::MAX);
        app.post("/op", &op).await.assert_rolled_back(413);
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn a_big_payload_is_committed() {
    for app in App::each().await {
        app.op("big:1000000").await.assert_committed(201);
        app.assert_stored(&[2]).await;
        assert_eq!(app.events().await[2].payload["text"].as_str().unwrap().len(), 1_000_000);
    }
}

#[tokio::test]
async fn a_payload_that_is_too_big_is_a_413_that_stores_nothing() {
    for app in App::each().await {
        for bytes in ["1048577", "67108864", "67108865", "18446744073709551615"] {
            app.op(&format!("big:{bytes}")).await.assert_rolled_back(413);
        }
        app.assert_nothing_stored().await;
    }
}

async fn raw(app: &App, arg: &str) -> Answer {
    let mut op = op("raw");
    op["arg"] = json!(arg);
    app.post("/op", &op).await
}

#[tokio::test]
async fn raw_json_is_stored_equal() {
    let nested = "[".repeat(100) + &"]".repeat(100);
    for arg in [
        "null",
        "true",
        " {\"a\": [1, -0.0, 1e300, \"\\u0000\\ud83d\\ude00 é\"],\n\"\": {}} ",
        "9007199254740993",
        "-9223372036854775808",
        "18446744073709551615",
        "0.1234567890123456789",
        "\"'; drop table orders; --\"",
        &nested,
    ] {
        for app in App::each().await {
            raw(&app, arg).await.assert_committed(201);
            app.assert_stored(&[2]).await;
            let stored = &app.events().await[2].payload["raw"];
            assert_eq!(*stored, serde_json::from_str::<Value>(arg).unwrap(), "{arg}");
        }
    }
}

#[tokio::test]
async fn raw_json_keeps_the_digits_that_no_float_holds() {
    for app in App::each().await {
        raw(&app, "123456789012345678901234567890").await.assert_committed(201);
        app.outbox.route_waiting().await.unwrap();
        let deliveries = app.outbox.deliveries(Some("effects"), None, 0, 1).await.unwrap();
        assert!(deliveries[0].event.payload.contains(":123456789012345678901234567890"), "{deliveries:?}");
    }
}

#[tokio::test]
async fn what_is_not_json_is_a_422_that_stores_nothing() {
    for app in App::each().await {
        for arg in ["", "{", "nul", "1 2", "'a'", "{\"a\":1,}", "\"\\ud800\"", "1e999", &"[".repeat(1000)] {
            raw(&app, arg).await.assert_rolled_back(422);
        }
        app.assert_nothing_stored().await;
    }
}

#[tokio::test]
async fn delayed_events_become_due_that_long_after_the_commit() {
    for app in App::each().await {
        let asked = DateTimeUtc::from(SystemTime::now()).timestamp_millis();
        app.op("delay:60000").await.assert_committed(201);
        app.assert_stored(&[]).await;
        app.outbox.route_waiting().await.unwrap();
        let deliveries = app.outbox.deliveries(Some("effects"), None, 0, 10).await.unwrap();
        assert_eq!(deliveries.len(), 2);
        for delivery in deliveries {
            let wait = delivery.due_at.unwrap().timestamp_millis() - asked;
            assert!((60_000..65_000).contains(&wait), "{wait}");
        }
        app.outbox.route_waiting().await.unwrap();
        let claimed = app.outbox.claim(app.effects, "w", 10, 10, Duration::from_secs(30)).await.unwrap().lanes;
        assert!(claimed.is_empty(), "{claimed:?}");
    }
}

#[tokio::test]
async fn a_higher_priority_is_claimed_first() {
    for app in App::each().await {
        for (op, mode) in [("low", "ok"), ("lower", "priority:-5"), ("high", "priority:5"), ("higher", "priority:9")] {
            let op = json!({ "op": op, "key": op, "n": 1, "mode": mode, "arg": "" });
            app.post("/op", &op).await.assert_committed(201);
        }
        app.outbox.route_waiting().await.unwrap();
        let claimed = app.outbox.claim(app.effects, "w", 10, 10, Duration::from_secs(30)).await.unwrap().lanes;
        let keys: Vec<_> = claimed.iter().map(|lane| lane.run[0].aggregate_id.as_str()).collect();
        assert_eq!(keys, ["higher", "high", "low", "lower"]);
    }
}

//! What may be pushed, and that it is stored as it was pushed.

use axum::extract::State;
use http::StatusCode;
use outbox_axum::{Error, Events, Tx};
use outbox_core::{MAX_PAYLOAD_DEPTH, NewEvent};
use serde_json::value::RawValue;

use crate::support::{build_app, insert};

/// The default of `outbox_core::Limits`.
const PAYLOAD_LIMIT: usize = 1024 * 1024;

fn with_payload(payload: &impl serde::Serialize) -> NewEvent {
    NewEvent::dynamic("order.placed", "order", "1", payload).unwrap()
}

#[tokio::test]
async fn ten_thousand_events_in_one_request_are_stored_in_their_order() {
    let app = build_app(|tx: Tx, events: Events| async move {
        insert(&tx, "a").await?;
        for i in 0..10_000 {
            events.push(with_payload(&i))?;
        }
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    let expected: Vec<String> = (0..10_000).map(|i: u32| i.to_string()).collect();
    assert_eq!(app.store.payloads().await, expected);
}

#[tokio::test]
async fn more_events_than_a_request_may_push_are_a_413_and_nothing_is_stored() {
    let app = build_app(|tx: Tx, events: Events| async move {
        insert(&tx, "a").await?;
        for i in 0..20_001 {
            events.push(with_payload(&i))?;
        }
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    assert_eq!(app.post().await.facts(), (413, "rolled-back"));
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn a_payload_at_the_limit_is_stored_and_one_above_is_a_413() {
    for (size, facts) in [(PAYLOAD_LIMIT, (201, "committed")), (PAYLOAD_LIMIT + 1, (413, "rolled-back"))] {
        let app = build_app(move |tx: Tx, events: Events| async move {
            insert(&tx, "a").await?;
            let quotes = 2;
            events.push(with_payload(&"x".repeat(size - quotes)))?;
            Ok::<_, Error>(StatusCode::CREATED)
        })
        .await;
        assert_eq!(app.post().await.facts(), facts, "{size}");
        let stored: Vec<usize> = app.store.payloads().await.iter().map(String::len).collect();
        assert_eq!(stored, if size > PAYLOAD_LIMIT { vec![] } else { vec![size] });
        assert_eq!(app.store.orders().await.len(), stored.len());
    }
}

#[tokio::test]
async fn an_event_with_a_name_that_is_not_valid_is_a_422() {
    let app = build_app(|events: Events| async move {
        events.push(NewEvent::dynamic("Order Placed", "order", "1", &())?)?;
        Ok::<_, Error>(())
    })
    .await;
    let answer = app.post().await;
    assert_eq!(answer.facts(), (422, "rolled-back"));
    assert_eq!(answer.body, r#"{"error":"a value of the request is not valid; change the request"}"#);
}

#[tokio::test]
async fn odd_json_is_stored_byte_for_byte() {
    let deep = format!("{}{}", "[".repeat(MAX_PAYLOAD_DEPTH), "]".repeat(MAX_PAYLOAD_DEPTH));
    let payloads = [
        r#""\u0000 and \ud83d\ude00, \\u0000 and \"""#,
        "{\"naïve\":\"Käse 🧀\u{2028}\u{202e}\"}",
        "9007199254740993",
        "-0.0",
        "1e400",
        "123456789012345678901234567890.10",
        r#"{"a":1,"a":2,"b":{"c":null}}"#,
        r#"{ "spaces" : [ 1 , 2 ] }"#,
        r#"{"z":1,"a":2}"#,
        "null",
        "[]",
        deep.as_str(),
    ]
    .map(str::to_owned);
    let expected = payloads.clone();
    let handler = move |events: Events, State(()): State<()>| async move {
        for payload in payloads {
            events.push(with_payload(&RawValue::from_string(payload).unwrap()))?;
        }
        Ok::<_, Error>(StatusCode::CREATED)
    };
    let app = build_app(handler).await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.payloads().await, expected);
}

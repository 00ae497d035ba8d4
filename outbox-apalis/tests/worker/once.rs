//! Workers that end by themselves.

use outbox_apalis::Deliveries;
use outbox_core::DeliveryError;
use outbox_seaorm::DeliveryState::{Delivered, Pending};

use crate::fixture::{Fixture, NEVER, Seen, each_noted, noted, policy, subscription};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_delivers_all_that_is_due_and_says_what_it_did() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| match event.n {
        3 => Err(DeliveryError::permanent("no")),
        4 => Err(DeliveryError::retry("not now")),
        _ => Ok(()),
    });
    let retry = policy(5).backoff(NEVER, NEVER).unwrap();
    let worker = || fixture.worker().poll(NEVER).unwrap().concurrency(2).unwrap();
    let first = worker().handlers(subscription("s").retry(retry), seen.handlers());
    assert_eq!(first.drain().await.unwrap(), Deliveries::default(), "nothing is there");
    let keys: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    fixture.push(keys.iter().enumerate().map(|(n, key)| noted(key, i64::try_from(n).unwrap()))).await;
    fixture.push([noted("later", 60).delay(NEVER)]).await;
    let done = worker().handlers(subscription("s").retry(retry), handlers).drain().await.unwrap();
    assert_eq!(done, Deliveries { delivered: 48, failed: 1, dead: 1 });
    let states = fixture.states("s").await;
    assert_eq!(states[4], (Pending, 1));
    assert_eq!(states[50], (Pending, 0));
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_ends_while_a_failed_delivery_waits() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|_, _| Err(DeliveryError::retry("not now")));
    let retry = policy(5).backoff(NEVER, NEVER).unwrap();
    fixture.worker().handlers(subscription("s").retry(retry), seen.handlers()).drain().await.unwrap();
    fixture.push(each_noted(&["a", "b"], 3)).await;
    let done = fixture.worker().handlers(subscription("s").retry(retry), handlers).drain().await.unwrap();
    assert_eq!(done, Deliveries { delivered: 0, failed: 2, dead: 0 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_once_works_on_one_claim() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker =
        || fixture.worker().concurrency(5).unwrap().batch(3).unwrap().handlers(subscription("s"), seen.handlers());
    assert_eq!(worker().run_once().await.unwrap(), Deliveries::default());
    let keys: Vec<String> = (0..10).map(|n| n.to_string()).collect();
    fixture.push(keys.iter().map(|key| noted(key, 0))).await;
    assert_eq!(worker().run_once().await.unwrap(), Deliveries { delivered: 3, failed: 0, dead: 0 });
    let delivered = fixture.states("s").await.iter().filter(|(state, _)| *state == Delivered).count();
    assert_eq!(delivered, 3);
    fixture.is_at_rest().await;
}

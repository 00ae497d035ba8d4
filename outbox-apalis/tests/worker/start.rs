use std::time::Duration;

use outbox_apalis::{Handlers, StartError, Worker};
use outbox_core::LogPublisher;
use outbox_seaorm::Outbox;

use crate::fixture::{Fixture, MS, Noted, Seen, subscription};

#[tokio::test]
async fn a_worker_without_subscriptions_is_refused() {
    let fixture = Fixture::new().await;
    let error = fixture.worker().start().await.unwrap_err();
    assert!(matches!(error, StartError::Empty));
    let text = "the worker has no subscriptions; add one with `.handlers(…)` or `.publisher(…)`";
    assert_eq!(error.to_string(), text);
}

#[tokio::test]
async fn one_name_for_two_subscriptions_is_refused_before_anything_is_registered() {
    let fixture = Fixture::new().await;
    let worker = fixture.worker().handlers(subscription("mails"), Seen::default().handlers());
    let error = worker.publisher(subscription("mails"), LogPublisher).run_until(async {}).await.unwrap_err();
    assert!(matches!(error, StartError::Twice(_)));
    assert_eq!(error.to_string(), "the subscription \"mails\" was added twice; one name is one subscription");
    assert_eq!(fixture.count("outbox_subscriptions").await, 0);
}

#[tokio::test]
async fn missing_tables_are_refused_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}?mode=rwc", directory.path().join("empty.db").display());
    let outbox = Outbox::connect(&url, 1).await.unwrap();
    let error = Worker::new(outbox).publisher(subscription("log"), LogPublisher).start().await.unwrap_err();
    assert!(matches!(error, StartError::Schema(_)));
    assert!(error.to_string().starts_with("the database has no outbox tables; run the migrations first"), "{error}");
}

#[tokio::test]
async fn tables_of_a_newer_version_are_refused() {
    let fixture = Fixture::new().await;
    fixture.execute("update outbox_meta set schema_version = 99").await;
    let worker = fixture.worker().publisher(subscription("log"), LogPublisher);
    let error = worker.start().await.unwrap_err();
    assert!(error.to_string().contains("newer version (schema 99"), "{error}");
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused_where_they_are_given() {
    let fixture = Fixture::new().await;
    let worker = || fixture.worker();
    let day = Duration::from_secs(24 * 3600);
    for (refused, text) in [
        (worker().lease(99 * MS), "a lease must be at least 100 ms and at most a day"),
        (worker().lease(Duration::MAX), "a lease must be at least 100 ms and at most a day"),
        (worker().timeout(Duration::ZERO), "an attempt needs more time than zero"),
        (worker().poll(9 * MS), "the poll interval must be at least 10 ms and at most a day"),
        (worker().poll(Duration::MAX), "the poll interval must be at least 10 ms and at most a day"),
        (worker().concurrency(0), "the concurrency must be between 1 and 10,000"),
        (worker().concurrency(10_001), "the concurrency must be between 1 and 10,000"),
        (worker().batch(0), "the batch size must be between 1 and 10,000"),
        (worker().batch(10_001), "the batch size must be between 1 and 10,000"),
    ] {
        assert_eq!(refused.unwrap_err().to_string(), text);
    }
    for allowed in [
        worker().lease(100 * MS),
        worker().lease(day),
        worker().timeout(Duration::MAX),
        worker().poll(10 * MS),
        worker().poll(day),
        worker().concurrency(10_000),
        worker().batch(10_000),
    ] {
        allowed.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_times_that_are_allowed_work() {
    let fixture = Fixture::new().await;
    let (seen, day) = (Seen::default(), Duration::from_secs(24 * 3600));
    let worker = fixture.worker().lease(day).unwrap().poll(day).unwrap().timeout(Duration::MAX).unwrap();
    let worker = worker.concurrency(10_000).unwrap().batch(10_000).unwrap().shutdown_grace(Duration::MAX);
    let worker = crate::fixture::run(worker.handlers(subscription("s"), seen.handlers())).await;
    fixture.push([crate::fixture::noted("a", 0)]).await;
    fixture.delivered(1).await;
    worker.stop().await;
}

#[test]
#[should_panic(expected = "the event type \"note.noted\" version 1 already has a handler in this subscription")]
fn one_event_type_has_one_handler() {
    let _ = Handlers::new().on(|_: Noted, _| async { Ok(()) }).on_tx(|_: Noted, _| async { Ok(()) });
}

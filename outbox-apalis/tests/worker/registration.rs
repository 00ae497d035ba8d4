//! Others change, remove and register the subscriptions of a worker while it runs.

use std::time::Duration;

use outbox_core::Subscription;

use crate::fixture::{Counted, Fixture, MS, Noted, Seen, counted, noted, run, subscription, within, worker};

/// Some heartbeats.
const SOON: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_goes_on_with_what_was_registered_anew() {
    let fixture = Fixture::new().await;
    let (other, seen) = (fixture.another_process().await, Seen::default());
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.push([noted("a", 0)]).await;
    fixture.delivered(1).await;
    // Another one takes the place of its id: SQLite gives the last id out again.
    assert!(other.remove("s").await.unwrap());
    other.register(&subscription("stranger")).await.unwrap();
    other.register(&subscription("s")).await.unwrap();
    fixture.push([noted("a", 1)]).await;
    within(SOON, "it is delivered", || async { seen.of("a") == [0, 1] }).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await.len(), 1);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_subscription_stays_removed_and_is_shown() {
    let fixture = Fixture::new().await;
    let (other, seen) = (fixture.another_process().await, Seen::default());
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.push([noted("a", 0)]).await;
    fixture.delivered(1).await;
    assert!(other.remove("s").await.unwrap());
    within(SOON, "operators see it", || async { other.workers().await.unwrap()[0].removed == ["s"] }).await;
    // Two heartbeats later.
    let seen_at = other.workers().await.unwrap()[0].last_seen_at;
    within(SOON, "it lives on", || async {
        other.workers().await.unwrap()[0].last_seen_at > seen_at + Duration::from_secs(6)
    })
    .await;
    assert_eq!(fixture.count("outbox_subscriptions").await, 0);
    assert!(!worker.has_ended());
    // Whoever wants it back registers it, and the worker has it again.
    other.register(&subscription("s")).await.unwrap();
    fixture.push([noted("a", 1)]).await;
    within(SOON, "it is delivered", || async { seen.of("a") == [0, 1] }).await;
    worker.stop().await;
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_version_restarted_last_takes_no_events_away() {
    let fixture = Fixture::new().await;
    let other = fixture.another_process().await;
    let of = |events: &str| -> Subscription { subscription("s").events(events.split(' ')).unwrap() };
    let old = || run(worker(&other).handlers(of("note.noted"), Seen::default().handlers()));
    let counts = Seen::default();
    let new = Seen::default().handlers().on({
        let counts = counts.clone();
        move |event: Counted, delivery| {
            counts.add(&Noted { key: event.key, n: event.n }, &delivery);
            async { Ok(()) }
        }
    });
    let first = old().await;
    let new = run(fixture.worker().handlers(of("note.noted note.counted"), new)).await;
    let heartbeat = || async { other.workers().await.unwrap().iter().any(|worker| worker.disagrees == ["s"]) };
    within(SOON, "the older one is shown", heartbeat).await;
    within(SOON, "the newer one is alive", || async { other.workers().await.unwrap().len() == 2 }).await;
    first.stop().await;
    let last = old().await;
    fixture.push([counted("a", 0)]).await;
    // Unless the older worker has it, which does not know it and leaves it alone for a moment.
    within(SOON, "the event of the new type is delivered", || async { counts.len() == 1 }).await;
    // The way back: no worker of the newer version is left.
    new.stop().await;
    let stored = || async { fixture.value::<String>("select filter from outbox_subscriptions").await };
    within(SOON, "the older definition counts", || async { !stored().await.contains("counted") }).await;
    assert!(last.stop().await < 5000 * MS);
    fixture.is_at_rest().await;
}

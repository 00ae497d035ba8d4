use std::time::Duration;

use outbox_apalis::Handlers;
use outbox_core::DeliveryError;
use outbox_seaorm::{DeliveryState::Delivered, Outbox};

use crate::fixture::{
    Counted, Fixture, MS, NEVER, Noted, Seen, counted, each_noted, eventually, noted, policy, run, subscription, within,
};

async fn rename(fixture: &Fixture, from: &str, to: &str) {
    fixture.execute(&format!("alter table {from} rename to {to}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_that_fail_are_tried_again_and_spend_no_attempts() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.push(each_noted(&["a"], 1)).await;
    fixture.delivered(1).await;
    fixture.push([noted("b", 0).delay(100 * MS)]).await;
    rename(&fixture, "outbox_lanes", "gone").await;
    tokio::time::sleep(400 * MS).await;
    assert!(!worker.has_ended());
    assert_eq!(seen.len(), 1);
    rename(&fixture, "gone", "outbox_lanes").await;
    fixture.delivered(2).await;
    assert!(!worker.has_ended());
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_that_cannot_be_stored_are_kept_and_nothing_new_is_begun_meanwhile() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| if event.key == "0" { Ok(()) } else { Err(DeliveryError::retry("no")) });
    let worker = fixture.worker().concurrency(2).unwrap();
    let worker = run(worker.handlers(subscription("s").retry(policy(2)), handlers)).await;
    rename(&fixture, "outbox_delivered", "gone").await;
    fixture.push((0..40).map(|key| noted(&key.to_string(), 0))).await;
    eventually("something is delivered", || async { seen.len() >= 2 }).await;
    tokio::time::sleep(400 * MS).await;
    assert!(seen.len() < 15, "{} were begun", seen.len());
    assert!(!worker.has_ended());
    rename(&fixture, "gone", "outbox_delivered").await;
    fixture.delivered(1).await;
    fixture.dead(39).await;
    worker.stop().await;
    assert_eq!(seen.len(), 1 + 2 * 39, "nothing was repeated");
    fixture.is_at_rest().await;
}

/// Longer than a connection waits for SQLite's lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_locked_for_long_costs_time_and_nothing_else() {
    let fixture = Fixture::new().await;
    let (seen, lease) = (Seen::default(), Duration::from_secs(30));
    let transactional = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async { Ok(()) }
        })
    };
    let plain = Seen::default();
    let (writer, reader) = (fixture.impatient_connection().await, fixture.impatient_connection().await);
    let worker = crate::fixture::worker(&Outbox::with_connections(writer, reader)).lease(lease).unwrap();
    let worker = worker.handlers(subscription("plain"), plain.handlers());
    let started = worker.handlers(subscription("transactional"), transactional).start().await.unwrap();
    fixture.push(each_noted(&["a", "b"], 2)).await;
    let other = fixture.another_process().await;
    let lock = other.begin(outbox_core::Context::default());
    lock.tx().begin_now().await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = tokio::spawn(started.run_until(async {
        let _ = stopped.await;
    }));
    tokio::time::sleep(600 * MS).await;
    assert_eq!((plain.len(), seen.len()), (0, 0));
    lock.rollback().await;
    let delivered = || async { fixture.count("outbox_delivered").await == 8 };
    within(Duration::from_secs(5), "the deliveries", delivered).await;
    assert!(!worker.is_finished());
    stop.send(()).unwrap();
    worker.await.unwrap();
    for name in ["plain", "transactional"] {
        assert_eq!(fixture.states(name).await, [(Delivered, 1); 4], "{name}");
    }
}

/// The transaction of the effect cannot begin: that is no attempt of the delivery.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_delivery_that_finds_the_database_locked_spends_no_attempt() {
    let fixture = Fixture::new().await;
    let (writer, reader) = (fixture.impatient_connection().await, fixture.impatient_connection().await);
    let (other, seen) = (fixture.another_process().await, Seen::default());
    let handlers = {
        let seen = seen.clone();
        Handlers::new()
            .on(move |_: Noted, delivery| {
                let other = other.clone();
                async move {
                    if delivery.attempt() > 1 {
                        return Ok(());
                    }
                    let lock = other.begin(outbox_core::Context::default());
                    lock.tx().begin_now().await?;
                    tokio::spawn(async move {
                        tokio::time::sleep(800 * MS).await;
                        lock.rollback().await;
                    });
                    Err(DeliveryError::retry("locked"))
                }
            })
            .on_tx(move |event: Counted, effect| {
                seen.add(&Noted { key: event.key, n: event.n }, effect.delivery());
                async { Ok(()) }
            })
    };
    // One at a time: the second delivery is begun when the first one has locked the database.
    let worker = crate::fixture::worker(&Outbox::with_connections(writer, reader)).lease(NEVER).unwrap();
    let started = worker.concurrency(1).unwrap().handlers(subscription("s"), handlers).start().await.unwrap();
    fixture.push([noted("a", 0), counted("b", 0)]).await;
    started.run_until(fixture.delivered(2)).await;
    assert_eq!(fixture.states("s").await, [(Delivered, 2), (Delivered, 1)]);
    assert_eq!(seen.calls().iter().map(|call| call.attempt).collect::<Vec<_>>(), [1]);
    assert_eq!(
        fixture.column::<Option<String>>("select attempt_log from outbox_delivered where attempts = 1").await,
        [None]
    );
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_store_anything_stops_nevertheless() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().lease(400 * MS).unwrap().shutdown_grace(100 * MS);
    let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
    rename(&fixture, "outbox_delivered", "gone").await;
    fixture.push([noted("a", 0)]).await;
    eventually("the delivery", || async { seen.len() == 1 }).await;
    let took = worker.stop().await;
    assert!(took < 1500 * MS, "{took:?}");
    rename(&fixture, "gone", "outbox_delivered").await;
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.delivered(1).await;
    worker.stop().await;
}

use std::{sync::Arc, time::Duration};

use outbox_apalis::Handlers;
use outbox_seaorm::DeliveryState::{Delivered, Leased, Pending};
use tokio::sync::Semaphore;

use crate::fixture::{
    Fixture, MS, NEVER, Noted, Seen, each_noted, eventually, gated, hanging, noted, run, subscription, within, worker,
    working,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_under_way_end_within_the_grace_and_are_acknowledged() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().shutdown_grace(Duration::from_secs(4));
    let worker = run(worker.handlers(subscription("s"), working(&seen, 300 * MS))).await;
    fixture.push(each_noted(&["a", "b", "c"], 2)).await;
    eventually("three are at work", || async { seen.len() == 3 }).await;
    let took = worker.stop().await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    let first = [(Delivered, 1); 3];
    assert_eq!(fixture.states("s").await, [&first[..], &[(Pending, 0); 3]].concat());
    assert_eq!(seen.len(), 3, "nothing new was begun");
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_attempt_is_cancelled_after_the_grace_and_given_back() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().lease(Duration::from_secs(30)).unwrap().shutdown_grace(300 * MS);
    let worker = run(worker.handlers(subscription("s"), hanging(&seen))).await;
    fixture.push([noted("a", 0)]).await;
    eventually("it is at work", || async { seen.len() == 1 }).await;
    let took = worker.stop().await;
    assert!((300 * MS..1300 * MS).contains(&took), "{took:?}");
    fixture.is_at_rest().await;
    assert_eq!(fixture.states("s").await, [(Pending, 0)]);
    // And at once: the lease that was given back does not have to end.
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    within(1000 * MS, "the delivery", || async { fixture.count("outbox_delivered").await == 1 }).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_claimed_in_advance_is_given_back_at_once() {
    let fixture = Fixture::new().await;
    let (seen, others, gate) = (Seen::default(), Seen::default(), Arc::new(Semaphore::new(0)));
    let (lease, grace) = (Duration::from_secs(30), Duration::from_secs(60));
    let first = fixture.worker().lease(lease).unwrap().concurrency(2).unwrap().shutdown_grace(grace);
    let first = run(first.handlers(subscription("s"), gated(&seen, &gate))).await;
    fixture.push(each_noted(&["a", "b", "c", "d", "e"], 2)).await;
    eventually("two are at work", || async { seen.len() == 2 }).await;
    eventually("four are claimed", || async { fixture.count("outbox_lanes where leased_by is not null").await == 4 })
        .await;
    let stopping = tokio::spawn(first.stop());
    let other = fixture.another_process().await;
    let second = run(worker(&other).handlers(subscription("s"), others.handlers())).await;
    fixture.delivered(6).await;
    assert!(!stopping.is_finished());
    assert_eq!(fixture.states("s").await.iter().filter(|(state, _)| *state == Leased).count(), 2);
    gate.add_permits(2);
    stopping.await.unwrap();
    fixture.delivered(10).await;
    second.stop().await;
    assert_eq!((seen.len(), others.len()), (2, 8));
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 10]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_stopped_in_the_middle_loses_and_repeats_nothing() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let keys: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let mut events = each_noted(&keys, 8).into_iter();
    let mut delivered = 0;
    // Stopped right after the commit, and a little later each time.
    for wait in 0..24 {
        let worker = fixture.worker().poll(NEVER).unwrap().concurrency(3).unwrap().batch(5).unwrap();
        let worker = worker.shutdown_grace(Duration::from_secs(4));
        let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
        fixture.push(events.by_ref().take(10)).await;
        tokio::time::sleep(wait * MS / 2).await;
        let took = worker.stop().await;
        assert!(took < Duration::from_secs(3), "{took:?}");
        fixture.is_at_rest().await;
        delivered = fixture.count("outbox_delivered").await;
        assert_eq!(seen.len(), usize::try_from(delivered).unwrap());
    }
    assert!(delivered > 0);
    let worker = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    fixture.delivered(240).await;
    worker.stop().await;
    assert_eq!(seen.len(), 240);
    assert!(keys.iter().all(|key| seen.of(key) == (0..8).collect::<Vec<_>>()));
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 240]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_before_it_has_begun_leaves_everything() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let started = fixture.worker().handlers(subscription("s"), seen.handlers()).start().await.unwrap();
    fixture.push(each_noted(&["a", "b"], 2)).await;
    started.run_until(std::future::ready(())).await;
    fixture.is_at_rest().await;
    let delivered = fixture.count("outbox_delivered").await;
    assert_eq!(seen.len(), usize::try_from(delivered).unwrap());
    fixture.worker().handlers(subscription("s"), seen.handlers()).run_until(fixture.delivered(4)).await.unwrap();
    assert_eq!(seen.len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_under_way_is_rolled_back_when_the_grace_is_over() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let handlers = {
        let seen = seen.clone();
        Handlers::new().on_tx(move |event: Noted, effect| {
            seen.add(&event, effect.delivery());
            async move {
                sea_orm::ConnectionTrait::execute_unprepared(effect.tx(), "insert into effects values ('a', 0, 1)")
                    .await?;
                std::future::pending().await
            }
        })
    };
    let worker = fixture.worker().lease(Duration::from_secs(30)).unwrap().shutdown_grace(100 * MS);
    let worker = run(worker.handlers(subscription("s"), handlers)).await;
    fixture.push([noted("a", 0)]).await;
    eventually("it is at work", || async { seen.len() == 1 }).await;
    let took = worker.stop().await;
    assert!(took < 1100 * MS, "{took:?}");
    assert_eq!((fixture.count("effects").await, fixture.count("outbox_inbox").await), (0, 0));
    fixture.is_at_rest().await;
    assert_eq!(fixture.states("s").await, [(Pending, 0)]);
}

/// Two workers of one process: a deployment that replaces one with the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stops_takes_no_wake_up_from_its_successor() {
    let fixture = Fixture::new().await;
    let (old, new, gate) = (Seen::default(), Seen::default(), Arc::new(Semaphore::new(0)));
    let first = fixture.worker().poll(NEVER).unwrap().shutdown_grace(Duration::from_secs(60));
    let first = run(first.handlers(subscription("s"), gated(&old, &gate))).await;
    fixture.push([noted("a", 0)]).await;
    eventually("it is at work", || async { old.len() == 1 }).await;
    let stopping = tokio::spawn(first.stop());
    let second = run(fixture.worker().poll(NEVER).unwrap().handlers(subscription("s"), new.handlers())).await;
    eventually("the second worker runs", || async { fixture.count("outbox_workers").await == 2 }).await;
    for n in 0..10 {
        fixture.push([noted(&n.to_string(), 0)]).await;
        within(1000 * MS, "the delivery", || async { new.len() > n }).await;
    }
    assert!(!stopping.is_finished());
    gate.add_permits(1);
    stopping.await.unwrap();
    second.stop().await;
    assert_eq!((old.len(), new.len()), (1, 10));
}

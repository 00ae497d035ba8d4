use std::time::Duration;

use outbox_core::Ordering;
use outbox_seaorm::DeliveryState::Delivered;

use crate::fixture::{Counted, Fixture, MS, Noted, Seen, counted, noted, run, subscription, within, worker, working};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_the_work_and_repeat_nothing() {
    let fixture = Fixture::new().await;
    let other = fixture.another_process().await;
    let seen = [Seen::default(), Seen::default()];
    let mut workers = Vec::new();
    for (outbox, seen) in [&fixture.outbox, &other].into_iter().zip(&seen) {
        // Neither can hold more than ten of the keys at a time.
        let worker = worker(outbox).lease(10_000 * MS).unwrap().concurrency(3).unwrap().batch(1).unwrap();
        workers.push(run(worker.handlers(subscription("s"), working(seen, 3 * MS))).await);
    }
    for n in 0..20 {
        fixture.push((0..25).map(|key| noted(&key.to_string(), n))).await;
    }
    fixture.delivered(500).await;
    for worker in workers {
        worker.stop().await;
    }
    assert!(seen.iter().all(|seen| seen.len() > 0), "one did nothing");
    assert_eq!(seen.iter().map(Seen::len).sum::<usize>(), 500);
    let mut calls = [seen[0].calls(), seen[1].calls()].concat();
    calls.sort_by_key(|call| call.at);
    for key in 0..25 {
        let order: Vec<i64> = calls.iter().filter(|call| call.key == key.to_string()).map(|call| call.n).collect();
        assert_eq!(order, (0..20).collect::<Vec<_>>(), "{key}");
    }
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 500]);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_does_not_know_a_new_event_spends_no_attempt_and_another_delivers_it() {
    let fixture = Fixture::new().await;
    let (other, seen) = (fixture.another_process().await, Seen::default());
    let old = run(fixture.worker().handlers(subscription("s"), seen.handlers())).await;
    let counts = Seen::default();
    let new = {
        let counts = counts.clone();
        seen.handlers().on(move |event: Counted, delivery| {
            counts.add(&Noted { key: event.key, n: event.n }, &delivery);
            async { Ok(()) }
        })
    };
    let new = run(worker(&other).handlers(subscription("s"), new)).await;
    fixture.push((0..20).flat_map(|n| [noted(&format!("a{n}"), n), counted(&format!("b{n}"), n)])).await;
    // The first waits after an unknown event are at most a second.
    within(Duration::from_secs(40), "all are delivered", || async { fixture.count("outbox_delivered").await == 40 })
        .await;
    old.stop().await;
    new.stop().await;
    assert_eq!(counts.len(), 20);
    assert_eq!(fixture.states("s").await, [(Delivered, 1); 40]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_global_order_is_exact_whoever_leads_and_dies() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let start = async || {
        let outbox = fixture.another_process().await;
        let worker = worker(&outbox).lease(300 * MS).unwrap().poll(50 * MS).unwrap();
        run(worker.handlers(subscription("s").ordering(Ordering::Global), working(&seen, MS))).await
    };
    let mut workers = vec![start().await, start().await, start().await];
    for n in 0..60 {
        fixture.push((0..5).map(|key| noted(&key.to_string(), n * 5 + key))).await;
    }
    for _ in 0..3 {
        let before = seen.len();
        // The leader is one of them: kill them all but the last, in turn.
        workers.remove(0).drop_future().await;
        workers.push(start().await);
        within(Duration::from_secs(5), "another leads", || async { seen.len() > before || seen.len() >= 300 }).await;
    }
    fixture.delivered(300).await;
    for worker in workers {
        worker.stop().await;
    }
    let mut first: Vec<i64> = Vec::new();
    for call in seen.calls() {
        if !first.contains(&call.n) {
            first.push(call.n);
        }
    }
    assert_eq!(first, (0..300).collect::<Vec<_>>());
    fixture.is_at_rest().await;
}

use outbox_seaorm::DeliveryState::Delivered;

use crate::fixture::{Fixture, MS, Seen, noted, run, subscription, worker, working};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_the_work_and_repeat_nothing() {
    let fixture = Fixture::new().await;
    let other = fixture.another_process().await;
    let seen = [Seen::default(), Seen::default()];
    let mut workers = Vec::new();
    for (outbox, seen) in [&fixture.outbox, &other].into_iter().zip(&seen) {
        // Neither can hold more than six of the keys at a time.
        let worker = worker(outbox).lease(10_000 * MS).unwrap().concurrency(3).unwrap();
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

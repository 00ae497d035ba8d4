//! What an operator stops, stops: only attempts under way go on.

use outbox_seaorm::DeliveryState::Delivered;

use crate::fixture::{Fixture, MS, Seen, each_noted, eventually, run, subscription, within, working};

/// Twenty at a time are at work, of forty keys with ten deliveries each.
async fn busy(fixture: &Fixture, seen: &Seen) -> crate::fixture::Running {
    let worker = fixture.worker().concurrency(20).unwrap().batch(10).unwrap();
    let worker = run(worker.handlers(subscription("s"), working(seen, 20 * MS))).await;
    let keys: Vec<String> = (0..40).map(|key| key.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    fixture.push(each_noted(&keys, 10)).await;
    eventually("many are delivered", || async { seen.len() > 60 }).await;
    worker
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_gives_leased_runs_back_at_once_and_nothing_is_lost() {
    for from_elsewhere in [false, true] {
        let fixture = Fixture::new().await;
        let seen = Seen::default();
        let worker = busy(&fixture, &seen).await;
        let outbox = if from_elsewhere { fixture.another_process().await } else { fixture.outbox.clone() };
        outbox.pause("s").await.unwrap();
        let begun = seen.len();
        // On SQLite a worker hears of another process when it looks.
        let most = if from_elsewhere { 60 } else { 5 } * 20;
        within(3000 * MS, "the end", || async { fixture.count("outbox_lanes where leased_by is not null").await == 0 })
            .await;
        let after = seen.len() - begun;
        assert!(after <= most, "{after} began after the pause");
        let at_rest = seen.len();
        tokio::time::sleep(300 * MS).await;
        assert_eq!(seen.len(), at_rest);
        fixture.outbox.resume("s").await.unwrap();
        fixture.delivered(400).await;
        assert_eq!(fixture.states("s").await, [(Delivered, 1); 400], "no attempt was spent");
        assert_eq!(seen.len(), 400);
        worker.stop().await;
        fixture.is_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_subscription_ends_with_the_attempts_under_way() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = busy(&fixture, &seen).await;
    fixture.outbox.remove("s").await.unwrap();
    let begun = seen.len();
    tokio::time::sleep(300 * MS).await;
    let after = seen.len() - begun;
    assert!(after <= 60, "{after} began after the removal");
    worker.stop().await;
}

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use outbox_seaorm::Outbox;
use sea_orm::DatabaseConnection;

use crate::fixture::{Fixture, MS, Seen, each_noted, eventually, hanging, noted, push, run, subscription};

/// A connection that counts statements.
async fn counting(fixture: &Fixture, statements: &Arc<AtomicUsize>) -> DatabaseConnection {
    let mut db = fixture.impatient_connection().await;
    let statements = statements.clone();
    db.set_metric_callback(move |_| {
        statements.fetch_add(1, SeqCst);
    });
    db
}

async fn counted_outbox(fixture: &Fixture) -> (Outbox, Arc<AtomicUsize>) {
    let statements = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox::with_connections(counting(fixture, &statements).await, counting(fixture, &statements).await);
    (outbox, statements)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_looks_a_handful_of_times() {
    let fixture = Fixture::new().await;
    let (outbox, statements) = counted_outbox(&fixture).await;
    let seen = Seen::default();
    let worker = crate::fixture::worker(&outbox).lease(Duration::from_secs(30)).unwrap().poll(500 * MS).unwrap();
    let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
    push(&outbox, [noted("a", 0), noted("b", 0).delay(Duration::from_secs(60))]).await;
    fixture.delivered(1).await;
    statements.store(0, SeqCst);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let counted = statements.load(SeqCst);
    // At most 7 looks of two reads each, and a heartbeat.
    assert!((4..=20).contains(&counted), "{counted} statements");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_full_claims_nothing() {
    let fixture = Fixture::new().await;
    let (outbox, statements) = counted_outbox(&fixture).await;
    let seen = Seen::default();
    let worker = crate::fixture::worker(&outbox).lease(Duration::from_secs(30)).unwrap().shutdown_grace(MS);
    let worker = worker.poll(500 * MS).unwrap();
    let worker = run(worker.concurrency(2).unwrap().handlers(subscription("s"), hanging(&seen))).await;
    push(&outbox, each_noted(&["a", "b", "c", "d", "e"], 1)).await;
    eventually("it is full", || async { fixture.count("outbox_lanes where leased_by is not null").await == 4 }).await;
    tokio::time::sleep(100 * MS).await;
    statements.store(0, SeqCst);
    push(&outbox, [noted("f", 0)]).await;
    let commit = statements.load(SeqCst);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Whether something waits to be routed is asked all the same: less and less often, up to twice a second.
    let counted = statements.load(SeqCst) - commit;
    assert!(counted <= 8, "{counted} statements");
    worker.stop().await;
}

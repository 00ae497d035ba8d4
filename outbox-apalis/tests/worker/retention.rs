use std::time::Duration;

use outbox_seaorm::Retention;

use crate::fixture::{Fixture, Seen, eventually, noted, run, subscription};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_takes_away_what_is_delivered_and_old() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().retention(Retention::default().keep(Duration::ZERO));
    let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
    fixture.push((0..5).map(|n| noted("a", n))).await;
    eventually("the deliveries", || async { seen.len() == 5 }).await;
    eventually("the purge", || async {
        fixture.outbox.events(&Default::default(), None, 1).await.unwrap().events.is_empty()
    })
    .await;
    worker.stop().await;
}

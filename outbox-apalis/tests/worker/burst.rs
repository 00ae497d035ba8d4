use std::time::Instant;

use crate::fixture::{Fixture, Seen, noted, run, subscription};

/// Prints how long it takes; asserts only that everything comes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_events_at_once() {
    for (name, keys) in [("2,000 keys", 2000), ("20 keys", 20)] {
        let fixture = Fixture::new().await;
        let seen = Seen::default();
        let worker = fixture.worker().lease(std::time::Duration::from_secs(10)).unwrap();
        let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
        let begun = Instant::now();
        fixture.push((0..2000).map(|n| noted(&(n % keys).to_string(), n))).await;
        let committed = begun.elapsed();
        fixture.delivered(2000).await;
        let took = begun.elapsed() - committed;
        println!("{name}: committed in {committed:?}, delivered in {took:?}, {:.0}/s", 2000.0 / took.as_secs_f64());
        worker.stop().await;
        assert_eq!(seen.len(), 2000);
        fixture.is_at_rest().await;
    }
}

//! Destinations that are slow, endless or mad, beside one that is well.

use std::time::Duration;

use outbox_apalis::WebhookPublisher;
use outbox_test_servers::{Destination, Manner};

use crate::fixture::{Fixture, MS, noted, policy, run, subscription, within};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const CONCURRENCY: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destinations_that_misbehave_take_nothing_from_one_that_does_not() {
    let fixture = Fixture::new().await;
    let manners = [Manner::Silent, Manner::Dripping, Manner::Endless, Manner::Circular, Manner::Good];
    let mut worker = fixture.worker().concurrency(CONCURRENCY).unwrap();
    let mut destinations = Vec::new();
    for manner in manners {
        let destination = Destination::start(manner).await;
        let publisher =
            WebhookPublisher::new(&destination.url, SECRET).unwrap().allow_loopback().timeout(300 * MS).unwrap();
        let name = format!("{manner:?}").to_lowercase();
        worker = worker.publisher(subscription(&name).retry(policy(3)), publisher);
        destinations.push(destination);
    }
    let worker = run(worker).await;
    fixture.push((0..200).map(|n| noted(&n.to_string(), n))).await;
    let good = "outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id where s.name = 'good'";
    within(Duration::from_secs(20), "the good one has all", || async { fixture.count(good).await == 200 }).await;
    // The others are still at it, or have been told to wait; a redirect is a failure for good.
    let waiting: Vec<(String, i64)> = fixture
        .rows("select s.name, count(*) from outbox_deliveries d join outbox_subscriptions s on s.id = d.subscription_id group by 1")
        .await
        .iter()
        .map(|row| (row.try_get_by_index(0).unwrap(), row.try_get_by_index(1).unwrap()))
        .collect();
    assert!(waiting.iter().any(|(name, left)| name == "silent" && *left > 100), "{waiting:?}");
    assert!(waiting.iter().any(|(name, left)| name == "dripping" && *left > 100), "{waiting:?}");
    for destination in destinations {
        assert!(destination.most_open() <= 2 * CONCURRENCY, "{destination:?}");
    }
    worker.stop().await;
    assert_eq!(fixture.count("outbox_lanes where leased_by is not null").await, 0);
}

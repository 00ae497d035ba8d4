//! Destinations that are down, gone or slow as a whole.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use outbox_apalis::Handlers;
use outbox_core::{Delivery, DeliveryError, Publisher};
use outbox_seaorm::DeliveryState::{Delivered, Pending};

use crate::fixture::{Fixture, MS, Noted, eventually, noted, run, subscription};

type Answer = Result<(), DeliveryError>;

/// Answers as it is told, and remembers the keys and the times of its calls.
#[derive(Clone)]
struct Destination {
    answer: Arc<Mutex<Box<dyn Fn(&Delivery) -> Answer + Send>>>,
    calls: Arc<Mutex<Vec<(String, u32, Instant)>>>,
}

impl Destination {
    fn new(answer: impl Fn(&Delivery) -> Answer + Send + 'static) -> Self {
        Self { answer: Arc::new(Mutex::new(Box::new(answer))), calls: Arc::default() }
    }

    fn now(&self, answer: impl Fn(&Delivery) -> Answer + Send + 'static) {
        *self.answer.lock().unwrap() = Box::new(answer);
    }

    fn calls(&self) -> Vec<(String, u32, Instant)> {
        self.calls.lock().unwrap().clone()
    }
}

impl Publisher for Destination {
    async fn publish(&self, delivery: &Delivery) -> Answer {
        let key = delivery.event().aggregate_id.clone();
        self.calls.lock().unwrap().push((key, delivery.attempt(), Instant::now()));
        let answer = (self.answer.lock().unwrap())(delivery);
        tokio::time::sleep(2 * MS).await;
        answer
    }
}

async fn push_keys(fixture: &Fixture, keys: i64) {
    fixture.push((0..keys).map(|n| noted(&n.to_string(), n))).await;
}

async fn circuit_is_open(fixture: &Fixture) -> bool {
    fixture.count("outbox_subscriptions where circuit_until is not null").await == 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_cannot_be_reached_costs_no_attempts_and_is_only_probed() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::unreachable("refused")));
    let worker = fixture.worker().concurrency(4).unwrap();
    // Attempts after 5 to 10 ms: without the circuit 300 deliveries would be tried at once, again and again.
    let worker = run(worker.publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 300).await;
    eventually("the circuit opens", || circuit_is_open(&fixture)).await;
    tokio::time::sleep(300 * MS).await;
    let calls = destination.calls();
    assert!(calls.iter().all(|(_, attempt, _)| *attempt == 1), "no attempt is spent");
    // What was under way when it was found down, then one at a time.
    assert!((2..=4 + 300 / 5 + 1).contains(&calls.len()), "{}", calls.len());
    destination.now(|_| Ok(()));
    fixture.delivered(300).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1)].repeat(300));
    assert!(!circuit_is_open(&fixture).await);
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_in_trouble_counts_as_down_when_five_keys_fail_in_a_row() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::unavailable("503")));
    let worker = fixture.worker().concurrency(4).unwrap();
    let worker = run(worker.publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 300).await;
    eventually("the circuit opens", || circuit_is_open(&fixture)).await;
    tokio::time::sleep(300 * MS).await;
    let spent = destination.calls().iter().filter(|(_, attempt, _)| *attempt > 1).count();
    assert!(spent <= 30, "{spent} of {}", destination.calls().len());
    assert_eq!(fixture.count("outbox_dead_letters").await, 0);
    destination.now(|_| Ok(()));
    fixture.delivered(300).await;
    worker.stop().await;
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_event_that_a_healthy_destination_never_takes_becomes_a_dead_letter() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|delivery| match delivery.event().aggregate_id.as_str() {
        "7" => Err(DeliveryError::unavailable("503")),
        _ => Ok(()),
    });
    let worker = run(fixture.worker().publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 20).await;
    fixture.dead(1).await;
    fixture.delivered(19).await;
    worker.stop().await;
    assert!(!circuit_is_open(&fixture).await);
}

/// While it is deployed, or its credentials have expired: whatever it answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_refuses_everything_costs_no_event() {
    for refused in [DeliveryError::retry, DeliveryError::permanent] {
        let fixture = Fixture::new().await;
        let destination = Destination::new(move |_| Err(refused("no")));
        let worker = fixture.worker().concurrency(4).unwrap();
        let worker = run(worker.publisher(subscription("s"), destination.clone())).await;
        push_keys(&fixture, 100).await;
        eventually("it is probed", || async {
            fixture.count("outbox_subscriptions where circuit_failures > 20").await == 1
        })
        .await;
        assert_eq!(fixture.count("outbox_dead_letters").await, 0);
        let calls = destination.calls().len();
        let probes: i32 = fixture.value("select circuit_failures from outbox_subscriptions").await;
        // Four keys, and what is under way; then one at a time.
        assert!(calls <= 4 + 4 + probes as usize + 1, "{calls} calls, {probes} times found down");
        destination.now(|_| Ok(()));
        fixture.delivered(100).await;
        worker.stop().await;
        fixture.is_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_event_that_is_refused_for_good_dies_at_its_second_attempt() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|delivery| match delivery.event().aggregate_id.as_str() {
        "7" => Err(DeliveryError::permanent("malformed")),
        _ => Ok(()),
    });
    let slow = outbox_core::RetryPolicy::default().backoff(100 * MS, 100 * MS).unwrap();
    let worker = fixture.worker().concurrency(1).unwrap().publisher(subscription("s").retry(slow), destination.clone());
    let worker = run(worker).await;
    push_keys(&fixture, 20).await;
    fixture.dead(1).await;
    fixture.delivered(19).await;
    worker.stop().await;
    assert!(!circuit_is_open(&fixture).await);
    assert_eq!(fixture.column::<i32>("select attempts from outbox_dead_letters").await, [2]);
    assert_eq!(fixture.column::<String>("select error from outbox_dead_letters").await, ["malformed"]);
}

/// Nothing tells whether it is the event or the destination.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_key_that_is_refused_has_all_its_attempts() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::permanent("404")));
    let worker = run(fixture.worker().publisher(subscription("s"), destination.clone())).await;
    fixture.push([noted("a", 0), noted("a", 1)]).await;
    fixture.dead(2).await;
    worker.stop().await;
    assert_eq!(fixture.column::<i32>("select attempts from outbox_dead_letters order by position").await, [5, 5]);
    assert!(!circuit_is_open(&fixture).await);
}

/// This process has run out of something.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_that_cannot_begin_are_given_back() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::not_begun("no file descriptors")));
    let worker = run(fixture.worker().publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 20).await;
    eventually("each is tried often", || async { destination.calls().len() > 200 }).await;
    assert!(destination.calls().iter().all(|(_, attempt, _)| *attempt == 1), "no attempt is spent");
    assert!(!circuit_is_open(&fixture).await);
    destination.now(|_| Ok(()));
    fixture.delivered(20).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1)].repeat(20));
}

/// A publisher may know better than the default of all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_without_a_policy_has_that_of_its_publisher() {
    struct Once;
    impl Publisher for Once {
        async fn publish(&self, _: &Delivery) -> Answer {
            Err(DeliveryError::retry("no"))
        }

        fn retry_policy(&self) -> outbox_core::RetryPolicy {
            outbox_core::RetryPolicy::default().max_attempts(1).unwrap()
        }
    }
    let fixture = Fixture::new().await;
    let subscription = outbox_core::Subscription::new("s").unwrap();
    let worker = run(fixture.worker().publisher(subscription, Once)).await;
    push_keys(&fixture, 1).await;
    fixture.dead(1).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_outage_the_load_begins_with_one_delivery() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::unreachable("refused")));
    let worker = fixture.worker().concurrency(50).unwrap();
    let worker = run(worker.publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 200).await;
    eventually("the circuit opens", || circuit_is_open(&fixture)).await;
    let under_way = Arc::new(Mutex::new(Vec::new()));
    let back = under_way.clone();
    destination.now(move |_| {
        back.lock().unwrap().push(Instant::now());
        Ok(())
    });
    fixture.delivered(200).await;
    worker.stop().await;
    let times = under_way.lock().unwrap().clone();
    // Each takes 2 ms: the second waits for the end of the first, the fourth for the end of the second.
    assert!(times[1] - times[0] >= 2 * MS && times[3] - times[1] >= 2 * MS, "{:?}", &times[..4]);
}

/// A handler that calls something else knows as much about it as a publisher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_may_find_its_destination_down_and_has_its_whole_concurrency_afterwards() {
    let fixture = Fixture::new().await;
    let (down, under_way, most) =
        (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let handlers = {
        let (down, most) = (down.clone(), most.clone());
        Handlers::new().on(move |_: Noted, _| {
            let (down, under_way, most) = (down.clone(), under_way.clone(), most.clone());
            async move {
                if down.load(SeqCst) {
                    return Err(DeliveryError::unreachable("refused"));
                }
                most.fetch_max(under_way.fetch_add(1, SeqCst) + 1, SeqCst);
                tokio::time::sleep(2 * MS).await;
                under_way.fetch_sub(1, SeqCst);
                Ok(())
            }
        })
    };
    let worker = run(fixture.worker().concurrency(4).unwrap().handlers(subscription("s"), handlers)).await;
    push_keys(&fixture, 100).await;
    eventually("the circuit opens", || circuit_is_open(&fixture)).await;
    down.store(false, SeqCst);
    fixture.delivered(100).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Delivered, 1)].repeat(100));
    assert_eq!(most.load(SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_holds_for_every_process() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::unreachable("refused")));
    let slow = outbox_core::RetryPolicy::default().backoff(Duration::from_secs(30), Duration::from_secs(30)).unwrap();
    let subscription = || subscription("s").retry(slow);
    let worker = run(fixture.worker().concurrency(1).unwrap().publisher(subscription(), destination.clone())).await;
    push_keys(&fixture, 100).await;
    eventually("the circuit opens", || circuit_is_open(&fixture)).await;
    worker.stop().await;
    let calls = destination.calls().len();
    let other = crate::fixture::worker(&fixture.another_process().await);
    let other = run(other.publisher(subscription(), destination.clone())).await;
    tokio::time::sleep(200 * MS).await;
    other.stop().await;
    assert_eq!(destination.calls().len(), calls);
    assert!(fixture.states("s").await.iter().all(|state| *state == (Pending, 0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_is_gone_pauses_its_subscription_and_keeps_the_events() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Err(DeliveryError::gone("410")));
    let worker = run(fixture.worker().concurrency(1).unwrap().publisher(subscription("s"), destination.clone())).await;
    push_keys(&fixture, 5).await;
    let paused = "outbox_subscriptions where paused_at is not null";
    eventually("the pause", || async { fixture.count(paused).await == 1 }).await;
    worker.stop().await;
    assert_eq!(fixture.states("s").await, [(Pending, 0)].repeat(5));
    fixture.outbox.resume("s").await.unwrap();
    destination.now(|_| Ok(()));
    let worker = run(fixture.worker().publisher(subscription("s"), destination)).await;
    fixture.delivered(5).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_keeps_its_rate_and_its_concurrency() {
    let fixture = Fixture::new().await;
    let destination = Destination::new(|_| Ok(()));
    let subscription = subscription("s").rate(100.0).unwrap().concurrency(1).unwrap();
    let worker = run(fixture.worker().publisher(subscription, destination.clone())).await;
    push_keys(&fixture, 20).await;
    fixture.delivered(20).await;
    worker.stop().await;
    let times: Vec<Instant> = destination.calls().iter().map(|(_, _, at)| *at).collect();
    assert!(times[19] - times[0] >= 180 * MS, "{:?}", times[19] - times[0]);
}

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use outbox_apalis::Handlers;
use outbox_core::{Delivery, DeliveryError, Event, NewEvent, Publisher, StartPosition};
use outbox_seaorm::DeliveryState;
use sea_orm::ConnectionTrait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::fixture::{Fixture, MS, NEVER, Noted, Seen, eventually, noted, push, run, subscription, within, worker};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_this_process_is_delivered_at_once_although_the_next_poll_is_far_away() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = fixture.worker().poll(Duration::from_secs(60)).unwrap();
    let worker = run(worker.handlers(subscription("s"), seen.handlers())).await;
    let mut waits = Vec::new();
    for n in 0..5 {
        fixture.push([noted("a", n)]).await;
        let committed = Instant::now();
        eventually("the delivery", || async { seen.len() > waits.len() }).await;
        waits.push(committed.elapsed());
        fixture.delivered(n + 1).await;
    }
    assert!(waits.iter().min() < Some(&(100 * MS)), "{waits:?}");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_commit_while_the_worker_looks_is_not_overlooked() {
    let fixture = Fixture::new().await;
    let (outbox, seen) = (fixture.slowly_reading_outbox().await, Seen::default());
    let worker = run(worker(&outbox).poll(NEVER).unwrap().handlers(subscription("s"), seen.handlers())).await;
    for n in 0..30 {
        push(&outbox, [noted(&n.to_string(), 0)]).await;
        within(Duration::from_secs(2), "the delivery", || async { seen.len() > n }).await;
        // The look after the acknowledgement is under way, or will be, or has been.
        tokio::time::sleep(fastrand::u32(..50) * MS).await;
    }
    worker.stop().await;
    fixture.is_at_rest().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_another_process_is_delivered_by_the_poll() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = run(fixture.worker().poll(100 * MS).unwrap().handlers(subscription("s"), seen.handlers())).await;
    let other = fixture.another_process().await;
    for n in 0..3 {
        push(&other, [noted("a", n)]).await;
        within(1000 * MS, "the delivery", || async { seen.of("a") == (0..=n).collect::<Vec<_>>() }).await;
    }
    worker.stop().await;
}

#[derive(Clone, Default)]
struct Published(Arc<Mutex<Vec<(Uuid, String)>>>);

impl Publisher for Published {
    async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
        let event = delivery.event();
        self.0.lock().unwrap().push((event.id, event.payload.clone()));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_a_transactional_handler_and_a_publisher_each_deliver() {
    let fixture = Fixture::new().await;
    let (seen, published) = (Seen::default(), Published::default());
    let worker = fixture
        .worker()
        .handlers(subscription("plain"), seen.handlers())
        .handlers(
            subscription("transactional"),
            Handlers::new().on_tx(|event: Noted, effect| async move {
                let sql = format!("insert into effects values ('{}', {}, 1)", event.key, event.n);
                effect.tx().execute_unprepared(&sql).await?;
                Ok(())
            }),
        )
        .publisher(subscription("publisher"), published.clone());
    let worker = run(worker).await;
    let event = noted("a", 7);
    let id = event.id();
    fixture.push([event]).await;
    fixture.delivered(3).await;
    worker.stop().await;

    assert_eq!(seen.of("a"), [7]);
    assert_eq!(fixture.column::<i64>("select n from effects").await, [7]);
    assert_eq!(*published.0.lock().unwrap(), [(id, r#"{"key":"a","n":7}"#.to_owned())]);
    for name in ["plain", "transactional", "publisher"] {
        let delivery = fixture.outbox.delivery(name, id).await.unwrap().unwrap();
        assert_eq!((delivery.state, delivery.attempts, delivery.error), (DeliveryState::Delivered, 1, None), "{name}");
    }
    fixture.is_at_rest().await;
    assert_eq!(fixture.count("outbox_lanes").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_between_start_and_run_is_delivered() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let started = fixture.worker().handlers(subscription("s"), seen.handlers()).start().await.unwrap();
    fixture.push([noted("a", 1)]).await;
    assert_eq!(seen.len(), 0);
    let delivered = fixture.delivered(1);
    started.run_until(delivered).await;
    assert_eq!(seen.of("a"), [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_from_the_beginning_gets_what_was_there_before_it() {
    let fixture = Fixture::new().await;
    fixture.push([noted("a", 1), noted("a", 2)]).await;
    let seen = Seen::default();
    let (late, subscription) = (Seen::default(), subscription("early").start(StartPosition::Beginning));
    let worker = fixture.worker().handlers(subscription, seen.handlers());
    let worker = run(worker.handlers(crate::fixture::subscription("late"), late.handlers())).await;
    fixture.delivered(2).await;
    worker.stop().await;
    assert_eq!((seen.of("a"), late.of("a")), (vec![1, 2], vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_event_is_not_delivered_early_and_holds_back_what_comes_after_it() {
    let fixture = Fixture::new().await;
    let seen = Seen::default();
    let worker = run(fixture.worker().poll(NEVER).unwrap().handlers(subscription("s"), seen.handlers())).await;
    let pushed = Instant::now();
    fixture.push([noted("a", 1), noted("a", 2).delay(300 * MS), noted("a", 3), noted("b", 1)]).await;
    eventually("what is due", || async { seen.len() == 2 }).await;
    assert_eq!((seen.of("a"), seen.of("b")), (vec![1], vec![1]));
    fixture.delivered(4).await;
    assert_eq!(seen.of("a"), [1, 2, 3]);
    assert!(seen.calls()[2].at - pushed >= 300 * MS);
    worker.stop().await;
}

/// `note.noted` with a number that counts in tens.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct NotedInTens {
    key: String,
    tens: i64,
}

impl Event for NotedInTens {
    const TYPE: &'static str = Noted::TYPE;
    const AGGREGATE_TYPE: &'static str = Noted::AGGREGATE_TYPE;
    const SCHEMA_VERSION: i32 = 3;

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_old_versions_are_lifted_step_by_step() {
    let fixture = Fixture::new().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let lifting = |lifts: bool| {
        let seen = seen.clone();
        let handlers = Handlers::new().on(move |event: NotedInTens, delivery| {
            seen.lock().unwrap().push((event.tens, delivery.event().schema_version));
            async { Ok(()) }
        });
        let handlers = handlers.upcast::<NotedInTens>(2, |mut payload| {
            payload["tens"] = payload["hundreds"].as_i64().map(|hundreds| hundreds * 10).into();
            Ok(payload)
        });
        if !lifts {
            return handlers;
        }
        handlers.upcast::<NotedInTens>(1, |mut payload| {
            let n = payload["n"].as_i64().filter(|n| *n >= 0).ok_or(DeliveryError::retry("negative"))?;
            payload["hundreds"] = (n / 100).into();
            Ok(payload)
        })
    };
    let worker = |lifts| fixture.worker().handlers(subscription("s"), lifting(lifts));
    worker(true).drain().await.unwrap();
    fixture.push([noted("a", 700), noted("b", -1)]).await;
    fixture.push([NewEvent::of(&NotedInTens { key: "c".to_owned(), tens: 4 }).unwrap()]).await;
    let done = worker(true).drain().await.unwrap();
    assert_eq!((done.delivered, done.dead), (2, 1));
    let mut lifted = seen.lock().unwrap().clone();
    lifted.sort_unstable();
    assert_eq!(lifted, [(4, 3), (70, 3)]);
    let error: String = fixture.value("select error from outbox_dead_letters").await;
    assert_eq!(error, "note.noted version 1 cannot be lifted: negative");
    // Without the first step the version is unknown: another worker may know it.
    fixture.push([noted("d", 100)]).await;
    assert_eq!(worker(false).drain().await.unwrap().dead, 0);
    assert_eq!(fixture.states("s").await[3], (DeliveryState::Pending, 0));
}

//! A worker without a database.

use std::{sync::Arc, time::Duration};

use outbox_apalis::{Handlers, Redis, StartError, Worker};
use outbox_core::{Context, DeliveryError, Events, Limits, NewEvent, testing::MemoryStore};

use crate::fixture::{MS, Noted, Seen, each_noted, eventually, noted, policy, subscription};

fn commit(store: &MemoryStore, events: impl IntoIterator<Item = NewEvent>) {
    let collector = Events::new(Limits::default(), Context::default());
    events.into_iter().for_each(|event| {
        collector.push(event).unwrap();
    });
    store.commit(&collector);
}

fn worker(store: &MemoryStore) -> Worker {
    Worker::with_store(store.clone()).lease(Duration::from_secs(2)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_are_tested_without_a_database() {
    let store = MemoryStore::new();
    let seen = Seen::default();
    let handlers = seen.answering(|event, _| match event.n {
        1 => Err(DeliveryError::permanent("no")),
        _ => Ok(()),
    });
    store.register(&subscription("s"));
    commit(&store, each_noted(&["a", "b", "c"], 3));
    let done = worker(&store).handlers(subscription("s").retry(policy(3)), handlers).drain().await.unwrap();
    assert_eq!((done.delivered, done.dead, store.waiting("s")), (6, 3, 0));
    for key in ["a", "b", "c"] {
        assert_eq!(seen.of(key), [0, 1, 2]);
    }
    let dead = store.finished("s").into_iter().filter(|(_, each)| each.error.is_some()).count();
    assert_eq!((dead, store.finished("s").len()), (3, 9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_woken_by_a_commit_and_stopped_by_a_pause() {
    let store = MemoryStore::new();
    let seen = Seen::default();
    let started = worker(&store).handlers(subscription("s"), seen.handlers()).start().await.unwrap();
    let stop = Arc::new(tokio::sync::Notify::new());
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { started.run_until(stop.notified()).await }
    });
    commit(&store, [noted("a", 0)]);
    eventually("the first", || async { seen.len() == 1 }).await;
    // It polls every five seconds.
    let begun = std::time::Instant::now();
    commit(&store, [noted("a", 1)]);
    eventually("the second", || async { seen.len() == 2 }).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    store.pause("s");
    commit(&store, [noted("a", 2)]);
    tokio::time::sleep(100 * MS).await;
    assert_eq!((seen.len(), store.waiting("s")), (2, 1));
    store.resume("s");
    eventually("the third", || async { seen.len() == 3 }).await;
    stop.notify_one();
    running.await.unwrap();
    assert_eq!(store.waiting("s"), 0);
}

#[tokio::test]
async fn what_needs_a_database_is_refused_without_one() {
    let store = MemoryStore::new();
    let transactional = Handlers::new().on_tx(|_: Noted, _| async { Ok(()) });
    let error = worker(&store).handlers(subscription("s"), transactional).start().await.unwrap_err();
    assert!(matches!(error, StartError::NeedsDatabase(_)), "{error}");
    assert_eq!(error.to_string(), "a transactional handler needs a database; build the worker with `Worker::new`");
    let redis = Redis::new("redis://127.0.0.1:1/0").unwrap();
    let relayed = worker(&store).redis(redis).handlers(subscription("s"), Seen::default().handlers());
    assert!(matches!(relayed.start().await.unwrap_err(), StartError::NeedsDatabase("Redis")));
}

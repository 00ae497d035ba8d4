use std::collections::HashMap;

use outbox_core::{Ordering, StartPosition, Subscription};
use outbox_seaorm::{Next, Outbox, Settled};

use super::{
    database,
    fixture::{LONG, Store, delivered, poll_once, record, runs, todo},
};

fn from_the_beginning(name: &str) -> Subscription {
    Subscription::new(name).unwrap().start(StartPosition::Beginning)
}

async fn generation(store: &Store) -> i64 {
    store.value("select routing_generation from outbox_meta").await
}

/// Delivers everything and checks that each of the events was there once, and each key in its order.
async fn delivers_once_in_order(store: &Store, subscription: i32, events: i64) {
    let positions = store.deliver_all(subscription).await;
    let keys: HashMap<i64, String> = store
        .rows("select position, aggregate_id from outbox_events")
        .await
        .iter()
        .map(|row| (row.try_get("", "position").unwrap(), row.try_get("", "aggregate_id").unwrap()))
        .collect();
    let mut last = HashMap::new();
    for position in &positions {
        let before = last.insert(&keys[position], *position);
        assert!(before < Some(*position), "{position} came after {before:?}");
    }
    assert_eq!(store.count(&format!("outbox_delivered where subscription_id = {subscription}")).await, events);
    assert_eq!(store.count(&format!("outbox_deliveries where subscription_id = {subscription}")).await, 0);
}

#[tokio::test]
async fn a_registration_that_was_cut_off_is_continued_by_the_next() {
    let store = Store::new().await;
    store.record((0..1200).map(|n| todo(&(n % 7).to_string()))).await;
    for cut_off_at in [1, 501, 1001, 1201] {
        let subscription = from_the_beginning(&format!("cut-off-at-{cut_off_at}"));
        let progress = format!("select backfill_from from outbox_subscriptions where name = '{}'", subscription.name());
        let mut registration = Box::pin(store.outbox.register(&subscription));
        // On a busy machine several answers may be there at one poll, even the last one.
        while store.column::<Option<i64>>(&progress).await.iter().all(|from| *from < Some(cut_off_at)) {
            if poll_once(&mut registration).await.is_ready() {
                break;
            }
        }
        drop(registration);
        store.execute("select 1").await;
        store.quiet().await;
        let id: i32 = store.value(&progress.replace("backfill_from", "id")).await;
        // The last batch may have been on its way.
        if store.value::<Option<i64>>(&progress).await.is_some() {
            assert!(store.claim(id).await.is_empty());
        }
        assert_eq!(store.register(subscription).await, id);
        assert_eq!(store.count(&format!("outbox_deliveries where subscription_id = {id}")).await, 1200);
        assert_eq!(store.claim(id).await.len(), 7);
    }
    store.is_whole().await;
}

#[tokio::test]
async fn nothing_is_claimed_before_the_backfill_is_complete() {
    let store = Store::new().await;
    let id = store.register(from_the_beginning("s")).await;
    store.record_todos(&["a", "b"]).await;
    // As a process that was killed leaves it.
    store.execute("update outbox_subscriptions set backfill_from = 1").await;
    assert!(store.claim(id).await.is_empty());
    assert_eq!(store.next_due(id).await, None);
    assert_eq!(store.register(from_the_beginning("s")).await, id);
    assert_eq!(store.claim(id).await.len(), 2);
    store.is_whole().await;
}

#[tokio::test]
async fn a_backfill_leaves_alone_what_is_there_already() {
    let store = Store::new().await;
    store.record_todos(&["old", "a", "b"]).await;
    let id = store.register(from_the_beginning("s")).await;
    let lanes = store.claim(id).await;
    assert_eq!(runs(&lanes).len(), 3);
    let mut dead = delivered(&lanes[1], 1, Next::Yield);
    dead.finished[0].error = Some("dead".to_owned());
    store.outbox.settle(&[delivered(&lanes[0], 1, Next::Yield), dead]).await.unwrap();
    store.record_todos(&["a", "new"]).await;
    store.execute("update outbox_subscriptions set backfill_from = 1").await;
    store.register(from_the_beginning("s").ordering(Ordering::Global)).await;
    assert_eq!(store.count("outbox_delivered").await, 1);
    assert_eq!(store.count("outbox_dead_letters").await, 1);
    assert_eq!(store.column::<i64>("select position from outbox_deliveries order by position").await, [3, 4, 5]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_old_event_does_not_wait_for_a_newer_one_that_is_delayed() {
    let store = Store::new().await;
    store.record_todos(&["a"]).await;
    let id = store.subscribe("s").await;
    // A commit between registration and backfill.
    store.record([todo("a").delay(LONG)]).await;
    store.execute("update outbox_subscriptions set backfill_from = 1").await;
    store.subscribe("s").await;
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![1])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_registration_that_fails_names_the_subscription() {
    let store = Store::new().await;
    store.execute("drop table outbox_subscriptions").await;
    let error = store.outbox.register(&Subscription::new("billing").unwrap()).await.unwrap_err();
    assert_eq!(error.to_string(), "the subscription \"billing\" could not be registered");
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn a_subscription_begins_with_the_next_commit_from_a_time_or_at_the_beginning() {
    let store = Store::new().await;
    store.record_todos(&["1", "2", "3", "4"]).await;
    let recorded_at = database::time("'2026-01-01T00:00:0' || aggregate_id || '.000Z'");
    store.execute(&format!("update outbox_events set recorded_at = {recorded_at}")).await;
    let start = async |name: &str, position| store.register(Subscription::new(name).unwrap().start(position)).await;
    let since = |at: &str| StartPosition::Since(at.parse().unwrap());
    let now = start("now", StartPosition::Now).await;
    let beginning = start("beginning", StartPosition::Beginning).await;
    let exact = start("exact", since("2026-01-01T00:00:03.000Z")).await;
    let between = start("between", since("2026-01-01T00:00:02.001Z")).await;
    let zone = start("zone", since("2026-01-01T02:00:02+02:00")).await;
    let future = start("future", since("2926-01-01T00:00:00Z")).await;
    let always = start("always", StartPosition::Since(chrono::DateTime::<chrono::Utc>::MIN_UTC)).await;
    store.record_todos(&["5"]).await;
    for (id, expected) in [
        (now, &[5][..]),
        (beginning, &[1, 2, 3, 4, 5]),
        (exact, &[3, 4, 5]),
        (between, &[3, 4, 5]),
        (zone, &[2, 3, 4, 5]),
        (future, &[5]),
        (always, &[1, 2, 3, 4, 5]),
    ] {
        assert_eq!(store.deliver_all(id).await, expected, "{id}");
    }
    store.is_whole().await;
}

#[tokio::test]
async fn a_subscription_that_was_removed_is_gone_with_all_its_deliveries() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    store.record_todos(&["a", "b", "c"]).await;
    let lanes = store.claim(id).await;
    let mut dead = delivered(&lanes[1], 1, Next::Yield);
    dead.finished[0].error = Some("dead".to_owned());
    store.outbox.settle(&[delivered(&lanes[0], 1, Next::Yield), dead]).await.unwrap();
    assert!(store.outbox.remove("s").await.unwrap());
    assert!(!store.outbox.remove("s").await.unwrap());
    let late = delivered(&lanes[2], 1, Next::Yield);
    assert_eq!(store.outbox.settle(&[late]).await.unwrap(), [Settled::Superseded]);
    store.record_todos(&["d"]).await;
    for table in ["outbox_lanes", "outbox_deliveries", "outbox_delivered", "outbox_dead_letters"] {
        assert_eq!(store.count(&format!("{table} where subscription_id = {id}")).await, 0, "{table}");
    }
    let again = store.register(from_the_beginning("s")).await;
    assert_ne!(again, id, "a late result for the old one cannot hit the new one");
    assert_eq!(store.deliver_all(again).await, [1, 2, 3, 4]);
    assert_eq!(store.deliver_all(other).await, [1, 2, 3, 4]);
    store.is_whole().await;
}

#[tokio::test]
async fn registering_again_continues_where_the_subscription_was() {
    let store = Store::new().await;
    store.record_todos(&["1"]).await;
    let id = store.subscribe("s").await;
    let before = generation(&store).await;
    assert_eq!(store.subscribe("s").await, id);
    assert_eq!(store.register(from_the_beginning("s")).await, id, "the start is that of the first registration");
    assert_eq!(generation(&store).await, before);
    assert_eq!(store.count("outbox_deliveries").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn a_changed_subscription_holds_for_the_commits_after_it() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1"]).await;
    let before = generation(&store).await;
    assert_eq!(store.register(Subscription::new("s").unwrap().events(["order.*"]).unwrap()).await, id);
    assert_ne!(generation(&store).await, before);
    store.record_todos(&["2"]).await;
    let before = generation(&store).await;
    assert_eq!(store.register(Subscription::new("s").unwrap().ordering(Ordering::Global)).await, id);
    assert_ne!(generation(&store).await, before);
    store.record_todos(&["3"]).await;
    assert_eq!(runs(&store.claim(id).await), [("todo/1", vec![1]), ("", vec![3])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_long_history_is_delivered_completely_and_in_order() {
    let store = Store::new().await;
    store.record((0..1700).map(|n| todo(&(n % 7).to_string()))).await;
    let id = store.register(from_the_beginning("s")).await;
    store.record_todos(&["1", "new"]).await;
    delivers_once_in_order(&store, id, 1702).await;
    store.is_whole().await;
}

#[tokio::test]
async fn a_backfill_takes_only_what_matches() {
    let store = Store::new().await;
    store.record((0..600).map(|n| todo("1").tag(if n % 100 == 0 { "rare" } else { "usual" }, "x").unwrap())).await;
    let id = store.register(from_the_beginning("s").required_tags(["rare"])).await;
    assert_eq!(store.deliver_all(id).await, [1, 101, 201, 301, 401, 501]);
    store.is_whole().await;
}

/// Commits of two writers that share nothing may be delivered in any order, so each has keys of its own.
async fn writer(outbox: Outbox, name: &'static str, events: usize) {
    for n in 0..events {
        record(&outbox, [todo(&format!("{name}{}", n % 3))]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_registered_while_others_commit_gets_every_event_once() {
    let store = Store::new().await;
    store.record((0..1100).map(|n| todo(&(n % 3).to_string()))).await;
    let other = store.another_process().await;
    let writers = [tokio::spawn(writer(store.outbox.clone(), "a", 60)), tokio::spawn(writer(other.clone(), "b", 60))];
    let ids = tokio::join!(async { store.outbox.register(&from_the_beginning("s")).await.unwrap() }, async {
        other.register(&from_the_beginning("s")).await.unwrap()
    },);
    assert_eq!(ids.0, ids.1);
    for writer in writers {
        writer.await.unwrap();
    }
    store.is_whole().await;
    delivers_once_in_order(&store, ids.0, 1220).await;
    store.is_whole().await;
}

/// The number of the subscriptions' state does not come again for another state.
#[tokio::test]
async fn a_registration_that_a_failover_lost_misleads_nobody() {
    let store = Store::new().await;
    store.subscribe("other").await;
    let before = generation(&store).await;
    store.register(Subscription::new("lost").unwrap().events(["order.*"]).unwrap()).await;
    store.record_todos(&["known"]).await;
    store.execute("delete from outbox_subscriptions where name = 'lost'").await;
    store.execute(&format!("update outbox_meta set routing_generation = {before}")).await;
    let again = Subscription::new("again").unwrap();
    let again = store.another_process().await.register(&again).await.unwrap();
    store.record_todos(&["new"]).await;
    assert_eq!(store.deliver_all(again).await, [2]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_older_definition_comes_back_when_nobody_has_the_newer() {
    let store = Store::new().await;
    let define = |events: &str| Subscription::new("s").unwrap().events(events.split(' ')).unwrap();
    let (one, two) = (define("todo.created"), define("todo.created todo.moved"));
    let kept_by =
        async |definition: &Subscription, by: &str| store.outbox.register_as(definition, by).await.unwrap().kept_by;
    let stored = async || -> Vec<bool> {
        let stored = store.outbox.registered(&[&one, &two]).await.unwrap();
        stored.iter().map(|stored| stored.unwrap().1).collect()
    };
    assert_eq!(kept_by(&one, "old").await, None);
    store.outbox.heartbeat("old", &[&one]).await.unwrap();
    assert_eq!(kept_by(&two, "new").await, None, "a definition that was never there is the newest");
    store.outbox.heartbeat("new", &[&two]).await.unwrap();
    for _ in 0..2 {
        assert_eq!(kept_by(&one, "old").await, Some("new".to_owned()));
        assert_eq!(stored().await, [false, true]);
    }
    let [new, old] = store.outbox.workers().await.unwrap().try_into().unwrap();
    assert_eq!((new.disagrees.len(), old.disagrees), (0, vec!["s".to_owned()]));
    // All that have the newer one have ended: that is a way back.
    store.outbox.forget_worker("new").await.unwrap();
    assert_eq!(kept_by(&one, "old").await, None);
    assert_eq!(stored().await, [true, false]);
    assert_eq!(kept_by(&two, "new").await, None, "it is still the one that was introduced last");
    // A worker that was killed has ended too.
    store.outbox.heartbeat("new", &[&two]).await.unwrap();
    let earlier = database::before(database::NOW, "60");
    store.execute(&format!("update outbox_workers set last_seen_at = {earlier} where id = 'new'")).await;
    assert_eq!(kept_by(&one, "old").await, None);
    let changes = store.outbox.audit_entries(10).await.unwrap();
    let by: Vec<_> = changes.iter().map(|entry| (entry.action.as_str(), entry.actor.as_str())).collect();
    assert_eq!(by, [("define", "old"), ("define", "new"), ("define", "old"), ("define", "new")]);
    assert_eq!(changes[0].details["to"]["filter"], serde_json::to_value(one.filter()).unwrap());
    assert_eq!(changes[0].details["from"]["filter"], serde_json::to_value(two.filter()).unwrap());
    store.is_whole().await;
}

#[tokio::test]
async fn a_worker_whose_subscription_was_removed_is_shown() {
    let store = Store::new().await;
    let [s, t] = ["s", "t"].map(|name| Subscription::new(name).unwrap());
    store.register(s.clone()).await;
    store.outbox.heartbeat("w", &[&s, &t]).await.unwrap();
    let [worker] = store.outbox.workers().await.unwrap().try_into().unwrap();
    assert_eq!((worker.removed, worker.disagrees), (vec!["t".to_owned()], Vec::new()));
    assert_eq!(store.outbox.registered(&[&t]).await.unwrap(), [None]);
    store.is_whole().await;
}

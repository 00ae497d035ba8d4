use outbox_core::Subscription;
use outbox_seaorm::{By, DeliveryState};

use super::{
    database,
    fixture::{Store, runs, todo},
};

/// Records an event by SQL, without the library.
async fn record_by_sql(store: &Store, id: &str) {
    store.execute(&database::record("todo.created", "todo", id, r#"{"by":"sql"}"#)).await;
}

#[tokio::test]
async fn an_event_from_sql_waits_is_seen_and_is_delivered_in_its_order() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.register(Subscription::new("other").unwrap().events(["order.*"]).unwrap()).await;
    record_by_sql(&store, "a").await;
    let unrouted = store.outbox.unrouted().await.unwrap();
    assert_eq!((unrouted.waiting, unrouted.set_aside), (1, 0));
    assert!(unrouted.oldest_age_seconds.is_some_and(|age| (0.0..60.0).contains(&age)));
    // It is not among the deliveries, and counts all the same: nobody is to think that all is done.
    let status = store.outbox.status().await.unwrap();
    let pending: Vec<_> = status.subscriptions.iter().map(|each| (each.name.as_str(), each.pending)).collect();
    assert_eq!(pending, [("other", 0), ("s", 1)]);
    assert!(status.subscriptions[1].oldest_pending_age_seconds.is_some());
    let event = store.outbox.events(&outbox_seaorm::EventFilter::default(), None, 10).await.unwrap().events[0].id;
    let why = store.outbox.why(event).await.unwrap().unwrap();
    assert_eq!((why[0].state, &why[0].details["cause"]), (None, &serde_json::json!("filter")));
    assert_eq!(
        (why[1].state, &why[1].details["cause"]),
        (Some(DeliveryState::Pending), &serde_json::json!("unrouted"))
    );
    assert_eq!(why[1].reason, "not routed yet, and no worker is running; start one");
    let details = store.outbox.event(event).await.unwrap().unwrap();
    assert_eq!(details.deliveries.len(), 1);

    let unit = store.outbox.begin(outbox_core::Context::default());
    unit.events().push(todo("a")).unwrap();
    unit.commit().await.unwrap();
    record_by_sql(&store, "a").await;
    let [lane] = store.claim(id).await.try_into().unwrap();
    assert_eq!(lane.run.iter().map(|event| event.position).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(lane.run[0].payload, r#"{"by":"sql"}"#);
    assert_eq!(store.outbox.unrouted().await.unwrap().waiting, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn more_than_a_request_routes_is_left_to_a_worker_with_what_is_its_own() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for n in 0..150 {
        record_by_sql(&store, &(n % 10).to_string()).await;
    }
    let unit = store.outbox.begin(outbox_core::Context::default());
    unit.events().push(todo("1")).unwrap();
    unit.events().push(todo("own").priority(1)).unwrap();
    unit.commit().await.unwrap();
    assert_eq!(store.outbox.unrouted().await.unwrap().waiting, 152);
    assert_eq!(store.outbox.route_waiting().await.unwrap(), 152);
    let lanes = store.claim(id).await;
    let of_one = lanes.iter().find(|lane| lane.lane.key == "todo/1").unwrap();
    let positions: Vec<i64> = of_one.run.iter().map(|event| event.position).collect();
    assert_eq!(positions, (0..15).map(|n| n * 10 + 2).chain([151]).collect::<Vec<_>>());
    assert_eq!(lanes.len(), 11);
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_that_was_set_aside_is_put_back_or_discarded() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for id in ["a", "b", "a"] {
        record_by_sql(&store, id).await;
    }
    store
        .execute(&format!(
            "update outbox_unrouted set error = 'no', set_aside_at = {} where position < 3",
            database::NOW
        ))
        .await;
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![3])], "it holds up no others");
    let found = store.outbox.set_aside(None, 10).await.unwrap();
    assert_eq!(
        found.iter().map(|each| (each.position, each.error.as_str())).collect::<Vec<_>>(),
        [(2, "no"), (1, "no")]
    );
    assert_eq!(store.outbox.set_aside(Some(2), 10).await.unwrap().len(), 1);
    let why = store.outbox.why(found[0].event_id.unwrap()).await.unwrap().unwrap();
    assert_eq!(why[0].details, serde_json::json!({ "cause": "set-aside", "error": "no" }));
    let status = store.outbox.status().await.unwrap();
    assert_eq!((status.unrouted.waiting, status.unrouted.set_aside, status.subscriptions[0].pending), (0, 2, 1));

    let by = By::new("ada");
    assert_eq!(store.outbox.discard_set_aside(Some(&[1, 3]), &by).await.unwrap(), 1);
    assert_eq!(store.outbox.put_back(None, &by).await.unwrap(), 1);
    assert_eq!(runs(&store.claim(id).await), [("todo/b", vec![2])]);
    assert_eq!(store.count("outbox_unrouted").await, 0);
    assert_eq!(store.count("outbox_events").await, 3, "a discarded one stays");
    let actions: Vec<_> = store.outbox.audit_entries(10).await.unwrap().into_iter().map(|entry| entry.action).collect();
    assert_eq!(actions, ["put-back", "discard-unrouted"]);
    store.is_whole().await;
}

#[tokio::test]
async fn the_mark_of_an_event_that_is_gone_is_set_aside() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for id in ["gone", "b"] {
        record_by_sql(&store, id).await;
    }
    store.execute("delete from outbox_events where position = 1").await;
    assert_eq!(runs(&store.claim(id).await), [("todo/b", vec![2])]);
    let [aside] = store.outbox.set_aside(None, 10).await.unwrap().try_into().unwrap();
    assert_eq!((aside.position, aside.event_id, aside.error.as_str()), (1, None, "the event's row is gone"));
    store.is_whole().await;
}

/// Each event is either routed with the subscription or filled in, whatever waits when it is registered.
#[tokio::test]
async fn a_subscription_from_the_beginning_gets_what_waits_once() {
    let store = Store::new().await;
    store.subscribe("old").await;
    store.record_todos(&["a", "b"]).await;
    for id in ["a", "c"] {
        record_by_sql(&store, id).await;
    }
    let beginning = Subscription::new("new").unwrap().start(outbox_core::StartPosition::Beginning);
    let id = store.register(beginning).await;
    record_by_sql(&store, "a").await;
    assert_eq!(store.deliver_all(id).await.len(), 5);
    assert_eq!(store.count(&format!("outbox_delivered where subscription_id = {id}")).await, 5);
    store.is_whole().await;
}

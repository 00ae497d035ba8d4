use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, SubsecRound, Utc};
use outbox_core::{Actor, Context, MAX_PAYLOAD_DEPTH, NewEvent, PushError, RecordedEvent, Subscription};
use outbox_seaorm::{EventFilter, Outbox};
use sea_orm::{ConnectionTrait, Statement};
use serde_json::value::RawValue;

use super::{
    database,
    fixture::{LONG, Store, of_type, record, todo},
};

/// The events that a subscription gets, in one claim.
async fn claimed(outbox: &Outbox, subscription: i32) -> Vec<RecordedEvent> {
    outbox.route_waiting().await.unwrap();
    let lanes = outbox.claim(subscription, "worker", 20_000, 20_000, LONG).await.unwrap().lanes;
    let mut events: Vec<_> = lanes.into_iter().flat_map(|lane| lane.run).collect();
    events.sort_by_key(|event| event.position);
    events
}

#[tokio::test]
async fn an_event_without_a_subscription_is_kept() {
    let store = Store::new().await;
    store.register(Subscription::new("other").unwrap().events(["order.*"]).unwrap()).await;
    store.record_todos(&["1"]).await;
    assert_eq!(store.count("outbox_events").await, 1);
    assert_eq!(store.count("outbox_deliveries").await, 0);
    assert_eq!(store.count("outbox_lanes").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn times_that_the_database_cannot_compare_do_not_harm_the_queue() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("past").occurred_at(DateTime::<Utc>::MIN_UTC)]).await;
    store.record([todo("future").occurred_at(DateTime::<Utc>::MAX_UTC)]).await;
    store.record([todo("never").not_before(DateTime::<Utc>::MAX_UTC)]).await;
    store.record([todo("nor ever").delay(Duration::MAX)]).await;
    let ids: Vec<_> = claimed(&store.outbox, id).await.into_iter().map(|event| event.aggregate_id).collect();
    assert_eq!(ids, ["past", "future"]);
    store.is_whole().await;
}

#[tokio::test]
async fn positions_follow_the_pushes() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record((0..300).map(|n| todo(&format!("{}", 1000 - n)))).await;
    store.record_todos(&["last"]).await;
    let ids = store.column::<String>("select aggregate_id from outbox_events order by position").await;
    let expected: Vec<_> = (0..300).map(|n| (1000 - n).to_string()).chain(["last".to_owned()]).collect();
    assert_eq!(ids, expected);
    let keys: Vec<_> = claimed(&store.outbox, id).await.into_iter().map(|event| event.aggregate_id).collect();
    assert_eq!(keys, expected, "each event keeps its own aggregate");
    store.is_whole().await;
}

#[tokio::test]
async fn names_as_people_have_them_are_stored_matched_and_found() {
    let store = Store::new().await;
    let of = async |name: &str, pattern: &str| {
        store.register(Subscription::new(name).unwrap().events([pattern]).unwrap()).await
    };
    let (exact, prefix) = (of("exact", "OrderCreated").await, of("prefix", "EMBED_*").await);
    let (dots, slashes) = (of("dots", "SYSTEM.*").await, of("slashes", "shop:order/*").await);
    let tagged = store.register(Subscription::new("tagged").unwrap().required_tags(["Region:EU"])).await;
    let unit = store.outbox.begin(Context::default());
    unit.events().set_actor(Actor::new("SYSTEM.IMPORT", "nightly").unwrap()).unwrap();
    let names = ["OrderCreated", "EMBED_UPSERT", "EMBEDDED", "SYSTEM.IMPORT", "shop:order/placed", "ordercreated"];
    for name in names {
        let event = NewEvent::dynamic(name, "Shop/USER", name, &()).unwrap();
        unit.events().push(event.tag("Region:EU", "x").unwrap()).unwrap();
    }
    let longest = "A".repeat(128);
    unit.events().push(NewEvent::dynamic(longest.clone(), longest.clone(), "1", &()).unwrap()).unwrap();
    unit.commit().await.unwrap();
    for (id, expected) in [
        (exact, &["OrderCreated"][..]),
        (prefix, &["EMBED_UPSERT"]),
        (dots, &["SYSTEM.IMPORT"]),
        (slashes, &["shop:order/placed"]),
        (tagged, &names),
    ] {
        let events = claimed(&store.outbox, id).await;
        assert!(events.iter().all(|event| event.actor.as_ref().unwrap().kind == "SYSTEM.IMPORT"));
        assert_eq!(events.iter().map(|event| event.event_type.as_str()).collect::<Vec<_>>(), expected);
    }
    for (event_type, aggregate_type, found) in [
        (Some("OrderCreated"), None, 1),
        (Some("ORDERCREATED"), None, 0),
        (Some(&*longest), None, 1),
        (None, Some("Shop/USER"), 6),
    ] {
        let filter = EventFilter {
            event_type: event_type.map(str::to_owned),
            aggregate_type: aggregate_type.map(str::to_owned),
            ..EventFilter::default()
        };
        assert_eq!(store.outbox.events(&filter, None, 10).await.unwrap().events.len(), found, "{filter:?}");
    }
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_goes_to_exactly_the_subscriptions_that_match() {
    let store = Store::new().await;
    let subscription = |name: &str| Subscription::new(name).unwrap();
    let all = store.register(subscription("all")).await;
    let types = store.register(subscription("types").events(["todo.*", "user.deleted"]).unwrap()).await;
    let exact = store.register(subscription("exact").events(["todo.created"]).unwrap()).await;
    let required = store.register(subscription("required").required_tags(["urgent", "region"])).await;
    let any = store.register(subscription("any").any_of_tags(["urgent", "region"])).await;
    let tenant = store.register(subscription("tenant").tenant("acme").unwrap()).await;

    let record = async |event: NewEvent, tenant: Option<&str>| {
        let unit = store.outbox.begin(Context::default());
        if let Some(tenant) = tenant {
            unit.events().set_tenant(tenant).unwrap();
        }
        unit.events().push(event).unwrap();
        unit.commit().await.unwrap();
    };
    let urgent = |event: NewEvent| event.tag("urgent", "yes").unwrap();
    record(of_type("todo.created", "1"), None).await;
    record(urgent(of_type("todo.done", "2")), Some("acme")).await;
    record(urgent(of_type("user.deleted", "3")).tag("region", "eu").unwrap(), Some("other")).await;
    record(of_type("user.created", "4"), Some("acme")).await;

    for (id, expected) in [
        (all, &["1", "2", "3", "4"][..]),
        (types, &["1", "2", "3"]),
        (exact, &["1"]),
        (required, &["3"]),
        (any, &["2", "3"]),
        (tenant, &["2", "4"]),
    ] {
        let ids: Vec<_> = claimed(&store.outbox, id).await.into_iter().map(|event| event.aggregate_id).collect();
        assert_eq!(ids, expected, "{id}");
    }
    store.is_whole().await;
}

#[tokio::test]
async fn what_is_known_after_the_push_reaches_all_events() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut context = Context::default();
    context.causation_id = Some("cause".to_owned());
    context.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
    context.tracestate = Some("vendor=1".to_owned());
    let unit = store.outbox.begin(context.clone());
    let events = unit.events();
    events.push(todo("1")).unwrap();
    events.set_tenant("acme").unwrap();
    events.push(todo("2")).unwrap();
    events.set_actor(Actor::new("user", "42").unwrap()).unwrap();
    events.set_correlation_id("Käse 'n \"quotes\"").unwrap();
    unit.commit().await.unwrap();
    let events = claimed(&store.outbox, id).await;
    assert_eq!(events.len(), 2);
    for event in events {
        assert_eq!(event.tenant.as_deref(), Some("acme"));
        assert_eq!(event.actor, Some(Actor::new("user", "42").unwrap()));
        assert_eq!(event.correlation_id.as_deref(), Some("Käse 'n \"quotes\""));
        assert_eq!(event.causation_id, context.causation_id);
        assert_eq!(event.traceparent, context.traceparent);
        assert_eq!(event.tracestate, context.tracestate);
    }
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_keeps_everything_it_was_pushed_with() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let occurred_at = "2001-02-03T04:05:06.789Z".parse().unwrap();
    let event = todo("it's 7").occurred_at(occurred_at).max_attempts(3);
    let event = event.tag("region", "EU \"west\"").unwrap().tag("note", "ümlaut\n\u{1F980}").unwrap();
    let plain = todo("8");
    let before = Utc::now().trunc_subsecs(3);
    store.record([event.clone(), plain.clone()]).await;
    let [first, second] = claimed(&store.outbox, id).await.try_into().unwrap();
    assert_eq!((first.id, first.event_type.as_str(), first.schema_version), (event.id(), "todo.created", 1));
    assert_eq!((first.aggregate_type.as_str(), first.aggregate_id.as_str()), ("todo", "it's 7"));
    assert_eq!((first.occurred_at, first.max_attempts), (occurred_at, Some(3)));
    assert_eq!(&first.tags, event.tags());
    assert_eq!(first.payload, event.payload());
    assert!((before..=Utc::now()).contains(&first.recorded_at), "{}", first.recorded_at);
    assert_eq!((second.id, second.max_attempts, &second.tags), (plain.id(), None, &BTreeMap::new()));
    assert!((before..=Utc::now()).contains(&second.occurred_at), "{}", second.occurred_at);
    assert_eq!((second.tenant, second.actor, second.correlation_id), (None, None, None));
    store.is_whole().await;
}

#[tokio::test]
async fn a_payload_is_stored_byte_for_byte() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let payloads = [
        r#"{"b": 1,  "a":2, "b":3}"#.to_owned(),
        r#""Käse \u00e4 \u0000 \ud83e\udd80 🦀 \/ \\ \" \u2028""#.to_owned(),
        "\"\u{2028}\u{7f}\u{feff}'; drop table outbox_events; --\"".to_owned(),
        "[9007199254740993, 1.0, 1e2, -0, 0.1000, 12345678901234567890123456789]".to_owned(),
        "null".to_owned(),
        "\"null\"".to_owned(),
        "true".to_owned(),
        format!("{}{}", "[".repeat(1000), "]".repeat(1000)),
        format!("\"{}\"", "ü".repeat(200_000)),
    ];
    store
        .record(payloads.iter().map(|payload| {
            let payload = RawValue::from_string(payload.clone()).unwrap();
            NewEvent::dynamic("todo.created", "todo", "1", &payload).unwrap()
        }))
        .await;
    let stored: Vec<_> = claimed(&store.outbox, id).await.into_iter().map(|event| event.payload).collect();
    assert!(stored == payloads);
    assert!(
        store.column::<String>("select cast(payload as text) from outbox_events order by position").await == payloads
    );
    store.is_whole().await;
}

#[tokio::test]
async fn a_context_that_cannot_be_stored_is_refused_at_the_push() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    type Set = fn(&mut Context, String);
    let fields: [(&str, Set); 7] = [
        ("tenant", |context, text| context.tenant = Some(text)),
        ("actor kind", |context, kind| context.actor = Some(Actor { kind, id: "42".to_owned() })),
        ("actor id", |context, id| context.actor = Some(Actor { kind: "user".to_owned(), id })),
        ("correlation id", |context, text| context.correlation_id = Some(text)),
        ("causation id", |context, text| context.causation_id = Some(text)),
        ("traceparent", |context, text| context.traceparent = Some(text)),
        ("tracestate", |context, text| context.tracestate = Some(text)),
    ];
    for (name, set) in fields {
        for bad in ["a\0b".to_owned(), String::new(), "x".repeat(100_000)] {
            let mut context = Context::default();
            set(&mut context, bad);
            let unit = store.outbox.begin(context);
            let error = unit.events().push(todo("1")).unwrap_err();
            assert!(matches!(error, PushError::Name(_)) && error.to_string().starts_with(name), "{name}: {error}");
            unit.commit().await.unwrap();
        }
    }
    let unit = store.outbox.begin(Context::default());
    for bad in ["a\0b".to_owned(), "x".repeat(100_000)] {
        assert!(matches!(unit.events().set_tenant(&bad), Err(PushError::Name(_))));
        assert!(matches!(unit.events().set_correlation_id(&bad), Err(PushError::Name(_))));
        assert!(matches!(
            unit.events().set_actor(Actor { kind: "user".into(), id: bad.clone() }),
            Err(PushError::Name(_))
        ));
        assert!(matches!(todo("1").tag("tag", &bad), Err(PushError::Name(_))));
        assert!(matches!(todo("1").tag(&bad, "value"), Err(PushError::Name(_))));
    }
    store.is_empty().await;
    // The longest and oddest that are allowed.
    let mut context = Context::default();
    for (name, set) in fields {
        let longest = match name {
            "actor kind" => "k".repeat(64),
            "tracestate" => "s".repeat(512),
            _ => "\u{1F980}\u{1}'\"\\".repeat(30) + &"x".repeat(15),
        };
        set(&mut context, longest);
    }
    let unit = store.outbox.begin(context.clone());
    unit.events().push(todo("1")).unwrap();
    unit.commit().await.unwrap();
    let [event] = claimed(&store.outbox, id).await.try_into().unwrap();
    assert_eq!((event.tenant, event.actor, event.tracestate), (context.tenant, context.actor, context.tracestate));
    store.is_whole().await;
}

#[tokio::test]
async fn a_payload_may_be_as_long_as_the_limit_and_no_longer() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let of_bytes = |bytes: usize| NewEvent::dynamic("todo.created", "todo", "1", &"x".repeat(bytes - 2)).unwrap();
    let unit = store.outbox.begin(Context::default());
    for bytes in [1024 * 1024 - 1, 1024 * 1024] {
        unit.events().push(of_bytes(bytes)).unwrap();
    }
    let error = unit.events().push(of_bytes(1024 * 1024 + 1)).unwrap_err();
    assert!(matches!(error, PushError::PayloadTooLarge { size: 1_048_577, limit: 1_048_576, .. }), "{error:?}");
    unit.commit().await.unwrap();
    let lengths: Vec<_> = claimed(&store.outbox, id).await.iter().map(|event| event.payload.len()).collect();
    assert_eq!(lengths, [1024 * 1024 - 1, 1024 * 1024]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_payload_is_nested_too_deep_for_both_databases_or_none() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let unit = store.outbox.begin(Context::default());
    for depth in [MAX_PAYLOAD_DEPTH, MAX_PAYLOAD_DEPTH + 1, 6000, 400_000] {
        let payload = format!(
            "{}{}",
            r#"{"a":["#.repeat(depth / 2) + &"[".repeat(depth % 2),
            "]".repeat(depth % 2) + &"]}".repeat(depth / 2)
        );
        let event = NewEvent::dynamic("todo.created", "todo", "1", &RawValue::from_string(payload).unwrap());
        if depth > MAX_PAYLOAD_DEPTH {
            assert!(matches!(event, Err(PushError::PayloadTooDeep { limit: MAX_PAYLOAD_DEPTH, .. })), "{depth}");
        } else {
            unit.events().push(event.unwrap()).unwrap();
        }
    }
    unit.commit().await.unwrap();
    let [event] = claimed(&store.outbox, id).await.try_into().unwrap();
    assert_eq!(event.payload.matches('[').count(), MAX_PAYLOAD_DEPTH / 2);
    store.is_whole().await;
}

#[tokio::test]
async fn an_attempts_limit_beyond_the_column_is_the_highest_there_is() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("1").max_attempts(u32::MAX)]).await;
    let [event] = claimed(&store.outbox, id).await.try_into().unwrap();
    assert_eq!(event.max_attempts, Some(i32::MAX.unsigned_abs()));
    store.is_whole().await;
}

#[tokio::test]
async fn ten_thousand_events_in_one_unit_of_work() {
    let store = Store::new().await;
    let (all, some) = (
        store.subscribe("all").await,
        store.register(Subscription::new("some").unwrap().events(["todo.done"]).unwrap()).await,
    );
    let event_type = |n| if n % 4 == 0 { "todo.done" } else { "todo.created" };
    store.record((0..10_000).map(|n| of_type(event_type(n), &(n % 100).to_string()))).await;
    assert_eq!(store.count("outbox_events").await, 10_000);
    assert_eq!(store.count(&format!("outbox_deliveries where subscription_id = {all}")).await, 10_000);
    assert_eq!(store.count(&format!("outbox_deliveries where subscription_id = {some}")).await, 2500);
    assert_eq!(store.count(&format!("outbox_lanes where subscription_id = {all} and pending = 100")).await, 100);
    assert_eq!(store.count(&format!("outbox_lanes where subscription_id = {some} and pending = 100")).await, 25);
    store.is_whole().await;
}

#[tokio::test]
async fn a_subscription_of_another_process_gets_what_commits_next() {
    let store = Store::new().await;
    let here = store.subscribe("here").await;
    store.record_todos(&["1"]).await;
    let other = store.another_process().await;
    let there = other.register(&Subscription::new("there").unwrap()).await.unwrap();
    store.record_todos(&["2"]).await;
    record(&other, [todo("3")]).await;
    assert_eq!(other.register(&Subscription::new("here").unwrap().events(["x"]).unwrap()).await.unwrap(), here);
    store.record_todos(&["4"]).await;
    let ids = async |subscription| -> Vec<String> {
        claimed(&store.outbox, subscription).await.into_iter().map(|event| event.aggregate_id).collect()
    };
    assert_eq!(ids(here).await, ["1", "2", "3"]);
    assert_eq!(ids(there).await, ["2", "3", "4"]);
    store.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_one_aggregate_get_positions_in_the_order_of_their_commits() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.execute("create table versions (version bigint)").await;
    store.execute("insert into versions values (0)").await;
    let other = store.another_process().await;
    let mut writers = Vec::new();
    for outbox in [store.outbox.clone(), store.outbox.clone(), other.clone(), other] {
        writers.push(tokio::spawn(async move {
            for _ in 0..25 {
                let written = outbox.transaction(Context::default(), |tx, events| async move {
                    let sql = "update versions set version = version + 1 returning version";
                    let row = tx.query_one_raw(Statement::from_string(database::BACKEND, sql)).await?.unwrap();
                    let version: i64 = row.try_get("", "version")?;
                    events.push(NewEvent::dynamic("todo.changed", "todo", "1", &version)?)?;
                    Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
                });
                written.await.unwrap();
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let versions: Vec<i64> =
        claimed(&store.outbox, id).await.iter().map(|event| event.payload.parse().unwrap()).collect();
    assert_eq!(versions, (1..=100).collect::<Vec<_>>());
    store.is_whole().await;
}

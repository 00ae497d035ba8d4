use std::time::Duration;

use outbox_core::{Actor, Context, NewEvent, Subscription};
use outbox_seaorm::{By, DELIVERIES_LISTED, DeliveryState, EventFilter, Next, entity, once};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
use serde_json::json;
use uuid::Uuid;

use super::{
    database,
    fixture::{LONG, Store, attempt_log, delivered, delivered_run, failed, hang_up_after, todo},
};

/// A subscription `s` with one delivery in each state and one behind a leased one, beside an empty one:
/// `delivered`, `dead`, `retried`, `leased` twice, `waiting`.
async fn busy(store: &Store) -> i32 {
    let id = store.subscribe("s").await;
    store.register(Subscription::new("empty").unwrap().events(["other"]).unwrap()).await;
    store.record_todos(&["delivered", "dead", "retried", "leased", "leased"]).await;
    let lanes = store.claim(id).await;
    let mut dead = delivered(&lanes[1], 1, Next::Yield);
    dead.finished[0].error = Some("no such address".to_owned());
    let reports = [delivered_run(&lanes[0]), dead, failed(&lanes[2], LONG, "down")];
    store.outbox.settle(&reports).await.unwrap();
    store.record_todos(&["waiting"]).await;
    id
}

#[tokio::test]
async fn an_event_without_a_delivery_has_no_record() {
    let store = Store::new().await;
    busy(&store).await;
    let event: Uuid = store.value("select event_id from outbox_events where position = 1").await;
    assert!(store.outbox.delivery("s", Uuid::now_v7()).await.unwrap().is_none());
    assert!(store.outbox.delivery("unknown", event).await.unwrap().is_none());
    assert!(store.outbox.delivery("empty", event).await.unwrap().is_none());
    assert!(store.outbox.deliveries(Some("unknown"), None, 0, 10).await.unwrap().is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn the_status_counts_what_is_in_each_state() {
    let store = Store::new().await;
    busy(&store).await;
    store.execute("update outbox_events set recorded_at = '2000-01-01T00:00:00.000Z' where position <= 2").await;
    let earlier = database::before(database::NOW, "100");
    store.execute(&format!("update outbox_events set recorded_at = {earlier} where position = 3")).await;
    store.execute("update outbox_subscriptions set paused_at = '2026-01-01T00:00:00.000Z' where name = 'empty'").await;
    let status = store.outbox.status().await.unwrap();
    let [empty, s] = &status.subscriptions[..] else { panic!("{status:?}") };
    assert_eq!((s.name.as_str(), s.pending, s.leased, s.delivered, s.dead), ("s", 4, 1, 1, 1));
    assert!(s.oldest_pending_age_seconds.is_some_and(|age| (99.9..130.0).contains(&age)), "{s:?}");
    assert_eq!((s.paused, s.last_error.as_deref()), (false, Some("down")));
    assert_eq!((empty.name.as_str(), empty.pending, empty.leased, empty.delivered, empty.dead), ("empty", 0, 0, 0, 0));
    assert_eq!((empty.paused, empty.oldest_pending_age_seconds, empty.last_error.as_deref()), (true, None, None));
    assert!(status.workers.is_empty());
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["subscriptions"][1]["pending"], json!(4));
    store.is_whole().await;
}

/// The clock may be set back, and differences of times are not exact.
#[tokio::test]
async fn no_age_is_negative() {
    let store = Store::new().await;
    store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    store.outbox.heartbeat("worker", &[&Subscription::new("s").unwrap()]).await.unwrap();
    let soon = database::before(database::NOW, "-60");
    store.execute(&format!("update outbox_events set recorded_at = {soon}")).await;
    store.execute(&format!("update outbox_workers set last_seen_at = {soon}")).await;
    let status = store.outbox.status().await.unwrap();
    assert_eq!(status.subscriptions[0].oldest_pending_age_seconds, Some(0.0));
    assert_eq!(status.workers[0].last_seen_seconds, 0.0);
    store.is_whole().await;
}

#[tokio::test]
async fn the_last_error_is_that_of_a_retry_else_of_the_newest_dead_letter() {
    let store = Store::new().await;
    let id = busy(&store).await;
    store.time_passes().await;
    let lane = store.claim(id).await.into_iter().find(|lane| lane.lane.key == "todo/retried").unwrap();
    let last_error = async || store.outbox.status().await.unwrap().subscriptions[1].last_error.clone();
    assert_eq!(last_error().await.as_deref(), Some("down"), "while it is tried again");
    store.outbox.settle(&[delivered_run(&lane)]).await.unwrap();
    assert_eq!(last_error().await.as_deref(), Some("no such address"));
    store.is_whole().await;
}

#[tokio::test]
async fn a_lease_that_has_ended_counts_as_pending() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    store.claim_one(id, LONG).await;
    assert_eq!(store.outbox.status().await.unwrap().subscriptions[0].leased, 1);
    store.time_passes().await;
    let status = store.outbox.status().await.unwrap();
    assert_eq!((status.subscriptions[0].leased, status.subscriptions[0].pending), (0, 1));
    let records = store.outbox.deliveries(None, Some(DeliveryState::Pending), 0, 10).await.unwrap();
    assert_eq!((records.len(), records[0].attempts), (1, 1));
    store.is_whole().await;
}

#[tokio::test]
async fn deliveries_are_listed_in_each_state() {
    let store = Store::new().await;
    busy(&store).await;
    let list = async |state| store.outbox.deliveries(Some("s"), Some(state), 0, 10).await.unwrap();

    let [leased] = list(DeliveryState::Leased).await.try_into().unwrap();
    assert_eq!((leased.event.position, leased.attempts, leased.leased_by.as_deref()), (4, 1, Some("worker")));
    assert!(leased.due_at.is_some_and(|at| at > chrono::Utc::now()) && leased.finished_at.is_none());

    let [waiting, behind, retried] = list(DeliveryState::Pending).await.try_into().unwrap();
    assert_eq!((waiting.event.position, waiting.attempts, waiting.error.as_deref()), (6, 0, None));
    assert!(waiting.due_at.is_some_and(|at| at <= chrono::Utc::now()));
    assert_eq!((behind.event.position, behind.attempts, behind.leased_by.as_deref()), (5, 0, None));
    assert_eq!((retried.event.position, retried.attempts, retried.error.as_deref()), (3, 1, Some("down")));
    assert!(retried.due_at.is_some_and(|at| at > chrono::Utc::now()) && retried.leased_by.is_none());

    let [dead] = list(DeliveryState::Dead).await.try_into().unwrap();
    assert_eq!((dead.event.position, dead.attempts, dead.error.as_deref()), (2, 1, Some("no such address")));
    assert!(dead.finished_at.is_some() && dead.due_at.is_none());

    let [done] = list(DeliveryState::Delivered).await.try_into().unwrap();
    assert_eq!((done.event.position, done.attempts, done.error.as_deref()), (1, 1, None));
    assert!(done.finished_at.is_some() && done.due_at.is_none());
    assert_eq!((done.subscription.as_str(), done.event.aggregate_id.as_str()), ("s", "delivered"));

    for record in store.outbox.deliveries(None, None, 0, 10).await.unwrap() {
        let one = store.outbox.delivery("s", record.event.id).await.unwrap().unwrap();
        assert_eq!((one.state, one.attempts, one.event), (record.state, record.attempts, record.event));
    }
    store.is_whole().await;
}

#[tokio::test]
async fn a_listing_has_large_payloads_neither_whole_nor_many() {
    let store = Store::new().await;
    store.subscribe("s").await;
    for n in 0..24 {
        let unit = store.outbox.begin(Context::default());
        let text = "x".repeat(if n % 2 == 0 { 1_000_000 } else { 60_000 });
        unit.events().push(NewEvent::dynamic("OrderCreated", "order", n.to_string(), &text).unwrap()).unwrap();
        unit.commit().await.unwrap();
    }
    store.outbox.route_waiting().await.unwrap();
    let records = store.outbox.deliveries(Some("s"), None, 0, u32::MAX).await.unwrap();
    assert_eq!(records.len(), 24);
    for (n, record) in records.iter().rev().enumerate() {
        let (large, wrong) = (n % 2 == 0, record.unreadable.as_deref());
        assert_eq!(record.event.payload.len(), if large { 4 } else { 60_002 }, "{n}");
        assert_eq!(wrong, large.then_some("the payload is not listed: it has 1000002 bytes"));
    }
    let whole = store.outbox.delivery("s", records[1].event.id).await.unwrap().unwrap();
    assert_eq!(whole.event.payload.len(), 1_000_002, "one delivery is shown whole");
    let (mut before, mut listed) = (None, Vec::new());
    loop {
        let page = store.outbox.events(&EventFilter::default(), before, 500).await.unwrap();
        listed.extend(page.events.into_iter().map(|event| event.position));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(listed, (1..=24).rev().collect::<Vec<i64>>());
}

#[tokio::test]
async fn a_page_beyond_the_newest_ten_thousand_is_empty() {
    let store = Store::new().await;
    busy(&store).await;
    for (offset, limit) in [(DELIVERIES_LISTED, 1), (DELIVERIES_LISTED + 1, u32::MAX), (u32::MAX, u32::MAX)] {
        assert!(store.outbox.deliveries(None, None, offset, limit).await.unwrap().is_empty(), "{offset} {limit}");
    }
}

#[tokio::test]
async fn listings_are_newest_first_and_come_in_pages() {
    let store = Store::new().await;
    busy(&store).await;
    store.register(Subscription::new("t").unwrap().start(outbox_core::StartPosition::Beginning)).await;
    let page = async |subscription, offset, limit| -> Vec<(i64, String)> {
        let records = store.outbox.deliveries(subscription, None, offset, limit).await.unwrap();
        records.into_iter().map(|record| (record.event.position, record.subscription)).collect()
    };
    let positions = |page: Vec<(i64, String)>| -> Vec<i64> { page.into_iter().map(|(position, _)| position).collect() };
    assert_eq!(positions(page(Some("s"), 0, 4).await), [6, 5, 4, 3]);
    assert_eq!(positions(page(Some("s"), 4, 4).await), [2, 1]);
    assert_eq!(positions(page(Some("s"), 6, 4).await), [0; 0]);
    assert_eq!(positions(page(Some("s"), u32::MAX, u32::MAX).await), [0; 0]);
    assert_eq!(positions(page(Some("s"), 0, 0).await), [0; 0]);
    let mut all = Vec::new();
    for offset in (0..12).step_by(5) {
        all.extend(page(None, offset, 5).await);
    }
    assert_eq!(all.len(), 12);
    assert!(all.is_sorted_by(|(a, _), (b, _)| a >= b));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 12);
    store.is_whole().await;
}

#[tokio::test]
async fn activity_counts_the_deliveries_of_the_last_seven_days() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.subscribe("other").await;
    store.record((0..10).map(|n| todo(&n.to_string()))).await;
    store.deliver_all(id).await;
    for (position, days) in [(1, 1), (2, 1), (3, 6), (4, 7), (5, 300)] {
        let day = database::before(database::NOW, &format!("{days} * 86400"));
        store.execute(&format!("update outbox_delivered set delivered_at = {day} where position = {position}")).await;
    }
    assert_eq!(store.outbox.activity("s").await.unwrap(), [1, 0, 0, 0, 0, 2, 5]);
    assert_eq!(store.outbox.activity("other").await.unwrap(), [0; 7]);
    assert_eq!(store.outbox.activity("unknown").await.unwrap(), [0; 7]);
    store.is_whole().await;
}

#[tokio::test]
async fn workers_are_shown_until_they_are_forgotten() {
    let named = |name: &str| Subscription::new(name).unwrap();
    let store = Store::new().await;
    store.outbox.heartbeat("a", &[&named("s"), &named("t")]).await.unwrap();
    store.outbox.heartbeat("b", &[]).await.unwrap();
    store.execute("update outbox_workers set started_at = '2026-01-01T00:00:00.000Z'").await;
    let earlier = database::before(database::NOW, "50");
    store.execute(&format!("update outbox_workers set last_seen_at = {earlier}")).await;
    store.outbox.heartbeat("a", &[&named("s"), &named("u")]).await.unwrap();
    let [a, b] = store.outbox.workers().await.unwrap().try_into().unwrap();
    assert_eq!((a.id.as_str(), a.subscriptions), ("a", vec!["s".to_owned(), "u".to_owned()]));
    assert_eq!(a.started_at, "2026-01-01T00:00:00Z".parse::<chrono::DateTime<chrono::Utc>>().unwrap());
    assert!((0.0..20.0).contains(&a.last_seen_seconds) && a.last_seen_at > b.last_seen_at, "{}", a.last_seen_seconds);
    assert!((49.0..80.0).contains(&b.last_seen_seconds), "{}", b.last_seen_seconds);
    assert_eq!(store.outbox.status().await.unwrap().workers.len(), 2);
    store.outbox.forget_workers(Duration::MAX).await.unwrap();
    store.outbox.forget_workers(Duration::from_secs(90)).await.unwrap();
    assert_eq!(store.outbox.workers().await.unwrap().len(), 2);
    store.outbox.forget_workers(Duration::from_secs(30)).await.unwrap();
    assert_eq!(store.column::<String>("select id from outbox_workers").await, ["a"]);
    store.outbox.forget_worker("unknown").await.unwrap();
    store.outbox.forget_worker("a").await.unwrap();
    assert!(store.outbox.workers().await.unwrap().is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn a_consumer_handles_an_event_once() {
    let store = Store::new().await;
    let event = Uuid::now_v7();
    let handle = async |consumer: &str, commit: bool| -> bool {
        let unit = store.outbox.begin(Context::default());
        let first = once(&store.outbox, &unit.tx(), consumer, event).await.unwrap();
        if commit {
            unit.commit().await.unwrap();
        } else {
            unit.rollback().await;
        }
        first
    };
    assert!(handle("mailer", false).await);
    assert!(handle("mailer", true).await, "what was rolled back was not handled");
    assert!(!handle("mailer", true).await);
    assert!(handle("other", true).await);
    assert_eq!(store.count("outbox_inbox").await, 2);

    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    assert!(!once(&store.outbox, &tx, "mailer", event).await.unwrap());
    assert!(once(&store.outbox, &tx, "mailer", Uuid::now_v7()).await.unwrap());
    drop(tx);
    let _ = hang_up_after(1, once(&store.outbox, &unit.tx(), "cancelled", event)).await;
    unit.rollback().await;
    assert_eq!(store.count("outbox_inbox").await, 2);
    store.is_whole().await;
}

#[tokio::test]
async fn every_table_can_be_read_through_its_entity() {
    let store = Store::new().await;
    let id = busy(&store).await;
    let unit = store.outbox.begin(Context::default());
    unit.events().set_tenant("acme").unwrap();
    unit.events().set_actor(Actor::new("user", "42").unwrap()).unwrap();
    unit.events().push(todo("tagged").tag("region", "eu").unwrap().max_attempts(2)).unwrap();
    let handled = Uuid::now_v7();
    assert!(once(&store.outbox, &unit.tx(), "mailer", handled).await.unwrap());
    unit.commit().await.unwrap();
    let lane = store.claim(id).await.remove(0);
    let mut report = delivered(&lane, 1, Next::Yield);
    report.finished[0].log = attempt_log("x");
    store.outbox.settle(&[report]).await.unwrap();
    store.outbox.heartbeat("worker", &[&Subscription::new("s").unwrap()]).await.unwrap();
    store
        .execute("insert into outbox_audit (actor, action, target, details) values ('me', 'pause', 's', '{\"a\":1}')")
        .await;
    store
        .execute("update outbox_subscriptions set paused_at = created_at, backfill_from = 1 where name = 'empty'")
        .await;
    store.execute("update outbox_dead_letters set attempt_log = '[]'").await;

    let db = store.hand();
    let events = entity::events::Entity::find().all(db).await.unwrap();
    assert_eq!(events.len(), 7);
    assert_eq!(events[0].payload, json!({"id": "delivered"}));
    let tagged = entity::events::Entity::find().filter(entity::events::Column::Tenant.eq("acme")).one(db).await;
    let tagged = tagged.unwrap().unwrap();
    assert_eq!((tagged.tags, tagged.max_attempts), (Some(json!({"region": "eu"})), Some(2)));
    assert_eq!((tagged.actor_kind.as_deref(), tagged.actor_id.as_deref()), (Some("user"), Some("42")));
    let subscriptions = entity::subscriptions::Entity::find().all(db).await.unwrap();
    assert_eq!((subscriptions.len(), &subscriptions[0].ordering), (2, &json!("aggregate")));
    assert!(subscriptions[1].paused_at.is_some() && subscriptions[1].backfill_from == Some(1));
    let deliveries = entity::deliveries::Entity::find().all(db).await.unwrap();
    assert_eq!(deliveries.len() as i64, store.count("outbox_deliveries").await);
    let lanes = entity::lanes::Entity::find().all(db).await.unwrap();
    let retried = lanes.iter().find(|lane| lane.key == "todo/retried").unwrap();
    assert_eq!((retried.attempts, retried.last_error.as_deref()), (1, Some("down")));
    assert_eq!(retried.attempt_log, Some(json!(attempt_log("down"))));
    let history = entity::delivered::Entity::find().all(db).await.unwrap();
    assert_eq!((history.len(), &history[1].attempt_log), (2, &Some(json!(attempt_log("x")))));
    let dead = entity::dead_letters::Entity::find().all(db).await.unwrap();
    assert_eq!((dead.len(), dead[0].error.as_str()), (1, "no such address"));
    let inbox = entity::inbox::Entity::find().all(db).await.unwrap();
    assert_eq!((inbox.len(), inbox[0].event_id), (1, handled));
    let workers = entity::workers::Entity::find().all(db).await.unwrap();
    assert_eq!((workers.len(), &workers[0].subscriptions[0]["name"]), (1, &json!("s")));
    let audit = entity::audit::Entity::find().all(db).await.unwrap();
    assert_eq!((audit.len(), &audit[0].details), (1, &Some(json!({"a": 1}))));
    store.is_whole().await;
}

/// The clock of the database's host was an hour ahead for a moment.
#[tokio::test]
async fn what_a_wrong_clock_put_off_is_seen_and_made_due() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("asked").delay(LONG)]).await;
    let ahead = database::before(database::NOW, "-3600");
    let jumped = async |ids: &[&str]| {
        store.record_todos(ids).await;
        let positions = "(select position from outbox_events where aggregate_id <> 'asked')";
        store.execute(&format!("update outbox_events set recorded_at = {ahead} where aggregate_id <> 'asked'")).await;
        store.execute(&format!("update outbox_deliveries set due_at = {ahead} where position in {positions}")).await;
        store.execute(&format!("update outbox_lanes set due_at = {ahead} where key <> 'todo/asked'")).await;
    };
    assert_eq!(store.outbox.postponed().await.unwrap().len(), 0, "a delay is what the event asked for");
    jumped(&["a", "b", "b"]).await;
    let [late] = store.outbox.postponed().await.unwrap().try_into().unwrap();
    assert_eq!((late.subscription.as_str(), late.keys), ("s", 2));
    assert!((3000.0..3700.0).contains(&late.seconds), "{late:?}");
    assert!(store.claim(id).await.is_empty());
    let by = By::new("anna").reason("the clock");
    assert_eq!(store.outbox.make_due("s", &by).await.unwrap(), Some(2));
    assert_eq!(store.outbox.make_due("s", &by).await.unwrap(), Some(0));
    assert_eq!(store.outbox.make_due("unknown", &by).await.unwrap(), None);
    assert_eq!(store.outbox.postponed().await.unwrap().len(), 0);
    // All of them, in their order; what asked for its time still waits for it.
    assert_eq!(store.deliver_all(id).await.len(), 3);
    assert_eq!(store.column::<i64>("select position from outbox_deliveries").await, [1]);
    // A delivery that has failed waits as it should, and an operator may not want to wait.
    store.record_todos(&["c"]).await;
    let lane = store.claim_one(id, LONG).await;
    store.outbox.settle(&[failed(&lane, LONG, "down")]).await.unwrap();
    assert_eq!(store.outbox.postponed().await.unwrap().len(), 0);
    assert_eq!(store.outbox.make_due("s", &by).await.unwrap(), Some(1));
    assert_eq!(store.claim_one(id, LONG).await.attempts, 2);
    let audit = store.outbox.audit_entries(1).await.unwrap().remove(0);
    assert_eq!((audit.action.as_str(), audit.target.as_str(), &audit.details["changed"]), ("due", "s", &json!(1)));
}

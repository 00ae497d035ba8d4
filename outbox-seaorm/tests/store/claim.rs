use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use chrono::{SubsecRound, Utc};
use outbox_core::{
    Context, NewEvent, Ordering, Subscription,
    store::{Holder, NextDue, Reservation, Store as Trait, Wanted},
};
use outbox_seaorm::{LaneRef, Next, Settled};
use sea_orm::DbBackend;

use super::{
    database,
    fixture::{LONG, SHORT, Store, delivered, delivered_run, failed, is_about, runs, todo},
};

#[tokio::test]
async fn a_claimed_lane_is_not_claimed_again_before_its_lease_ends() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1"]).await;
    let begun = Instant::now();
    let first = store.claim_one(id, SHORT).await;
    assert_eq!((first.attempts, first.run.len()), (1, 1));
    let again = store.claim_when_due(id).await.remove(0);
    // The database counts in whole milliseconds.
    assert!(begun.elapsed() >= SHORT - Duration::from_millis(2), "{:?}", begun.elapsed());
    assert!(again.lane.token > first.lane.token);
    assert_eq!((again.attempts, &again.lane.key, &again.run), (2, &first.lane.key, &first.run));
    assert!(store.claim(id).await.is_empty());
    let wait = store.next_due(id).await.unwrap();
    assert!(is_about(wait, LONG), "{wait:?}");
    store.is_whole().await;
}

#[tokio::test]
async fn one_claim_asks_for_many_subscriptions_and_each_is_answered_for_itself() {
    let store = Store::new().await;
    let mut ids = Vec::new();
    for name in ["due", "few", "idle", "later", "paused", "down", "probed", "asked"] {
        let subscription = Subscription::new(name).unwrap();
        let (kind, event) = (["idle.one"], ["later.one"]);
        let subscription = match name {
            "idle" => subscription.events(kind).unwrap(),
            "later" => subscription.events(event).unwrap(),
            _ => subscription.events(["todo.created"]).unwrap(),
        };
        ids.push(store.register(subscription).await);
    }
    store.record_todos(&["1", "2", "3", "1"]).await;
    store.record([NewEvent::dynamic("later.one", "a", "1", &()).unwrap().delay(LONG)]).await;
    store.outbox.pause("paused").await.unwrap();
    store.outbox.open_circuit(ids[5], LONG, true).await.unwrap();
    store.outbox.open_circuit(ids[6], Duration::ZERO, true).await.unwrap();
    let wanted: Vec<Wanted> = ids
        .iter()
        .zip([(10, 10), (2, 1), (10, 10), (10, 10), (10, 10), (10, 10), (10, 10), (0, 0)])
        .map(|(id, (lanes, run))| Wanted { subscription: *id, lanes, run, all: true, ..Wanted::default() })
        .collect();
    tokio::time::sleep(Duration::from_millis(5)).await;
    let claims = store.outbox.claim_of(Holder { worker: "w", lease: LONG }, &wanted).await.unwrap();
    let found: Vec<_> = claims.iter().map(|claim| (runs(&claim.lanes), claim.probe)).collect();
    let nothing = || (Vec::new(), false);
    assert_eq!(
        found,
        [
            (vec![("todo/1", vec![1, 4]), ("todo/2", vec![2]), ("todo/3", vec![3])], false),
            (vec![("todo/1", vec![1]), ("todo/2", vec![2])], false),
            nothing(),
            nothing(),
            nothing(),
            nothing(),
            (vec![("todo/1", vec![1])], true),
            nothing(),
        ]
    );
    let of = |index: usize| claims[index].lanes.iter().all(|lane| lane.lane.subscription == ids[index]);
    assert!((0..ids.len()).all(of), "a lane is another's");
    let next: Vec<_> = claims.iter().map(|claim| claim.next).collect();
    assert_eq!(next[2], Some(NextDue { after: None, circuit: None }), "idle");
    assert!(next[3].is_some_and(|next| is_about(next.after.unwrap(), LONG)), "later: {:?}", next[3]);
    assert_eq!(next[4], None, "paused");
    assert!(next[5].is_some_and(|next| is_about(next.after.unwrap(), LONG) && next.circuit == Some(1)), "down");
    assert_eq!(next[7], Some(NextDue { after: Some(Duration::ZERO), circuit: None }), "only asked");
    store.is_whole().await;
}

#[tokio::test]
async fn large_events_of_one_subscription_leave_room_for_those_of_another() {
    let store = Store::new().await;
    let large = store.register(Subscription::new("large").unwrap().events(["large.one"]).unwrap()).await;
    let small = store.register(Subscription::new("small").unwrap().events(["todo.created"]).unwrap()).await;
    let text = "x".repeat(900 << 10);
    for number in 0..12 {
        store.record([NewEvent::dynamic("large.one", "a", format!("{number}"), &text).unwrap()]).await;
    }
    store.record_todos(&["1", "2"]).await;
    let wanted = [large, small].map(|subscription| Wanted { subscription, lanes: 20, run: 1, ..Wanted::default() });
    let claims = store.outbox.claim_of(Holder { worker: "w", lease: LONG }, &wanted).await.unwrap();
    assert!((1..12).contains(&claims[0].lanes.len()), "{}", claims[0].lanes.len());
    assert_eq!(claims[1].lanes.len(), 2);
    // What did not come along is given back.
    let lanes = "select count(*) from outbox_lanes where leased_by is null";
    assert_eq!(store.value::<i64>(lanes).await, 12 - claims[0].lanes.len() as i64);
}

/// Events of these todos, committed by a tenant.
async fn record_of(store: &Store, tenant: Option<&str>, ids: &[&str]) {
    let mut context = Context::default();
    context.tenant = tenant.map(str::to_owned);
    let unit = store.outbox.begin(context);
    ids.iter().for_each(|id| unit.events().push(todo(id)).map(|_| ()).unwrap());
    unit.commit().await.unwrap();
    store.outbox.route_waiting().await.unwrap();
}

#[tokio::test]
async fn a_lane_of_every_other_tenant_comes_before_those_of_tenants_that_have_enough() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    record_of(&store, Some("busy"), &["1", "2", "3", "4"]).await;
    record_of(&store, None, &["5"]).await;
    for (tenant, ids) in [("a", ["6", "7"]), ("b", ["8", "9"]), ("z", ["10", "11"])] {
        record_of(&store, Some(tenant), &ids).await;
    }
    let claim = async |lanes, others, passed: &[&str]| {
        let passed = passed.iter().map(|tenant| (*tenant).to_owned()).collect();
        let wanted = Wanted { subscription: id, lanes, others, passed, run: 1, all: true };
        let claims = store.outbox.claim_of(Holder { worker: "w", lease: LONG }, &[wanted]).await.unwrap();
        let mut keys: Vec<String> = claims[0].lanes.iter().map(|lane| lane.lane.key.clone()).collect();
        keys.sort();
        keys.iter().map(|key| key.trim_start_matches("todo/").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(claim(1, 0, &[]).await, ["1"], "nobody is passed");
    assert_eq!(claim(0, 2, &["busy"]).await, ["6", "8"], "one of each");
    // It goes on behind the last one, and begins anew.
    assert_eq!(claim(1, 1, &["busy"]).await, ["10", "7"]);
    assert_eq!(claim(3, 1, &["busy", "a"]).await, ["11", "2", "3", "9"], "what is left is for all");
    assert_eq!(claim(0, 9, &["busy"]).await, [""; 0], "no other is left");
    assert_eq!(claim(9, 9, &["busy"]).await, ["4", "5"]);
    store.is_whole().await;
}

#[tokio::test]
async fn of_a_subscription_that_is_paused_or_down_no_tenant_is_served() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    record_of(&store, Some("busy"), &["1"]).await;
    record_of(&store, Some("a"), &["2"]).await;
    let claim = async || {
        let passed = vec!["busy".to_owned()];
        let wanted = Wanted { subscription: id, lanes: 5, others: 5, passed, run: 1, all: true };
        let claims = store.outbox.claim_of(Holder { worker: "w", lease: LONG }, &[wanted]).await.unwrap();
        claims[0].lanes.len()
    };
    store.outbox.pause("s").await.unwrap();
    assert_eq!(claim().await, 0);
    store.outbox.resume("s").await.unwrap();
    store.outbox.open_circuit(id, LONG, true).await.unwrap();
    assert_eq!(claim().await, 0);
    store.outbox.close_circuit(id).await.unwrap();
    assert_eq!(claim().await, 2);
}

#[tokio::test]
async fn a_lane_that_was_tried_before_comes_with_its_head_alone() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let first = store.claim_one(id, SHORT).await;
    assert_eq!(runs(&[first]), [("todo/a", vec![1, 2, 3])]);
    let after_a_crash = store.claim_when_due(id).await.remove(0);
    assert_eq!(runs(std::slice::from_ref(&after_a_crash)), [("todo/a", vec![1])]);
    store.outbox.settle(&[failed(&after_a_crash, Duration::ZERO, "no")]).await.unwrap();
    let after_a_failure = store.claim_when_due(id).await.remove(0);
    assert_eq!(
        (after_a_failure.attempts, runs(std::slice::from_ref(&after_a_failure))),
        (3, vec![("todo/a", vec![1])])
    );
    store.outbox.settle(&[delivered_run(&after_a_failure)]).await.unwrap();
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![2, 3])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_lane_whose_holder_died_after_a_part_of_its_run_comes_with_its_next_head_alone() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "a", "a"]).await;
    let lane = store.claim_one(id, SHORT).await;
    store.outbox.settle(&[delivered(&lane, 1, Next::Keep)]).await.unwrap();
    let again = store.claim_when_due(id).await.remove(0);
    assert_eq!((again.attempts, runs(std::slice::from_ref(&again))), (2, vec![("todo/a", vec![2])]));
    store.is_whole().await;
}

#[tokio::test]
async fn a_paused_subscription_gives_nothing() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let other = store.subscribe("other").await;
    store.record_todos(&["1"]).await;
    store.execute("update outbox_subscriptions set paused_at = '2026-01-01T00:00:00.000Z' where name = 's'").await;
    assert!(store.claim(id).await.is_empty());
    assert_eq!(store.next_due(id).await, None);
    assert_eq!(store.claim(other).await.len(), 1);
    store.execute("update outbox_subscriptions set paused_at = null").await;
    assert_eq!(store.claim(id).await.len(), 1);
    store.is_whole().await;
}

#[tokio::test]
async fn what_is_paused_collects_events_and_goes_on_when_resumed() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1"]).await;
    let leased = store.claim_one(id, LONG).await;
    assert!(store.outbox.pause("s").await.unwrap());
    assert!(store.outbox.pause("s").await.unwrap(), "twice is once");
    assert!(!store.outbox.pause("unknown").await.unwrap());
    assert_eq!(
        store.outbox.settle(&[delivered_run(&leased)]).await.unwrap(),
        [Settled::Done],
        "what is under way ends"
    );
    store.record_todos(&["2"]).await;
    assert!(store.claim(id).await.is_empty());
    assert!(store.outbox.status().await.unwrap().subscriptions[0].paused);
    assert!(store.outbox.resume("s").await.unwrap());
    assert!(!store.outbox.resume("unknown").await.unwrap());
    assert_eq!(runs(&store.claim(id).await), [("todo/2", vec![2])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_paused_or_idle_subscription_is_polled_without_the_write_lock() {
    let store = Store::new().await;
    let (id, idle) = (store.subscribe("s").await, store.subscribe("idle").await);
    store.record_todos(&["1"]).await;
    store.execute("update outbox_subscriptions set paused_at = '2026-01-01T00:00:00.000Z' where name = 's'").await;
    store.execute("delete from outbox_deliveries where subscription_id = 2").await;
    store.execute("delete from outbox_lanes where subscription_id = 2").await;
    let writing = store.outbox.begin(Context::default());
    writing.tx().begin_now().await.unwrap();
    assert!(store.claim(id).await.is_empty());
    assert!(store.claim(idle).await.is_empty());
    writing.rollback().await;
    store.is_whole().await;
}

#[tokio::test]
async fn a_delayed_event_is_not_claimed_early_and_holds_back_only_its_own_key() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("a"), todo("a").delay(LONG), todo("a"), todo("b")]).await;
    let lanes = store.claim(id).await;
    assert_eq!(runs(&lanes), [("todo/a", vec![1]), ("todo/b", vec![4])]);
    for lane in &lanes {
        store.outbox.settle(&[delivered_run(lane)]).await.unwrap();
    }
    assert!(store.claim(id).await.is_empty());
    let wait = store.next_due(id).await.unwrap();
    assert!(is_about(wait, LONG), "{wait:?}");
    store.time_passes().await;
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![2, 3])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_delayed_head_holds_back_what_is_pushed_later_for_its_key() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("a").delay(LONG)]).await;
    store.record_todos(&["a"]).await;
    assert!(store.claim(id).await.is_empty());
    store.time_passes().await;
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![1, 2])]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_event_is_not_delivered_before_its_time_and_the_later_of_time_and_delay_counts() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let past = Utc::now() - LONG;
    store
        .record([
            todo("past").not_before(past),
            todo("delay").not_before(past).delay(LONG),
            todo("time").not_before(Utc::now() + LONG).delay(Duration::ZERO),
        ])
        .await;
    assert_eq!(runs(&store.claim(id).await), [("todo/past", vec![1])]);
    assert!(store.claim(id).await.is_empty());
    let soon = Utc::now().trunc_subsecs(3) + SHORT;
    store.record([todo("soon").not_before(soon), todo("soon too").delay(SHORT)]).await;
    let mut waited = store.claim_when_due(id).await;
    assert!(Utc::now() >= soon);
    if waited.len() == 1 {
        waited.extend(store.claim_when_due(id).await);
    }
    assert_eq!(runs(&waited), [("todo/soon", vec![4]), ("todo/soon too", vec![5])]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_priority_is_a_head_start_and_not_an_exemption_from_a_delay() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("low"), todo("delayed").priority(100).delay(LONG)]).await;
    store.record([todo("high").priority(1), todo("higher").priority(2)]).await;
    // Low, and one minute and a half older: before `high`, after `higher`.
    store.record_todos(&["old"]).await;
    for table in ["outbox_deliveries", "outbox_lanes"] {
        let older = database::before("due_at", "90");
        store.execute(&format!("update {table} set due_at = {older} where key = 'todo/old'")).await;
    }
    let lanes = store.claim(id).await;
    let keys: Vec<_> = lanes.iter().map(|lane| lane.lane.key.as_str()).collect();
    assert_eq!(keys, ["todo/higher", "todo/old", "todo/high", "todo/low"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_run_is_in_order_and_ends_at_its_limit() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a", "b", "a", "b", "a"]).await;
    let lanes = store.outbox.claim(id, "worker", 100, 2, LONG).await.unwrap().lanes;
    assert_eq!(runs(&lanes), [("todo/a", vec![1, 3]), ("todo/b", vec![2, 4])]);
    store.outbox.settle(&[delivered_run(&lanes[0]), delivered_run(&lanes[1])]).await.unwrap();
    assert_eq!(runs(&store.claim(id).await), [("todo/a", vec![5])]);
    store.is_whole().await;
}

#[tokio::test]
async fn the_oldest_lanes_are_claimed_first() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let names: Vec<String> = (0..20).map(|n| format!("{}", 99 - n)).collect();
    for name in &names {
        store.record_todos(&[name]).await;
    }
    for table in ["outbox_deliveries", "outbox_lanes"] {
        let older = database::before(database::NOW, "substr(key, 6)");
        store.execute(&format!("update {table} set due_at = {older}")).await;
    }
    let mut claimed = Vec::new();
    while claimed.len() < 20 {
        let lanes = store.outbox.claim(id, "worker", 5, 1, LONG).await.unwrap().lanes;
        assert_eq!(lanes.len(), 5);
        claimed.extend(lanes.into_iter().map(|lane| lane.run[0].aggregate_id.clone()));
    }
    assert_eq!(claimed, names);
    assert!(store.claim(id).await.is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn lanes_that_are_equally_old_come_in_the_order_of_their_events() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record((0..50).map(|n| todo(&format!("{}", 99 - n)))).await;
    let positions: Vec<_> = store.claim(id).await.iter().map(|lane| lane.run[0].position).collect();
    assert_eq!(positions, (1..=50).collect::<Vec<_>>());
    store.is_whole().await;
}

#[tokio::test]
async fn the_ordering_decides_what_waits_for_each_other() {
    let store = Store::new().await;
    let subscribe =
        async |name: &str, ordering| store.register(Subscription::new(name).unwrap().ordering(ordering)).await;
    let aggregate = subscribe("aggregate", Ordering::Aggregate).await;
    let none = subscribe("none", Ordering::None).await;
    let tenant = subscribe("tenant", Ordering::Tenant).await;
    let tag = subscribe("tag", Ordering::Tag("region".to_owned())).await;
    let global = subscribe("global", Ordering::Global).await;
    for (n, who) in [(1, Some("acme")), (2, None), (3, Some("other")), (4, Some("acme"))] {
        let unit = store.outbox.begin(Context::default());
        if let Some(who) = who {
            unit.events().set_tenant(who).unwrap();
        }
        let event = todo(if n < 3 { "a" } else { "b" });
        unit.events().push(if n == 3 { event } else { event.tag("region", "eu").unwrap() }).unwrap();
        unit.commit().await.unwrap();
    }
    let positions = async |id| -> Vec<Vec<i64>> {
        let lanes = store.claim(id).await;
        let mut runs: Vec<Vec<i64>> = runs(&lanes).into_iter().map(|(_, run)| run).collect();
        runs.sort();
        runs
    };
    assert_eq!(positions(aggregate).await, [vec![1, 2], vec![3, 4]]);
    assert_eq!(positions(none).await, [[1], [2], [3], [4]]);
    assert_eq!(positions(tenant).await, [vec![1, 4], vec![2], vec![3]]);
    assert_eq!(positions(tag).await, [vec![1, 2, 4], vec![3]]);
    assert_eq!(positions(global).await, [[1, 2, 3, 4]]);
    store.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_never_hold_the_same_lane() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record((0..200).map(|n| todo(&n.to_string()))).await;
    let other = store.another_process().await;
    let mut workers = Vec::new();
    for (outbox, name) in [(store.outbox.clone(), "a"), (other.clone(), "b"), (other, "c")] {
        workers.push(tokio::spawn(async move {
            let mut keys = Vec::new();
            loop {
                let lanes = outbox.claim(id, name, 7, 1, LONG).await.unwrap().lanes;
                if lanes.is_empty() {
                    return keys;
                }
                keys.extend(lanes.into_iter().map(|lane| lane.lane.key));
            }
        }));
    }
    let mut keys = Vec::new();
    for worker in workers {
        keys.extend(worker.await.unwrap());
    }
    assert_eq!(keys.len(), 200);
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 200);
    store.is_whole().await;
}

/// The backlog alone would take four seconds.
#[tokio::test]
async fn what_comes_to_lie_behind_a_mark_is_claimed_while_a_backlog_goes_on() {
    const LANES: usize = 5;
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record([todo("long").priority(1), todo("long").priority(1)]).await;
    store.record((0..1000).map(|n| todo(&n.to_string()))).await;
    let mut claim = store.outbox.claim(id, "worker", 5, 1, LONG).await.unwrap();
    let long = claim.lanes.iter().find(|lane| lane.lane.key == "todo/long").unwrap();
    store.outbox.settle(&[delivered_run(long)]).await.unwrap();
    store.record([todo("late").priority(100)]).await;
    let mut expected = vec!["todo/late", "todo/long"];
    let begun = Instant::now();
    while !expected.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        claim = store.claim_on(id, 5).await;
        assert_eq!(claim.lanes.len(), LANES, "the backlog is over and {expected:?} were not claimed");
        expected.retain(|key| claim.lanes.iter().all(|lane| lane.lane.key != *key));
    }
    println!("claimed after {:?}", begun.elapsed());
    store.is_whole().await;
}

#[tokio::test]
async fn claims_that_go_on_after_a_mark_leave_nothing_out() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record((0..100).map(|n| todo(&n.to_string()))).await;
    let due_at = database::time("'2026-01-01T00:00:00.000Z'");
    // All of them at the same time.
    store.execute(&format!("update outbox_lanes set due_at = {due_at}")).await;
    let mut keys = Vec::new();
    loop {
        let claim = store.claim_on(id, 7).await;
        let is_full = claim.lanes.len() == 7;
        keys.extend(claim.lanes.into_iter().map(|lane| lane.lane.key));
        if !is_full {
            break;
        }
    }
    assert_eq!(keys.len(), 100);
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 100);
    store.record_todos(&["a", "b"]).await;
    store.outbox.claim(id, "worker", 1, 1, LONG).await.unwrap();
    store.execute(&format!("update outbox_lanes set due_at = {due_at} where key = 'todo/b'")).await;
    let rest = store.claim_on(id, 1).await;
    assert_eq!(runs(&rest.lanes), [("todo/b", vec![102])], "there is nothing but behind the mark");
    store.is_whole().await;
}

#[tokio::test]
async fn a_subscription_that_does_not_exist_gives_nothing() {
    let store = Store::new().await;
    store.subscribe("s").await;
    store.record_todos(&["1"]).await;
    assert!(store.claim(7).await.is_empty());
    assert_eq!(store.next_due(7).await, None);
    store.is_whole().await;
}

/// The token of a job in Redis is public there, and that of the worker which has taken it over is one more.
#[tokio::test]
async fn only_leases_of_relays_are_taken_over_and_once() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let other = store.subscribe("other").await;
    store.record_todos(&["a", "a", "b"]).await;
    let relayed = store.outbox.claim_for_relay(id, "r", 10, LONG).await.unwrap().lanes;
    assert_eq!(relayed.len(), 2);
    assert!(relayed.iter().all(|lane| lane.run.is_empty() && lane.attempts == 1), "{relayed:?}");
    let jobs: Vec<_> = relayed.into_iter().map(|lane| lane.lane).collect();
    assert_eq!(store.outbox.relayed(&jobs).await.unwrap(), jobs);
    let take_over =
        async |subscription, jobs: &[LaneRef]| store.outbox.take_over(subscription, "w", jobs, 10, LONG).await.unwrap();
    assert!(take_over(other, &jobs).await.is_empty(), "they are of another subscription");
    let forged = jobs.iter().map(|job| LaneRef { token: job.token + 1, ..job.clone() }).collect::<Vec<_>>();
    assert!(take_over(id, &forged).await.is_empty());

    let taken = take_over(id, &[jobs.clone(), jobs.clone()].concat()).await;
    assert_eq!(runs(&taken), [("todo/a", vec![1, 2]), ("todo/b", vec![3])]);
    assert!(taken.iter().all(|lane| lane.attempts == 1));
    assert!(take_over(id, &jobs).await.is_empty(), "they are taken");
    let leases: Vec<_> = taken.iter().map(|lane| lane.lane.clone()).collect();
    assert!(take_over(id, &leases).await.is_empty(), "a worker has them");
    assert!(store.outbox.relayed(&leases).await.unwrap().is_empty());
    assert_eq!(store.outbox.held(&leases).await.unwrap(), leases);
    store.outbox.settle(&taken.iter().map(delivered_run).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(store.claim(other).await.len(), 2);
    store.is_whole().await;
}

#[tokio::test]
async fn the_database_says_what_time_it_is() {
    let store = Store::new().await;
    let (before, instance) = (Utc::now(), store.outbox.instance().await.unwrap());
    let beat = store.outbox.heartbeat("w", &[&Subscription::new("s").unwrap()]).await.unwrap();
    let margin = chrono::TimeDelta::milliseconds(10);
    assert!(before - margin <= instance.now && instance.now <= beat && beat <= Utc::now() + margin);
}

/// What a claim takes of a worker's memory does not grow with its lanes, their runs, and the size of payloads.
#[tokio::test]
async fn a_claim_ends_when_its_payloads_are_some_mib() {
    const MOST: usize = 8 << 20;
    const SIZE: usize = 300_000;
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let large = |key: &str| NewEvent::dynamic("todo.grown", "todo", key, &"x".repeat(SIZE)).unwrap();
    let keys: Vec<String> = (0..20).map(|key| format!("{key:02}")).collect();
    for _ in 0..5 {
        store.record(keys.iter().map(|key| large(key))).await;
    }
    let mut arrived: HashMap<String, Vec<i64>> = HashMap::new();
    let mut claims = 0;
    loop {
        let lanes = store.claim(id).await;
        if lanes.is_empty() {
            break;
        }
        claims += 1;
        let bytes: usize = lanes.iter().flat_map(|lane| &lane.run).map(|event| event.payload.len()).sum();
        assert!(bytes < MOST + 2 * SIZE, "{bytes} bytes in a claim");
        for lane in &lanes {
            let run = lane.run.iter().map(|event| event.position);
            arrived.entry(lane.lane.key.clone()).or_default().extend(run);
        }
        let reports: Vec<_> = lanes.iter().map(delivered_run).collect();
        assert!(store.outbox.settle(&reports).await.unwrap().iter().all(|settled| *settled == Settled::Done));
    }
    // Those that did not come along were given back, in their order and with their attempt.
    assert_eq!(arrived.len(), 20);
    assert!(arrived.values().all(|run| run.len() == 5 && run.is_sorted()), "{arrived:?}");
    assert_eq!(store.column::<i32>("select distinct attempts from outbox_delivered").await, [1]);
    assert!((4..=20).contains(&claims), "{claims}");
    store.is_whole().await;
}

#[tokio::test]
async fn the_rate_that_workers_have_together_is_reserved_one_after_another() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("t").await);
    let reserve = async |asked: &[(i32, u32)]| {
        let every = Duration::from_millis(100);
        let asked = asked.iter().map(|(subscription, attempts)| Reservation {
            subscription: *subscription,
            attempts: *attempts,
            every,
        });
        Trait::reserve(&store.outbox, &asked.collect::<Vec<_>>()).await.unwrap()
    };
    let is_about_in = |after: Option<Duration>, millis: u64| {
        let after = after.expect("it is reserved");
        after <= Duration::from_millis(millis + 10)
            && after + Duration::from_millis(200) > Duration::from_millis(millis)
    };
    assert!(is_about_in(reserve(&[(id, 5)]).await[0], 0));
    let both = reserve(&[(other, 5), (id, 7), (-1, 1)]).await;
    assert!(is_about_in(both[0], 0) && is_about_in(both[1], 500), "{both:?}");
    assert_eq!(both[2], None, "there is no such subscription");
    // By now it is reserved for more than a second ahead.
    assert_eq!(reserve(&[(id, 1)]).await, [None]);
    assert!(is_about_in(reserve(&[(other, 1)]).await[0], 500));
    // A clock stepped back by a day.
    let tomorrow = match database::BACKEND {
        DbBackend::Sqlite => "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '+1 day')",
        _ => "now() + interval '1 day'",
    };
    store.execute(&format!("update outbox_subscriptions set rate_at = {tomorrow}")).await;
    assert!(is_about_in(reserve(&[(id, 1)]).await[0], 0));
}

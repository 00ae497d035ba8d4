//! Routing beside others: one statement, with locks that it does not wait for.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::{Actor, Context, NewEvent, StartPosition, Subscription};
use outbox_seaorm::{Next, NextLook, Outbox, Routed, Router, Taker};
use sea_orm::{ConnectionTrait, TransactionTrait};

use outbox_test_servers::{Fault, Proxy};

use super::{
    database::{DAMAGE, server},
    fixture::{LONG, SHORT, Store, delivered, eventually, failed, runs, todo},
};

async fn commit(outbox: &Outbox, event: NewEvent) {
    outbox.transaction(Context::default(), |_, events| async move { events.push(event) }).await.unwrap();
}

fn taker(subscription: i32) -> Taker {
    Taker { subscription, worker: Arc::from("w"), lanes: 10, passed: Vec::new(), run: 10, lease: LONG }
}

/// Looks until nothing is left.
async fn route_all(router: &mut Router, takers: &[Taker]) -> Routed {
    let mut all = Routed { events: 0, leased: Vec::new(), next: NextLook::Now };
    let began = Instant::now();
    while all.next != NextLook::Woken {
        let routed = router.route(takers, 500).await.unwrap();
        all.events += routed.events;
        all.leased.extend(routed.leased);
        all.next = routed.next;
        assert!(began.elapsed() < Duration::from_secs(20), "{all:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    all
}

/// A transaction that has stored its event and is not over, in another process.
async fn open_transaction(store: &Store, key: &str) -> sea_orm::DatabaseTransaction {
    let tx = store.another_process().await.writer().begin().await.unwrap();
    tx.execute_unprepared(&format!("select outbox_record('todo.created', 'todo', '{key}', '{{}}')")).await.unwrap();
    tx
}

#[tokio::test]
async fn what_commits_late_comes_behind_a_head_that_was_tried() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let late = open_transaction(&store, "a").await;
    store.record_todos(&["a"]).await;
    let lane = store.claim_one(id, LONG).await;
    store.outbox.settle(&[failed(&lane, Duration::ZERO, "no")]).await.unwrap();
    late.commit().await.unwrap();
    store.outbox.route_waiting().await.unwrap();
    let lane = store.claim_one(id, LONG).await;
    assert_eq!((lane.attempts, lane.run.len(), lane.run[0].position), (2, 1, 2), "its attempts are its own");
    store.outbox.settle(&[delivered(&lane, 1, Next::Yield)]).await.unwrap();
    let lane = store.claim_one(id, LONG).await;
    assert_eq!((lane.attempts, lane.run[0].position), (1, 1));
    store.is_whole().await;
}

#[tokio::test]
async fn lanes_of_tenants_that_have_enough_are_not_leased_as_they_are_routed() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    let mut router = store.outbox.router();
    let takers = [Taker { passed: vec!["busy".to_owned()], ..taker(id) }, taker(other)];
    let of = async |tenant: Option<&str>, keys: &[&str]| {
        let mut context = Context::default();
        context.tenant = tenant.map(str::to_owned);
        let unit = store.outbox.begin(context);
        keys.iter().for_each(|key| unit.events().push(todo(key)).map(|_| ()).unwrap());
        unit.commit().await.unwrap();
    };
    // One event has a statement of its own.
    for keys in [&["a"][..], &["b", "c", "d"]] {
        let mut leased = Vec::new();
        for tenant in [Some("busy"), Some("quiet"), None] {
            let keys: Vec<String> = keys.iter().map(|key| format!("{key}{tenant:?}")).collect();
            of(tenant, &keys.iter().map(String::as_str).collect::<Vec<_>>()).await;
            let routed = route_all(&mut router, &takers).await;
            let count = |id| routed.leased.iter().filter(|lane| lane.lane.subscription == id).count();
            leased.push((count(id), count(other)));
        }
        let all = keys.len();
        assert_eq!(leased, [(0, all), (all, all), (all, all)]);
    }
    let waiting = "select count(*) from outbox_lanes where leased_by is null and tenant = 'busy'";
    assert_eq!(store.value::<i64>(waiting).await, 4);
}

#[tokio::test]
async fn what_this_process_commits_is_leased_as_it_is_routed() {
    let store = Store::new().await;
    let (id, other) = (store.subscribe("s").await, store.subscribe("other").await);
    let mut router = store.outbox.router();
    let tagged = todo("a").tag("t", "v").unwrap().max_attempts(3);
    commit(&store.outbox, tagged.clone()).await;
    let routed = router.route(&[taker(id)], 500).await.unwrap();
    assert_eq!((routed.events, routed.next), (1, NextLook::Woken));
    let [lane] = routed.leased.try_into().unwrap();
    assert_eq!((lane.attempts, lane.lane.worker.as_str(), lane.run[0].id), (1, "w", tagged.id()));
    let stored = &store.outbox.events(&outbox_seaorm::EventFilter::default(), None, 1).await.unwrap().events[0];
    assert_eq!(&lane.run[0], stored, "as if it had been read");
    assert!(store.claim(id).await.is_empty(), "it is leased");
    assert_eq!(store.claim(other).await.len(), 1, "nobody of this process takes that");
    store.outbox.settle(&[delivered(&lane, 1, Next::Yield)]).await.unwrap();
    // A lane that exists is not leased: others may have it.
    commit(&store.outbox, todo("b")).await;
    router.route(&[], 500).await.unwrap();
    commit(&store.outbox, todo("b")).await;
    assert!(router.route(&[taker(id)], 500).await.unwrap().leased.is_empty());
    store.is_whole().await;
}

#[tokio::test]
async fn routing_leases_only_what_a_claim_would() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut router = store.outbox.router();
    let mut leased = async |event: NewEvent| {
        commit(&store.outbox, event).await;
        router.route(&[taker(id)], 500).await.unwrap().leased.len()
    };
    assert_eq!(leased(todo("delayed").delay(LONG)).await, 0);
    store.execute("update outbox_subscriptions set paused_at = now()").await;
    assert_eq!(leased(todo("paused")).await, 0);
    store.execute("update outbox_subscriptions set paused_at = null, circuit_until = now()").await;
    assert_eq!(leased(todo("down")).await, 0);
    store.execute("update outbox_subscriptions set circuit_until = null, backfill_from = 1").await;
    assert_eq!(leased(todo("filling")).await, 0);
    store.execute("update outbox_subscriptions set backfill_from = null").await;
    assert_eq!(leased(todo("free")).await, 1);
    for n in 0..15 {
        commit(&store.outbox, todo(&format!("many {n}"))).await;
    }
    let routed = route_all(&mut router, &[taker(id)]).await;
    assert_eq!((routed.events, routed.leased.len()), (15, 10));
    store.is_whole().await;
}

/// Of another process' commits small events come along with their marks; large ones, and those that cannot be read, are
/// read as a claim reads them.
#[tokio::test]
async fn events_of_another_process_are_leased_whole_whatever_their_size() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let other = store.another_process().await;
    let mut context = Context::default();
    context.tenant = Some("t".to_owned());
    context.actor = Some(Actor { kind: "USER".to_owned(), id: "7".to_owned() });
    context.correlation_id = Some("story".to_owned());
    context.causation_id = Some("command".to_owned());
    context.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
    context.tracestate = Some("a=b".to_owned());
    let unit = other.begin(context);
    for length in [10, 4_000, 5_000, 200_000] {
        let event = NewEvent::dynamic("todo.created", "todo", length.to_string(), &"x".repeat(length)).unwrap();
        unit.events().push(event.max_attempts(3).tag("size", "any").unwrap()).unwrap();
    }
    unit.commit().await.unwrap();
    for (n, (change, _)) in DAMAGE.iter().enumerate() {
        commit(&other, todo(&format!("damaged {n}"))).await;
        store.execute(&format!("update outbox_events set {change} where aggregate_id = 'damaged {n}'")).await;
    }
    let routed = store.outbox.router().route(&[taker(id)], 500).await.unwrap();
    assert_eq!(routed.leased.len(), 4 + DAMAGE.len());
    for lane in routed.leased {
        assert_eq!(lane.unreadable.is_some(), lane.lane.key.contains("damaged"), "{lane:?}");
        if lane.unreadable.is_none() {
            let stored = store.outbox.event(lane.run[0].id).await.unwrap().unwrap();
            assert_eq!(lane.run, [stored.event.unwrap()]);
        }
    }
}

/// What waits, and the statement that routes it, and sometimes what the floor is. The same with a reading of what was leased
/// takes two more.
#[tokio::test]
async fn small_events_of_another_process_are_not_read_a_second_time() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let proxy = Proxy::start(server().port()).await;
    let outbox = Outbox::connect(&proxy.url(&store.place.url(), server().port()), 1).await.unwrap();
    let (mut router, mut answers) = (outbox.router(), Vec::new());
    for n in 0..8 {
        for key in ["a", "b"] {
            commit(&store.outbox, todo(&format!("{key}{n}"))).await;
        }
        let before = proxy.answers();
        assert_eq!(router.route(&[taker(id)], 500).await.unwrap().leased.len(), 2);
        answers.push(proxy.answers() - before);
    }
    assert!(answers.iter().min() <= Some(&3), "{answers:?}");
}

/// Its own commit is not all that waits: what another process committed before comes first.
#[tokio::test]
async fn an_event_of_another_process_is_not_overtaken() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut router = store.outbox.router();
    let other = store.another_process().await;
    for _ in 0..3 {
        commit(&other, todo("a")).await;
        commit(&store.outbox, todo("a")).await;
        router.route(&[], 500).await.unwrap();
    }
    assert_eq!(store.deliver_all(id).await, [1, 2, 3, 4, 5, 6]);
    store.is_whole().await;
}

/// A commit whose answer came late is handed over when it was found and routed already: it stands for no other mark.
#[tokio::test]
async fn an_event_that_is_routed_already_hides_no_other_that_comes_first() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut router = store.outbox.router();
    commit(&store.outbox, todo("late")).await;
    store.another_process().await.route_waiting().await.unwrap();
    commit(&store.another_process().await, todo("a")).await;
    commit(&store.outbox, todo("a")).await;
    router.route(&[], 500).await.unwrap();
    assert_eq!(store.deliver_all(id).await.iter().filter(|position| **position > 1).collect::<Vec<_>>(), [&2, &3]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_lane_that_somebody_has_locked_waits_with_what_follows_it_and_nothing_else() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["a"]).await;
    let mut router = store.outbox.router();
    let holding = store.another_process().await.writer().begin().await.unwrap();
    holding.execute_unprepared("select from outbox_lanes where key = 'todo/a' for update").await.unwrap();
    for key in ["a", "b", "a", "c"] {
        commit(&store.outbox, todo(key)).await;
    }
    let began = Instant::now();
    let mut routed = 0;
    while routed < 2 {
        routed += router.route(&[], 500).await.unwrap().events;
        assert!(began.elapsed() < Duration::from_secs(2), "{routed}");
    }
    let waiting = store.column::<i64>("select position from outbox_unrouted order by position").await;
    assert_eq!(waiting, [2, 4]);
    assert_eq!(router.route(&[], 500).await.unwrap().next, NextLook::Soon);
    holding.rollback().await.unwrap();
    eventually("the rest", async || {
        router.route(&[], 500).await.unwrap();
        (store.count("outbox_unrouted").await == 0).then_some(())
    })
    .await;
    assert_eq!(store.deliver_all(id).await.len(), 5);
    store.is_whole().await;
}

#[tokio::test]
async fn a_mark_that_somebody_has_locked_is_waited_for() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for key in ["a", "a", "b"] {
        commit(&store.outbox, todo(key)).await;
    }
    let holding = store.another_process().await.writer().begin().await.unwrap();
    holding.execute_unprepared("select from outbox_unrouted where position = 1 for update").await.unwrap();
    let mut router = store.outbox.router();
    eventually("the other key", async || {
        router.route(&[], 500).await.unwrap();
        (store.count("outbox_unrouted").await == 2).then_some(())
    })
    .await;
    holding.rollback().await.unwrap();
    eventually("the rest", async || {
        router.route(&[], 500).await.unwrap();
        (store.count("outbox_unrouted").await == 0).then_some(())
    })
    .await;
    let delivered = store.deliver_all(id).await;
    assert_eq!(delivered.iter().filter(|position| **position < 3).collect::<Vec<_>>(), [&1, &2]);
    store.is_whole().await;
}

/// A client that is frozen in the middle of routing, or of a registration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_holds_up_routing_is_ended() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let frozen = store.another_process().await.writer().begin().await.unwrap();
    frozen.execute_unprepared("/* outbox:meta */ select from outbox_meta for update").await.unwrap();
    commit(&store.outbox, todo("a")).await;
    let mut router = store.outbox.router();
    let began = Instant::now();
    assert_eq!(router.route(&[], 500).await.unwrap().next, NextLook::Soon);
    let complaint = eventually("the complaint", async || {
        let found = store.outbox.checkup().await.unwrap();
        found.into_iter().find(|found| found.problem.starts_with("routing is held up by session "))
    });
    let complaint = complaint.await;
    assert!(complaint.problem.ends_with("(idle in transaction)"), "{}", complaint.problem);
    assert_eq!(route_all(&mut router, &[]).await.events, 1);
    assert!((3..9).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert!(frozen.commit().await.is_err(), "it was ended");
    assert_eq!(store.deliver_all(id).await, [1]);
    store.is_whole().await;
}

/// A router that is stopped after its first statement, after its second, and so on, while others write and route; it
/// continues when they are done, or dies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_is_frozen_after_any_statement_loses_nothing_and_holds_up_nobody() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut places = 0;
    for (dies, looks) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut is_frozen = true;
        for statements in 1.. {
            let proxy = Proxy::start(server().port()).await;
            let other = Outbox::connect(&proxy.url(&store.place.url(), server().port()), 1).await.unwrap();
            let mut frozen = other.router();
            assert_eq!(route_all(&mut frozen, &[]).await.events, 0);
            // Handed over by its own process, or found.
            let writer = if looks { &store.outbox } else { &other };
            for key in ["a", "b", "a"] {
                commit(writer, todo(key)).await;
            }
            let answers = proxy.answers() + statements;
            proxy.set(Fault::FreezeAfter(answers));
            let taker = Taker { lease: SHORT, ..taker(id) };
            let routing = tokio::spawn(async move { frozen.route(&[taker], 500).await });
            eventually("a statement", async || (routing.is_finished() || proxy.answers() >= answers).then_some(()))
                .await;
            // The answer of the last statement arrives, and nothing comes after it.
            tokio::time::sleep(Duration::from_millis(20)).await;
            is_frozen = !routing.is_finished();
            places += usize::from(is_frozen);
            let began = Instant::now();
            for key in ["a", "c"] {
                commit(&store.outbox, todo(key)).await;
            }
            route_all(&mut store.outbox.router(), &[]).await;
            assert!(began.elapsed() < Duration::from_secs(2), "{statements}: {:?}", began.elapsed());
            proxy.set(if dies { Fault::Refuse } else { Fault::None });
            let routed = routing.await.unwrap();
            assert!(routed.is_ok() || dies && is_frozen, "{statements}: {routed:?}");
            let mut positions = Vec::new();
            eventually("all deliveries", async || {
                positions.extend(store.deliver_all(id).await);
                (positions.len() >= 5).then_some(())
            })
            .await;
            let first = positions.iter().min().copied().unwrap();
            let of_a: Vec<i64> =
                positions.iter().map(|position| position - first).filter(|n| [0, 2, 3].contains(n)).collect();
            assert_eq!(of_a, [0, 2, 3], "{statements}: {positions:?}");
            assert_eq!(positions.len(), 5, "{statements}: {positions:?}");
            store.is_whole().await;
            if !is_frozen {
                break;
            }
        }
        assert!(!is_frozen);
    }
    assert!(places >= 8, "{places}");
}

#[tokio::test]
async fn an_event_that_cannot_be_routed_is_set_aside_and_holds_up_nobody() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let refuse = "
        create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'it is cursed' using errcode = '22023'; end $$;
        create trigger refuse before insert on outbox_deliveries for each row when (new.key = 'todo/bad')
            execute function refuse()";
    store.execute(refuse).await;
    for key in ["a", "b", "bad", "c", "bad", "d"] {
        commit(&store.outbox, todo(key)).await;
    }
    let mut router = store.outbox.router();
    assert_eq!(route_all(&mut router, &[]).await.events, 4);
    let aside = store.outbox.set_aside(None, 10).await.unwrap();
    assert_eq!(aside.iter().map(|each| each.position).collect::<Vec<_>>(), [5, 3]);
    assert!(aside[0].error.contains("it is cursed"), "{}", aside[0].error);
    assert_eq!(store.claim(id).await.len(), 4);

    // Everything is refused: that is not about the events, and nothing more is set aside.
    store.execute("drop trigger refuse on outbox_deliveries").await;
    store
        .execute("create trigger refuse before insert on outbox_deliveries for each row execute function refuse()")
        .await;
    for n in 0..6 {
        commit(&store.outbox, todo(&n.to_string())).await;
    }
    let refused = eventually("the alarm", async || router.route(&[], 500).await.err()).await;
    assert!(refused.to_string().contains("it is cursed"), "{refused}");
    assert_eq!(store.outbox.unrouted().await.unwrap().set_aside, 2 + 3);
    store.execute("drop trigger refuse on outbox_deliveries").await;
    store.outbox.put_back(None, &outbox_seaorm::By::new("ada")).await.unwrap();
    route_all(&mut router, &[]).await;
    assert_eq!(store.count("outbox_unrouted").await, 0);
    assert_eq!(store.count("outbox_deliveries").await, 12);
    store.is_whole().await;
}

/// Whoever writes into the tables without `outbox_record` has no checks. A column of an event that routing calculates with
/// may then have any value of its type.
#[tokio::test]
async fn an_event_with_values_out_of_bounds_holds_up_nobody() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let numbers = ["'NaN'", "'infinity'", "'-infinity'", "1e300", "-1e300"].map(|wait| (wait, "now()", "null"));
    let times = ["'infinity'", "'-infinity'", "'4713-01-02 BC'", "'290000-01-01'"];
    let recorded = times.map(|time| ("0", time, "null"));
    let early = ("-1e300", "'4713-01-02 BC'", "'infinity'");
    let not_before = times.map(|time| ("0", "now()", time));
    let all: Vec<_> = numbers.into_iter().chain(recorded).chain(not_before).chain([early]).collect();
    for (n, (wait, recorded_at, not_before)) in all.iter().enumerate() {
        let insert = format!(
            "with event as (
                insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
                                           occurred_at, recorded_at, wait_seconds, not_before)
                values (gen_random_uuid(), 'todo.created', 1, 'todo', '{n}', '{{}}', now(), {recorded_at}, {wait},
                        {not_before})
                returning position)
             insert into outbox_unrouted (position) select position from event"
        );
        store.execute(&insert).await;
    }
    commit(&store.outbox, todo("after")).await;
    let mut router = store.outbox.router();
    assert_eq!(route_all(&mut router, &[]).await.events, all.len() + 1);
    assert_eq!(store.outbox.unrouted().await.unwrap().set_aside, 0);
    let lanes = store.claim(id).await;
    assert!(lanes.iter().any(|lane| lane.lane.key == "todo/after"), "{lanes:?}");
    // The other way to a delivery calculates with the same columns. It leaves out what cannot be read: the five of a time
    // that is none.
    let beginning = Subscription::new("later").unwrap().start(StartPosition::Beginning);
    store.register(beginning).await;
    assert_eq!(store.count("outbox_deliveries").await, 2 * (i64::try_from(all.len()).unwrap() + 1) - 5);
    store.is_whole().await;
}

#[tokio::test]
async fn a_high_priority_overtakes_what_is_not_routed_but_not_its_own_key() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    for n in 0..30 {
        commit(&store.outbox, todo(&n.to_string())).await;
    }
    commit(&store.outbox, todo("29").priority(9)).await;
    commit(&store.outbox, todo("high").priority(9)).await;
    let mut router = store.another_process().await.router();
    router.route(&[], 5).await.unwrap();
    let lanes = store.column::<String>("select key from outbox_lanes order by due_at limit 1").await;
    assert_eq!(lanes, ["todo/high"]);
    assert_eq!(store.count("outbox_lanes").await, 6, "the other one waits for its turn");
    route_all(&mut router, &[]).await;
    let lanes = store.claim(id).await;
    let of_29 = lanes.iter().find(|lane| lane.lane.key == "todo/29").unwrap();
    assert_eq!(runs(std::slice::from_ref(of_29)), [("todo/29", vec![30, 31])]);
    store.is_whole().await;
}

/// Many entries of the index that nobody may remove, because of somebody's old snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_appear_late_are_routed_whatever_the_floor_is() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let mut router = store.outbox.router();
    let late = open_transaction(&store, "late").await;
    for n in 0..20 {
        commit(&store.outbox, todo(&n.to_string())).await;
        router.route(&[], 500).await.unwrap();
    }
    late.commit().await.unwrap();
    let mut looking = store.another_process().await.router();
    assert_eq!(route_all(&mut looking, &[]).await.events, 1);
    assert_eq!(store.deliver_all(id).await.len(), 21);
    store.is_whole().await;
}

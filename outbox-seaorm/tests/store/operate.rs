//! What operators see and do.

use std::{collections::HashSet, time::Duration};

use chrono::Utc;
use outbox_core::{Actor, AttemptLog, Context, Ordering, StartPosition, Subscription};
use outbox_seaorm::{
    By, Changed, ClaimedLane, DeadLetterFilter, DeliveryState, EventFilter, LaneReport, Next, Outbox, Purged, Replay,
    Retention, Why, entity::archive, once,
};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, EntityTrait, Statement, TryGetable};
use serde_json::json;
use uuid::Uuid;

use super::{
    database::{self, BACKEND, NOW, Place, before},
    fixture::{LONG, delivered, delivered_run, failed, of_type, record, todo},
};

const KEPT: Duration = Duration::from_secs(3600);

struct Db {
    outbox: Outbox,
    witness: DatabaseConnection,
    _place: Place,
}

impl Db {
    async fn new() -> Self {
        let place = Place::migrated().await;
        let outbox = place.connect(2).await;
        let witness = place.witness(&outbox).await;
        Self { outbox, witness, _place: place }
    }

    async fn subscribe(&self, name: &str) -> i32 {
        self.outbox.register(&Subscription::new(name).unwrap()).await.unwrap()
    }

    async fn record_todos(&self, ids: &[&str]) {
        record(&self.outbox, ids.iter().map(|id| todo(id))).await;
    }

    async fn claim(&self, subscription: i32) -> Vec<ClaimedLane> {
        self.outbox.claim(subscription, "worker", 1000, 1000, LONG).await.unwrap().lanes
    }

    async fn settle(&self, report: LaneReport) {
        self.outbox.settle(&[report]).await.unwrap();
    }

    /// Claims all that is due and gives up the first of each lane; the rest of a lane goes on, or is held.
    async fn all_die(&self, subscription: i32, hold: bool) {
        for lane in self.claim(subscription).await {
            let position = lane.run[0].position;
            let mut dead = delivered(&lane, 1, if hold { Next::Hold { position } } else { Next::Yield });
            dead.finished[0].error = Some("no such address".to_owned());
            self.settle(dead).await;
        }
    }

    async fn all_delivered(&self, subscription: i32) {
        loop {
            let lanes = self.claim(subscription).await;
            if lanes.is_empty() {
                return;
            }
            for lane in lanes {
                self.settle(delivered_run(&lane)).await;
            }
        }
    }

    fn hand(&self) -> &DatabaseConnection {
        Place::hand(&self.outbox, &self.witness)
    }

    async fn execute(&self, sql: &str) {
        self.hand().execute_unprepared(sql).await.unwrap();
    }

    async fn column<T: TryGetable>(&self, sql: &str) -> Vec<T> {
        let rows = self.witness.query_all_raw(Statement::from_string(BACKEND, sql)).await.unwrap();
        rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
    }

    async fn count(&self, table: &str) -> i64 {
        self.column(&format!("select count(*) from {table}")).await[0]
    }

    async fn event(&self, position: i64) -> Uuid {
        self.column(&format!("select event_id from outbox_events where position = {position}")).await[0]
    }

    async fn why(&self, position: i64, subscription: &str) -> Why {
        let whys = self.outbox.why(self.event(position).await).await.unwrap().unwrap();
        whys.into_iter().find(|why| why.subscription == subscription).unwrap()
    }

    async fn replay_dead(&self, filter: &DeadLetterFilter) -> Changed {
        self.outbox.replay_dead_letters(filter, false, &by()).await.unwrap()
    }

    async fn all_a_day_ago(&self) {
        for (table, column) in [
            ("outbox_events", "recorded_at"),
            ("outbox_delivered", "delivered_at"),
            ("outbox_dead_letters", "died_at"),
            ("outbox_inbox", "handled_at"),
        ] {
            let earlier = before(column, "86400");
            self.execute(&format!("update {table} set {column} = {earlier}")).await;
        }
    }

    async fn purge(&self, retention: &Retention) -> Purged {
        self.outbox.purge(retention).await.unwrap()
    }

    async fn is_whole(&self) {
        let wrong: Vec<String> = self
            .column(
                "select key from outbox_lanes l
                  where pending <> (select count(*) from outbox_deliveries d
                                     where d.subscription_id = l.subscription_id and d.key = l.key)
                     or pending = 0 and held_at is null
                 union all
                 select key from outbox_deliveries d
                  where not exists (select 1 from outbox_lanes l
                                     where l.subscription_id = d.subscription_id and l.key = d.key)
                     or not exists (select 1 from outbox_events e where e.position = d.position)
                     or exists (select 1 from outbox_delivered f
                                 where f.subscription_id = d.subscription_id and f.position = d.position)
                     or exists (select 1 from outbox_dead_letters x
                                 where x.subscription_id = d.subscription_id and x.position = d.position)
                 union all
                 select 'history of ' || position from outbox_delivered
                  where position not in (select position from outbox_events)",
            )
            .await;
        assert_eq!(wrong, Vec::<String>::new());
    }
}

fn by() -> By {
    By::new("anna").reason("the receiver is back")
}

fn all() -> DeadLetterFilter {
    DeadLetterFilter::default()
}

fn runs(lanes: &[ClaimedLane]) -> Vec<(u32, Vec<i64>)> {
    lanes.iter().map(|lane| (lane.attempts, lane.run.iter().map(|event| event.position).collect())).collect()
}

fn both(changed: u64) -> Changed {
    Changed { matched: changed, changed }
}

#[tokio::test]
async fn a_replayed_dead_letter_is_due_at_its_place_with_all_attempts() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "b"]).await;
    db.all_die(id, false).await;
    db.record_todos(&["a"]).await;
    assert_eq!(db.replay_dead(&all()).await, both(2));
    db.is_whole().await;
    let mut claimed = runs(&db.claim(id).await);
    claimed.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(claimed, [(1, vec![1, 3]), (1, vec![2])]);
    assert_eq!(db.count("outbox_dead_letters").await, 0);
    assert_eq!(db.replay_dead(&all()).await, both(0), "once");
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_leaves_no_audit_entry() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "b"]).await;
    db.all_die(id, false).await;
    let would = Changed { matched: 2, changed: 0 };
    assert_eq!(db.outbox.replay_dead_letters(&all(), true, &by()).await.unwrap(), would);
    assert_eq!(db.outbox.discard_dead_letters(&all(), true, &by()).await.unwrap(), would);
    let types = Replay::EventType("todo.created".to_owned());
    assert_eq!(db.outbox.replay("s", &types, true, &by()).await.unwrap(), Some(would));
    assert_eq!((db.count("outbox_dead_letters").await, db.count("outbox_audit").await), (2, 0));
    assert!(db.claim(id).await.is_empty());
}

#[tokio::test]
async fn every_action_leaves_an_audit_entry_that_says_who_what_and_why() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "b"]).await;
    db.all_die(id, false).await;
    let first: i64 = db.column("select min(id) from outbox_dead_letters").await[0];
    db.replay_dead(&DeadLetterFilter { ids: Some(vec![first, 999]), ..all() }).await;
    db.outbox.discard_dead_letters(&all(), false, &By::new("bob\0\n")).await.unwrap();
    db.outbox.replay("s", &Replay::EventType("other".to_owned()), false, &by()).await.unwrap();
    db.outbox.pause_as("s", &by()).await.unwrap();
    db.outbox.resume_as("s", &by()).await.unwrap();
    db.outbox.remove_as("s", &by()).await.unwrap();
    let entries = db.outbox.audit_entries(10).await.unwrap();
    let short = entries.iter().rev().map(|entry| {
        (
            &*entry.actor,
            &*entry.action,
            &*entry.target,
            entry.details["changed"].as_u64(),
            entry.details["reason"].as_str(),
        )
    });
    let why = Some("the receiver is back");
    assert_eq!(
        short.collect::<Vec<_>>(),
        [
            ("anna", "replay", "dead-letters", Some(1), why),
            ("bob", "discard", "dead-letters", Some(1), None),
            ("anna", "replay", "s", Some(0), why),
            ("anna", "pause", "s", Some(1), why),
            ("anna", "resume", "s", Some(1), why),
            ("anna", "remove", "s", None, why),
        ]
    );
    assert_eq!(entries[5].details["ids"], json!([first, 999]));
}

#[tokio::test]
async fn a_held_key_goes_on_with_the_dead_letter_that_is_replayed() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "a"]).await;
    db.all_die(id, true).await;
    assert!(db.claim(id).await.is_empty(), "held");
    assert_eq!(db.replay_dead(&all()).await, both(1));
    db.is_whole().await;
    assert_eq!(runs(&db.claim(id).await), [(1, vec![1, 2])]);
    assert_eq!(db.count("outbox_lanes where held_at is not null").await, 0);
}

#[tokio::test]
async fn a_held_key_goes_on_without_the_dead_letter_that_is_discarded() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "a", "alone"]).await;
    db.all_die(id, true).await;
    assert_eq!(db.count("outbox_lanes").await, 2, "also that of a dead letter that nothing waits for");
    assert_eq!(db.outbox.discard_dead_letters(&all(), false, &by()).await.unwrap(), both(2));
    db.is_whole().await;
    assert_eq!(runs(&db.claim(id).await), [(1, vec![2])]);
    assert_eq!(db.count("outbox_lanes").await, 1);
}

#[tokio::test]
async fn dead_letters_are_listed_in_pages_and_by_filter() {
    let db = Db::new().await;
    let (s, t) = (db.subscribe("s").await, db.subscribe("t").await);
    record(&db.outbox, [todo("a"), of_type("todo.renamed", "b"), todo("c")]).await;
    db.all_die(s, false).await;
    tokio::time::sleep(Duration::from_millis(2)).await;
    let between = Utc::now();
    tokio::time::sleep(Duration::from_millis(2)).await;
    db.all_die(t, false).await;
    let list = async |filter: &DeadLetterFilter| -> Vec<(String, i64)> {
        let found = db.outbox.dead_letters(filter, None, 100).await.unwrap();
        found.into_iter().map(|dead| (dead.subscription, dead.position)).collect()
    };
    assert_eq!(list(&all()).await.len(), 6);
    assert_eq!(list(&DeadLetterFilter { subscription: Some("s".to_owned()), ..all() }).await.len(), 3);
    assert_eq!(list(&DeadLetterFilter { subscription: Some("unknown".to_owned()), ..all() }).await, []);
    let renamed = DeadLetterFilter { event_type: Some("todo.renamed".to_owned()), ..all() };
    assert_eq!(list(&renamed).await, [("t".to_owned(), 2), ("s".to_owned(), 2)]);
    let (since, until) = (
        list(&DeadLetterFilter { since: Some(between), ..all() }).await,
        list(&DeadLetterFilter { until: Some(between), ..all() }).await,
    );
    assert!(since.len() == 3 && since.iter().all(|(name, _)| name == "t"), "{since:?}");
    assert!(until.len() == 3 && until.iter().all(|(name, _)| name == "s"), "{until:?}");
    assert_eq!(db.outbox.replay_dead_letters(&renamed, true, &by()).await.unwrap().matched, 2);

    let (mut before, mut seen) = (None, Vec::new());
    loop {
        let page = db.outbox.dead_letters(&all(), before, 4).await.unwrap();
        let Some(last) = page.last() else { break };
        before = Some(last.id);
        seen.extend(page.iter().map(|dead| dead.id));
    }
    assert!(seen.len() == 6 && seen.is_sorted_by(|a, b| a > b), "{seen:?}");
    let dead = &db.outbox.dead_letters(&renamed, None, 1).await.unwrap()[0];
    assert_eq!((dead.event_id, dead.event_type.as_deref()), (Some(db.event(2).await), Some("todo.renamed")));
    assert_eq!((dead.aggregate_type.as_deref(), dead.aggregate_id.as_deref()), (Some("todo"), Some("b")));
    assert_eq!((dead.attempts, &*dead.error), (1, "no such address"));
}

#[tokio::test]
async fn dead_letters_without_a_readable_event_are_listed_and_discarded_but_not_replayed() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "b"]).await;
    db.all_die(id, false).await;
    db.execute("delete from outbox_events where position = 1").await;
    if BACKEND == DbBackend::Sqlite {
        db.execute("update outbox_events set event_id = 'broken', event_type = x'00' where position = 2").await;
    }
    let dead = db.outbox.dead_letters(&all(), None, 10).await.unwrap();
    assert!(dead.len() == 2 && dead.iter().all(|dead| dead.event_id.is_none() || dead.position == 2), "{dead:?}");
    let gone = DeadLetterFilter { ids: Some(vec![dead[1].id]), ..all() };
    assert_eq!(db.replay_dead(&gone).await, Changed { matched: 1, changed: 0 });
    db.is_whole().await;
    assert_eq!(db.outbox.discard_dead_letters(&all(), false, &by()).await.unwrap(), both(2));
}

#[tokio::test]
async fn many_dead_letters_are_replayed_in_several_transactions_with_one_audit_entry() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    let ids: Vec<String> = (0..1200).map(|n| (n % 900).to_string()).collect();
    db.record_todos(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    db.all_die(id, false).await;
    db.all_die(id, false).await;
    assert_eq!(db.replay_dead(&all()).await, both(1200));
    db.is_whole().await;
    assert_eq!(db.count("outbox_deliveries").await, 1200);
    let entries = db.outbox.audit_entries(10).await.unwrap();
    assert_eq!((entries.len(), &entries[0].details["changed"]), (1, &json!(1200)));
    db.all_delivered(id).await;
    let since = Replay::Since(Utc::now() - KEPT);
    assert_eq!(db.outbox.replay("s", &since, true, &by()).await.unwrap().unwrap().matched, 1200);
    assert_eq!(db.outbox.replay("s", &since, false, &by()).await.unwrap(), Some(both(1200)));
    db.is_whole().await;
    assert_eq!((db.count("outbox_deliveries").await, db.count("outbox_delivered").await), (1200, 0));
}

#[tokio::test]
async fn operators_who_replay_the_same_dead_letters_replay_each_once() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    let ids: Vec<String> = (0..300).map(|n| (n % 7).to_string()).collect();
    db.record_todos(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    while db.count("outbox_deliveries").await > 0 {
        db.all_die(id, false).await;
    }
    let replay = async || db.replay_dead(&all()).await.changed;
    let again = async || {
        let types = Replay::EventType("todo.created".to_owned());
        db.outbox.replay("s", &types, false, &by()).await.unwrap().unwrap().changed
    };
    let flushes = async || {
        for n in 0..20 {
            db.record_todos(&[&*(n % 7).to_string(), "new"]).await;
        }
        0
    };
    let (a, b, c, _) = tokio::join!(replay(), replay(), again(), flushes());
    assert_eq!(a + b + c, 300);
    db.is_whole().await;
    assert_eq!(db.count("outbox_deliveries").await, 340);
}

#[tokio::test]
async fn a_subscription_gets_finished_events_again_and_leaves_unfinished_ones_alone() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    record(&db.outbox, [todo("done"), todo("dead"), todo("retried"), of_type("todo.renamed", "done")]).await;
    let lanes = db.claim(id).await;
    for lane in &lanes {
        let mut report = delivered_run(lane);
        match lane.lane.key.as_str() {
            "todo/dead" => report.finished[0].error = Some("x".to_owned()),
            "todo/retried" => report = failed(lane, LONG, "down"),
            _ => {}
        }
        db.settle(report).await;
    }
    let late = Subscription::new("late").unwrap().events(["todo.renamed"]).unwrap();
    let late = db.outbox.register(&late).await.unwrap();
    let replay = async |name: &str, replay: Replay| db.outbox.replay(name, &replay, false, &by()).await.unwrap();
    assert_eq!(replay("unknown", Replay::Events(Vec::new())).await, None);
    let types = || Replay::EventType("todo.created".to_owned());
    assert_eq!(replay("s", types()).await, Some(both(2)), "the delivered one and the dead one");
    db.is_whole().await;
    assert_eq!((db.count("outbox_dead_letters").await, db.count("outbox_delivered").await), (0, 1));
    let mut claimed = runs(&db.claim(id).await);
    claimed.sort_by(|a, b| a.1.cmp(&b.1));
    assert_eq!(claimed, [(1, vec![1]), (1, vec![2])]);
    assert_eq!(replay("late", types()).await, Some(both(0)), "not of its filter");
    let ids = vec![db.event(4).await, db.event(1).await, Uuid::now_v7()];
    assert_eq!(replay("late", Replay::Events(ids)).await, Some(both(1)));
    assert_eq!(runs(&db.claim(late).await), [(1, vec![4])]);
    db.is_whole().await;
}

#[tokio::test]
async fn a_replay_that_comes_before_a_waiting_head_does_not_spend_its_attempts() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "a"]).await;
    db.all_die(id, false).await;
    let lane = db.claim(id).await.remove(0);
    db.settle(failed(&lane, LONG, "down")).await;
    db.replay_dead(&all()).await;
    assert_eq!(runs(&db.claim(id).await), [(1, vec![1, 2])]);
}

#[tokio::test]
async fn a_replay_leaves_a_lease_alone() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a", "a"]).await;
    db.all_die(id, false).await;
    let lane = db.claim(id).await.remove(0);
    db.replay_dead(&all()).await;
    db.settle(delivered_run(&lane)).await;
    db.is_whole().await;
    assert_eq!(runs(&db.claim(id).await), [(1, vec![1])]);
    assert_eq!(db.column::<i64>("select position from outbox_delivered").await, [2]);
}

/// The lane is leased while a delivery comes before its head: the count and the log are of the one that was the head.
#[tokio::test]
async fn a_replay_that_comes_before_a_leased_head_does_not_inherit_its_attempts() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    for end in ["fails", "is given back", "begins the next", "is lost", "is noted and lost"] {
        db.record_todos(&["a", "a", "a"]).await;
        db.all_die(id, false).await;
        let first = db.claim(id).await.remove(0);
        db.settle(failed(&first, Duration::ZERO, "down")).await;
        let lane = db.claim(id).await.remove(0);
        assert_eq!(lane.attempts, 2);
        db.replay_dead(&all()).await;
        match end {
            "fails" => db.settle(failed(&lane, LONG, "down")).await,
            "is given back" => {
                let next = Next::Release { attempts: 1, log: lane.attempt_log.clone() };
                db.settle(delivered(&lane, 0, next)).await;
            }
            "begins the next" => db.settle(delivered(&lane, 1, Next::Keep)).await,
            "is noted and lost" => {
                let noted = db.outbox.note_attempts(&[(lane.lane.clone(), AttemptLog::parse("[{}]"))]).await.unwrap();
                assert!(noted.contains(&lane.lane));
            }
            _ => {}
        }
        // The leases of those that are lost end.
        db.execute(&format!("update outbox_lanes set due_at = {NOW} where leased_by is not null")).await;
        let lane = db.claim(id).await.remove(0);
        let replayed: i64 = db.column("select min(position) from outbox_deliveries").await[0];
        assert_eq!((lane.attempts, lane.attempt_log.is_empty(), lane.run[0].position), (1, true, replayed), "{end}");
        db.settle(delivered_run(&lane)).await;
        db.all_delivered(id).await;
        db.is_whole().await;
    }
}

#[tokio::test]
async fn why_says_what_the_tables_say() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["leased", "leased", "done", "dead", "dead", "retried", "due"]).await;
    record(&db.outbox, [todo("later").delay(LONG)]).await;
    for lane in db.claim(id).await {
        match lane.lane.key.as_str() {
            "todo/done" => db.settle(delivered_run(&lane)).await,
            "todo/dead" => {
                let mut dead = delivered(&lane, 1, Next::Hold { position: 4 });
                dead.finished[0].error = Some("no such address".to_owned());
                db.settle(dead).await;
            }
            "todo/retried" => db.settle(failed(&lane, LONG, "no handler for it")).await,
            "todo/due" => {
                let next = Next::Release { attempts: 0, log: AttemptLog::default() };
                db.settle(LaneReport { lane: lane.lane, finished: Vec::new(), next }).await;
            }
            _ => {}
        }
    }
    let only_others = Subscription::new("others").unwrap().events(["other"]).unwrap();
    db.outbox.register(&only_others).await.unwrap();
    db.subscribe("began-later").await;
    let expect = async |position, subscription: &str, state, cause: &str, text: &str| {
        let why = db.why(position, subscription).await;
        assert_eq!((why.state, why.details["cause"].as_str()), (state, Some(cause)), "{why:?}");
        assert!(why.reason.contains(text), "{why:?}");
        why
    };
    let pending = Some(DeliveryState::Pending);
    let leased = expect(1, "s", Some(DeliveryState::Leased), "leased", "attempt 1 is under way in worker").await;
    assert!(leased.details["until"].is_string());
    let blocked = expect(2, "s", pending, "blocked", "waits behind event").await;
    assert_eq!(blocked.details["event_id"], json!(db.event(1).await.to_string()));
    let done = expect(3, "s", Some(DeliveryState::Delivered), "delivered", "after 1 attempt").await;
    assert!(done.since.is_some());
    expect(4, "s", Some(DeliveryState::Dead), "dead", "after 1 attempt: no such address; replay or discard").await;
    let held = expect(5, "s", pending, "held", "held up by dead letter").await;
    assert_eq!(held.details["event_id"], json!(db.event(4).await.to_string()));
    expect(6, "s", pending, "retry", "last error: no handler for it").await;
    expect(7, "s", pending, "due", "is a worker of this subscription running?").await;
    expect(8, "s", pending, "waiting", "not due before").await;
    expect(1, "others", None, "filter", "does not take this event").await;
    expect(1, "began-later", None, "began-later", "it began at").await;
    db.outbox.open_circuit(id, LONG, true).await.unwrap();
    expect(7, "s", pending, "circuit", "the destination is down").await;
    db.outbox.pause("s").await.unwrap();
    let paused = expect(7, "s", pending, "paused", "paused since").await;
    assert!(paused.since.is_some());
    assert!(db.outbox.why(Uuid::now_v7()).await.unwrap().is_none());
}

#[tokio::test]
async fn an_event_is_shown_with_all_its_deliveries() {
    let db = Db::new().await;
    let id = db.subscribe("a").await;
    db.subscribe("b").await;
    db.record_todos(&["x"]).await;
    db.subscribe("c").await;
    let lane = db.claim(id).await.remove(0);
    db.settle(failed(&lane, LONG, "down")).await;
    let event = db.event(1).await;
    let details = db.outbox.event(event).await.unwrap().unwrap();
    assert_eq!((details.event.unwrap().id, details.position), (event, 1));
    let [a, b] = &details.deliveries[..] else { panic!("{:?}", details.deliveries) };
    assert_eq!(
        (&*a.subscription, a.state, a.attempts, a.error.as_deref()),
        ("a", DeliveryState::Pending, 1, Some("down"))
    );
    assert!(a.attempt_log[0]["error"] == "down" && a.due_at.is_some());
    assert_eq!((&*b.subscription, b.state, b.attempts), ("b", DeliveryState::Pending, 0));
    assert!(db.outbox.event(Uuid::now_v7()).await.unwrap().is_none());
    let record = db.outbox.delivery("a", event).await.unwrap().unwrap();
    assert_eq!((record.state, record.attempts, record.error.as_deref()), (DeliveryState::Pending, 1, Some("down")));
}

#[tokio::test]
async fn events_are_listed_in_pages_and_by_filter() {
    let db = Db::new().await;
    let unit = db.outbox.begin(Context::default());
    unit.events().set_tenant("acme").unwrap();
    unit.events().set_actor(Actor::new("user", "42").unwrap()).unwrap();
    unit.events().push(todo("a")).unwrap();
    unit.events().push(of_type("todo.renamed", "a")).unwrap();
    unit.commit().await.unwrap();
    tokio::time::sleep(Duration::from_millis(2)).await;
    let between = Utc::now();
    tokio::time::sleep(Duration::from_millis(2)).await;
    db.record_todos(&["a", "b", "c"]).await;
    let list = async |filter: EventFilter| -> Vec<i64> {
        let page = db.outbox.events(&filter, None, 100).await.unwrap();
        page.events.iter().map(|event| event.position).collect()
    };
    let filter = EventFilter::default;
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(list(filter()).await, [5, 4, 3, 2, 1]);
    assert_eq!(list(EventFilter { event_type: text("todo.renamed"), ..filter() }).await, [2]);
    assert_eq!(list(EventFilter { aggregate_type: text("todo"), ..filter() }).await.len(), 5);
    let of_a = EventFilter { aggregate_type: text("todo"), aggregate_id: text("a"), ..filter() };
    assert_eq!(list(of_a.clone()).await, [3, 2, 1]);
    assert_eq!(list(EventFilter { event_type: text("todo.created"), ..of_a.clone() }).await, [3, 1]);
    assert_eq!(list(EventFilter { tenant: text("acme"), ..filter() }).await, [2, 1]);
    assert_eq!(list(EventFilter { actor_kind: text("user"), tenant: text("other"), ..filter() }).await.len(), 0);
    assert_eq!(list(EventFilter { actor_kind: text("user"), ..filter() }).await, [2, 1]);
    assert_eq!(list(EventFilter { since: Some(between), ..filter() }).await, [5, 4, 3]);
    assert_eq!(list(EventFilter { until: Some(between), ..filter() }).await, [2, 1]);
    let first = db.outbox.events(&of_a, None, 2).await.unwrap();
    assert_eq!((first.events.len(), first.next), (2, Some(2)));
    let last = db.outbox.events(&of_a, first.next, 2).await.unwrap();
    assert_eq!((last.events.len(), last.next), (1, None));
}

#[tokio::test]
async fn pause_and_resume_say_whether_they_changed_anything() {
    let db = Db::new().await;
    db.subscribe("s").await;
    assert_eq!(db.outbox.pause_as("s", &by()).await.unwrap(), Some(true));
    assert_eq!(db.outbox.pause_as("s", &by()).await.unwrap(), Some(false));
    assert_eq!(db.outbox.resume_as("s", &by()).await.unwrap(), Some(true));
    assert_eq!(db.outbox.resume_as("s", &by()).await.unwrap(), Some(false));
    assert_eq!(db.outbox.pause_as("unknown", &by()).await.unwrap(), None);
    assert_eq!(db.count("outbox_audit").await, 4);
}

#[tokio::test]
async fn retention_takes_what_is_old_and_finished_and_nothing_else() {
    let db = Db::new().await;
    let (s, t) = (db.subscribe("s").await, db.subscribe("t").await);
    db.record_todos(&["old", "young-history", "dead", "unfinished"]).await;
    for lane in db.claim(s).await {
        match lane.lane.key.as_str() {
            "todo/dead" => {
                let mut dead = delivered_run(&lane);
                dead.finished[0].error = Some("x".to_owned());
                db.settle(dead).await;
            }
            "todo/unfinished" => {}
            _ => db.settle(delivered_run(&lane)).await,
        }
    }
    db.all_delivered(t).await;
    db.all_a_day_ago().await;
    db.execute(&format!(
        "update outbox_delivered set delivered_at = {NOW} where position = 2 and subscription_id = {t}"
    ))
    .await;
    db.record_todos(&["young"]).await;
    assert_eq!(db.purge(&Retention::default()).await, Purged::default(), "7 days");
    let purged = db.purge(&Retention::default().keep(KEPT)).await;
    assert_eq!(purged, Purged { events: 1, deliveries: 2, ..Purged::default() });
    assert_eq!(db.column::<i64>("select position from outbox_events order by 1").await, [2, 3, 4, 5]);
    db.is_whole().await;
    db.execute("delete from outbox_lanes").await;
    db.execute("delete from outbox_deliveries").await;
    db.all_a_day_ago().await;
    let purged = db.purge(&Retention::default().keep(Duration::ZERO)).await;
    assert_eq!(purged.events, 3, "all but what is dead");
}

/// Neither what nobody has routed yet, nor what was set aside.
#[tokio::test]
async fn retention_leaves_what_is_not_routed() {
    let db = Db::new().await;
    db.outbox.register(&Subscription::new("s").unwrap()).await.unwrap();
    for id in ["waits", "aside"] {
        db.execute(&database::record("todo.created", "todo", id, "{}")).await;
    }
    db.execute("update outbox_unrouted set set_aside_at = null, error = null where position = 1").await;
    db.execute(&format!("update outbox_unrouted set set_aside_at = {NOW}, error = 'no' where position = 2")).await;
    db.all_a_day_ago().await;
    assert_eq!(db.purge(&Retention::default().keep(Duration::ZERO)).await, Purged::default());
    assert_eq!(db.column::<i64>("select position from outbox_events order by position").await, [1, 2]);
    db.execute("delete from outbox_unrouted where position = 2").await;
    assert_eq!(db.purge(&Retention::default().keep(Duration::ZERO)).await.events, 1);
    db.is_whole().await;
}

#[tokio::test]
async fn retention_follows_the_first_rule_that_fits() {
    let db = Db::new().await;
    record(&db.outbox, ["audit.login", "audit.note", "todo.created", "audit"].map(|name| of_type(name, "1"))).await;
    db.all_a_day_ago().await;
    let retention = Retention::default()
        .keep(KEPT)
        .keep_events("audit.note", KEPT)
        .unwrap()
        .keep_events("audit.*", 48 * KEPT)
        .unwrap();
    assert!(retention.clone().keep_events("not a type", KEPT).is_err());
    assert_eq!(db.purge(&retention).await.events, 3);
    assert_eq!(db.column::<String>("select event_type from outbox_events").await, ["audit.login"]);
}

#[tokio::test]
async fn an_event_is_archived_before_it_goes() {
    let db = Db::new().await;
    let payload = json!({"text": "a\u{0}b", "big": 1.5});
    let event = outbox_core::NewEvent::dynamic("todo.created", "todo", "1", &payload).unwrap();
    record(&db.outbox, [event.tag("region", "eu").unwrap(), todo("2")]).await;
    let first = db.event(1).await;
    db.all_a_day_ago().await;
    let purged = db.purge(&Retention::default().keep(KEPT).archive()).await;
    assert_eq!((purged.events, purged.archived), (2, 2));
    let archived = archive::Entity::find().all(db.hand()).await.unwrap();
    assert_eq!((archived[0].position, archived[0].event_id), (1, first));
    let stored: serde_json::Value = serde_json::from_str(archived[0].event["payload"].as_str().unwrap()).unwrap();
    assert_eq!((stored, &archived[0].event["event_type"]), (payload, &json!("todo.created")));
    let tags: serde_json::Value = serde_json::from_str(archived[0].event["tags"].as_str().unwrap()).unwrap();
    assert_eq!(tags, json!({"region": "eu"}));
    assert_eq!(db.count("outbox_events").await, 0);
}

#[tokio::test]
async fn the_inbox_remembers_events_that_are_still_here() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    db.record_todos(&["a"]).await;
    let handled = async |event| {
        let unit = db.outbox.begin(Context::default());
        assert!(once(&db.outbox, &unit.tx(), "mailer", event).await.unwrap());
        unit.commit().await.unwrap();
    };
    handled(db.event(1).await).await;
    handled(Uuid::now_v7()).await;
    let short = Retention::default().keep(KEPT);
    assert_eq!(db.purge(&short).await.inbox, 0, "young");
    db.all_a_day_ago().await;
    assert_eq!(db.purge(&short.clone().inbox(48 * KEPT)).await.inbox, 0, "its own time");
    assert_eq!(db.purge(&short).await, Purged { inbox: 1, ..Purged::default() });
    db.all_delivered(id).await;
    db.all_a_day_ago().await;
    assert_eq!(db.purge(&short).await, Purged { events: 1, deliveries: 1, inbox: 1, archived: 0 });
}

#[tokio::test]
async fn purges_side_by_side_take_each_event_once() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    let ids: Vec<String> = (0..2500).map(|n| n.to_string()).collect();
    db.record_todos(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    db.all_delivered(id).await;
    db.all_a_day_ago().await;
    let retention = Retention::default().keep(KEPT).archive();
    let (a, b) = tokio::join!(db.outbox.purge(&retention), db.outbox.purge(&retention));
    let (a, b) = (a.unwrap(), b.unwrap());
    db.purge(&retention).await;
    assert!(a.events + b.events <= 2500 && a.deliveries == a.events && b.deliveries == b.events, "{a:?} {b:?}");
    assert_eq!((db.count("outbox_events").await, db.count("outbox_archive").await), (0, 2500));
    db.is_whole().await;
}

#[tokio::test]
async fn a_subscription_from_the_beginning_and_a_purge_leave_no_delivery_without_its_event() {
    let db = Db::new().await;
    let ids: Vec<String> = (0..3000).map(|n| n.to_string()).collect();
    db.record_todos(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    db.all_a_day_ago().await;
    let late = Subscription::new("late").unwrap().ordering(Ordering::None).start(StartPosition::Beginning);
    let retention = Retention::default().keep(KEPT);
    let (registered, purged) = tokio::join!(db.outbox.register(&late), db.outbox.purge(&retention));
    let (id, purged) = (registered.unwrap(), purged.unwrap().events);
    db.is_whole().await;
    let positions: HashSet<i64> = db.column("select position from outbox_deliveries").await.into_iter().collect();
    let rest: HashSet<i64> = db.column("select position from outbox_events").await.into_iter().collect();
    assert_eq!(positions, rest, "{id}: {purged} were purged");
}

#[tokio::test]
async fn the_circuit_is_part_of_the_status() {
    let db = Db::new().await;
    let id = db.subscribe("s").await;
    let circuit = async || db.outbox.status().await.unwrap().subscriptions[0].circuit.clone();
    assert_eq!(circuit().await, "closed");
    db.outbox.open_circuit(id, LONG, true).await.unwrap();
    assert_eq!(circuit().await, "open");
    db.outbox.open_circuit(id, Duration::ZERO, true).await.unwrap();
    assert_eq!(circuit().await, "half-open");
    db.outbox.close_circuit(id).await.unwrap();
    assert_eq!(circuit().await, "closed");
}

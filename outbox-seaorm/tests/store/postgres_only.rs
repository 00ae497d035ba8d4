//! What only a server can do: let many write at once, and end it for one of them.

use std::time::{Duration, Instant};

use outbox_core::{AttemptLog, Context, StartPosition, Subscription};
use outbox_seaorm::{CommitError, Outbox, is_transient};
use sea_orm::{ConnectionTrait, DbErr, TransactionTrait};
use tokio::task::JoinHandle;

use super::fixture::{LONG, Store, delivered_run, eventually, migrate, record, runs, todo};

#[tokio::test]
async fn the_victim_of_a_deadlock_of_the_application_may_try_again() {
    let store = Store::new().await;
    store.execute("insert into notes values ('a'), ('b')").await;
    let other = store.another_process().await;
    let (unit, opposite) = (store.outbox.begin(Context::default()), other.begin(Context::default()));
    let lock = |note: &str| format!("select text from notes where text = '{note}' for update");
    unit.tx().execute_unprepared(&lock("a")).await.unwrap();
    opposite.tx().execute_unprepared(&lock("b")).await.unwrap();
    let (first, second) = (unit.tx(), opposite.tx());
    let (lock_b, lock_a) = (lock("b"), lock("a"));
    let results: [Result<_, DbErr>; 2] =
        tokio::join!(first.execute_unprepared(&lock_b), second.execute_unprepared(&lock_a)).into();
    let errors: Vec<&DbErr> = results.iter().filter_map(|result| result.as_ref().err()).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(is_transient(errors[0]), "{errors:?}");
    drop((first, second));
    unit.rollback().await;
    opposite.rollback().await;
    store.is_whole().await;
}

#[tokio::test]
async fn a_flush_that_may_not_wait_for_a_lock_may_be_tried_again() {
    let store = Store::new().await;
    store.subscribe("s").await;
    let other = store.another_process().await;
    let holding = other.begin(Context::default());
    holding.tx().execute_unprepared("lock table outbox_events in access exclusive mode").await.unwrap();
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("set local lock_timeout = '20ms'").await.unwrap();
    unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Flush(_)) && error.is_transient(), "{error:?}");
    holding.rollback().await;
    store.is_empty().await;
}

#[tokio::test]
async fn attempts_are_noted_without_waiting_for_a_commit() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1", "2"]).await;
    let lanes: Vec<_> = store.outbox.claim(id, "w", 2, 1, LONG).await.unwrap().lanes;
    let notes: Vec<_> = lanes.iter().map(|lane| (lane.lane.clone(), AttemptLog::default())).collect();
    let refs = [lanes[0].lane.clone(), lanes[1].lane.clone()];
    let holding = store.another_process().await.begin(Context::default());
    holding.tx().execute_unprepared("select from outbox_lanes where key = 'todo/1' for update").await.unwrap();
    assert_eq!(store.outbox.note_attempts(&notes).await.unwrap(), [refs[1].clone()].into());
    assert_eq!(store.outbox.held(&refs).await.unwrap(), refs);
    holding.rollback().await;
    assert_eq!(store.outbox.note_attempts(&notes).await.unwrap(), refs.into());
    store.is_whole().await;
}

#[tokio::test]
async fn a_session_that_is_ended_between_two_statements_commits_nothing_and_its_successor_works() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    store
        .rows(
            "select pg_terminate_backend(pid) from pg_stat_activity
                where datname = current_database() and state = 'idle in transaction'",
        )
        .await;
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Flush(_)) && error.is_transient(), "{error:?}");
    store.is_empty().await;
    store.record_todos(&["2"]).await;
    let lane = store.claim_one(id, LONG).await;
    store.outbox.settle(&[delivered_run(&lane)]).await.unwrap();
    assert_eq!(store.count("outbox_delivered").await, 1);
    store.is_whole().await;
}

#[tokio::test]
async fn a_commit_of_another_process_wakes_who_listens() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    let other = store.another_process().await;
    let wake = || {
        let outbox = store.outbox.clone();
        tokio::spawn(async move { tokio::time::timeout(Duration::from_secs(20), outbox.woken(id)).await })
    };
    let looked = wake();
    tokio::task::yield_now().await;
    let outbox = store.outbox.clone();
    let listening = tokio::spawn(async move { outbox.listen().await });
    looked.await.unwrap().expect("who begins to listen looks once");
    for _ in 0..3 {
        let woken = wake();
        record(&other, [todo("1")]).await;
        woken.await.unwrap().expect("a commit of another process");
    }
    listening.abort();
    store.is_whole().await;
}

#[tokio::test]
async fn limits_of_statements_and_of_idle_transactions_are_set_by_the_url() {
    let store = Store::new().await;
    let limits = "options[statement_timeout]=200ms&options[idle_in_transaction_session_timeout]=300ms";
    let outbox = Outbox::connect(&format!("{}?{limits}", store.place.url()), 1).await.unwrap();

    let unit = outbox.begin(Context::default());
    let error = unit.tx().execute_unprepared("select pg_sleep(5)").await.unwrap_err();
    assert!(is_transient(&error), "{error}");
    unit.rollback().await;

    let unit = outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('forgotten')").await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let lost = unit.commit().await.unwrap_err();
    assert!(matches!(lost, CommitError::Commit(_) | CommitError::Flush(_)), "{lost:?}");
    let notes: Vec<String> = store.column("select text from notes where text = 'forgotten'").await;
    assert_eq!(notes, Vec::<String>::new());

    // The connection that was cut off is not given to the next.
    let unit = outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('next')").await.unwrap();
    unit.commit().await.unwrap();
    store.is_whole().await;
}

#[tokio::test]
async fn a_schema_of_its_own_and_an_ordinary_role_are_enough() {
    let store = Store::new().await;
    let role = format!("shop_{:08x}", fastrand::u32(..));
    store.execute(&format!("create role {role} login")).await;
    store.execute(&format!("create schema shop authorization {role}")).await;
    let url = store.place.url().replace("postgres://postgres@", &format!("postgres://{role}@"));
    let outbox = Outbox::connect(&format!("{url}?options[search_path]=shop"), 2).await.unwrap();
    migrate(&outbox).await;
    outbox.check_schema().await.unwrap();
    let id = outbox.register(&Subscription::new("s").unwrap()).await.unwrap();
    record(&outbox, [todo("a"), todo("b")]).await;
    let claim = outbox.claim(id, "worker", 10, 10, LONG).await.unwrap();
    assert_eq!(claim.lanes.len(), 2);
    let reports: Vec<_> = claim.lanes.iter().map(delivered_run).collect();
    outbox.settle(&reports).await.unwrap();
    assert_eq!(outbox.status().await.unwrap().subscriptions[0].delivered, 2);
    assert_eq!(store.count("shop.outbox_events").await, 2);
    assert_eq!(store.count("public.outbox_events").await, 0, "the tables of another application are left alone");
    drop(outbox);
}

#[tokio::test]
async fn what_removed_subscriptions_have_left_is_swept() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1"]).await;
    for gone in [id + 1, id + 5] {
        store
            .execute(&format!(
                "insert into outbox_deliveries (subscription_id, key, seq, position, due_at)
                 select {gone}, key, seq, position, due_at from outbox_deliveries where subscription_id = {id}"
            ))
            .await;
    }
    store
        .execute(&format!(
            "insert into outbox_lanes (subscription_id, key, pending, due_at)
             select {id} + 5, key, pending, due_at from outbox_lanes where subscription_id = {id}"
        ))
        .await;
    store.outbox.sweep_removed().await.unwrap();
    for table in ["outbox_lanes", "outbox_deliveries"] {
        let left = store.column::<i32>(&format!("select subscription_id from {table}")).await;
        assert_eq!(left, [id], "{table}");
    }
}

#[tokio::test]
async fn a_claim_that_goes_on_after_a_mark_does_not_look_behind_it() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.record_todos(&["1", "2", "3", "4"]).await;
    store.outbox.claim(id, "worker", 2, 1, LONG).await.unwrap();
    store.record([todo("5").priority(100)]).await;
    let next = store.claim_on(id, 1).await;
    assert_eq!(runs(&next.lanes), [("todo/3", vec![3])]);
    let from_the_first = store.outbox.claim(id, "worker", 1, 1, LONG).await.unwrap();
    assert_eq!(runs(&from_the_first.lanes), [("todo/5", vec![5])]);
}

/// A commit of another process that is held up between its flush and its end.
struct HeldCommit {
    commit: JoinHandle<Result<(), CommitError>>,
    gate: sea_orm::DatabaseTransaction,
}

impl HeldCommit {
    /// Commits an event of the todo `1`. Those of a test have numbers from 1 on.
    async fn begin(store: &Store, number: u32) -> Self {
        if number == 1 {
            store
                .execute(
                    "create function wait() returns trigger language plpgsql as $$
                         begin perform pg_advisory_xact_lock_shared(new.text::integer); return null; end $$;
                     create constraint trigger wait after insert on notes deferrable initially deferred
                         for each row when (new.text ~ '^[0-9]+$') execute function wait()",
                )
                .await;
        }
        let gate = store.another_process().await.writer().begin().await.unwrap();
        gate.execute_unprepared(&format!("select pg_advisory_xact_lock({number})")).await.unwrap();
        let process = store.another_process().await;
        let commit = tokio::spawn(async move {
            let unit = process.begin(Context::default());
            unit.tx().execute_unprepared(&format!("insert into notes values ('{number}')")).await.unwrap();
            unit.events().push(todo("1")).unwrap();
            unit.commit().await.map(|_| ())
        });
        let waits = format!(
            "select pid from pg_locks where locktype = 'advisory' and objid = {number} and not granted
                and database = (select oid from pg_database where datname = current_database())"
        );
        eventually("the end of the flush", async || (!store.column::<i32>(&waits).await.is_empty()).then_some(()))
            .await;
        Self { commit, gate }
    }

    async fn end(self) {
        self.gate.rollback().await.unwrap();
        self.commit.await.unwrap().unwrap();
    }
}

/// What commits after the registration is its, whenever it was flushed: registering waits for no commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_gets_what_was_under_way_when_it_was_registered() {
    for start in [StartPosition::Now, StartPosition::Beginning] {
        let store = Store::new().await;
        store.record_todos(&["1"]).await;
        let held = HeldCommit::begin(&store, 1).await;
        let began = Instant::now();
        let late = store.register(Subscription::new("late").unwrap().start(start)).await;
        assert!(began.elapsed() < Duration::from_secs(2), "it waited for the commit");
        store.record_todos(&["2"]).await;
        let mut delivered = store.deliver_all(late).await;
        held.end().await;
        delivered.extend(store.deliver_all(late).await);
        let old: &[i64] = if start == StartPosition::Now { &[] } else { &[1] };
        assert_eq!(delivered, [old, &[3, 2]].concat(), "{start:?}");
        store.is_whole().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_under_way_meets_the_changed_definition() {
    let store = Store::new().await;
    let id = store.register(Subscription::new("late").unwrap().events(["other"]).unwrap()).await;
    store.record_todos(&["before"]).await;
    let held = HeldCommit::begin(&store, 1).await;
    assert_eq!(store.subscribe("late").await, id);
    held.end().await;
    assert_eq!(store.deliver_all(id).await, [2]);
    store.is_whole().await;
}

/// What is visible when a registration begins is routed as things were.
#[tokio::test]
async fn what_waits_is_not_for_a_subscription_that_begins_now() {
    let store = Store::new().await;
    let old = store.subscribe("old").await;
    store.outbox.transaction(Context::default(), |_, events| async move { events.push(todo("1")) }).await.unwrap();
    assert_eq!(store.count("outbox_unrouted").await, 1);
    let new = store.subscribe("new").await;
    let wide = store.register(Subscription::new("old").unwrap().events(["order.*"]).unwrap()).await;
    assert_eq!((store.deliver_all(new).await, wide), (Vec::new(), old));
    assert_eq!(store.deliver_all(old).await, [1], "it was committed before the definition was changed");
    store.is_whole().await;
}

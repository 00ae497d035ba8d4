//! What only a server can do: let many write at once, and end it for one of them.

use std::time::{Duration, Instant};

use outbox_core::{Context, StartPosition, Subscription};
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
    holding.tx().execute_unprepared("lock table outbox_lanes in access exclusive mode").await.unwrap();
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
    let notes: Vec<_> = lanes.iter().map(|lane| (lane.lane.clone(), "[]".to_owned())).collect();
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
async fn what_a_late_flush_writes_for_subscriptions_that_are_gone_goes_as_well() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    store.outbox.transaction(Context::default(), |_, events| async move { events.push(todo("1")) }).await.unwrap();
    for gone in [id + 1, id + 5] {
        store
            .execute(&format!(
                "insert into outbox_deliveries (subscription_id, key, position, due_at)
                 select {gone}, key, position, due_at from outbox_deliveries where subscription_id = {id}"
            ))
            .await;
    }
    store
        .execute(&format!(
            "insert into outbox_lanes (subscription_id, key, pending, due_at)
             select {id} + 5, key, pending, due_at from outbox_lanes where subscription_id = {id}"
        ))
        .await;
    store.outbox.settle_subscriptions().await.unwrap();
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
    let first = store.outbox.claim(id, "worker", 2, 1, LONG).await.unwrap();
    store.record([todo("5").priority(100)]).await;
    let next = store.outbox.claim_after(first.mark, id, "worker", 1, 1, LONG).await.unwrap();
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

/// Registers a subscription to all events while a commit is held up, and returns when the others can see it.
async fn register_meanwhile(store: &Store, start: StartPosition) -> JoinHandle<i32> {
    let (outbox, late) = (store.another_process().await, Subscription::new("late").unwrap().start(start));
    let registering = tokio::spawn(async move { outbox.register(&late).await.unwrap() });
    let known = "select name from outbox_subscriptions where name = 'late' and filter::text !~ 'none|other'";
    eventually("the registration", async || (!store.column::<String>(known).await.is_empty()).then_some(())).await;
    registering
}

async fn id_of_late(store: &Store) -> i32 {
    store.value("select id from outbox_subscriptions where name = 'late'").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_added_during_a_commit_gets_its_event_before_the_next_one_of_the_key() {
    for start in [StartPosition::Now, StartPosition::Beginning] {
        let store = Store::new().await;
        // Its lane makes the commits of the key one after another.
        store.subscribe("a").await;
        let held = HeldCommit::begin(&store, 1).await;
        let registering = register_meanwhile(&store, start).await;
        let next = tokio::spawn({
            let process = store.another_process().await;
            async move { record(&process, [todo("1")]).await }
        });
        held.end().await;
        next.await.unwrap();
        let mut delivered = store.deliver_all(id_of_late(&store).await).await;
        let id = registering.await.unwrap();
        delivered.extend(store.deliver_all(id).await);
        store.settle_subscriptions().await;
        delivered.extend(store.deliver_all(id).await);
        assert_eq!(delivered, [1, 2], "{start:?}");
        store.is_whole().await;
    }
}

/// Nothing holds up the commit of the later event here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_subscription_waits_for_the_commits_that_do_not_know_it() {
    let store = Store::new().await;
    let held = HeldCommit::begin(&store, 1).await;
    let registering = register_meanwhile(&store, StartPosition::Now).await;
    store.record_todos(&["1", "2"]).await;
    let id = id_of_late(&store).await;
    assert_eq!(store.deliver_all(id).await, [] as [i64; 0]);
    assert!(!registering.is_finished());
    held.end().await;
    assert_eq!(registering.await.unwrap(), id);
    let delivered = store.deliver_all(id).await;
    assert_eq!(delivered.iter().copied().filter(|position| *position != 3).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(delivered.len(), 3);
    store.settle_subscriptions().await;
    assert_eq!(store.deliver_all(id).await, [] as [i64; 0]);
    store.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_takes_more_waits_for_the_commits_that_do_not_know_it() {
    let store = Store::new().await;
    let id = store.register(Subscription::new("late").unwrap().events(["other"]).unwrap()).await;
    let held = HeldCommit::begin(&store, 1).await;
    let registering = register_meanwhile(&store, StartPosition::Now).await;
    store.record_todos(&["1"]).await;
    assert_eq!(store.deliver_all(id).await, [] as [i64; 0]);
    held.end().await;
    assert_eq!(registering.await.unwrap(), id);
    assert_eq!(store.deliver_all(id).await, [1, 2]);
    store.is_whole().await;
}

/// The end of the first registration must not open what the second one waits for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_is_changed_while_it_is_registered_waits_for_both() {
    let store = Store::new().await;
    store.register(Subscription::new("late").unwrap().events(["none"]).unwrap()).await;
    let first = HeldCommit::begin(&store, 1).await;
    let outbox = store.another_process().await;
    let narrow = Subscription::new("late").unwrap().events(["other"]).unwrap();
    let narrowing = tokio::spawn(async move { outbox.register(&narrow).await.unwrap() });
    let known = "select name from outbox_subscriptions where filter::text like '%other%'";
    eventually("the registration", async || (!store.column::<String>(known).await.is_empty()).then_some(())).await;
    let second = HeldCommit::begin(&store, 2).await;
    let registering = register_meanwhile(&store, StartPosition::Now).await;
    first.end().await;
    let id = narrowing.await.unwrap();
    store.record_todos(&["1"]).await;
    assert_eq!(store.deliver_all(id).await, [] as [i64; 0]);
    second.end().await;
    registering.await.unwrap();
    assert_eq!(store.deliver_all(id).await, [1, 2, 3]);
    store.is_whole().await;
}

/// The process that registers ends while it waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_that_was_cut_off_while_it_waited_is_continued_by_the_next_or_by_a_worker() {
    for again in [true, false] {
        let store = Store::new().await;
        let held = HeldCommit::begin(&store, 1).await;
        let registering = register_meanwhile(&store, StartPosition::Now).await;
        registering.abort();
        assert!(registering.await.is_err());
        store.record_todos(&["1"]).await;
        held.end().await;
        let id = id_of_late(&store).await;
        assert_eq!(store.deliver_all(id).await, [] as [i64; 0]);
        if again {
            store.subscribe("late").await;
        } else {
            store.settle_subscriptions().await;
        }
        assert_eq!(store.deliver_all(id).await, [1, 2]);
        store.is_whole().await;
    }
}

/// What commits after that comes late: it is delivered, but not in its order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_does_not_end_holds_up_no_registration_for_ever() {
    let store = Store::new().await;
    let held = HeldCommit::begin(&store, 1).await;
    let began = Instant::now();
    let id = store.subscribe("late").await;
    assert!((Duration::from_secs(5)..Duration::from_secs(9)).contains(&began.elapsed()), "{:?}", began.elapsed());
    store.record_todos(&["1"]).await;
    assert_eq!(store.deliver_all(id).await, [2]);
    held.end().await;
    store.settle_subscriptions().await;
    assert_eq!(store.deliver_all(id).await, [1]);
    store.is_whole().await;
}

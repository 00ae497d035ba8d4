use std::time::Duration;

use outbox_core::{Context, PushError};
use outbox_seaorm::{CommitError, Outbox, SavepointError, TransactionError};
use sea_orm::{
    ActiveModelTrait, ConnectOptions, ConnectionTrait, Database, EntityTrait, Set, Statement, TransactionTrait,
};

use super::{
    database,
    fixture::{SLOW, Store, hang_up_after, todo},
};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[expect(unreachable_pub, reason = "the derive macros of SeaORM spell it")]
mod notes {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "notes")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub text: String,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

#[tokio::test]
async fn a_dropped_unit_of_work_rolls_back_and_gives_its_connection_back() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    drop(unit);
    store.is_empty().await;
}

#[test]
fn a_unit_of_work_dropped_outside_a_runtime_rolls_back() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, unit) = runtime.block_on(async {
        let store = Store::new().await;
        let unit = store.outbox.begin(Context::default());
        unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
        unit.events().push(todo("1")).unwrap();
        (store, unit)
    });
    drop(unit);
    runtime.block_on(store.is_empty());
}

#[tokio::test]
async fn a_failed_statement_makes_the_handle_failed() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap_err();
    let error = tx.execute_unprepared("insert into notes values ('b')").await.unwrap_err();
    assert!(error.to_string().contains("an earlier statement of this transaction failed"), "{error}");
    let error = tx.savepoint(async |_, _| Ok::<_, Error>(())).await.unwrap_err();
    assert!(matches!(error, SavepointError::Database(_)), "{error:?}");
    drop(tx);
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::StatementFailed), "{error:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_query_that_fails_makes_the_handle_failed() {
    let store = Store::new().await;
    for all in [false, true] {
        let unit = store.outbox.begin(Context::default());
        unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
        let statement = Statement::from_string(database::BACKEND, "select * from nothing");
        let failed = if all {
            unit.tx().query_all_raw(statement).await.is_err()
        } else {
            unit.tx().query_one_raw(statement).await.is_err()
        };
        assert!(failed);
        assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    }
    store.is_empty().await;
}

#[tokio::test]
async fn a_statement_that_is_cancelled_halfway_makes_the_handle_failed() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.begin_now().await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let answered = hang_up_after(1, tx.execute_unprepared(SLOW)).await;
    assert!(answered.is_none());
    assert!(tx.execute_unprepared("insert into notes values ('b')").await.is_err());
    drop(tx);
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    store.is_empty().await;
}

#[tokio::test]
async fn a_held_handle_is_refused_at_the_commit() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let held = unit.tx();
    held.execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::HandleHeld), "{error:?}");
    assert!(!error.is_transient());
    let error = held.execute_unprepared("insert into notes values ('b')").await.unwrap_err();
    assert!(error.to_string().contains("the transaction has ended"), "{error}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_handle_held_by_a_task_that_is_writing_is_refused_at_the_commit() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let held = unit.tx();
    held.begin_now().await.unwrap();
    let task = tokio::spawn(async move {
        let mut written = 0;
        while held.execute_unprepared(&format!("insert into notes values ('{written}')")).await.is_ok() {
            written += 1;
        }
        written
    });
    tokio::task::yield_now().await;
    assert!(matches!(unit.commit().await, Err(CommitError::HandleHeld)));
    task.await.unwrap();
    store.is_empty().await;
}

#[tokio::test]
async fn use_after_the_end_is_an_error() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let (source, events) = (unit.source(), unit.events());
    unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.commit().await.unwrap();
    let tx = source.tx();
    for error in [
        tx.execute_unprepared("insert into notes values ('b')").await.unwrap_err(),
        tx.begin_now().await.unwrap_err(),
        notes::Entity::find().all(&tx).await.unwrap_err(),
        notes::Entity::find().one(&tx).await.unwrap_err(),
    ] {
        assert!(error.to_string().contains("the transaction has ended"), "{error}");
    }
    let error = tx.savepoint(async |_, _| Ok::<_, Error>(())).await.unwrap_err();
    assert!(matches!(error, SavepointError::Database(_)), "{error:?}");
    assert!(matches!(events.push(todo("1")), Err(PushError::Closed)));
    assert_eq!(store.column::<String>("select text from notes").await, ["a"]);
    assert_eq!(store.count("outbox_events").await, 0);
    store.is_whole().await;
}

#[tokio::test]
async fn pushing_after_the_end_is_closed() {
    let store = Store::new().await;
    let rolled_back = store.outbox.begin(Context::default());
    let dropped = store.outbox.begin(Context::default());
    let committed = store.outbox.begin(Context::default());
    let collectors = [rolled_back.events(), dropped.events(), committed.events()];
    rolled_back.rollback().await;
    drop(dropped);
    committed.commit().await.unwrap();
    for events in collectors {
        assert!(matches!(events.push(todo("1")), Err(PushError::Closed)));
        assert!(matches!(events.set_tenant("acme"), Err(PushError::Closed)));
    }
    store.is_empty().await;
}

#[tokio::test]
async fn a_commit_that_the_database_refuses_stores_nothing() {
    let store = Store::new().await;
    store.execute("create table replies (note text references notes (text) deferrable initially deferred)").await;
    store.subscribe("s").await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into replies values ('missing')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Commit(_)), "{error:?}");
    assert_eq!(store.count("replies").await, 0);
    store.is_empty().await;
}

#[tokio::test]
async fn a_flush_that_fails_stores_nothing() {
    let store = Store::new().await;
    store.subscribe("s").await;
    store.execute("drop table outbox_unrouted").await;
    let unit = store.outbox.begin(Context::default());
    unit.tx().execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Flush(_)), "{error:?}");
    assert_eq!(store.count("notes").await, 0);
    assert_eq!(store.count("outbox_events").await, 0);
}

#[tokio::test]
async fn no_free_connection_is_transient() {
    let store = Store::new().await;
    let mut options = ConnectOptions::new(store.place.url());
    options.max_connections(1).acquire_timeout(Duration::from_millis(300)).sqlx_logging(false);
    let busy = Outbox::new(Database::connect(options).await.unwrap());
    let taken = busy.writer().begin().await.unwrap();
    let unit = busy.begin(Context::default());
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Begin(_)) && error.is_transient(), "{error:?}");
    taken.rollback().await.unwrap();
    store.is_whole().await;
}

#[tokio::test]
async fn a_transaction_rolls_back_when_its_work_fails() {
    let store = Store::new().await;
    let error = store
        .outbox
        .transaction(Context::default(), |tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            Err::<(), Error>("no".into())
        })
        .await
        .unwrap_err();
    assert!(matches!(&error, TransactionError::Work(error) if error.to_string() == "no"), "{error:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_whose_failed_statement_is_ignored_does_not_commit() {
    let store = Store::new().await;
    let answer = store
        .outbox
        .transaction(Context::default(), |tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            let _ = tx.execute_unprepared("insert into notes values ('a')").await;
            events.push(todo("1"))?;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(answer, Err(TransactionError::Commit(CommitError::StatementFailed))), "{answer:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_whose_answer_holds_the_handle_does_not_commit() {
    let store = Store::new().await;
    let answer = store
        .outbox
        .transaction(Context::default(), |tx, _| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            Ok::<_, Error>(tx)
        })
        .await;
    assert!(matches!(answer, Err(TransactionError::Commit(CommitError::HandleHeld))), "{answer:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_rolls_back_when_its_work_panics() {
    let store = Store::new().await;
    let outbox = store.outbox.clone();
    let task = tokio::spawn(async move {
        let work = outbox.transaction(Context::default(), |tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            if !events.is_empty() {
                panic!("a bug in a handler");
            }
            Ok::<_, Error>(())
        });
        work.await.unwrap();
    });
    assert!(task.await.unwrap_err().is_panic());
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_whose_caller_hangs_up_is_stored_as_a_whole_or_not_at_all() {
    let store = Store::new().await;
    store.subscribe("s").await;
    let mut committed = 0;
    for polls in 0..60 {
        let work = store.outbox.transaction(Context::default(), |tx, events| async move {
            tx.execute_unprepared(&format!("insert into notes values ('{polls}')")).await?;
            events.push(todo(&polls.to_string()))?;
            Ok::<_, Error>(())
        });
        committed += usize::from(hang_up_after(polls, work).await.is_some());
    }
    store.outbox.route_waiting().await.unwrap();
    store.is_whole().await;
    let notes = store.column::<String>("select text from notes order by text").await;
    let events = store.column::<String>("select aggregate_id from outbox_events order by aggregate_id").await;
    let deliveries = store.column::<String>("select substr(key, 6) from outbox_deliveries order by key").await;
    assert_eq!(notes, events);
    assert_eq!(notes, deliveries);
    assert!(notes.len() >= committed);
}

#[tokio::test]
async fn a_commit_that_has_started_ends_although_its_caller_hangs_up() {
    let store = Store::new().await;
    for n in 1.. {
        let unit = store.outbox.begin(Context::default());
        unit.tx().execute_unprepared(&format!("insert into notes values ('{n}')")).await.unwrap();
        unit.events().push(todo("1")).unwrap();
        let answered = hang_up_after(1, unit.commit()).await.is_some();
        store.is_whole().await;
        assert_eq!((store.count("notes").await, store.count("outbox_events").await), (n, n));
        // On a busy machine all answers may be there at the first poll: then nobody has hung up.
        if !answered {
            return;
        }
    }
}

#[tokio::test]
async fn a_begin_that_is_cancelled_anywhere_leaves_no_transaction_behind() {
    let store = Store::new().await;
    for polls in 0..60 {
        let unit = store.outbox.begin(Context::default());
        let tx = unit.tx();
        if polls % 2 == 0 {
            let _ = hang_up_after(polls, tx.begin_now()).await;
        } else {
            let _ = hang_up_after(polls, tx.execute_unprepared("insert into notes values ('lost')")).await;
        }
        drop((tx, unit));
        store.execute(&format!("insert into notes values ('after {polls}')")).await;
        assert_eq!(store.count("notes").await, polls as i64 + 1, "after {polls} polls");
    }
    for n in 0..50 {
        store.execute(&format!("insert into notes values ('{n}')")).await;
    }
    assert_eq!(store.count("notes").await, 110);
    store.is_whole().await;
}

#[tokio::test]
async fn events_and_rows_commit_together() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let (tx, other) = (unit.tx(), unit.tx());
    notes::ActiveModel { text: Set("a".to_owned()) }.insert(&tx).await.unwrap();
    unit.events().push(todo("1")).unwrap();
    other.execute_unprepared("insert into notes values ('b')").await.unwrap();
    tx.events().push(todo("2")).unwrap();
    assert_eq!(notes::Entity::find().all(&tx).await.unwrap().len(), 2);
    assert_eq!(store.count("notes").await, 0, "nothing is visible before the commit");
    drop((tx, other));
    unit.commit().await.unwrap();
    assert_eq!(store.count("notes").await, 2);
    assert_eq!(store.count("outbox_events").await, 2);
    store.is_whole().await;
}

#[tokio::test]
async fn events_alone_commit() {
    let store = Store::new().await;
    store.record_todos(&["1"]).await;
    assert_eq!(store.count("outbox_events").await, 1);
    store.is_whole().await;
}

#[tokio::test]
async fn a_unit_of_work_that_wrote_nothing_needs_no_connection() {
    let store = Store::new().await;
    let taken = store.outbox.writer().begin().await.unwrap();
    let unit = store.outbox.begin(Context::default());
    let _ = (unit.tx(), unit.events(), unit.source());
    unit.commit().await.unwrap();
    store.outbox.begin(Context::default()).rollback().await;
    taken.rollback().await.unwrap();
    store.is_empty().await;
}

#[tokio::test]
async fn a_transaction_commits_and_answers() {
    let store = Store::new().await;
    let answer = store
        .outbox
        .transaction(Context::default(), |tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            Ok::<_, Error>(7)
        })
        .await;
    assert_eq!(answer.unwrap(), 7);
    assert_eq!(store.count("notes").await, 1);
    assert_eq!(store.count("outbox_events").await, 1);
    store.is_whole().await;
}

#[tokio::test]
async fn what_is_routed_wakes_the_subscriptions_that_have_something_to_deliver() {
    let store = Store::new().await;
    let all = store.subscribe("all").await;
    let none = store.register(outbox_core::Subscription::new("none").unwrap().events(["other.*"]).unwrap()).await;
    let clone = store.outbox.clone();
    let unit = store.outbox.begin(Context::default());
    unit.events().push(todo("1")).unwrap();
    assert!(hang_up_after(5, clone.woken(all)).await.is_none(), "woken before the commit");
    unit.commit().await.unwrap();
    store.outbox.route_waiting().await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), clone.woken(all)).await.expect("woken by the commit before");
    assert!(hang_up_after(5, clone.woken(all)).await.is_none(), "one commit wakes once");
    assert!(hang_up_after(5, clone.woken(none)).await.is_none(), "nothing matches");
    let rolled_back = store.outbox.begin(Context::default());
    rolled_back.events().push(todo("2")).unwrap();
    rolled_back.rollback().await;
    store.outbox.route_waiting().await.unwrap();
    assert!(hang_up_after(5, clone.woken(all)).await.is_none(), "a rollback wakes nobody");
    store.is_whole().await;
}

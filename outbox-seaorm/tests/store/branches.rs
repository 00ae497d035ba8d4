//! Several branches of one request, as of a `join!` or of two fields of a GraphQL query, and what else works beside the
//! transaction: a savepoint belongs to its closure, the transaction to its unit of work.

use std::time::Duration;

use outbox_core::Context;
use outbox_seaorm::{CommitError, SavepointError, Tx};
use sea_orm::{ConnectionTrait, DbErr, Statement};
use tokio::{sync::Notify, task::JoinSet};

use super::{
    database,
    fixture::{Store, todo},
};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Long enough for a statement of another branch to come between, if it could.
const A_MOMENT: Duration = Duration::from_millis(30);

async fn insert(tx: &Tx, text: &str) -> Result<(), DbErr> {
    tx.execute_unprepared(&format!("insert into notes values ('{text}')")).await.map(|_| ())
}

/// A savepoint that writes, lets others try to come between, and answers as asked.
async fn savepoint(tx: &Tx, text: &str, open: &Notify, keep: bool) -> Result<(), SavepointError<Error>> {
    tx.savepoint(|tx, events| async move {
        insert(&tx, text).await?;
        events.push(todo(text))?;
        open.notify_one();
        tokio::time::sleep(A_MOMENT).await;
        if keep { Ok(()) } else { Err("no".into()) }
    })
    .await
}

async fn notes(store: &Store) -> Vec<String> {
    store.column("select text from notes order by text").await
}

async fn aggregates(store: &Store) -> Vec<String> {
    store.column("select aggregate_id from outbox_events order by aggregate_id").await
}

#[tokio::test]
async fn a_branch_beside_a_savepoint_that_fails_is_stored() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let (tx, open) = (unit.tx(), Notify::new());
    let branch = async {
        open.notified().await;
        unit.events().push(todo("branch")).unwrap();
        insert(&tx, "branch").await
    };
    let (failed, branch) = tokio::join!(savepoint(&tx, "savepoint", &open, false), branch);
    assert!(matches!(failed, Err(SavepointError::Work(_))));
    branch.unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["branch"]);
    assert_eq!(aggregates(&store).await, ["branch"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_failed_statement_beside_a_savepoint_is_not_forgiven_with_it() {
    let store = Store::new().await;
    for keep in [false, true] {
        let unit = store.outbox.begin(Context::default());
        let (tx, open) = (unit.tx(), Notify::new());
        insert(&tx, "there").await.unwrap();
        let branch = async {
            open.notified().await;
            insert(&tx, "there").await
        };
        let (ended, branch) = tokio::join!(savepoint(&tx, "savepoint", &open, keep), branch);
        assert_eq!(ended.is_ok(), keep, "{ended:?}");
        branch.unwrap_err();
        drop(tx);
        assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    }
    store.is_empty().await;
}

#[tokio::test]
async fn savepoints_side_by_side_come_one_after_the_other() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let (tx, open) = (unit.tx(), Notify::new());
    let ended = tokio::join!(
        savepoint(&tx, "a", &open, true),
        savepoint(&tx, "b", &open, false),
        savepoint(&tx, "c", &open, true),
        savepoint(&tx, "d", &open, false),
    );
    assert!(matches!(ended, (Ok(()), Err(SavepointError::Work(_)), Ok(()), Err(SavepointError::Work(_)))), "{ended:?}");
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a", "c"]);
    assert_eq!(aggregates(&store).await, ["a", "c"]);
    store.is_whole().await;
}

#[tokio::test]
async fn branches_in_a_savepoint_wait_for_each_other_too() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let outer = tx.savepoint(|tx, events| async move {
        let open = Notify::new();
        let branch = async {
            open.notified().await;
            events.push(todo("branch"))?;
            insert(&tx, "branch").await.map_err(Error::from)
        };
        let (failed, branch) = tokio::join!(savepoint(&tx, "inner", &open, false), branch);
        assert!(matches!(failed, Err(SavepointError::Work(_))));
        branch
    });
    outer.await.unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["branch"]);
    assert_eq!(aggregates(&store).await, ["branch"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_handle_from_around_a_savepoint_is_refused_in_it() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let around = &tx;
    let ended = tx.savepoint(|tx, _| async move {
        insert(&tx, "inside").await?;
        insert(around, "around").await
    });
    let Err(SavepointError::Work(error)) = ended.await else { panic!("it would wait for itself") };
    assert!(error.to_string().contains("use the handle that the closure is given"), "{error}");
    drop(tx);
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)));
    store.is_empty().await;
}

#[tokio::test]
async fn a_collector_from_around_a_savepoint_is_refused_in_it() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let around = unit.events();
    around.push(todo("before")).unwrap();
    let tx = unit.tx();
    let ended = tx.savepoint(|_, events| async move {
        events.push(todo("inside"))?;
        around.push(todo("around"))?;
        Ok::<_, Error>(())
    });
    let Err(SavepointError::Work(error)) = ended.await else { panic!("it would outlive the rollback") };
    drop(tx);
    assert!(error.to_string().contains("push into the collector that the closure is given"), "{error}");
    unit.commit().await.unwrap();
    assert_eq!(aggregates(&store).await, ["before"]);
    store.is_whole().await;
}

#[tokio::test]
async fn what_a_savepoint_was_given_is_of_no_use_after_it() {
    let store = Store::new().await;
    for keep in [false, true] {
        let unit = store.outbox.begin(Context::default());
        let (tx, left) = (unit.tx(), std::sync::Mutex::new(None));
        let ended = tx.savepoint(|tx, events| {
            *left.lock().unwrap() = Some((tx, events));
            async move { if keep { Ok(()) } else { Err("no") } }
        });
        assert_eq!(ended.await.is_ok(), keep);
        let (late, events) = left.lock().unwrap().take().unwrap();
        let error = insert(&late, "late").await.unwrap_err();
        assert!(error.to_string().contains("the savepoint of this handle has ended"), "{error}");
        assert!(events.push(todo("late")).is_err());
        drop((tx, late));
        unit.commit().await.unwrap();
    }
    store.is_empty().await;
}

#[tokio::test]
async fn sql_that_begins_or_ends_a_transaction_is_refused() {
    let store = Store::new().await;
    for sql in [
        "commit",
        "ROLLBACK",
        "begin",
        "savepoint mine",
        "release savepoint outbox_1",
        "/* now */ end",
        "insert into notes values ('b'); commit; insert into notes values ('c')",
    ] {
        for prepared in [false, true] {
            let unit = store.outbox.begin(Context::default());
            let tx = unit.tx();
            insert(&tx, "a").await.unwrap();
            unit.events().push(todo("a")).unwrap();
            let refused = if prepared {
                tx.execute_raw(Statement::from_string(database::BACKEND, sql)).await
            } else {
                tx.execute_unprepared(sql).await
            };
            let error = refused.unwrap_err();
            assert!(error.to_string().contains("tx.savepoint"), "{sql}: {error}");
            drop(tx);
            assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed)), "{sql}");
        }
        store.is_empty().await;
    }
}

#[tokio::test]
async fn handles_of_tasks_that_were_aborted_are_no_obstacle() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    insert(&unit.tx(), "a").await.unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..4 {
        let held = unit.tx();
        tasks.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
    }
    tokio::task::yield_now().await;
    drop(tasks);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_handle_in_a_log_shows_no_payload() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    unit.events().push(todo("secret")).unwrap();
    let shown = format!("{unit:?} {:?} {:?} {:?}", unit.tx(), unit.events(), unit.source());
    assert!(!shown.contains("secret"), "{shown}");
    unit.rollback().await;
    store.is_empty().await;
}

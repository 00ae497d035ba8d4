use std::time::Duration;

use outbox_core::Context;
use outbox_seaorm::{CommitError, SavepointError};
use sea_orm::ConnectionTrait;

use super::{
    database,
    fixture::{SLOW, Store, hang_up_after, poll_once, todo},
};

type Error = Box<dyn std::error::Error + Send + Sync>;

async fn notes(store: &Store) -> Vec<String> {
    store.column("select text from notes order by text").await
}

async fn aggregates(store: &Store) -> Vec<String> {
    store.column("select aggregate_id from outbox_events order by position").await
}

#[tokio::test]
async fn a_savepoint_that_fails_drops_its_rows_and_events_and_the_transaction_goes_on() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let failed = tx
        .savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('b')").await?;
            events.push(todo("2"))?;
            Err::<(), Error>("no".into())
        })
        .await;
    assert!(matches!(failed, Err(SavepointError::Work(error)) if error.to_string() == "no"));
    tx.execute_unprepared("insert into notes values ('c')").await.unwrap();
    unit.events().push(todo("3")).unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a", "c"]);
    assert_eq!(aggregates(&store).await, ["1", "3"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_statement_that_fails_in_a_savepoint_fails_only_the_savepoint() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap();
    let failed = tx
        .savepoint(|tx, _| async move {
            tx.execute_unprepared("insert into notes values ('b')").await?;
            tx.execute_unprepared("insert into notes values ('a')").await?;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(failed, Err(SavepointError::Work(_))), "{failed:?}");
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a"]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_ignored_error_in_a_savepoint_rolls_it_back() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let failed = tx
        .savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            let _ = tx.execute_unprepared("insert into notes values ('a')").await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(failed, Err(SavepointError::StatementFailed)), "{failed:?}");
    tx.execute_unprepared("insert into notes values ('b')").await.unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["b"]);
    assert_eq!(aggregates(&store).await, Vec::<String>::new());
    store.is_whole().await;
}

#[tokio::test]
async fn a_savepoint_that_is_cancelled_anywhere_commits_nothing_or_all_of_it() {
    let store = Store::new().await;
    let mut cancelled = 0;
    for polls in 0..40 {
        let unit = store.outbox.begin(Context::default());
        let tx = unit.tx();
        tx.execute_unprepared(&format!("insert into notes values ('before {polls}')")).await.unwrap();
        let kept = tx.savepoint(|tx, events| async move {
            tx.execute_unprepared(&format!("insert into notes values ('{polls}')")).await?;
            events.push(todo(&polls.to_string()))?;
            // Cancelled here for sure, whatever the speed of the database.
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok::<_, Error>(())
        });
        // Once it was polled, something is under way.
        let begun = polls > 0;
        assert!(hang_up_after(polls, kept).await.is_none());
        drop(tx);
        let committed = unit.commit().await;
        if begun {
            assert!(matches!(committed, Err(CommitError::StatementFailed)), "{polls}: {committed:?}");
            cancelled += 1;
        } else {
            committed.unwrap();
        }
    }
    assert_eq!(cancelled, 39);
    assert_eq!(notes(&store).await, ["before 0"]);
    assert_eq!(aggregates(&store).await, Vec::<String>::new());
    store.is_whole().await;
}

#[tokio::test]
async fn a_savepoint_that_is_cancelled_while_a_clone_is_at_work_commits_nothing() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.begin_now().await.unwrap();
    let clone = tx.clone();
    let (reached, mut waiting) = tokio::sync::oneshot::channel();
    let mut savepoint = Box::pin(tx.savepoint(|tx, events| async move {
        tx.execute_unprepared("insert into notes values ('half')").await?;
        events.push(todo("1"))?;
        let _ = reached.send(());
        std::future::pending::<Result<(), Error>>().await
    }));
    while waiting.try_recv().is_err() {
        assert!(poll_once(&mut savepoint).await.is_pending());
        tokio::task::yield_now().await;
    }
    let mut statement = clone.execute_unprepared(SLOW);
    assert!(poll_once(&mut statement).await.is_pending());
    drop(savepoint);
    let _ = statement.await;
    drop((tx, clone));
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::StatementFailed), "{error:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_savepoint_that_is_cancelled_inside_another_rolls_back_the_other() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap();
    let outer = tx
        .savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('b')").await?;
            events.push(todo("1"))?;
            let inner = tx.savepoint(|tx, events| async move {
                tx.execute_unprepared("insert into notes values ('c')").await?;
                events.push(todo("2"))?;
                std::future::pending::<Result<(), Error>>().await
            });
            let _ = tokio::time::timeout(Duration::from_millis(20), inner).await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(outer, Err(SavepointError::StatementFailed)), "{outer:?}");
    tx.savepoint(|tx, events| async move {
        tx.execute_unprepared("insert into notes values ('d')").await?;
        events.push(todo("3"))?;
        Ok::<_, Error>(())
    })
    .await
    .unwrap();
    drop(tx);
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a", "d"]);
    assert_eq!(aggregates(&store).await, ["3"]);
    store.is_whole().await;
}

#[tokio::test]
async fn a_panic_in_a_savepoint_commits_nothing() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    tx.execute_unprepared("insert into notes values ('a')").await.unwrap();
    unit.events().push(todo("1")).unwrap();
    let task = tokio::spawn(async move {
        let work = tx.savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('b')").await?;
            events.push(todo("2"))?;
            if !events.is_empty() {
                panic!("a bug in a handler");
            }
            Ok::<_, Error>(())
        });
        work.await
    });
    assert!(task.await.unwrap_err().is_panic());
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::StatementFailed), "{error:?}");
    store.is_empty().await;
}

#[tokio::test]
async fn a_savepoint_that_cannot_be_ended_commits_nothing() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    unit.events().push(todo("1")).unwrap();
    let lost = tx
        .savepoint(|tx, _| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            let _ = tx.execute_unprepared(database::END_TRANSACTION).await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(lost, Err(SavepointError::Database(_))), "{lost:?}");
    drop(tx);
    // A session that was ended is about chance.
    assert!(matches!(unit.commit().await, Err(CommitError::StatementFailed | CommitError::StatementBusy)));
    store.is_empty().await;
}

#[tokio::test]
async fn a_savepoint_that_succeeds_is_kept() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let tx = unit.tx();
    let answer = tx
        .savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            Ok::<_, Error>(7)
        })
        .await;
    assert_eq!(answer.unwrap(), 7);
    drop(tx);
    assert_eq!(store.count("notes").await, 0, "nothing is visible before the commit");
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a"]);
    assert_eq!(aggregates(&store).await, ["1"]);
    store.is_whole().await;
}

#[tokio::test]
async fn savepoints_nest() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    unit.tx()
        .savepoint(|tx, events| async move {
            tx.execute_unprepared("insert into notes values ('a')").await?;
            events.push(todo("1"))?;
            for (name, keep) in [("b", false), ("c", true), ("d", false)] {
                let inner = tx
                    .savepoint(|tx, events| async move {
                        tx.execute_unprepared(&format!("insert into notes values ('{name}')")).await?;
                        events.push(todo(name))?;
                        if keep { Ok(()) } else { Err::<_, Error>("no".into()) }
                    })
                    .await;
                assert_eq!(inner.is_ok(), keep);
            }
            events.push(todo("2"))?;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    unit.commit().await.unwrap();
    assert_eq!(notes(&store).await, ["a", "c"]);
    assert_eq!(aggregates(&store).await, ["1", "c", "2"]);
    store.is_whole().await;
}

#[tokio::test]
async fn an_outer_savepoint_that_fails_takes_the_inner_one_back() {
    let store = Store::new().await;
    let unit = store.outbox.begin(Context::default());
    let outer = unit
        .tx()
        .savepoint(|tx, _| async move {
            tx.savepoint(|tx, events| async move {
                tx.execute_unprepared("insert into notes values ('a')").await?;
                events.push(todo("1"))?;
                Ok::<_, Error>(())
            })
            .await
            .map_err(|error| error.to_string())?;
            Err::<(), Error>("no".into())
        })
        .await;
    assert!(matches!(outer, Err(SavepointError::Work(_))));
    unit.commit().await.unwrap();
    store.is_empty().await;
}

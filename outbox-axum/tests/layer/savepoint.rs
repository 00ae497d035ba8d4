//! Parts of a transaction that may fail.

use http::StatusCode;
use outbox_axum::{Error, Tx};
use outbox_seaorm::SavepointError;
use sea_orm::{DbErr, TransactionTrait};
use tokio::sync::Notify;

use crate::support::{build_app, insert, place, placed};

#[tokio::test]
async fn a_branch_beside_a_savepoint_that_fails_is_stored() {
    let app = build_app(|tx: Tx| async move {
        let open = Notify::new();
        let savepoint = tx.savepoint(|tx, events| {
            let open = &open;
            async move {
                insert(&tx, "savepoint").await?;
                events.push(placed("savepoint"))?;
                open.notify_one();
                tokio::time::sleep(std::time::Duration::from_millis(30)).await;
                Err::<(), Error>(DbErr::Custom("no".to_owned()).into())
            }
        });
        let branch = async {
            open.notified().await;
            place(&tx, "branch").await;
        };
        let (failed, ()) = tokio::join!(savepoint, branch);
        assert!(matches!(failed, Err(SavepointError::Work(_))));
        StatusCode::CREATED
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.orders().await, ["branch"]);
    assert_eq!(app.store.payloads().await, [r#"{"op":"branch"}"#]);
}

#[tokio::test]
async fn a_transaction_of_seaorm_is_a_savepoint() {
    async fn by_anybody<C: TransactionTrait>(db: &C, op: &str, keep: bool) -> Result<(), DbErr> {
        let inside = db.begin().await?;
        insert(&inside, op).await?;
        if keep {
            sea_orm::TransactionSession::commit(inside).await
        } else {
            sea_orm::TransactionSession::rollback(inside).await
        }
    }
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        by_anybody(&tx, "kept", true).await?;
        by_anybody(&tx, "gone", false).await?;
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.orders().await, ["a", "kept"]);
}

#[tokio::test]
async fn savepoint_kept() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        tx.savepoint(|tx, events| async move {
            insert(&tx, "b").await?;
            events.push(placed("b"))?;
            Ok::<_, Error>(())
        })
        .await?;
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.orders().await, ["a", "b"]);
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#, r#"{"op":"b"}"#]);
}

#[tokio::test]
async fn savepoint_rolled_back() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let refused = tx
            .savepoint(|tx, events| async move {
                insert(&tx, "b").await.unwrap();
                events.push(placed("b")).unwrap();
                Err::<(), _>("changed my mind")
            })
            .await;
        assert!(matches!(refused, Err(SavepointError::Work("changed my mind"))));
        place(&tx, "c").await;
        StatusCode::CREATED
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.orders().await, ["a", "c"]);
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#, r#"{"op":"c"}"#]);
}

#[tokio::test]
async fn an_error_inside_a_savepoint_leaves_the_rest_good() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let refused = tx
            .savepoint(|tx, events| async move {
                events.push(placed("b")).unwrap();
                insert(&tx, "b").await?;
                insert(&tx, "a").await
            })
            .await;
        assert!(matches!(refused, Err(SavepointError::Work(DbErr::Exec(_)))), "{refused:?}");
        StatusCode::CREATED
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.orders().await, ["a"]);
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#]);
}

#[tokio::test]
async fn an_error_swallowed_inside_a_savepoint_rolls_the_savepoint_back() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let refused = tx
            .savepoint(|tx, events| async move {
                events.push(placed("b")).unwrap();
                let _ignored = insert(&tx, "a").await;
                Ok::<_, Error>(())
            })
            .await;
        assert!(matches!(refused, Err(SavepointError::StatementFailed)), "{refused:?}");
        StatusCode::CREATED
    })
    .await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#]);
}

#[tokio::test]
async fn the_error_of_a_savepoint_is_the_answer_with_a_question_mark() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        tx.savepoint(|tx, _| async move { insert(&tx, "a").await }).await?;
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    assert_eq!(app.post().await.facts(), (409, "rolled-back"));
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn a_savepoint_that_was_cancelled_is_a_500_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let stuck = tx.savepoint(|tx, _| async move {
            insert(&tx, "b").await.unwrap();
            std::future::pending::<Result<(), DbErr>>().await
        });
        let cancelled = tokio::time::timeout(std::time::Duration::from_millis(50), stuck).await;
        assert!(cancelled.is_err());
        StatusCode::CREATED
    })
    .await;
    assert_eq!(app.post().await.facts(), (500, "rolled-back"));
    assert!(app.store.is_empty().await && app.store.can_write().await);
}

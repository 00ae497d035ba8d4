//! Modes with a savepoint.

use crate::support::App;

#[tokio::test]
async fn an_event_pushed_inside_a_savepoint_that_is_kept_is_stored() {
    for app in App::each().await {
        app.op("savepoint_ok").await.assert_committed(201);
        app.assert_stored(&[2]).await;
    }
}

#[tokio::test]
async fn an_event_pushed_inside_a_savepoint_that_is_rolled_back_is_absent() {
    for app in App::each().await {
        app.op("savepoint_rollback").await.assert_committed(201);
        app.assert_stored(&[]).await;
    }
}

#[tokio::test]
async fn a_statement_that_fails_inside_a_savepoint_takes_only_the_savepoint_with_it() {
    for app in App::each().await {
        app.op("savepoint_error").await.assert_committed(201);
        app.assert_stored(&[]).await;
    }
}

//! What only a file can be: locked as a whole, and safe on disk by settings of the connection.

use outbox_core::Context;
use outbox_seaorm::{CommitError, SchemaError, is_transient};
use sea_orm::ConnectionTrait;

use super::{
    database::Place,
    fixture::{Store, todo},
};

#[tokio::test]
async fn connections_confirm_commits_only_when_they_are_on_disk() {
    let store = Store::new().await;
    for db in [store.outbox.writer(), store.outbox.reader()] {
        for (pragma, expected) in
            [("journal_mode", "wal"), ("synchronous", "2"), ("foreign_keys", "1"), ("busy_timeout", "5000")]
        {
            let sql = format!("select cast({pragma} as text) from pragma_{pragma}");
            let sql = if pragma == "busy_timeout" { sql.replacen(pragma, "timeout", 1) } else { sql };
            let statement = sea_orm::Statement::from_string(sea_orm::DbBackend::Sqlite, sql);
            let row = db.query_one_raw(statement).await.unwrap().unwrap();
            assert_eq!(row.try_get_by_index::<String>(0).unwrap(), expected, "{pragma}");
        }
    }
}

#[tokio::test]
async fn a_database_that_another_process_has_locked_is_transient() {
    let store = Store::new().await;
    let other = store.another_process().await;
    other.writer().execute_unprepared("pragma busy_timeout = 10").await.unwrap();
    let writing = store.outbox.begin(Context::default());
    writing.tx().begin().await.unwrap();
    let unit = other.begin(Context::default());
    unit.events().push(todo("1")).unwrap();
    let error = unit.commit().await.unwrap_err();
    assert!(matches!(error, CommitError::Begin(_)) && error.is_transient(), "{error:?}");
    let syntax = other.writer().execute_unprepared("no sql").await.unwrap_err();
    assert!(!is_transient(&syntax), "{syntax:?}");
    writing.rollback().await;
    store.is_empty().await;
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_not_told_to_migrate() {
    let place = Place::migrated().await;
    let outbox = place.connect(1).await;
    outbox.reader().clone().close().await.unwrap();
    let error = outbox.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::Unanswered(_)), "{error:?}");
}

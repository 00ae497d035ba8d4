//! That the server is as hostile as it should be, and what only such a server can do.

use std::time::Duration;

use outbox_core::Context;
use outbox_seaorm::CommitError;

use super::{
    SETTINGS,
    database::connect,
    fixture::{Store, eventually, record, todo},
};

#[tokio::test]
async fn the_servers_defaults_are_not_those_of_a_new_one() {
    let store = Store::new().await;
    let plain = connect(&store.place.url(), 1).await;
    let sql = "select name::text || '=' || coalesce(reset_val, '') as setting from pg_settings";
    let found = sea_orm::ConnectionTrait::query_all_raw(
        &plain,
        sea_orm::Statement::from_string(super::database::BACKEND, sql.to_owned()),
    );
    let found: Vec<String> = found.await.unwrap().iter().map(|row| row.try_get_by_index(0).unwrap()).collect();
    for name in ["default_transaction_isolation=repeatable read", "bytea_output=escape", "jit_above_cost=0"] {
        assert!(SETTINGS.contains(&name) && found.iter().any(|setting| setting == name), "{name}");
    }
    assert!(found.iter().any(|setting| setting.starts_with("search_path=stranger")), "{found:?}");
}

/// An administrator holds up all writes for a while.
#[tokio::test]
async fn a_database_that_is_read_only_for_a_while_takes_events_again() {
    let store = Store::new().await;
    let database: String = store.value("select current_database()::text").await;
    let push = async || {
        let unit = store.outbox.begin(Context::default());
        unit.events().push(todo("1")).unwrap();
        unit.commit().await
    };
    push().await.unwrap();
    let set = async |value: &str| {
        let sql = format!("alter database {database} set default_transaction_read_only = {value}");
        sea_orm::ConnectionTrait::execute_unprepared(
            &connect(&store.place.url(), 1).await,
            &format!("begin read write; {sql}; commit"),
        )
        .await
        .unwrap();
    };
    set("on").await;
    let ended = "select pg_terminate_backend(pid) from pg_stat_activity
                  where datname = current_database() and pid <> pg_backend_pid()";
    store.rows(ended).await;
    eventually("the refusal", async || {
        let refused = push().await.err()?;
        assert!(refused.is_transient(), "{refused:?}");
        matches!(&refused, CommitError::Flush(cause) if cause.to_string().contains("read-only")).then_some(())
    })
    .await;
    set("off").await;
    eventually("the first commit", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        push().await.ok()
    })
    .await;
    record(&store.outbox, [todo("2")]).await;
}

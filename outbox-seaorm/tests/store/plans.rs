//! Each statement is explained as it stands in the store.

use sea_orm::{ConnectionTrait, DbBackend, Statement, Value};

use crate::fixture::{Store, todo};

#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/sqlite.rs"]
mod sqlite;

async fn plan(store: &Store, sql: &str, parameters: usize) -> String {
    let nothing = vec![Value::String(None); parameters];
    let statement = Statement::from_sql_and_values(DbBackend::Sqlite, format!("explain query plan {sql}"), nothing);
    let rows = store.outbox.reader().query_all_raw(statement).await.unwrap();
    let steps: Vec<String> = rows.iter().map(|row| row.try_get("", "detail").unwrap()).collect();
    steps.join("\n")
}

#[tokio::test]
async fn dump() {
    let store = Store::new().await;
    for (name, sql, n) in [
        ("INSERT_EVENTS", sqlite::INSERT_EVENTS, 8),
        ("INSERT_DELIVERIES", sqlite::INSERT_DELIVERIES, 1),
        ("UPSERT_LANES", sqlite::UPSERT_LANES, 1),
        ("NEXT_DUE", sqlite::NEXT_DUE, 1),
        ("CLAIM", sqlite::CLAIM, 4),
        ("RUNS", sqlite::RUNS, 3),
        ("HELD", sqlite::HELD, 1),
        ("DELETE_DELIVERIES", sqlite::DELETE_DELIVERIES, 1),
        ("INSERT_DELIVERED", sqlite::INSERT_DELIVERED, 1),
        ("INSERT_DEAD_LETTERS", sqlite::INSERT_DEAD_LETTERS, 1),
        ("ADVANCE_LANES", sqlite::ADVANCE_LANES, 1),
        ("DELETE_EMPTY_LANES", sqlite::DELETE_EMPTY_LANES, 1),
        ("RENEW", sqlite::RENEW, 2),
        ("POSITIONS_KNOWN", sqlite::POSITIONS_KNOWN, 2),
        ("EVENTS_FROM", sqlite::EVENTS_FROM, 2),
        ("FIRST_POSITION_SINCE", sqlite::FIRST_POSITION_SINCE, 1),
        ("STATUS", sqlite::STATUS, 0),
        ("ACTIVITY", sqlite::ACTIVITY, 1),
        ("LIST_UNFINISHED", sqlite::LIST_UNFINISHED, 4),
        ("LIST_DELIVERED", sqlite::LIST_DELIVERED, 3),
        ("LIST_DEAD", sqlite::LIST_DEAD, 3),
    ] {
        println!("{name}\n{}\n", plan(&store, sql, n).await);
    }
    let _ = todo("1");
}

//! The statements as they stand in the store, explained by SQLite.

use sea_orm::{ConnectionTrait, DbBackend, Statement, Value};

use super::fixture::Store;

#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/sqlite.rs"]
mod sqlite;

use crate::sql::{Flush, Settle};
use sqlite::SQLITE;

async fn plan(store: &Store, sql: &str) -> String {
    let parameters = (1..10).filter(|n| sql.contains(&format!("${n}"))).map(|_| Value::String(None));
    let explain = format!("explain query plan {sql}");
    let statement = Statement::from_sql_and_values(DbBackend::Sqlite, explain, parameters);
    let rows = store.outbox.reader().query_all_raw(statement).await.unwrap();
    rows.iter().map(|row| row.try_get::<String>("", "detail").unwrap() + "\n").collect()
}

#[tokio::test]
async fn the_claim_reads_due_lanes_from_their_index() {
    let store = Store::new().await;
    let due = "SEARCH outbox_lanes USING COVERING INDEX outbox_lanes_due (subscription_id=? AND due_at<?)";
    let claim = plan(&store, SQLITE.claim).await;
    assert!(claim.contains(due) && claim.contains("SEARCH outbox_lanes USING PRIMARY KEY"), "{claim}");
    let others = plan(&store, SQLITE.claim_others).await;
    let of_tenant = "SEARCH outbox_lanes USING COVERING INDEX outbox_lanes_tenant (subscription_id=? AND tenant";
    assert!(others.matches(of_tenant).count() >= 3 && !others.contains("SCAN outbox_lanes"), "{others}");
    let next_due = plan(&store, SQLITE.next_due).await;
    assert!(next_due.contains("USING COVERING INDEX outbox_lanes_due (subscription_id=?)"), "{next_due}");
    assert!(!next_due.contains("TEMP B-TREE"), "{next_due}");
}

#[tokio::test]
async fn runs_are_read_from_the_primary_key_of_the_deliveries() {
    let store = Store::new().await;
    let runs = plan(&store, SQLITE.runs).await;
    assert!(runs.contains("SEARCH d USING PRIMARY KEY (subscription_id=? AND key=? AND seq=?)"), "{runs}");
    assert!(runs.contains("SEARCH outbox_deliveries USING PRIMARY KEY (subscription_id=? AND key=?)"), "{runs}");
}

#[tokio::test]
async fn flush_and_settle_touch_only_their_own_lanes_and_deliveries() {
    let store = Store::new().await;
    let (Flush::Routed { insert_events, insert_marks }, Settle::InSteps(settle)) = (&SQLITE.flush, &SQLITE.settle)
    else {
        panic!("a statement costs no round trip here")
    };
    for sql in [
        insert_events,
        insert_marks,
        SQLITE.insert_deliveries,
        SQLITE.upsert_lanes,
        SQLITE.due_with_head,
        SQLITE.held,
        settle.delete_deliveries,
        settle.insert_delivered,
        settle.insert_dead_letters,
        settle.advance_lanes,
        SQLITE.delete_empty_lanes,
        SQLITE.note_attempts,
        SQLITE.renew,
        SQLITE.take_over,
        SQLITE.relayed,
    ] {
        let plan = plan(&store, sql).await;
        let tables = plan.lines().filter(|step| !step.contains("VIRTUAL TABLE"));
        for step in tables.filter(|step| step.starts_with("SCAN") || step.starts_with("SEARCH")) {
            let of_one_row =
                ["(subscription_id=? AND key=?", "(subscription_id=? AND position=?)", "INTEGER PRIMARY KEY (rowid=?)"];
            assert!(of_one_row.iter().any(|search| step.contains(search)), "{sql}\n{plan}");
        }
    }
}

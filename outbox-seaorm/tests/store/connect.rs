use std::sync::Arc;

use outbox_core::{Context, StartPosition, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{DeliveryState, SchemaError, Settled, once};
use uuid::Uuid;

use super::{
    database::Place,
    fixture::{LONG, Migrator, Store, delivered_run, record, todo},
};

#[tokio::test]
async fn a_database_without_tables_is_told_to_migrate() {
    let place = Place::empty().await;
    let outbox = place.connect(1).await;
    let error = outbox.check_schema().await.unwrap_err();
    assert!(matches!(error, SchemaError::Missing(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the database has no outbox tables; run the migrations first (see `outbox_migrations::up`)"
    );
}

#[tokio::test]
async fn tables_from_a_newer_version_are_refused() {
    let store = Store::new().await;
    store.outbox.check_schema().await.unwrap();
    store.execute("update outbox_meta set schema_version = 4").await;
    let error = store.outbox.check_schema().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the outbox tables are from a newer version (schema 4, this program knows 3); start that version, or restore \
         a backup from before the upgrade"
    );
}

#[tokio::test]
async fn tables_from_an_older_version_are_refused() {
    let store = Store::new().await;
    store.execute("update outbox_meta set schema_version = 1").await;
    let error = store.outbox.check_schema().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the outbox tables are from an older version (schema 1, this program needs 3); run the migrations (see \
         `outbox_migrations::up`)"
    );
}

/// As cleaners of test databases do.
#[tokio::test]
async fn tables_that_were_emptied_take_events_again() {
    for checked in [true, false] {
        let store = Store::new().await;
        store.subscribe("s").await;
        store.record_todos(&["1"]).await;
        for table in ["lanes", "deliveries", "events", "subscriptions", "meta"] {
            store.execute(&format!("delete from outbox_{table}")).await;
        }
        if checked {
            store.outbox.check_schema().await.unwrap();
        }
        // A copy of the subscriptions from before is not used.
        store.record_todos(&["2"]).await;
        assert_eq!(store.count("outbox_deliveries").await, 0);
        let id = store.subscribe("s").await;
        store.record_todos(&["3"]).await;
        assert_eq!(store.deliver_all(id).await.len(), 1);
        store.outbox.check_schema().await.unwrap();
        store.is_whole().await;
    }
}

#[tokio::test]
async fn the_store_knows_the_version_that_the_migrations_end_with() {
    let store = Store::new().await;
    store.execute(&format!("update outbox_meta set schema_version = {}", outbox_migrations::SCHEMA_VERSION)).await;
    store.outbox.check_schema().await.unwrap();
    store.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_may_open_a_new_database_at_once() {
    let place = Arc::new(Place::empty().await);
    let mut processes = Vec::new();
    for _ in 0..8 {
        let place = place.clone();
        processes.push(tokio::spawn(async move {
            let outbox = place.connect(2).await;
            outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
            outbox.check_schema().await.unwrap();
            let id = outbox.register(&Subscription::new("s").unwrap()).await.unwrap();
            record(&outbox, [todo("1")]).await;
            id
        }));
    }
    for process in processes {
        assert_eq!(process.await.unwrap(), 1);
    }
}

struct Prefixed;

impl MigratorTrait for Prefixed {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::with_prefix("shop_")
    }
}

#[tokio::test]
async fn a_table_prefix_works_from_end_to_end() {
    let store = Store::new().await;
    let outbox = store.another_process().await.table_prefix("shop_");
    assert!(outbox.check_schema().await.is_err());
    store.execute("drop table seaql_migrations").await;
    outbox_migrations::up::<Prefixed>(outbox.writer()).await.unwrap();
    outbox.check_schema().await.unwrap();

    record(&outbox, [todo("1")]).await;
    let s = Subscription::new("s").unwrap().start(StartPosition::Beginning);
    let id = outbox.register(&s).await.unwrap();
    let unit = outbox.begin(Context::default());
    unit.events().push(todo("2")).unwrap();
    assert!(once(&outbox, &unit.tx(), "mailer", Uuid::now_v7()).await.unwrap());
    unit.commit().await.unwrap();
    outbox.route_waiting().await.unwrap();
    let lanes = outbox.claim(id, "worker", 10, 10, LONG).await.unwrap().lanes;
    assert_eq!(lanes.len(), 2);
    assert_eq!(outbox.renew(&[lanes[0].lane.clone()], LONG).await.unwrap().len(), 1);
    let mut dead = delivered_run(&lanes[1]);
    dead.finished[0].error = Some("no".to_owned());
    assert_eq!(outbox.settle(&[delivered_run(&lanes[0]), dead]).await.unwrap(), [Settled::Done; 2]);
    assert_eq!(outbox.next_due(id).await.unwrap().and_then(|next| next.after), None);
    outbox.heartbeat("worker", &[&Subscription::new("s").unwrap()]).await.unwrap();
    let status = outbox.status().await.unwrap();
    assert_eq!((status.subscriptions[0].delivered, status.subscriptions[0].dead, status.workers.len()), (1, 1, 1));
    for (state, records) in [(DeliveryState::Delivered, 1), (DeliveryState::Dead, 1), (DeliveryState::Pending, 0)] {
        assert_eq!(outbox.deliveries(Some("s"), Some(state), 0, 10).await.unwrap().len(), records);
    }
    assert_eq!(outbox.activity("s").await.unwrap()[6], 1);
    outbox.forget_worker("worker").await.unwrap();

    assert_eq!(store.count("shop_events").await, 2);
    assert_eq!(store.count("shop_inbox").await, 1);
    for table in ["outbox_events", "outbox_subscriptions", "outbox_delivered", "outbox_inbox"] {
        assert_eq!(store.count(table).await, 0, "{table}");
    }
    store.is_whole().await;
}

#[test]
fn a_table_prefix_that_is_no_name_is_refused() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for prefix in ["", "a.b", "a-b", "Shop_", "a'b", "a b", "1a", &"a".repeat(33)] {
        let store = runtime.block_on(Store::new());
        let refused =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| store.outbox.clone().table_prefix(prefix)));
        assert!(refused.is_err(), "{prefix}");
        let _entered = runtime.enter();
        drop(store);
    }
}

use std::error::Error;

use outbox_core::{Context, StartPosition, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{ConnectError, DeliveryState, Outbox, SchemaError, Settled, once};
use sea_orm::ConnectionTrait;
use uuid::Uuid;

use crate::fixture::{LONG, Migrator, Store, delivered_run, record, todo, url};

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[tokio::test]
async fn another_kind_of_database_is_refused_in_one_sentence() {
    for (url, scheme) in [
        ("mysql://me:hunter2@host/db", "mysql"),
        ("nonsense", "nonsense"),
        ("", ""),
        ("sqlite", "sqlite"),
        ("SQLITE://x", "SQLITE"),
    ] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::UnknownScheme { .. }), "{error:?}");
        let text = chain(&error);
        assert_eq!(
            text,
            format!(
                "the database URL starts with {scheme:?}; use sqlite://FILE?mode=rwc, for example \
                 sqlite://todo.db?mode=rwc, or postgres://USER:PASSWORD@HOST/DATABASE"
            )
        );
        assert!(!text.contains("hunter2") && !format!("{error:?}").contains("hunter2"));
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_one_sentence() {
    // A port that nobody listens on any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Outbox::connect(&format!("postgres://me:hunter2@127.0.0.1:{port}/db"), 1).await.unwrap_err();
    let text = chain(&error);
    assert!(text.starts_with("the database server could not be reached; check host"), "{text}");
    assert!(!text.contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_database_in_memory_is_refused() {
    for url in ["sqlite::memory:", "sqlite://:memory:", "sqlite://x?mode=memory"] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::InMemory), "{error:?}");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_one_sentence() {
    for url in [
        "sqlite:///missing/folder/todo.db?mode=rwc",
        "sqlite://me:hunter2@host/todo.db?mode=rwc",
        "sqlite:///missing/todo.db?mode=ro&password=hunter2",
        "sqlite:///missing/todo.db?mode=nonsense",
        "sqlite:///missing/todo.db",
    ] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::Open(_)), "{error:?}");
        assert_eq!(
            error.to_string(),
            "the database could not be opened; check that the file's folder exists and can be written"
        );
        assert!(!chain(&error).contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_database_without_tables_is_told_to_migrate() {
    let directory = tempfile::tempdir().unwrap();
    let outbox = Outbox::connect(&url(&directory), 1).await.unwrap();
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
    store.execute("update outbox_meta set schema_version = 2").await;
    let error = store.outbox.check_schema().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the outbox tables are from a newer version (schema 2, this program knows 1); start that version, or restore \
         a backup from before the upgrade"
    );
    store.execute("delete from outbox_meta").await;
    assert!(matches!(store.outbox.check_schema().await, Err(SchemaError::Missing(_))));
}

#[tokio::test]
async fn the_store_knows_the_version_that_the_migrations_end_with() {
    let store = Store::new().await;
    store.execute(&format!("update outbox_meta set schema_version = {}", outbox_migrations::SCHEMA_VERSION)).await;
    store.outbox.check_schema().await.unwrap();
    store.is_whole().await;
}

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_may_open_a_new_file_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut processes = Vec::new();
    for _ in 0..8 {
        let url = url(&directory);
        processes.push(tokio::spawn(async move {
            let outbox = Outbox::connect(&url, 2).await.unwrap();
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
    let lanes = outbox.claim(id, "worker", 10, 10, LONG).await.unwrap().lanes;
    assert_eq!(lanes.len(), 2);
    assert_eq!(outbox.renew(&[lanes[0].lane.clone()], LONG).await.unwrap().len(), 1);
    let mut dead = delivered_run(&lanes[1]);
    dead.finished[0].error = Some("no".to_owned());
    assert_eq!(outbox.settle(&[delivered_run(&lanes[0]), dead]).await.unwrap(), [Settled::Done; 2]);
    assert_eq!(outbox.next_due(id).await.unwrap().and_then(|next| next.after), None);
    outbox.heartbeat("worker", &["s"]).await.unwrap();
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
    for prefix in ["", "a.b", "a-b", "Shop_", "a'b", "a b", &"a".repeat(65)] {
        let store = runtime.block_on(Store::new());
        let refused =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| store.outbox.clone().table_prefix(prefix)));
        assert!(refused.is_err(), "{prefix}");
        let _entered = runtime.enter();
        drop(store);
    }
}

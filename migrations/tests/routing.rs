//! The way from version 1 to version 2 and back, on a full database.

use std::time::Duration;

use outbox_migrations::{MigrateError, down, sea_orm_migration, up};
use outbox_test_servers::Postgres;
use sea_orm_migration::{
    MigrationTrait, MigratorTrait,
    sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, Statement, TransactionTrait},
};

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

/// A program of the version before.
struct Before;

impl MigratorTrait for Before {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all().into_iter().take(1).collect()
    }
}

async fn connect(url: &str) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url);
    options.max_connections(2).sqlx_logging(false);
    Database::connect(options).await.unwrap()
}

/// A database of version 1 of each kind.
async fn databases() -> (tempfile::TempDir, [DatabaseConnection; 2]) {
    let directory = tempfile::tempdir().unwrap();
    let file = format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display());
    let databases = [connect(&file).await, connect(&Postgres::shared().database()).await];
    for db in &databases {
        up::<Before>(db).await.unwrap();
    }
    (directory, databases)
}

async fn execute(db: &DatabaseConnection, sql: &str) {
    db.execute_unprepared(sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"));
}

async fn texts(db: &DatabaseConnection, sql: &str) -> Vec<String> {
    let rows = db.query_all_raw(Statement::from_string(db.get_database_backend(), sql)).await;
    rows.unwrap_or_else(|error| panic!("{error}: {sql}")).iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
}

/// Deliveries that wait, are leased, delayed, dead, held up and delivered, with purged events, and a backfill that was cut
/// off.
async fn fill(db: &DatabaseConnection) {
    let (at, id, settled) = match db.get_database_backend() {
        DbBackend::Sqlite => ("'2026-01-01T00:00:00.000Z'", "randomblob(16)", ""),
        _ => ("timestamptz '2026-01-01T00:00:00Z'", "gen_random_uuid()", ", changed_in = null"),
    };
    for (n, name) in ["plain", "held", "filling"].iter().enumerate() {
        let backfill = if *name == "filling" { "3" } else { "null" };
        execute(
            db,
            &format!(
                "insert into outbox_subscriptions (name, filter, ordering, backfill_from)
                 values ('{name}', '{{}}', '\"Aggregate\"', {backfill})"
            ),
        )
        .await;
        assert!(n < 3);
    }
    if !settled.is_empty() {
        execute(db, &format!("update outbox_subscriptions set backfill_from = backfill_from {settled}")).await;
    }
    for n in 1..=9 {
        execute(
            db,
            &format!(
                "insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
                    occurred_at, recorded_at, tenant)
                 values ({id}, 'todo.created', 1, 'todo', '{n}', '{{\"n\":{n}}}', {at}, {at}, 'acme')"
            ),
        )
        .await;
    }
    for (subscription, key, positions, attempts, leased, held) in [
        (1, "waits", "1 2", 0, "null", "null"),
        (1, "leased", "3", 1, "'worker'", "null"),
        (1, "delayed", "4", 0, "null", "null"),
        (2, "held", "6", 0, "null", "5"),
        (3, "filled", "3", 0, "null", "null"),
    ] {
        let count = positions.split(' ').count();
        execute(
            db,
            &format!(
                "insert into outbox_lanes (subscription_id, key, pending, due_at, attempts, leased_by, held_at)
                 values ({subscription}, '{key}', {count}, {at}, {attempts}, {leased}, {held})"
            ),
        )
        .await;
        for position in positions.split(' ') {
            execute(
                db,
                &format!(
                    "insert into outbox_deliveries (subscription_id, key, position, due_at)
                     values ({subscription}, '{key}', {position}, {at})"
                ),
            )
            .await;
        }
    }
    execute(
        db,
        &format!(
            "insert into outbox_dead_letters (subscription_id, position, key, attempts, error, died_at)
             values (2, 5, 'held', 6, 'no', {at})"
        ),
    )
    .await;
    execute(
        db,
        &format!(
            "insert into outbox_delivered (subscription_id, position, attempts, delivered_at) values (1, 7, 1, {at})"
        ),
    )
    .await;
    // Retention has been there: the last position is not that of a row.
    execute(db, "delete from outbox_events where position in (8, 9)").await;
}

/// What both versions have.
async fn contents(db: &DatabaseConnection) -> Vec<String> {
    let text = |columns: &str| match db.get_database_backend() {
        DbBackend::Sqlite => format!("json_array({columns})"),
        _ => format!("json_build_array({columns})::text"),
    };
    let mut found = Vec::new();
    for (table, columns) in [
        ("events", "position, aggregate_id, tenant, wait_seconds"),
        ("subscriptions", "id, name, backfill_from"),
        ("deliveries", "subscription_id, key, position, due_at"),
        ("lanes", "subscription_id, key, pending, attempts, lease_token, leased_by, held_at"),
        ("dead_letters", "subscription_id, position, key, error"),
        ("delivered", "subscription_id, position, attempts"),
    ] {
        let sql = format!("select {} from outbox_{table} order by {columns}", text(columns));
        found.extend(texts(db, &sql).await.into_iter().map(|row| format!("{table} {row}")));
    }
    found
}

async fn record(db: &DatabaseConnection, event_type: &str) -> Result<(), String> {
    let sql = match db.get_database_backend() {
        DbBackend::Sqlite => format!(
            "insert into outbox_record (event_type, aggregate_type, aggregate_id, payload)
             values ('{event_type}', 'order', '7', '{{\"a\":1}}')"
        ),
        _ => format!("select outbox_record('{event_type}', 'order', '7', '{{\"a\":1}}')"),
    };
    db.execute_unprepared(&sql).await.map(|_| ()).map_err(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_database_goes_to_version_2_and_back_and_on() {
    let (_directory, databases) = databases().await;
    for db in &databases {
        fill(db).await;
        let before = contents(db).await;
        up::<Migrator>(db).await.unwrap();
        assert_eq!(contents(db).await, before);
        let wrong = "select cast(position as text) from outbox_deliveries where seq <> position";
        assert_eq!(texts(db, wrong).await, [""; 0]);

        // What a flush of version 1 begins with.
        let old = "select 1 from outbox_meta where generation = 1";
        assert!(db.execute_unprepared(old).await.unwrap_err().to_string().contains("generation"));

        record(db, "order.placed").await.unwrap();
        assert_eq!(texts(db, "select cast(position as text) from outbox_unrouted").await, ["10"]);
        down::<Migrator>(db, 1).await.unwrap();
        assert_eq!(
            texts(db, "select cast(schema_version as text) from outbox_meta where routing_generation > 0").await,
            ["2"]
        );
        let error = down::<Migrator>(db, 1).await.unwrap_err();
        assert!(matches!(error, MigrateError::Refused(_)) && error.to_string().contains("not routed"), "{error}");
        execute(db, "delete from outbox_unrouted").await;
        execute(db, "delete from outbox_events where position = 10").await;

        down::<Migrator>(db, 1).await.unwrap();
        assert_eq!(contents(db).await, before);
        assert_eq!(texts(db, "select cast(schema_version as text) from outbox_meta where generation > 0").await, ["1"]);
        up::<Before>(db).await.unwrap();
        up::<Migrator>(db).await.unwrap();
        assert_eq!(contents(db).await, before);
        record(db, "order.placed").await.unwrap();
        assert_eq!(texts(db, "select cast(max(position) as text) from outbox_events").await, ["11"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_under_way_comes_first() {
    let db = connect(&Postgres::shared().database()).await;
    up::<Before>(&db).await.unwrap();
    execute(&db, "insert into outbox_subscriptions (name, filter, ordering) values ('s', '{}', '\"Aggregate\"')").await;
    let error = up::<Migrator>(&db).await.unwrap_err();
    assert!(matches!(error, MigrateError::Refused(_)) && error.to_string().contains("changed_in"), "{error}");
    // As a worker of version 1 leaves it, after a registration that was cut off.
    let settled = "update outbox_subscriptions set changed_in = null, backfill_from = 9223372036854775807";
    execute(&db, settled).await;
    up::<Migrator>(&db).await.unwrap();
    assert_eq!(texts(&db, "select name from outbox_subscriptions where backfill_from is null").await, ["s"]);
}

/// Nobody waits for a writer together with the migration for more than its two seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_under_way_ends_first() {
    let url = Postgres::shared().database();
    let db = connect(&url).await;
    up::<Before>(&db).await.unwrap();
    let writer = connect(&url).await.begin().await.unwrap();
    let insert =
        "insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
                                             occurred_at)
                  values (gen_random_uuid(), 'a', 1, 'a', '1', '{}', now())";
    writer.execute_unprepared(insert).await.unwrap();
    let migrating = tokio::spawn({
        let db = db.clone();
        async move { up::<Migrator>(&db).await }
    });
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!migrating.is_finished());
    writer.execute_unprepared(&insert.replace("'1'", "'2'")).await.unwrap();
    writer.commit().await.unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(texts(&db, "select aggregate_id from outbox_events order by 1").await, ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_from_sql_are_checked_with_a_sentence() {
    let (_directory, databases) = databases().await;
    for db in &databases {
        up::<Migrator>(db).await.unwrap();
        record(db, "order.placed").await.unwrap();
        let is_sqlite = db.get_database_backend() == DbBackend::Sqlite;
        for (columns, values, said) in [
            ("aggregate_type, aggregate_id, payload", "'order', '7', '{}'", "event type"),
            ("event_type, aggregate_type, aggregate_id, payload", "'or der', 'order', '7', '{}'", "event type"),
            ("event_type, aggregate_type, aggregate_id, payload", "'a', 'ü', '7', '{}'", "aggregate type"),
            ("event_type, aggregate_type, aggregate_id, payload", "'a', 'b', '', '{}'", "aggregate id"),
            ("event_type, aggregate_type, aggregate_id, payload", "'a', 'b', '7', 'no'", "JSON"),
            ("event_type, aggregate_type, aggregate_id, payload, tags", "'a', 'b', '7', '{}', '[1]'", "tags"),
            ("event_type, aggregate_type, aggregate_id, payload, tags", "'a', 'b', '7', '{}', '{\"t\":1}'", "tag"),
            ("event_type, aggregate_type, aggregate_id, payload, priority", "'a', 'b', '7', '{}', -1", "priority"),
            (
                "event_type, aggregate_type, aggregate_id, payload, max_attempts",
                "'a', 'b', '7', '{}', 0",
                "max_attempts",
            ),
            ("event_type, aggregate_type, aggregate_id, payload, actor_id", "'a', 'b', '7', '{}', '1'", "actor"),
        ] {
            let sql = if is_sqlite {
                format!("insert into outbox_record ({columns}) values ({values})")
            } else {
                let named: Vec<String> = columns
                    .split(", ")
                    .zip(values.split(", "))
                    .map(|(column, value)| format!("{column} => {value}"))
                    .collect();
                let missing = if columns.starts_with("event_type") { "" } else { ", event_type => null" };
                format!("select outbox_record({}{missing})", named.join(", "))
            };
            let error = db.execute_unprepared(&sql).await.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("outbox_record: ") && error.contains(said), "{sql}: {error}");
        }
        let large =
            if is_sqlite { "'\"' || hex(zeroblob(600000)) || '\"'" } else { "'\"' || repeat('x', 1048575) || '\"'" };
        let sql = if is_sqlite {
            format!(
                "insert into outbox_record (event_type, aggregate_type, aggregate_id, payload) values ('a', 'b', '7', {large})"
            )
        } else {
            format!("select outbox_record('a', 'b', '7', {large})")
        };
        let error = db.execute_unprepared(&sql).await.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("1 MiB"), "{error}");
        assert_eq!(texts(db, "select event_type from outbox_events").await, ["order.placed"]);
        assert_eq!(texts(db, "select cast(position as text) from outbox_unrouted").await.len(), 1);
    }
}

/// From psql, with JSON of every kind, whatever the search path is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_records_with_data_and_previous() {
    let db = connect(&Postgres::shared().database()).await;
    up::<Migrator>(&db).await.unwrap();
    for sql in [
        "create schema shop",
        "create table shop.orders (id int primary key, state text)",
        "create function shop.record_order() returns trigger language plpgsql as $$
         begin
             perform public.outbox_record(
                 'order.' || case tg_op when 'INSERT' then 'placed' else 'changed' end, 'order', new.id::text,
                 jsonb_build_object('data', to_jsonb(new), 'previous', case tg_op when 'UPDATE' then to_jsonb(old) end));
             return null;
         end $$",
        "create trigger record_order after insert or update on shop.orders
             for each row execute function shop.record_order()",
    ] {
        execute(&db, sql).await;
    }
    let tx = db.begin().await.unwrap();
    for sql in [
        "set local search_path = shop",
        "insert into orders values (7, 'new')",
        "update orders set state = 'paid'",
        "select public.outbox_record('a', 'b', '1', json_build_object('n', 1), priority => 3, tags => '{\"t\":\"v\"}')",
        "select public.outbox_record('a', 'b', '1', '[]', delay => '1 minute', event_id => gen_random_uuid())",
    ] {
        tx.execute_unprepared(sql).await.unwrap();
    }
    tx.commit().await.unwrap();
    let payloads = texts(&db, "select payload::text from outbox_events order by position").await;
    assert!(payloads[1].contains(r#""previous": {"id": 7, "state": "new"}"#), "{payloads:?}");
    assert_eq!(payloads.len(), 4);
    let waits =
        "select wait_seconds || ' ' || coalesce(ahead, false) from outbox_events join outbox_unrouted using (position)
                  order by position";
    assert_eq!(texts(&db, waits).await, ["0 false", "0 false", "-180 true", "60 false"]);
    let versions = "select distinct substr(event_id::text, 15, 1) from outbox_events";
    assert!(texts(&db, versions).await.contains(&"7".to_owned()));
}

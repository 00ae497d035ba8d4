//! A database of one test.

use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{Outbox, testing::TestOutbox};
use sea_orm::{ConnectionTrait, DbBackend, DbErr, Statement};

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

pub(crate) async fn database() -> TestOutbox {
    let outbox = TestOutbox::sqlite().await.unwrap();
    outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
    for table in [
        "create table orders (op text primary key)",
        "create table lines (op text not null references orders (op) deferrable initially deferred)",
    ] {
        outbox.writer().execute_unprepared(table).await.unwrap();
    }
    outbox
}

pub(crate) async fn insert(db: &impl ConnectionTrait, op: &str) -> Result<(), DbErr> {
    let sql = "insert into orders (op) values ($1)";
    db.execute_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, [op.into()])).await.map(drop)
}

/// How many orders and how many events there are.
pub(crate) async fn stored(outbox: &Outbox) -> (i64, i64) {
    let sql = "select (select count(*) from orders) as orders, (select count(*) from outbox_events) as events";
    let row = outbox.reader().query_one_raw(Statement::from_string(DbBackend::Sqlite, sql)).await.unwrap().unwrap();
    (row.try_get("", "orders").unwrap(), row.try_get("", "events").unwrap())
}

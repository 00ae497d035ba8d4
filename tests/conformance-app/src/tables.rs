//! The tables of the application, behind those of the outbox. Every statement here runs on SQLite and on PostgreSQL.

use outbox_migrations::MigrateError;
use outbox_seaorm::Outbox;
use sea_orm::{ConnectionTrait, DbErr, Statement, Value};
use sea_orm_migration::{MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait::async_trait};
use uuid::Uuid;

use crate::events::OrderPlaced;

/// Brings the database to the version of this program; any number of processes may do it at once.
///
/// # Errors
///
/// If the database refuses, or was migrated by a later version; nothing is changed then.
pub async fn migrate(outbox: &Outbox) -> Result<(), MigrateError> {
    outbox_migrations::up::<Migrator>(outbox.writer()).await
}

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut migrations = outbox_migrations::all();
        migrations.push(Box::new(Tables));
        migrations
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &'static str {
        "m20261121_000002_conformance"
    }
}

const UP: &[&str] = &[
    "create table orders (
       op text primary key,
       key text not null,
       created_at timestamp with time zone not null default current_timestamp)",
    "create table keys (key text primary key, seq bigint not null)",
    "create table effects (
       event_id text primary key,
       op text,
       i bigint,
       key text,
       seq bigint,
       applied bigint not null)",
    // For the mode `deferred`: only COMMIT notices that the order of a line is missing.
    "create table order_lines (op text not null references orders (op) deferrable initially deferred)",
];

#[expect(elided_lifetimes_in_paths, reason = "async_trait takes the signature only as the trait spells it")]
#[async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in UP {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["order_lines", "effects", "keys", "orders"] {
            manager.get_connection().execute_unprepared(&format!("drop table {table}")).await?;
        }
        Ok(())
    }
}

fn statement<const N: usize>(db: &impl ConnectionTrait, sql: &'static str, values: [Value; N]) -> Statement {
    Statement::from_sql_and_values(db.get_database_backend(), sql, values)
}

/// Advances the running number of a key by `n` and returns it. The lock of the row decides who comes first.
pub(crate) async fn advance(db: &impl ConnectionTrait, key: &str, n: u32) -> Result<i64, DbErr> {
    let sql = "insert into keys (key, seq) values ($1, $2)
               on conflict (key) do update set seq = keys.seq + excluded.seq returning seq";
    let row = db.query_one_raw(statement(db, sql, [key.into(), i64::from(n).into()])).await?;
    row.ok_or(DbErr::RecordNotInserted)?.try_get("", "seq")
}

pub(crate) async fn insert_order(db: &impl ConnectionTrait, op: &str, key: &str) -> Result<(), DbErr> {
    let sql = "insert into orders (op, key) values ($1, $2)";
    db.execute_raw(statement(db, sql, [op.into(), key.into()])).await.map(drop)
}

pub(crate) async fn touch_order(db: &impl ConnectionTrait, op: &str) -> Result<(), DbErr> {
    let sql = "update orders set key = key where op = $1";
    db.execute_raw(statement(db, sql, [op.into()])).await.map(drop)
}

/// A line of an order that does not exist: the statement succeeds, COMMIT fails.
pub(crate) async fn insert_orphan_line(db: &impl ConnectionTrait, op: &str) -> Result<(), DbErr> {
    let sql = "insert into order_lines (op) values ($1)";
    db.execute_raw(statement(db, sql, [format!("{op}/missing").into()])).await.map(drop)
}

/// The running number of a key.
pub(crate) async fn seq(db: &impl ConnectionTrait, key: &str) -> Result<Option<i64>, DbErr> {
    let row = db.query_one_raw(statement(db, "select seq from keys where key = $1", [key.into()])).await?;
    row.map(|row| row.try_get("", "seq")).transpose()
}

pub(crate) async fn orders(db: &impl ConnectionTrait) -> Result<Vec<String>, DbErr> {
    let rows = db.query_all_raw(statement(db, "select op from orders", [])).await?;
    rows.iter().map(|row| row.try_get("", "op")).collect()
}

/// Counts each time that the effect of an event is applied: more than 1 is one too many.
pub(crate) async fn apply(db: &impl ConnectionTrait, event_id: Uuid, order: &OrderPlaced) -> Result<(), DbErr> {
    let sql = "insert into effects (event_id, op, i, key, seq, applied) values ($1, $2, $3, $4, $5, 1)
               on conflict (event_id) do update set applied = effects.applied + 1";
    let values = [
        event_id.to_string().into(),
        order.op.as_str().into(),
        order.i.into(),
        order.key.as_str().into(),
        order.seq.into(),
    ];
    db.execute_raw(statement(db, sql, values)).await.map(drop)
}

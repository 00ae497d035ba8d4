//! The tables of the application, behind those of the outbox.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager,
    async_trait::async_trait,
    sea_orm::{ConnectionTrait, DbBackend, DbErr},
};

pub(crate) struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut migrations = outbox_migrations::all();
        migrations.push(Box::new(Todos));
        migrations
    }
}

struct Todos;

impl MigrationName for Todos {
    fn name(&self) -> &'static str {
        "m20261121_000002_todos"
    }
}

const UP: &[&str] = &[
    "create table todos (
       id ID_TYPE,
       title text not null,
       completed boolean not null default false,
       version bigint not null default 1)",
    "create index todos_title on todos (title)",
    "create table stats (
       id integer primary key check (id = 1),
       created bigint not null default 0,
       completed bigint not null default 0,
       renamed bigint not null default 0,
       deleted bigint not null default 0,
       open bigint not null default 0)",
    "insert into stats (id) values (1)",
    "create table activity (
       id ID_TYPE,
       event_id text not null unique,
       event_type text not null,
       todo_id bigint not null,
       title text not null,
       summary text not null,
       at text not null,
       latency_ms bigint not null)",
];

#[expect(elided_lifetimes_in_paths, reason = "async_trait takes the signature only as the trait spells it")]
#[async_trait]
impl MigrationTrait for Todos {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let id = match manager.get_database_backend() {
            DbBackend::Sqlite => "integer primary key autoincrement",
            _ => "bigint generated always as identity primary key",
        };
        for statement in UP {
            manager.get_connection().execute_unprepared(&statement.replace("ID_TYPE", id)).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["activity", "stats", "todos"] {
            manager.get_connection().execute_unprepared(&format!("drop table {table}")).await?;
        }
        Ok(())
    }
}

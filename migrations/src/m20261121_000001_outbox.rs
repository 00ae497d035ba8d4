//! The first version of all tables.
//!
//! Times are `timestamptz` on PostgreSQL. On SQLite they are text of one fixed width (`2026-11-21T01:02:03.004Z`), so
//! that they sort and compare as text.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager,
    async_trait::async_trait,
    sea_orm::{ConnectionTrait, DbBackend, DbErr},
};

use crate::DEFAULT_PREFIX;

pub(crate) struct Migration {
    prefix: String,
}

impl Migration {
    pub(crate) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    async fn run(&self, manager: &SchemaManager<'_>, statements: &[&str]) -> Result<(), DbErr> {
        for statement in statements {
            let statement = statement.replace(DEFAULT_PREFIX, &self.prefix);
            manager.get_connection().execute_unprepared(&statement).await?;
        }
        Ok(())
    }
}

impl MigrationName for Migration {
    fn name(&self) -> &'static str {
        "m20261121_000001_outbox"
    }
}

#[expect(elided_lifetimes_in_paths, reason = "async_trait takes the signature only as the trait spells it")]
#[async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        match manager.get_database_backend() {
            DbBackend::Sqlite => self.run(manager, SQLITE).await,
            DbBackend::Postgres => self.run(manager, POSTGRES).await,
            other => Err(DbErr::Migration(format!("the outbox runs on SQLite and PostgreSQL, not on {other:?}"))),
        }
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        self.run(manager, DOWN).await
    }
}

const SQLITE: &[&str] = &[
    // The generation changes with every change of a subscription: a flush with an old copy of them writes nothing. The
    // instance tells the queues of this outbox from those of others in the same Redis.
    "create table outbox_meta (
       id integer primary key check (id = 1),
       schema_version integer not null,
       generation integer not null,
       instance text not null)",
    "insert into outbox_meta (id, schema_version, generation, instance) values (1, 1, 1, lower(hex(randomblob(8))))",
    // `wait_seconds` is a delay, or a head start if negative.
    "create table outbox_events (
       position integer primary key autoincrement,
       event_id blob not null unique,
       event_type text not null,
       schema_version integer not null,
       aggregate_type text not null,
       aggregate_id text not null,
       payload text not null,
       occurred_at text not null,
       recorded_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
       tenant text,
       actor_kind text,
       actor_id text,
       correlation_id text,
       causation_id text,
       traceparent text,
       tracestate text,
       tags text,
       max_attempts integer,
       wait_seconds real not null default 0,
       not_before text)",
    "create index outbox_events_aggregate on outbox_events (aggregate_type, aggregate_id, position)",
    "create index outbox_events_type on outbox_events (event_type, position)",
    "create index outbox_events_tenant on outbox_events (tenant, position) where tenant is not null",
    "create index outbox_events_recorded on outbox_events (recorded_at)",
    // `circuit_until`: the destination is down; nothing is claimed, and at that time one delivery is tried.
    "create table outbox_subscriptions (
       id integer primary key autoincrement,
       name text not null unique,
       filter text not null,
       ordering text not null,
       backfill_from integer,
       paused_at text,
       circuit_until text,
       circuit_failures integer not null default 0,
       created_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')))",
    // Written once, deleted once: what a subscription still has to get. `due_at` holds a delay or a head start.
    "create table outbox_deliveries (
       subscription_id integer not null,
       key text not null,
       position integer not null,
       due_at text not null,
       primary key (subscription_id, key, position)) without rowid",
    "create index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    // What workers claim: the ordered queue of one key of one subscription. A lease is a due time in the future. `held_at`
    // is the position of the dead letter that holds the lane up until an operator decides.
    "create table outbox_lanes (
       subscription_id integer not null,
       key text not null,
       pending integer not null,
       due_at text not null,
       attempts integer not null default 0,
       lease_token integer not null default 0,
       leased_by text,
       last_error text,
       attempt_log text,
       held_at integer,
       primary key (subscription_id, key)) without rowid",
    "create index outbox_lanes_due on outbox_lanes (subscription_id, due_at, key)",
    "create table outbox_delivered (
       subscription_id integer not null,
       position integer not null,
       attempts integer not null,
       attempt_log text,
       delivered_at text not null,
       primary key (subscription_id, position)) without rowid",
    "create table outbox_dead_letters (
       id integer primary key autoincrement,
       subscription_id integer not null,
       position integer not null,
       key text not null,
       attempts integer not null,
       error text not null,
       attempt_log text,
       died_at text not null,
       unique (subscription_id, position))",
    "create table outbox_archive (
       position integer primary key,
       event_id blob not null unique,
       archived_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
       event text not null)",
    "create table outbox_inbox (
       consumer text not null,
       event_id blob not null,
       handled_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
       primary key (consumer, event_id)) without rowid",
    "create index outbox_inbox_handled on outbox_inbox (handled_at)",
    "create table outbox_workers (
       id text primary key,
       subscriptions text not null,
       started_at text not null,
       last_seen_at text not null) without rowid",
    "create table outbox_audit (
       id integer primary key autoincrement,
       at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
       actor text not null,
       action text not null,
       target text not null,
       details text)",
];

// Autovacuum: the hot tables are small and change completely all the time, so their dead rows must not wait for a
// share of the table. Fillfactor leaves room for updates of lanes within their page.
//
// `changed_in`, `settled_after`: a flush that began before a change of a subscription may commit after it. Until no such
// transaction is left, events that the snapshot does not see are looked through for deliveries that are missing.
// `backfill_from` is the largest number while a registration waits for such flushes.
const POSTGRES: &[&str] = &[
    "create table outbox_meta (
       id smallint primary key check (id = 1),
       schema_version integer not null,
       generation bigint not null,
       instance text not null)",
    "insert into outbox_meta (id, schema_version, generation, instance)
     values (1, 1, 1, left(replace(gen_random_uuid()::text, '-', ''), 16))",
    "create table outbox_events (
       position bigint generated always as identity primary key,
       event_id uuid not null unique,
       event_type text not null,
       schema_version integer not null,
       aggregate_type text not null,
       aggregate_id text not null,
       payload json not null,
       occurred_at timestamptz not null,
       recorded_at timestamptz not null default clock_timestamp(),
       tenant text,
       actor_kind text,
       actor_id text,
       correlation_id text,
       causation_id text,
       traceparent text,
       tracestate text,
       tags jsonb,
       max_attempts integer,
       wait_seconds float8 not null default 0,
       not_before timestamptz,
       transaction_id xid8 not null default pg_current_xact_id())",
    "create index outbox_events_aggregate on outbox_events (aggregate_type, aggregate_id, position)",
    "create index outbox_events_type on outbox_events (event_type, position)",
    "create index outbox_events_tenant on outbox_events (tenant, position) where tenant is not null",
    "create index outbox_events_recorded on outbox_events (recorded_at)",
    "create table outbox_subscriptions (
       id integer generated always as identity primary key,
       name text not null unique,
       filter jsonb not null,
       ordering jsonb not null,
       backfill_from bigint,
       paused_at timestamptz,
       circuit_until timestamptz,
       circuit_failures integer not null default 0,
       created_at timestamptz not null default clock_timestamp(),
       changed_at timestamptz not null default clock_timestamp(),
       changed_in pg_snapshot default pg_current_snapshot(),
       settled_after xid8)",
    "create table outbox_deliveries (
       subscription_id integer not null,
       key text not null,
       position bigint not null,
       due_at timestamptz not null,
       primary key (subscription_id, key, position))
       with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)",
    "create index outbox_deliveries_position on outbox_deliveries (subscription_id, position)",
    "create table outbox_lanes (
       subscription_id integer not null,
       key text not null,
       pending integer not null,
       due_at timestamptz not null,
       attempts integer not null default 0,
       lease_token bigint not null default 0,
       leased_by text,
       last_error text,
       attempt_log jsonb,
       held_at bigint,
       primary key (subscription_id, key))
       with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000)",
    "create index outbox_lanes_due on outbox_lanes (subscription_id, due_at, key)",
    "create table outbox_delivered (
       subscription_id integer not null,
       position bigint not null,
       attempts integer not null,
       attempt_log jsonb,
       delivered_at timestamptz not null,
       primary key (subscription_id, position))",
    "create table outbox_dead_letters (
       id bigint generated always as identity primary key,
       subscription_id integer not null,
       position bigint not null,
       key text not null,
       attempts integer not null,
       error text not null,
       attempt_log jsonb,
       died_at timestamptz not null,
       unique (subscription_id, position))",
    "create table outbox_archive (
       position bigint primary key,
       event_id uuid not null unique,
       archived_at timestamptz not null default clock_timestamp(),
       event jsonb not null)",
    "create table outbox_inbox (
       consumer text not null,
       event_id uuid not null,
       handled_at timestamptz not null default clock_timestamp(),
       primary key (consumer, event_id))",
    "create index outbox_inbox_handled on outbox_inbox (handled_at)",
    "create table outbox_workers (
       id text primary key,
       subscriptions jsonb not null,
       started_at timestamptz not null,
       last_seen_at timestamptz not null)",
    "create table outbox_audit (
       id bigint generated always as identity primary key,
       at timestamptz not null default clock_timestamp(),
       actor text not null,
       action text not null,
       target text not null,
       details jsonb)",
];

const DOWN: &[&str] = &[
    "drop table outbox_audit",
    "drop table outbox_workers",
    "drop table outbox_inbox",
    "drop table outbox_archive",
    "drop table outbox_dead_letters",
    "drop table outbox_delivered",
    "drop table outbox_lanes",
    "drop table outbox_deliveries",
    "drop table outbox_subscriptions",
    "drop table outbox_events",
    "drop table outbox_meta",
];

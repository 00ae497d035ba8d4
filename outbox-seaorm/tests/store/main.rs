//! The store: its specification as tests, once on each database. Every test has a database of its own and ends with
//! `Store::is_whole`.
//!
//! The modules of the suite are compiled for each. What differs stands in `sqlite.rs` and `postgres.rs`: the same names,
//! each in the words of its database. What makes sense on one database alone is a module of that one.

#![allow(clippy::duplicate_mod, reason = "one suite, two databases")]

mod urls;

#[path = "."]
mod sqlite {
    #[path = "sqlite.rs"]
    mod database;

    mod branches;
    mod claim;
    mod connect;
    mod damage;
    mod fixture;
    mod flush;
    mod model;
    mod nested;
    mod operate;
    mod random;
    mod register;
    mod route;
    mod savepoint;
    mod settle;
    mod status;
    mod unit_of_work;

    #[path = "sqlite_only.rs"]
    mod only;
    #[path = "sqlite_plans.rs"]
    mod plans;
}

#[path = "."]
mod postgres {
    const SETTINGS: &[&str] = &[];
    const STRANGER: &str = "";

    #[path = "postgres.rs"]
    mod database;

    mod branches;
    mod claim;
    mod connect;
    mod damage;
    mod fixture;
    mod flush;
    mod model;
    mod nested;
    mod operate;
    mod random;
    mod register;
    mod route;
    mod savepoint;
    mod settle;
    mod status;
    mod unit_of_work;

    #[path = "postgres_only.rs"]
    mod only;
    #[path = "postgres_plans.rs"]
    mod plans;
    #[path = "postgres_pooler.rs"]
    mod pooler;
    #[path = "postgres_route.rs"]
    mod routing;
    #[path = "postgres_sessions.rs"]
    mod sessions;
}

/// The suite once more, on a server whose administrator likes other settings: `postgres_hostile.rs` checks that they are
/// there.
#[path = "."]
mod hostile {
    const SETTINGS: &[&str] = &[
        "default_transaction_isolation=repeatable read",
        "default_transaction_deferrable=on",
        "DateStyle=SQL, DMY",
        "IntervalStyle=sql_standard",
        "TimeZone=Asia/Kathmandu",
        "bytea_output=escape",
        "extra_float_digits=-15",
        "standard_conforming_strings=off",
        "escape_string_warning=off",
        "statement_timeout=20s",
        "lock_timeout=15s",
        "idle_in_transaction_session_timeout=15s",
        "idle_session_timeout=300ms",
        "jit_above_cost=0",
        "enable_indexscan=off",
        "enable_nestloop=off",
        "plan_cache_mode=force_custom_plan",
        "search_path=stranger, public",
    ];
    /// In front of the tables, with the same names and another shape.
    const STRANGER: &str = "create schema stranger;
         create table stranger.outbox_events (id serial primary key, payload text not null);
         create table stranger.outbox_lanes (lane text);
         create table stranger.outbox_deliveries (delivery text);
         create table stranger.outbox_subscriptions (subscription text);
         create table stranger.outbox_inbox (inbox text)";

    #[path = "postgres.rs"]
    mod database;

    mod branches;
    mod claim;
    mod connect;
    mod damage;
    mod fixture;
    mod flush;
    mod model;
    mod nested;
    mod operate;
    mod random;
    mod register;
    mod route;
    mod savepoint;
    mod settle;
    mod status;
    mod unit_of_work;

    #[path = "postgres_hostile.rs"]
    mod settings;
}

#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/sql.rs"]
mod sql;

//! The store: its specification as tests, once on each database. Every test has a database of its own and ends with
//! `Store::is_whole`.
//!
//! The modules of the suite are compiled twice. What differs stands in `sqlite.rs` and `postgres.rs`: the same names,
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
    mod nested;
    mod operate;
    mod random;
    mod register;
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
    #[path = "postgres.rs"]
    mod database;

    mod branches;
    mod claim;
    mod connect;
    mod damage;
    mod fixture;
    mod flush;
    mod nested;
    mod operate;
    mod random;
    mod register;
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
}

#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/sql.rs"]
mod sql;

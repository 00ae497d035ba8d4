//! The store on SQLite: its specification as tests. Every test has a database file of its own and ends with
//! [`fixture::Store::is_whole`].

mod claim;
mod connect;
mod fixture;
mod flush;
mod plans;
mod random;
mod register;
mod savepoint;
mod settle;
#[allow(dead_code, reason = "only some of the statements are explained")]
#[path = "../../src/sql.rs"]
mod sql;
mod status;
mod unit_of_work;

//! The layer, the extractors and the operator router through their public API, on SQLite.

mod context;
mod decision;
mod disconnect;
mod events;
mod failure;
mod handles;
mod log;
mod nested;
mod operator;
mod operator_api;
mod savepoint;
mod server;
mod support;
mod time;

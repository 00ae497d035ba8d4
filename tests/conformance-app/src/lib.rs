//! A small service, built from the public API of the outbox only, whose single purpose is to be shot at: killed, cut
//! off, flooded, lied to.
//!
//! `POST /op` writes an order and pushes its events, in every way in which a handler can be right, wrong or unlucky
//! (`mode.rs`). The worker delivers them to a webhook and to a table, where a load generator compares what arrived with
//! what its clients were told. `POST /poison` pushes events that harm their worker.
//!
//! `cargo run -p conformance-app` runs everything in one process on SQLite; `-- help` shows the parts and the settings.
//! [`router`] and [`migrate`] are for tests inside one process; [`main`] is the process.

mod app;
mod config;
mod events;
mod late;
mod mode;
mod op;
mod poison;
mod process;
mod subscriptions;
mod tables;

pub use app::router;
pub use process::main;
pub use tables::migrate;

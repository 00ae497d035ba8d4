//! What a worker does, on SQLite files.

mod board;
mod burst;
mod crash;
mod deliver;
mod destination;
mod failure;
mod fairness;
mod fixture;
mod idle;
mod isolation;
mod lease;
mod memory;
mod once;
mod order;
mod outage;
mod pause;
mod registration;
mod retention;
mod share;
mod shutdown;
mod start;
mod transactional;

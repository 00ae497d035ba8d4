//! The example and the conformance application as real processes.

mod damage;
mod delivery;
mod example;
mod failover;
mod faults;
mod postgres;
mod redis;
mod startup;
mod truth;

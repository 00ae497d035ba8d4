//! The example and the conformance application as real processes.

mod damage;
mod delivery;
mod disk;
mod example;
mod failover;
mod faults;
mod network;
mod postgres;
mod redis;
mod routing;
mod security;
mod startup;
mod truth;

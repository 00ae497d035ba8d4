//! The example and the conformance application as real processes.

mod example;
mod faults;
mod postgres;
mod startup;
mod truth;

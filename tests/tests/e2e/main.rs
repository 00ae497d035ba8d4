//! The example application as real processes.

mod example;
mod faults;
mod postgres;
mod startup;

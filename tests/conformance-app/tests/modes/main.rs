//! Every mode of the contract, through the router; then the process against a sink.
//!
//! Never a success without its rows, never a failure with them.

mod answers;
mod late;
mod options;
mod process;
mod savepoints;
mod support;

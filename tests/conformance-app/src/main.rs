//! The conformance application as a process.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    conformance_app::main(std::env::args().skip(1)).await
}

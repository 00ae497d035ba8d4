//! The `outbox` command: what operators ask and change without a browser.

mod dead;
mod events;
mod maintenance;
mod output;
mod select;
mod status;
mod subscriptions;
mod unrouted;

use std::{error::Error, process::ExitCode};

use clap::{Parser, Subcommand};
use outbox_seaorm::Outbox;
use uuid::Uuid;

use crate::output::Output;

/// Looks into the outbox of a database, and repairs it.
///
/// Answers with exit code 0, with 1 if something is wrong (one sentence on standard error says what), and with 2 if the
/// command line is not understood.
#[derive(Parser)]
#[command(name = "outbox", version)]
struct Cli {
    /// Where the outbox is, for example sqlite://todo.db or postgres://user:password@host/database.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true, default_value = "")]
    database_url: String,
    /// Prints JSON instead of a table, with the members of the operators' API.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Counts deliveries of each subscription and lists the workers.
    Status,
    /// Events: what was committed.
    Events {
        #[command(subcommand)]
        command: Option<events::Events>,
    },
    /// Dead letters: deliveries that were given up.
    Dead {
        #[command(subcommand)]
        command: Option<dead::Dead>,
    },
    /// Delivers events to a subscription again.
    Replay(subscriptions::Replay),
    /// Stops the delivery of a subscription; its events go on being collected.
    Pause {
        /// The subscription.
        subscription: String,
        #[command(flatten)]
        by: select::Who,
    },
    /// Makes due what waits: failed deliveries, and those that a clock which was ahead has put off; not what an event asked
    /// for.
    Due {
        /// The subscription.
        subscription: String,
        #[command(flatten)]
        by: select::Who,
    },
    /// Goes on with the delivery of a subscription.
    Resume {
        /// The subscription.
        subscription: String,
        #[command(flatten)]
        by: select::Who,
    },
    /// Subscriptions: who gets which events.
    Subscriptions {
        #[command(subcommand)]
        command: Option<subscriptions::Subscriptions>,
    },
    /// Says why an event was or was not delivered, for each subscription.
    Why {
        /// The id of the event.
        event: Uuid,
    },
    /// Takes away delivered events that are older than the retention.
    Purge(maintenance::Purge),
    /// The outbox' tables: brings them to this version, takes them away, or says which there are.
    Migrate {
        #[command(subcommand)]
        command: Option<maintenance::Migrate>,
    },
    /// Events that are not routed to subscriptions: how many wait, and those that could not be.
    Unrouted {
        #[command(subcommand)]
        command: Option<unrouted::Unrouted>,
    },
    /// Looks for what usually goes wrong and says what to do.
    Doctor,
}

type Answer = Result<Output, Box<dyn Error>>;

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    match run(cli).await {
        Ok(output) => {
            print!("{}", output.print(json));
            if output.is_bad() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Answer {
    let url = cli.database_url;
    if url.is_empty() {
        return Err("no database; set DATABASE_URL or give --database-url, for example sqlite://todo.db".into());
    }
    if let Command::Migrate { command } = cli.command {
        return maintenance::migrate(&url, command.unwrap_or(maintenance::Migrate::Status)).await;
    }
    let outbox = Outbox::connect(&url, 1).await?;
    outbox.check_schema().await?;
    match cli.command {
        Command::Status => status::status(&outbox).await,
        Command::Events { command } => events::run(&outbox, command.unwrap_or_default()).await,
        Command::Dead { command } => dead::run(&outbox, command.unwrap_or_default()).await,
        Command::Replay(replay) => subscriptions::replay(&outbox, replay).await,
        Command::Pause { subscription, by } => subscriptions::pause(&outbox, &subscription, by).await,
        Command::Due { subscription, by } => subscriptions::due(&outbox, &subscription, by).await,
        Command::Resume { subscription, by } => subscriptions::resume(&outbox, &subscription, by).await,
        Command::Subscriptions { command } => subscriptions::run(&outbox, command.unwrap_or_default()).await,
        Command::Why { event } => events::why(&outbox, event).await,
        Command::Purge(purge) => maintenance::purge(&outbox, purge).await,
        Command::Unrouted { command } => unrouted::run(&outbox, command.unwrap_or_default()).await,
        Command::Doctor => maintenance::doctor(&outbox).await,
        Command::Migrate { .. } => unreachable!("answered above"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}

//! The `outbox` command: what operators ask a database without a browser. It only reads.

use std::{error::Error, fmt::Write, process::ExitCode};

use clap::{Parser, Subcommand};
use outbox_seaorm::{DeliveryRecord, DeliveryState, Outbox, Status};
use serde_json::{Value, json};

/// Looks into the outbox of a database.
#[derive(Parser)]
#[command(name = "outbox", version)]
struct Cli {
    /// Where the outbox is, for example sqlite://todo.db.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true, default_value = "")]
    database_url: String,
    /// Prints JSON instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Counts deliveries of each subscription and lists the workers.
    Status,
    /// Dead letters: deliveries that were given up.
    Dead {
        #[command(subcommand)]
        command: Dead,
    },
}

#[derive(Subcommand)]
enum Dead {
    /// Lists them, the newest event first.
    List {
        /// Only those of this subscription.
        #[arg(long)]
        subscription: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
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

async fn run(cli: Cli) -> Result<String, Box<dyn Error>> {
    if cli.database_url.is_empty() {
        return Err("no database; set DATABASE_URL or give --database-url, for example sqlite://todo.db".into());
    }
    let outbox = Outbox::connect(&cli.database_url, 1).await?;
    outbox.check_schema().await?;
    match cli.command {
        Command::Status => {
            let status = outbox.status().await?;
            if cli.json { as_json(&serde_json::to_value(&status)?) } else { Ok(status_table(&status)) }
        }
        Command::Dead { command: Dead::List { subscription, limit } } => {
            let dead = outbox.deliveries(subscription.as_deref(), Some(DeliveryState::Dead), 0, limit).await?;
            if cli.json { as_json(&dead.iter().map(dead_json).collect()) } else { Ok(dead_table(&dead)) }
        }
    }
}

fn as_json(value: &Value) -> Result<String, Box<dyn Error>> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn status_table(status: &Status) -> String {
    let mut rows =
        vec![["subscription", "pending", "leased", "delivered", "dead", "oldest", "last error"].map(String::from)];
    for each in &status.subscriptions {
        let name = if each.paused { format!("{} (paused)", each.name) } else { each.name.clone() };
        rows.push([
            name,
            each.pending.to_string(),
            each.leased.to_string(),
            each.delivered.to_string(),
            each.dead.to_string(),
            each.oldest_pending_age_seconds.map_or_else(|| "-".to_owned(), |age| format!("{age:.1} s")),
            each.last_error.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let mut text = table(&rows);
    for worker in &status.workers {
        let seen = worker.last_seen_seconds;
        let _ = writeln!(text, "worker {}, seen {seen:.0} s ago: {}", worker.id, worker.subscriptions.join(", "));
    }
    text
}

fn dead_json(dead: &DeliveryRecord) -> Value {
    json!({
        "event_id": dead.event.id.to_string(),
        "subscription": dead.subscription,
        "event_type": dead.event.event_type,
        "aggregate_type": dead.event.aggregate_type,
        "aggregate_id": dead.event.aggregate_id,
        "attempts": dead.attempts,
        "error": dead.error,
        "died_at": dead.finished_at.map(|at| at.to_rfc3339()),
    })
}

fn dead_table(dead: &[DeliveryRecord]) -> String {
    let mut rows = vec![["died at", "subscription", "event", "aggregate", "attempts", "error"].map(String::from)];
    for each in dead {
        rows.push([
            each.finished_at.map(|at| at.format("%Y-%m-%d %H:%M:%S").to_string()).unwrap_or_default(),
            each.subscription.clone(),
            format!("{} {}", each.event.event_type, each.event.id),
            format!("{} {}", each.event.aggregate_type, each.event.aggregate_id),
            each.attempts.to_string(),
            each.error.clone().unwrap_or_default(),
        ]);
    }
    table(&rows)
}

/// Columns as wide as their widest cell; the last one, which may be long, ends with its text.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    rows.iter().fold(String::new(), |mut text, row| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["a", "long cell"], ["wide", "x"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "a     long cell\nwide  x\n");
    }

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}

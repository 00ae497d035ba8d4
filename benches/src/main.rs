//! `cargo run --release -p benches -- write`: each figure beside its baseline, in the same run and interleaved, because
//! only the ratio of two figures from the same minute means anything. docs/performance.md has the goals and what came
//! of them.

mod backlog;
mod bad_day;
mod bare;
mod child;
mod database;
mod drain;
mod events;
mod fairness;
mod http;
mod idle;
mod latency;
mod many;
mod measure;
mod ordered;
mod processor;
mod redis;
mod rival;
mod routing;
mod shop;
mod sink;
mod write;

use clap::{Parser, Subcommand};
use tokio::sync::OnceCell;
use tracing_subscriber::EnvFilter;

use crate::{
    database::Server,
    measure::{Result, report},
};

/// Measures the outbox.
#[derive(Parser)]
struct Cli {
    /// How often each side is measured.
    #[arg(long, global = true, default_value_t = 5)]
    rounds: usize,
    /// A share of the usual sizes and times, for a quick look.
    #[arg(long, global = true, default_value_t = 1.0)]
    scale: f64,
    /// A PostgreSQL server where databases may be created; a private one is started otherwise.
    #[arg(long, global = true)]
    database_url: Option<String>,
    /// Prints one JSON object for each goal instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Subcommand)]
enum Scenario {
    /// Requests with events, against a handler that writes its outbox by hand: W1 to W4; S1 on SQLite.
    Write,
    /// A backlog through the worker, against bare SQL: D1, D1b, D2.
    Drain,
    /// Commit to delivery: L1, L2.
    Latency,
    /// Large backlogs, a large history, an old snapshot: B1 to B4.
    Backlog,
    /// One hot key: D3.
    Ordered,
    /// A backlog through the worker as it comes, against `graphile_worker`: P1.
    Rival,
    /// Routing alone, and a worker that finds a million events: R3, R4.
    Routing,
    /// A worker with nothing to do, and one with much: I1, M1.
    Idle,
    /// A busy tenant or key beside others, and limits for three workers together: F1, F2.
    Fairness,
    /// A worker with a thousand subscriptions, and three of the same events: I2.
    Many,
    /// A backlog and single events through Redis, against the database alone and bare apalis-redis: R1, R2.
    Redis,
    /// Failures, a slow destination, a crash of the server.
    BadDay,
    /// The worker process of other scenarios.
    #[command(hide = true)]
    Worker(child::Options),
}

/// What all scenarios share.
struct Setup {
    rounds: usize,
    scale: f64,
    url: Option<String>,
    server: OnceCell<Server>,
}

impl Setup {
    fn scaled(&self, size: usize) -> usize {
        // Whole tenths, for the scenarios that compare them.
        ((size as f64 * self.scale / 10.0).round() as usize * 10).max(10)
    }

    async fn server(&self) -> Result<&Server> {
        self.server.get_or_try_init(|| Server::start(self.url.as_deref())).await
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error,apalis=off")))
        .with_writer(std::io::stderr)
        .init();
    let setup = Setup { rounds: cli.rounds.max(1), scale: cli.scale, url: cli.database_url, server: OnceCell::new() };
    let (name, measured) = match &cli.scenario {
        Scenario::Write => ("write", write::run(&setup).await?),
        Scenario::Drain => ("drain", drain::run(&setup).await?),
        Scenario::Latency => ("latency", latency::run(&setup).await?),
        Scenario::Backlog => ("backlog", backlog::run(&setup).await?),
        Scenario::Ordered => ("ordered", ordered::run(&setup).await?),
        Scenario::Rival => ("rival", rival::run(&setup).await?),
        Scenario::Routing => ("routing", routing::run(&setup).await?),
        Scenario::Idle => ("idle", idle::run(&setup).await?),
        Scenario::Fairness => ("fairness", fairness::run(&setup).await?),
        Scenario::Many => ("many", many::run(&setup).await?),
        Scenario::Redis => ("redis", redis::run(&setup).await?),
        Scenario::BadDay => ("bad-day", bad_day::run(&setup).await?),
        Scenario::Worker(options) => {
            return child::run(setup.url.as_deref().unwrap_or_default(), options).await;
        }
    };
    report(name, &measured, cli.json);
    Ok(())
}

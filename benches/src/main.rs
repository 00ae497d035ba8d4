//! `cargo run --release -p benches -- drain`: each measurement beside its baseline, in the same run and interleaved,
//! because only the ratio of two figures from the same minute means anything.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand};
use outbox_apalis::Worker;
use outbox_core::{Context, Delivery, DeliveryError, NewEvent, Publisher, Subscription};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox};
use sea_orm_migration::{MigrationTrait, MigratorTrait};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::Notify;

const SUBSCRIPTION: &str = "sink";
const LEASE: Duration = Duration::from_secs(60);

/// Measures the outbox.
#[derive(Parser)]
struct Cli {
    /// How often each side is measured.
    #[arg(long, global = true, default_value_t = 5)]
    rounds: usize,
    /// Prints one JSON object for each scenario instead of a table.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Clone, Copy, Subcommand)]
enum Scenario {
    /// From a backlog to delivered, with a destination that does nothing, on SQLite: the worker with its defaults
    /// beside a loop that only claims and settles batches of 100.
    Drain {
        /// How many events wait, each of its own aggregate.
        #[arg(long, default_value_t = 2000)]
        events: usize,
    },
}

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let cli = Cli::parse();
    let Scenario::Drain { events } = cli.scenario;
    let mut pairs = Vec::with_capacity(cli.rounds);
    for round in 1..=cli.rounds.max(1) {
        let (_directory, outbox) = backlog(events).await?;
        let baseline = rate(events, bare_loop(&outbox, events).await?);
        let (_directory, outbox) = backlog(events).await?;
        let ours = rate(events, worker(&outbox, events).await?);
        eprintln!("round {round} of {}: {ours:.0}/s beside {baseline:.0}/s", cli.rounds);
        pairs.push((ours, baseline));
    }
    report(&cli, &pairs);
    Ok(())
}

/// A database with this many events waiting.
async fn backlog(events: usize) -> Result<(TempDir, Outbox), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let outbox = Outbox::connect(&format!("sqlite://{}/bench.db?mode=rwc", directory.path().display()), 2).await?;
    outbox_migrations::up::<Migrator>(outbox.writer()).await?;
    outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
    let unit = outbox.begin(Context::default());
    for n in 0..events {
        let payload = json!({ "n": n, "text": "x".repeat(150) });
        unit.events().push(NewEvent::dynamic("bench.happened", "bench", n.to_string(), &payload)?)?;
    }
    unit.commit().await?;
    Ok((directory, outbox))
}

async fn bare_loop(outbox: &Outbox, events: usize) -> Result<Duration, Box<dyn Error>> {
    let subscription = outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
    let started = Instant::now();
    let mut delivered = 0;
    while delivered < events {
        let lanes = outbox.claim(subscription, "bare", 100, 100, LEASE).await?.lanes;
        let reports: Vec<LaneReport> = lanes
            .into_iter()
            .map(|lane| {
                let finished = lane.run.iter().map(|event| event.position);
                let finished = finished.map(|position| Finished { position, attempts: 1, log: None, error: None });
                LaneReport { lane: lane.lane, finished: finished.collect(), next: Next::Yield }
            })
            .collect();
        delivered += reports.iter().map(|report| report.finished.len()).sum::<usize>();
        outbox.settle(&reports).await?;
    }
    Ok(started.elapsed())
}

#[derive(Clone, Default)]
struct Nothing {
    delivered: Arc<AtomicUsize>,
    expected: usize,
    done: Arc<Notify>,
}

impl Publisher for Nothing {
    async fn publish(&self, _: &Delivery) -> Result<(), DeliveryError> {
        if self.delivered.fetch_add(1, Ordering::Relaxed) + 1 == self.expected {
            self.done.notify_one();
        }
        Ok(())
    }
}

async fn worker(outbox: &Outbox, events: usize) -> Result<Duration, Box<dyn Error>> {
    let destination = Nothing { expected: events, ..Nothing::default() };
    let done = destination.done.clone();
    let worker = Worker::new(outbox.clone()).publisher(Subscription::new(SUBSCRIPTION)?, destination).start().await?;
    let started = Instant::now();
    // Ends when everything is also acknowledged.
    worker.run_until(async move { done.notified().await }).await;
    Ok(started.elapsed())
}

fn rate(events: usize, took: Duration) -> f64 {
    events as f64 / took.as_secs_f64()
}

fn report(cli: &Cli, pairs: &[(f64, f64)]) {
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let mut ratios: Vec<f64> = pairs.iter().map(|(ours, baseline)| ours / baseline).collect();
    let ratio = median(&mut ratios);
    let ours = median(&mut pairs.iter().map(|pair| pair.0).collect());
    let baseline = median(&mut pairs.iter().map(|pair| pair.1).collect());
    let (min, max) = (ratios[0], ratios[ratios.len() - 1]);
    if cli.json {
        let line = json!({
            "scenario": "drain", "goal": null, "ours": ours, "baseline": baseline, "ratio": ratio, "ratio_min": min,
            "ratio_max": max, "rounds": pairs.len(), "unit": "events/s",
        });
        println!("{line}");
    } else {
        println!("scenario  ours        baseline    ratio (min-max)");
        println!(
            "drain     {ours:<7.0}/s   {baseline:<7.0}/s   {ratio:.2} ({min:.2}-{max:.2}), {} rounds",
            pairs.len()
        );
    }
}

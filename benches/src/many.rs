//! A worker that serves a thousand subscriptions, and one that serves three of the same events: I2.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use outbox_core::{Context, NewEvent};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};

use crate::{
    Setup,
    child::{Child, nanoseconds},
    events::Happened,
    idle::transactions,
    measure::{Measurement, Result, percentile, progress, sorted},
};

const SUBSCRIPTIONS: usize = 1000;
const TIME: Duration = Duration::from_secs(15);
/// From one commit to the next.
const PAUSE: Duration = Duration::from_millis(10);
const EVENTS: usize = 1500;

/// What a worker with so many subscriptions costs, of which each event matches three.
struct Cost {
    statements: f64,
    connections: f64,
    memory: f64,
    /// Milliseconds from the end of a commit to each handler.
    latencies: Vec<f64>,
}

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut statements =
        Measurement::at_most("I2 idle", "queries of an idle worker, 1,000 subscriptions ÷ 3", "queries/s", 10.0, 2.0);
    let mut connections = Measurement::shown("I2 connections", "connections, 1,000 subscriptions ÷ 3", "connections");
    let mut memory = Measurement::at_most("I2 memory", "peak memory, 1,000 subscriptions ÷ 3", "MB", 256.0, 128.0);
    let mut latency =
        Measurement::at_most("I2 p99", "100 events/s, three handlers each, 1,000 subscriptions ÷ 3", "ms", 50.0, 20.0);
    let mut three = Measurement::shown("I2 three", "database for an event, 3 subscriptions ÷ 1", "µs of its processor");
    for round in 0..setup.rounds {
        let (many, few) = (cost(setup, SUBSCRIPTIONS).await?, cost(setup, 3).await?);
        statements.add(many.statements, few.statements);
        connections.add(many.connections, few.connections);
        memory.add(many.memory, few.memory);
        latency.add(percentile(&many.latencies, 0.99), percentile(&few.latencies, 0.99));
        let (of_three, of_one) = (database(setup, 3).await?, database(setup, 1).await?);
        three.add(of_three, of_one);
        progress(&format!(
            "many {} of {}: {:.2} queries/s, {} connections, {:.0} MB, p99 {:.1} ms ({:.1} with three); {:.0} and {:.0} µs",
            round + 1,
            setup.rounds,
            many.statements,
            many.connections,
            many.memory,
            percentile(&many.latencies, 0.99),
            percentile(&few.latencies, 0.99),
            of_three,
            of_one,
        ));
    }
    Ok(vec![statements, connections, memory, latency, three])
}

async fn cost(setup: &Setup, subscriptions: usize) -> Result<Cost> {
    let database = setup.server().await?.empty().await?;
    let time = TIME.mul_f64(setup.scale.clamp(0.2, 1.0));
    let mut child =
        Child::start(&database.url, &["--subscriptions", &subscriptions.to_string(), "--groups", "--print"]).await?;
    let db = sea_orm::Database::connect(&database.url).await?;
    // After its start a worker looks more often for a while.
    tokio::time::sleep(time).await;
    let before = transactions(&db).await?;
    tokio::time::sleep(time).await;
    let statements = (transactions(&db).await? - before) as f64 / time.as_secs_f64();
    let connections = connections(&db).await?;
    let outbox = database.outbox().await?;
    let (events, groups) = (setup.scaled(EVENTS), subscriptions / 3);
    let committing = tokio::spawn(async move {
        let mut committed = HashMap::new();
        let begin = Instant::now();
        for n in 0..events {
            tokio::time::sleep_until((begin + PAUSE * n as u32).into()).await;
            let unit = outbox.begin(Context::default());
            unit.events().push(NewEvent::of(&Happened::new(n, n))?.tag(format!("group-{}", n % groups), "yes")?)?;
            unit.commit().await?;
            committed.insert(n, nanoseconds());
        }
        Ok::<_, crate::measure::Failure>(committed)
    });
    let mut seen: Vec<(usize, u128)> = Vec::new();
    while seen.len() < 3 * events {
        let line = tokio::time::timeout(Duration::from_secs(10), child.line()).await??;
        let (n, at) = line.split_once(' ').ok_or("no time")?;
        seen.push((n.parse()?, at.parse()?));
    }
    let committed = committing.await??;
    let latencies = seen.into_iter().map(|(n, at)| at.saturating_sub(committed[&n]) as f64 / 1e6);
    let latencies = sorted(latencies);
    let memory = child.end(true).await?;
    db.close().await?;
    database.drop().await?;
    Ok(Cost { statements, connections, memory, latencies })
}

/// Microseconds of the database's processor for an event that so many subscriptions of a worker get, one commit each.
async fn database(setup: &Setup, subscriptions: usize) -> Result<f64> {
    let server = setup.server().await?;
    let database = server.empty().await?;
    let mut child = Child::start(&database.url, &["--subscriptions", &subscriptions.to_string(), "--print"]).await?;
    let outbox = database.outbox().await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (events, before) = (setup.scaled(2 * EVENTS), server.processor_time().await?);
    let begin = Instant::now();
    let committing = tokio::spawn(async move {
        for n in 0..events {
            tokio::time::sleep_until((begin + PAUSE / 2 * n as u32).into()).await;
            let unit = outbox.begin(Context::default());
            unit.events().push(Happened::new(n, n))?;
            unit.commit().await?;
        }
        Ok::<_, crate::measure::Failure>(())
    });
    for _ in 0..events * subscriptions {
        tokio::time::timeout(Duration::from_secs(10), child.line()).await??;
    }
    committing.await??;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let used = server.processor_time().await?.saturating_sub(before);
    child.end(true).await?;
    database.drop().await?;
    Ok(used.as_secs_f64() * 1e6 / events as f64)
}

async fn connections(db: &DatabaseConnection) -> Result<f64> {
    let sql = "select count(*) as connections from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()";
    let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?.ok_or("no statistics")?;
    Ok(row.try_get::<i64>("", "connections")? as f64)
}

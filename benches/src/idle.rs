//! What a worker costs that has nothing to do, and how much memory it needs when it has much to do: I1, M1.

use std::time::Duration;

use sea_orm::{ConnectionTrait, DbBackend, Statement};

use crate::{
    Setup,
    child::Child,
    measure::{Measurement, Result, progress},
};

const TIME: Duration = Duration::from_secs(15);
const BACKLOG: usize = 1_000_000;
/// So many deliveries show what a backlog does to memory.
const DELIVERIES: usize = 30_000;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut one =
        Measurement::at_most("I1 one", "queries of an idle worker with 1 subscription ÷ none", "queries/s", 2.0, 1.0);
    let mut four = Measurement::at_most("I1 four", "the same with 4 subscriptions", "queries/s", 8.0, 1.0);
    let mut processor =
        Measurement::at_most("I1 cpu", "processor time of an idle worker, 4 subscriptions", "percent", 0.5, 0.5);
    let mut memory = Measurement::at_most("M1", "peak memory, large backlog ÷ small backlog", "MB", 128.0, 64.0);
    let server = setup.server().await?;
    let time = TIME.mul_f64(setup.scale.clamp(0.2, 1.0));
    let events = setup.scaled(BACKLOG);
    let deliveries = setup.scaled(DELIVERIES);
    let large = server.backlog(events, events).await?;
    let small = server.backlog(deliveries, deliveries).await?;
    for round in 0..setup.rounds {
        let none = idle(setup, 0, time).await?;
        let with_one = idle(setup, 1, time).await?;
        let with_four = idle(setup, 4, time).await?;
        one.add(with_one.0 - none.0, none.0);
        four.add(with_four.0 - none.0, none.0);
        processor.add(with_four.1, with_one.1);

        let mut peaks = Vec::new();
        for filled in [&large, &small] {
            let database = server.copy(filled).await?;
            let child = Child::start(&database.url, &["--until", &deliveries.to_string()]).await?;
            peaks.push(child.end(false).await?);
            database.drop().await?;
        }
        memory.add(peaks[0], peaks[1]);
        progress(&format!(
            "idle {} of {}: {:.2} queries/s with one subscription, {:.2} with four, {:.0} MB",
            round + 1,
            setup.rounds,
            with_one.0 - none.0,
            with_four.0 - none.0,
            peaks[0],
        ));
    }
    large.drop().await?;
    small.drop().await?;
    Ok(vec![one, four, processor, memory])
}

/// Transactions per second in the database, and percent of a processor in the worker.
async fn idle(setup: &Setup, subscriptions: usize, time: Duration) -> Result<(f64, f64)> {
    let database = setup.server().await?.empty().await?;
    let child = match subscriptions {
        0 => None,
        n => Some(Child::start(&database.url, &["--subscriptions", &n.to_string()]).await?),
    };
    let db = sea_orm::Database::connect(&database.url).await?;
    let processor = |child: &Option<Child>| child.as_ref().map_or(Ok(Duration::ZERO), Child::processor_time);
    // After its start a worker looks more often for a while.
    tokio::time::sleep(time).await;
    let (before, busy_before) = (transactions(&db).await?, processor(&child)?);
    tokio::time::sleep(time).await;
    let (after, busy_after) = (transactions(&db).await?, processor(&child)?);
    if let Some(child) = child {
        child.end(true).await?;
    }
    db.close().await?;
    database.drop().await?;
    let percent = 100.0 * (busy_after - busy_before).as_secs_f64() / time.as_secs_f64();
    Ok(((after - before) as f64 / time.as_secs_f64(), percent))
}

pub(crate) async fn transactions(db: &impl ConnectionTrait) -> Result<i64> {
    let sql = "select pg_stat_force_next_flush(), pg_stat_clear_snapshot(), xact_commit
                 from pg_stat_database where datname = current_database()";
    let row = db.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await?.ok_or("no statistics")?;
    Ok(row.try_get("", "xact_commit")?)
}

//! Size, age and other people's snapshots: B1 to B4.

use sea_orm::{ConnectionTrait, TransactionTrait};

use crate::{
    Setup,
    database::{Database, Server},
    drain::worker,
    measure::{Measurement, Result, progress},
    processor::{Cost, Meter},
    sink::{self, Drained, Tuning},
};

const SMALL: usize = 10_000;
const LARGE: usize = 1_000_000;

/// Not scaled: what an old snapshot costs shows only after 60,000.
const SNAPSHOT: usize = 80_000;

/// What was delivered long ago: the same rows as history. The tables of what waits begin anew, as they do not grow where
/// that much was delivered little by little.
const AGE: &str = "
    insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
    select subscription_id, position, 1, clock_timestamp() from outbox_deliveries;
    truncate outbox_deliveries, outbox_lanes";

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut b1 = Measurement::ratio("B1", "first tenth of a large backlog ÷ a small backlog", "events/s", 0.85, 0.95);
    let mut b2 = Measurement::ratio("B2", "last ÷ first tenth of a large backlog", "events/s", 0.75, 0.95);
    let mut b3 = Measurement::ratio("B3", "last ÷ first fifth, old snapshot held", "events/s", 0.75, 0.9);
    let mut b3b = Measurement::shown("B3b", "after 60 k: under an old snapshot ÷ without", "events/s");
    let mut b3c = Measurement::shown("B3 db", "processor time of the database: old snapshot held ÷ none", "µs");
    let mut b4 = Measurement::ratio("B4", "large history kept ÷ none", "events/s", 0.9, 1.0);
    let server = setup.server().await?;
    let (small_events, large_events) = (setup.scaled(SMALL), setup.scaled(LARGE));
    let small = server.backlog(small_events, small_events).await?;
    let large = server.backlog(large_events, large_events).await?;
    let snapshot = server.backlog(SNAPSHOT, SNAPSHOT).await?;
    let aged = server.copy(&large).await?;
    aged.execute(AGE).await?;
    aged.fill(small_events, small_events).await?;
    aged.execute("vacuum analyze").await?;
    for round in 0..setup.rounds {
        let without = worker(setup, &small, small_events, Tuning::Fast).await?.rate;
        let with_history = worker(setup, &aged, small_events, Tuning::Fast).await?.rate;
        b4.add(with_history, without);

        let database = server.copy(&large).await?;
        let outbox = database.outbox().await?;
        let drained = sink::drain(&outbox, large_events, Tuning::Fast).await?;
        b1.add(drained.between(0, 1), without);
        b2.add(drained.between(9, 10), drained.between(0, 1));
        drop(outbox);
        database.drop().await?;

        let (free, free_cost) = drain_under(server, &snapshot, false).await?;
        let (held, held_cost) = drain_under(server, &snapshot, true).await?;
        b3.add(held.between(8, 10), held.between(0, 2));
        b3b.add(held.between(8, 10), free.between(8, 10));
        b3c.add(held_cost.database, free_cost.database);
        progress(&format!(
            "backlog {} of {}: small {without:.0}/s, with history {with_history:.0}/s, large {:.0}/s, under a snapshot {:.0}/s",
            round + 1,
            setup.rounds,
            drained.rate(),
            held.rate()
        ));
    }
    for database in [small, large, snapshot, aged] {
        database.drop().await?;
    }
    Ok(vec![b1, b2, b3, b3b, b3c, b4])
}

/// Drains a copy, perhaps while somebody else holds a snapshot from before.
async fn drain_under(server: &Server, filled: &Database, snapshot: bool) -> Result<(Drained, Cost)> {
    let database = server.copy(filled).await?;
    let outbox = database.outbox().await?;
    let other = sea_orm::Database::connect(&database.url).await?;
    let old = other.begin_with_config(Some(sea_orm::IsolationLevel::RepeatableRead), None).await?;
    if snapshot {
        old.execute_unprepared("select count(*) from outbox_meta").await?;
    }
    let meter = Meter::start(server).await?;
    let drained = sink::drain(&outbox, SNAPSHOT, Tuning::Fast).await?;
    let cost = meter.for_each_of(SNAPSHOT).await?;
    old.rollback().await?;
    other.close().await?;
    drop(outbox);
    database.drop().await?;
    Ok((drained, cost))
}

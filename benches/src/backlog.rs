//! Size, age and other people's snapshots: B1 to B4.

use sea_orm::{ConnectionTrait, TransactionTrait};

use crate::{
    Setup,
    drain::worker,
    measure::{Measurement, Result, progress},
    sink::{self, Tuning},
};

const SMALL: usize = 10_000;
const LARGE: usize = 1_000_000;
const SNAPSHOT: usize = 80_000;

/// What was delivered long ago: the same rows as history.
const AGE: &str = "
    insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
    select subscription_id, position, 1, clock_timestamp() from outbox_deliveries;
    delete from outbox_deliveries; delete from outbox_lanes";

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut b1 = Measurement::ratio("B1", "first tenth of a large backlog ÷ a small backlog", "events/s", 0.85, 0.95);
    let mut b2 = Measurement::ratio("B2", "last ÷ first tenth of a large backlog", "events/s", 0.75, 0.95);
    let mut b3 = Measurement::ratio("B3", "last ÷ first fifth, old snapshot held", "events/s", 0.75, 0.9);
    let mut b4 = Measurement::ratio("B4", "large history kept ÷ none", "events/s", 0.9, 1.0);
    let server = setup.server().await?;
    let (small_events, large_events, snapshot_events) =
        (setup.scaled(SMALL), setup.scaled(LARGE), setup.scaled(SNAPSHOT));
    let small = server.backlog(small_events, small_events).await?;
    let large = server.backlog(large_events, large_events).await?;
    let snapshot = server.backlog(snapshot_events, snapshot_events).await?;
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

        let database = server.copy(&snapshot).await?;
        let outbox = database.outbox().await?;
        let other = sea_orm::Database::connect(&database.url).await?;
        let old = other.begin_with_config(Some(sea_orm::IsolationLevel::RepeatableRead), None).await?;
        old.execute_unprepared("select count(*) from outbox_meta").await?;
        let held = sink::drain(&outbox, snapshot_events, Tuning::Fast).await?;
        b3.add(held.between(8, 10), held.between(0, 2));
        old.rollback().await?;
        other.close().await?;
        drop(outbox);
        database.drop().await?;
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
    Ok(vec![b1, b2, b3, b4])
}

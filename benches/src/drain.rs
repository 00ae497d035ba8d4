//! A backlog from waiting to delivered and acknowledged: D1, D1b, D2.

use crate::{
    Setup, bare,
    database::Database,
    measure::{Measurement, Result, progress},
    processor::{Cost, Meter},
    sink::{self, Tuning},
};

pub(crate) const EVENTS: usize = 20_000;
const KEYS_OF_RUNS: usize = 2_000;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut d1 = Measurement::ratio("D1", "distinct keys: tuned worker ÷ bare SQL lanes", "events/s", 0.6, 0.8);
    let mut app = Measurement::shown("D1 app", "processor time of the worker: tuned ÷ bare SQL lanes", "µs");
    let mut db = Measurement::shown("D1 db", "processor time of the database: tuned ÷ bare SQL lanes", "µs");
    let mut runs_app = Measurement::shown("D1b app", "runs of 10, worker: tuned ÷ bare SQL lanes", "µs");
    let mut runs_db = Measurement::shown("D1b db", "runs of 10, database: tuned ÷ bare SQL lanes", "µs");
    let mut d1b = Measurement::ratio("D1b", "runs of 10: tuned worker ÷ bare unordered rows", "events/s", 0.8, 1.3);
    let mut bare_runs = Measurement::shown("D1c", "runs of 10: bare SQL lanes ÷ bare unordered rows", "events/s");
    let mut d2 = Measurement::ratio("D2", "distinct keys: default worker ÷ tuned worker", "events/s", 0.8, 1.0);
    let server = setup.server().await?;
    let events = setup.scaled(EVENTS);
    let distinct = server.backlog(events, events).await?;
    let runs = server.backlog(events, setup.scaled(KEYS_OF_RUNS)).await?;
    for round in 0..setup.rounds {
        let bare = bare_lanes(setup, &distinct, events).await?;
        let tuned = worker(setup, &distinct, events, Tuning::Fast).await?;
        let default = worker(setup, &distinct, events, Tuning::Default).await?;
        let database = server.copy(&runs).await?;
        let rows = bare::drain_rows(&database, events).await?;
        database.drop().await?;
        let runs_bare = bare_lanes(setup, &runs, events).await?;
        let runs_tuned = worker(setup, &runs, events, Tuning::Fast).await?;
        progress(&format!(
            "drain {} of {}: bare {:.0}/s, tuned {:.0}/s, default {:.0}/s; runs: unordered rows {rows:.0}/s, bare lanes {:.0}/s, \
             tuned {:.0}/s",
            round + 1,
            setup.rounds,
            bare.rate,
            tuned.rate,
            default.rate,
            runs_bare.rate,
            runs_tuned.rate,
        ));
        d1.add(tuned.rate, bare.rate);
        app.add(tuned.cost.app, bare.cost.app);
        db.add(tuned.cost.database, bare.cost.database);
        d1b.add(runs_tuned.rate, rows);
        bare_runs.add(runs_bare.rate, rows);
        runs_app.add(runs_tuned.cost.app, runs_bare.cost.app);
        runs_db.add(runs_tuned.cost.database, runs_bare.cost.database);
        d2.add(default.rate, tuned.rate);
    }
    distinct.drop().await?;
    runs.drop().await?;
    Ok(vec![d1, app, db, d1b, bare_runs, runs_app, runs_db, d2])
}

/// A drain: deliveries per second, and what one of them cost.
#[derive(Clone, Copy)]
pub(crate) struct Drain {
    pub(crate) rate: f64,
    pub(crate) cost: Cost,
}

pub(crate) async fn worker(setup: &Setup, filled: &Database, events: usize, tuning: Tuning) -> Result<Drain> {
    let server = setup.server().await?;
    let database = server.copy(filled).await?;
    let outbox = database.outbox().await?;
    let meter = Meter::start(server).await?;
    let drained = sink::drain(&outbox, events, tuning).await?;
    let cost = meter.for_each_of(events).await?;
    drop(outbox);
    database.drop().await?;
    Ok(Drain { rate: drained.rate(), cost })
}

pub(crate) async fn bare_lanes(setup: &Setup, filled: &Database, events: usize) -> Result<Drain> {
    let server = setup.server().await?;
    let database = server.copy(filled).await?;
    let meter = Meter::start(server).await?;
    let rate = bare::drain_lanes(&database, events).await?;
    let cost = meter.for_each_of(events).await?;
    database.drop().await?;
    Ok(Drain { rate, cost })
}

//! A backlog from waiting to delivered and acknowledged: D1, D1b, D2.

use crate::{
    Setup, bare,
    database::Database,
    measure::{Measurement, Result, progress},
    sink::{self, Tuning},
};

pub(crate) const EVENTS: usize = 20_000;
const KEYS_OF_RUNS: usize = 2_000;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut d1 = Measurement::ratio("D1", "distinct keys: tuned worker ÷ bare SQL lanes", "events/s", 0.6, 0.8);
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
            "drain {} of {}: bare {bare:.0}/s, tuned {tuned:.0}/s, default {default:.0}/s; runs: unordered rows {rows:.0}/s, \
             bare lanes {runs_bare:.0}/s, tuned {runs_tuned:.0}/s",
            round + 1,
            setup.rounds
        ));
        d1.add(tuned, bare);
        d1b.add(runs_tuned, rows);
        bare_runs.add(runs_bare, rows);
        d2.add(default, tuned);
    }
    distinct.drop().await?;
    runs.drop().await?;
    Ok(vec![d1, d1b, bare_runs, d2])
}

pub(crate) async fn worker(setup: &Setup, filled: &Database, events: usize, tuning: Tuning) -> Result<f64> {
    let database = setup.server().await?.copy(filled).await?;
    let outbox = database.outbox().await?;
    let drained = sink::drain(&outbox, events, tuning).await?;
    drop(outbox);
    database.drop().await?;
    Ok(drained.rate())
}

pub(crate) async fn bare_lanes(setup: &Setup, filled: &Database, events: usize) -> Result<f64> {
    let database = setup.server().await?.copy(filled).await?;
    let rate = bare::drain_lanes(&database, events).await?;
    database.drop().await?;
    Ok(rate)
}

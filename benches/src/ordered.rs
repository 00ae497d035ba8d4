//! One hot key: D3.

use crate::{
    Setup,
    drain::{EVENTS, bare_lanes, worker},
    measure::{Measurement, Result, progress},
    sink::Tuning,
};

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut d3 = Measurement::ratio("D3", "tuned worker: one hot key ÷ distinct keys", "events/s", 0.25, 0.5);
    let mut limit = Measurement::shown("D3b", "one hot key: tuned worker ÷ bare SQL lanes", "events/s");
    let mut default = Measurement::shown("D3c", "one hot key: default worker ÷ bare SQL lanes", "events/s");
    let server = setup.server().await?;
    let events = setup.scaled(EVENTS);
    let distinct = server.backlog(events, events).await?;
    let hot = server.backlog(events, 1).await?;
    for round in 0..setup.rounds {
        let spread = worker(setup, &distinct, events, Tuning::Fast).await?.rate;
        let ours = worker(setup, &hot, events, Tuning::Fast).await?.rate;
        let as_it_comes = worker(setup, &hot, events, Tuning::Default).await?.rate;
        let bare = bare_lanes(setup, &hot, events).await?.rate;
        progress(&format!(
            "ordered {} of {}: distinct {spread:.0}/s, hot {ours:.0}/s, default {as_it_comes:.0}/s, bare {bare:.0}/s",
            round + 1,
            setup.rounds
        ));
        d3.add(ours, spread);
        limit.add(ours, bare);
        default.add(as_it_comes, bare);
    }
    distinct.drop().await?;
    hot.drop().await?;
    Ok(vec![d3, limit, default])
}

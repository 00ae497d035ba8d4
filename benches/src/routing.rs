//! Routing: R3, how many events a second; R4, what a worker does that finds very many which nobody has routed.

use std::time::Instant;

use outbox_core::Subscription;
use sea_orm::ConnectionTrait;

use crate::{
    Setup,
    child::{Child, nanoseconds},
    events::SUBSCRIPTION,
    measure::{Measurement, Result, progress},
};

const EVENTS: usize = 50_000;
const BACKLOG: usize = 1_000_000;
/// So many deliveries show what the backlog does to memory.
const DELIVERIES: usize = 100_000;

/// As a request stores them, by SQL.
const FILL: &str = "
    with event as (
        insert into outbox_events (event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at)
        select gen_random_uuid(), 'bench.happened', 1, 'bench', n::text,
               json_build_object('n', n, 'key', n::text, 'text', repeat('0123456789', 14)), clock_timestamp()
          from generate_series(1, $1) n
        returning position)
    insert into outbox_unrouted (position) select position from event";

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut four = Measurement::at_least("R3", "routing for 4 subscriptions ÷ for 1", "events/s", 40_000.0, 60_000.0);
    let mut many = Measurement::at_least(
        "R3b",
        "routing for 1,000 subscriptions, of which 3 match ÷ for 3",
        "events/s",
        10_000.0,
        20_000.0,
    );
    let mut first =
        Measurement::at_most("R4", "first delivery of a large backlog ÷ of a small one", "ms", 1000.0, 500.0);
    let mut memory = Measurement::at_most("R4 memory", "peak memory, large backlog ÷ small backlog", "MB", 64.0, 48.0);
    let events = setup.scaled(EVENTS);
    let (large, small) = (setup.scaled(BACKLOG), setup.scaled(DELIVERIES));
    for round in 0..setup.rounds {
        let one = routed(setup, events, 1, 0).await?;
        let with_four = routed(setup, events, 4, 0).await?;
        let three = routed(setup, events, 3, 0).await?;
        let with_many = routed(setup, events, 3, 997).await?;
        four.add(with_four, one);
        many.add(with_many, three);
        let of_large = started(setup, large, small).await?;
        let of_small = started(setup, small, small).await?;
        first.add(of_large.0, of_small.0);
        memory.add(of_large.1, of_small.1);
        progress(&format!(
            "routing {} of {}: {one:.0}/s for one, {with_four:.0}/s for four, {with_many:.0}/s among 1,000; first of a \
             backlog after {:.0} ms, {:.0} MB",
            round + 1,
            setup.rounds,
            of_large.0,
            of_large.1,
        ));
    }
    Ok(vec![four, many, first, memory])
}

/// Events per second that one process routes, while nobody delivers.
async fn routed(setup: &Setup, events: usize, matching: usize, others: usize) -> Result<f64> {
    let database = setup.server().await?.empty().await?;
    let outbox = database.outbox().await?;
    for n in 0..matching {
        outbox.register(&Subscription::new(format!("{SUBSCRIPTION}-{n}"))?).await?;
    }
    for n in 0..others {
        outbox.register(&Subscription::new(format!("other-{n}"))?.events([&*format!("other.{n}")])?).await?;
    }
    database.execute(&FILL.replace("$1", &events.to_string())).await?;
    let began = Instant::now();
    let routed = outbox.route_waiting().await?;
    let rate = routed as f64 / began.elapsed().as_secs_f64();
    drop(outbox);
    database.drop().await?;
    Ok(rate)
}

/// Milliseconds until a worker that starts delivers its first event, and its memory in megabytes after some more.
async fn started(setup: &Setup, events: usize, deliveries: usize) -> Result<(f64, f64)> {
    let database = setup.server().await?.empty().await?;
    let outbox = database.outbox().await?;
    outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
    database.execute(&FILL.replace("$1", &events.to_string())).await?;
    outbox.writer().execute_unprepared("checkpoint").await?;
    drop(outbox);
    let began = nanoseconds();
    let mut child = Child::start(&database.url, &["--print", "--until", &deliveries.to_string()]).await?;
    let line = child.line().await?;
    let (_, at) = line.split_once(' ').ok_or("no time")?;
    let first = at.parse::<u128>()?.saturating_sub(began) as f64 / 1e6;
    let peak = child.end(false).await?;
    database.drop().await?;
    Ok((first, peak))
}

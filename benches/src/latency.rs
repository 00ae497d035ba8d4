//! From the end of a commit to the delivery, while nothing else happens: L1 in the same process, L2 in another.

use std::{collections::HashMap, time::Duration};

use outbox_apalis::{Handlers, Redis, Worker};
use outbox_core::{Context, Subscription};
use sea_orm::sqlx::{self, postgres::PgListener};
use tokio::sync::mpsc;

use crate::{
    Setup, bare,
    child::{Child, nanoseconds},
    database::Database,
    events::{Happened, SUBSCRIPTION},
    measure::{Measurement, Result, percentile, progress, sorted},
};

pub(crate) const EVENTS: usize = 200;
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut same_p50 = Measurement::at_most("L1 p50", "same process ÷ bare LISTEN/NOTIFY", "ms", 1.0, 0.7);
    let mut same_p99 = Measurement::at_most("L1 p99", "same process ÷ bare LISTEN/NOTIFY", "ms", 4.0, 2.5);
    let mut other_p50 = Measurement::at_most("L2 p50", "other process ÷ bare LISTEN/NOTIFY", "ms", 2.0, 1.0);
    let mut other_p99 = Measurement::at_most("L2 p99", "other process ÷ bare LISTEN/NOTIFY", "ms", 10.0, 7.0);
    let events = setup.scaled(EVENTS);
    for round in 0..setup.rounds {
        let same = side(setup, events, Where::Here).await?;
        let other = side(setup, events, Where::OtherProcess).await?;
        let bare = side(setup, events, Where::Bare).await?;
        for (measurement, ours, share) in [
            (&mut same_p50, &same, 0.5),
            (&mut same_p99, &same, 0.99),
            (&mut other_p50, &other, 0.5),
            (&mut other_p99, &other, 0.99),
        ] {
            measurement.add(percentile(ours, share), percentile(&bare, share));
        }
        progress(&format!(
            "latency {} of {}: p50 here {:.2} ms, other process {:.2} ms, bare {:.2} ms",
            round + 1,
            setup.rounds,
            percentile(&same, 0.5),
            percentile(&other, 0.5),
            percentile(&bare, 0.5),
        ));
    }
    Ok(vec![same_p50, same_p99, other_p50, other_p99])
}

/// Who delivers.
pub(crate) enum Where {
    Here,
    /// This process too, with this Redis between relay and worker.
    ThroughRedis(Box<Redis>),
    OtherProcess,
    /// A consumer in bare SQL that is notified by each commit, after it.
    Bare,
}

/// Milliseconds of each event, sorted.
pub(crate) async fn side(setup: &Setup, events: usize, place: Where) -> Result<Vec<f64>> {
    let database = setup.server().await?.empty().await?;
    let outbox = database.outbox().await?;
    outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
    let (delivered, mut deliveries) = mpsc::unbounded_channel::<(usize, u128)>();
    let consumer = match place {
        Where::Here => here(Worker::new(outbox.clone()), delivered).await?,
        Where::ThroughRedis(redis) => here(Worker::new(outbox.clone()).redis(*redis), delivered).await?,
        Where::OtherProcess => other_process(&database, delivered).await?,
        Where::Bare => bare_listener(&database, delivered).await?,
    };
    // Everybody has looked once.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut committed = HashMap::new();
    for n in 0..events {
        let unit = outbox.begin(Context::default());
        unit.events().push(Happened::new(n, n))?;
        unit.commit().await?;
        committed.insert(n, nanoseconds());
        tokio::time::sleep(PAUSE).await;
    }
    let mut taken = Vec::with_capacity(events);
    for _ in 0..events {
        let received = tokio::time::timeout(Duration::from_secs(10), deliveries.recv()).await?;
        let (n, at) = received.ok_or("the consumer ended early")?;
        let committed = committed.get(&n).ok_or("an event that was not pushed")?;
        taken.push(at.saturating_sub(*committed) as f64 / 1e6);
    }
    consumer.abort();
    drop(outbox);
    database.drop().await?;
    Ok(sorted(taken.into_iter()))
}

async fn here(worker: Worker, delivered: mpsc::UnboundedSender<(usize, u128)>) -> Result<tokio::task::AbortHandle> {
    let handlers = Handlers::new().on(move |event: Happened, _| {
        let _ = delivered.send((event.n, nanoseconds()));
        std::future::ready(Ok(()))
    });
    let worker = worker.handlers(Subscription::new(SUBSCRIPTION)?, handlers).start().await?;
    Ok(tokio::spawn(worker.run_until(std::future::pending())).abort_handle())
}

async fn other_process(
    database: &Database,
    delivered: mpsc::UnboundedSender<(usize, u128)>,
) -> Result<tokio::task::AbortHandle> {
    let mut child = Child::start(&database.url, &["--print"]).await?;
    let read = tokio::spawn(async move {
        while let Ok(line) = child.line().await {
            let Some((n, at)) = line.split_once(' ') else { continue };
            if let (Ok(n), Ok(at)) = (n.parse(), at.parse()) {
                let _ = delivered.send((n, at));
            }
        }
    });
    Ok(read.abort_handle())
}

async fn bare_listener(
    database: &Database,
    delivered: mpsc::UnboundedSender<(usize, u128)>,
) -> Result<tokio::task::AbortHandle> {
    // The library's own notifications, with a consumer that does the least.
    let mut listener = PgListener::connect(&database.url).await?;
    listener.listen("outbox").await?;
    let pool = bare::pool(database).await?;
    let subscription = bare::subscription(&pool).await?;
    sqlx::query("select 1").execute(&pool).await?;
    let consume = tokio::spawn(async move {
        while listener.recv().await.is_ok() {
            while let Ok(numbers) = bare::marks_numbers(&pool, subscription).await {
                if numbers.is_empty() {
                    break;
                }
                for (n, at) in numbers {
                    let _ = delivered.send((n, at));
                }
            }
        }
    });
    Ok(consume.abort_handle())
}

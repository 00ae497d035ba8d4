//! What a busy tenant or key costs the others, and how well limits hold for three workers together: F1, F2.

use std::{collections::HashMap, sync::Arc, time::Duration};

use outbox_apalis::{Handlers, Worker};
use outbox_core::{Context, NewEvent, Ordering, Subscription};
use tokio::{sync::mpsc, time::Instant};

use crate::{
    Setup,
    child::{Child, nanoseconds},
    database::Database,
    events::{Happened, SUBSCRIPTION},
    measure::{Measurement, Result, percentile, progress, sorted},
};

const BUSY: usize = 50_000;
const OTHERS: usize = 9;
const WORK: Duration = Duration::from_millis(100);
const TIME: Duration = Duration::from_secs(20);

const RATE: f64 = 100.0;
const CONCURRENCY: usize = 12;
const WORKERS: usize = 3;

/// Who has very many events: one of the tenants, or one of the keys.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Tenant,
    Key,
}

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut tenants =
        Measurement::at_most("F1 tenants", "p99 of nine tenants, beside a busy one ÷ without it", "ms", 1e9, 1e9);
    let mut keys = Measurement::at_most("F1 keys", "p99 of nine keys, beside a busy one ÷ without it", "ms", 1e9, 1e9);
    let mut rate = Measurement::shown("F2 rate", "most attempts in 10 s, three workers ÷ the limit", "attempts");
    let mut least =
        Measurement::shown("F2 rate, least", "fewest attempts in 10 s, three workers ÷ the limit", "attempts");
    let mut concurrency =
        Measurement::shown("F2 concurrency", "attempts at once in 10 s, three workers ÷ the limit", "attempts");
    for round in 0..setup.rounds {
        for (by, measurement) in [(By::Tenant, &mut tenants), (By::Key, &mut keys)] {
            let (beside, alone) = (latencies(setup, by, true).await?, latencies(setup, by, false).await?);
            measurement.add(percentile(&beside, 0.99), percentile(&alone, 0.99));
            progress(&format!(
                "fairness {} of {}: p50 {:.1} and p99 {:.1} ms beside a busy one, {:.1} and {:.1} ms without",
                round + 1,
                setup.rounds,
                percentile(&beside, 0.5),
                percentile(&beside, 0.99),
                percentile(&alone, 0.5),
                percentile(&alone, 0.99),
            ));
        }
        let attempts = fleet(setup, &["--fleet-rate", &RATE.to_string(), "--work", "1"]).await?;
        let windows = windows(&attempts, |attempts, from, to| {
            attempts.iter().filter(|(begun, _)| (from..to).contains(begun)).count() as f64
        });
        let (fewest, most) = (windows.first().copied().unwrap_or(0.0), windows.last().copied().unwrap_or(0.0));
        rate.add(most, 10.0 * RATE);
        least.add(fewest, 10.0 * RATE);
        let attempts = fleet(setup, &["--fleet-concurrency", &CONCURRENCY.to_string(), "--work", "200"]).await?;
        let at_once = self::windows(&attempts, |attempts, from, to| {
            let under_way = |(begun, ended): &(u128, u128)| ended.min(&to).saturating_sub(*begun.max(&from)) as f64;
            attempts.iter().map(under_way).sum::<f64>() / (to - from) as f64
        });
        let (fewest, most) = (at_once.first().copied().unwrap_or(0.0), at_once.last().copied().unwrap_or(0.0));
        concurrency.add(most, CONCURRENCY as f64);
        progress(&format!(
            "fleet {} of {}: {fewest:.1} to {most:.1} attempts at once of {CONCURRENCY}, \
             {:.0} to {:.0} attempts in 10 s of {:.0}",
            round + 1,
            setup.rounds,
            windows.first().copied().unwrap_or(0.0),
            windows.last().copied().unwrap_or(0.0),
            10.0 * RATE
        ));
    }
    Ok(vec![tenants, keys, rate, least, concurrency])
}

/// Milliseconds from the end of a commit to the begin of its handler, of nine with an event a second each.
async fn latencies(setup: &Setup, by: By, is_busy: bool) -> Result<Vec<f64>> {
    let database = setup.server().await?.empty().await?;
    let outbox = database.outbox().await?;
    outbox.register(&subscription(by)?).await?;
    if is_busy {
        fill(&database, by, setup.scaled(BUSY)).await?;
    }
    let (begun, mut begins) = mpsc::unbounded_channel::<(usize, u128)>();
    let handlers = Handlers::new().on(move |event: Happened, _| {
        let _ = begun.send((event.n, nanoseconds()));
        async {
            tokio::time::sleep(WORK).await;
            Ok(())
        }
    });
    let worker = Worker::new(outbox.clone()).handlers(subscription(by)?, handlers).start().await?;
    let working = tokio::spawn(worker.run_until(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let rounds = (TIME.as_secs_f64() * setup.scale).clamp(3.0, 60.0) as usize;
    let mut committed = HashMap::new();
    let begin = Instant::now();
    for n in 0..rounds * OTHERS {
        tokio::time::sleep_until(begin + Duration::from_secs(1) * n as u32 / OTHERS as u32).await;
        let other = n % OTHERS;
        push(&outbox, by, &format!("other-{other}"), usize::MAX - n, &format!("{n}-{other}")).await?;
        committed.insert(usize::MAX - n, nanoseconds());
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    working.abort();
    let mut latencies = Vec::new();
    while let Ok((n, at)) = begins.try_recv() {
        if let Some(committed) = committed.remove(&n) {
            latencies.push(at.saturating_sub(committed) as f64 / 1e6);
        }
    }
    // What has not begun within two seconds counts as these.
    latencies.extend(committed.iter().map(|_| 2000.0));
    drop(outbox);
    database.drop().await?;
    Ok(sorted(latencies.into_iter()))
}

fn subscription(by: By) -> Result<Subscription> {
    let subscription = Subscription::new(SUBSCRIPTION)?;
    Ok(if by == By::Tenant { subscription } else { subscription.ordering(Ordering::Tenant) })
}

/// An event of this tenant. The key is the tenant too, or another one for each event.
async fn push(outbox: &outbox_seaorm::Outbox, by: By, tenant: &str, n: usize, key: &str) -> Result<()> {
    let mut context = Context::default();
    context.tenant = Some(tenant.to_owned());
    let unit = outbox.begin(context);
    let key = if by == By::Tenant { key.to_owned() } else { tenant.to_owned() };
    unit.events().push(NewEvent::of(&Happened::of(n, key))?)?;
    Ok(unit.commit().await?)
}

async fn fill(database: &Database, by: By, events: usize) -> Result<()> {
    let outbox = Arc::new(database.outbox().await?);
    for first in (0..events).step_by(2000) {
        let mut context = Context::default();
        context.tenant = Some("busy".to_owned());
        let unit = outbox.begin(context);
        for n in first..events.min(first + 2000) {
            let key = if by == By::Tenant { n.to_string() } else { "busy".to_owned() };
            unit.events().push(Happened::of(n, key))?;
        }
        unit.commit().await?;
    }
    Ok(outbox.route_waiting().await.map(|_| ())?)
}

/// When the attempts of three workers with a backlog began and ended.
async fn fleet(setup: &Setup, options: &[&str]) -> Result<Vec<(u128, u128)>> {
    let server = setup.server().await?;
    let database = server.backlog(20_000, 20_000).await?;
    let options: Vec<&str> = options.iter().copied().chain(["--print"]).collect();
    let mut readers = Vec::new();
    for _ in 0..WORKERS {
        let mut child = Child::start(&database.url, &options).await?;
        readers.push(tokio::spawn(async move {
            let (mut attempts, end) = (Vec::new(), Instant::now() + Duration::from_secs(42));
            while let Ok(line) = tokio::time::timeout_at(end, child.line()).await {
                let line = line?;
                let mut numbers = line.split(' ').skip(1).map(str::parse::<u128>);
                let (Some(begun), Some(ended)) = (numbers.next(), numbers.next()) else { continue };
                attempts.push((begun?, ended?));
            }
            child.end(true).await?;
            Ok::<_, crate::measure::Failure>(attempts)
        }));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let mut attempts = Vec::new();
    for reader in readers {
        attempts.extend(reader.await??);
    }
    database.drop().await?;
    attempts.sort_unstable();
    Ok(attempts)
}

/// A figure of each ten seconds after the first eleven, when all workers know of each other; sorted.
fn windows(attempts: &[(u128, u128)], figure: impl Fn(&[(u128, u128)], u128, u128) -> f64) -> Vec<f64> {
    let second = 1_000_000_000;
    let Some((first, _)) = attempts.first() else { return Vec::new() };
    let last = attempts.iter().map(|(begun, _)| *begun).max().unwrap_or(*first);
    let starts = (0..).map(|n| first + 11 * second + n * second / 2).take_while(|from| from + 10 * second < last);
    sorted(starts.map(|from| figure(attempts, from, from + 10 * second)))
}

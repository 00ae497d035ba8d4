//! When things fail: deliveries that need a second attempt, a destination that is slow, a server that crashes.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_apalis::{Handlers, Worker};
use outbox_core::{DeliveryError, RetryPolicy, Subscription};
use tokio::sync::Notify;

use crate::{
    Setup,
    database::Database,
    events::{Happened, SUBSCRIPTION},
    measure::{Measurement, Result, progress},
};

const EVENTS: usize = 5_000;
const SLOW_EVENTS: usize = 1_000;
const SLOW: Duration = Duration::from_millis(10);

/// The default number of deliveries under way.
const CONCURRENCY: f64 = 10.0;

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut failing = Measurement::shown("X1", "one in ten fails at first ÷ none fails", "events/s");
    let mut slow = Measurement::shown("X2", "destination of 10 ms ÷ what ten at a time could do", "events/s");
    let mut crash = Measurement::shown("X3", "server crashes halfway ÷ it does not", "s");
    let server = setup.server().await?;
    let (events, slow_events) = (setup.scaled(EVENTS), setup.scaled(SLOW_EVENTS));
    let filled = server.backlog(events, events).await?;
    let few = server.backlog(slow_events, slow_events).await?;
    for round in 0..setup.rounds {
        let healthy = drain(setup, &filled, events, Trouble::None).await?;
        let troubled = drain(setup, &filled, events, Trouble::Failures).await?;
        let slowly = drain(setup, &few, slow_events, Trouble::Slow).await?;
        failing.add(events as f64 / troubled, events as f64 / healthy);
        slow.add(slow_events as f64 / slowly, CONCURRENCY / SLOW.as_secs_f64());
        if server.private.is_some() {
            let crashed = drain(setup, &filled, events, Trouble::Crash).await?;
            crash.add(crashed, healthy);
        }
        progress(&format!(
            "bad day {} of {}: healthy {healthy:.2} s, failing {troubled:.2} s, slow {slowly:.2} s",
            round + 1,
            setup.rounds
        ));
    }
    filled.drop().await?;
    few.drop().await?;
    Ok(vec![failing, slow, crash])
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    Failures,
    Slow,
    Crash,
}

/// Seconds until every event was delivered at least once.
async fn drain(setup: &Setup, filled: &Database, events: usize, trouble: Trouble) -> Result<f64> {
    let server = setup.server().await?;
    let database = server.copy(filled).await?;
    let outbox = database.outbox().await?;
    let retry = RetryPolicy::default().backoff(Duration::from_millis(100), Duration::from_secs(1))?;
    let delivered = Arc::new(Mutex::new(HashSet::new()));
    let (halfway, all, tried) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let handlers = Handlers::new().on({
        let (delivered, halfway, all) = (delivered.clone(), halfway.clone(), all.clone());
        move |event: Happened, delivery| {
            let (delivered, halfway, all, tried) = (delivered.clone(), halfway.clone(), all.clone(), tried.clone());
            async move {
                if tried.fetch_add(1, Ordering::Relaxed) == events / 2 {
                    halfway.notify_one();
                }
                if trouble == Trouble::Slow {
                    tokio::time::sleep(SLOW).await;
                }
                if trouble == Trouble::Failures && event.n.is_multiple_of(10) && delivery.attempt() == 1 {
                    return Err(DeliveryError::retry("not today"));
                }
                let mut delivered = delivered.lock().unwrap_or_else(PoisonError::into_inner);
                if delivered.insert(event.n) && delivered.len() == events {
                    all.notify_one();
                }
                Ok(())
            }
        }
    });
    let worker = Worker::new(outbox.clone())
        .lease(Duration::from_secs(2))?
        .handlers(Subscription::new(SUBSCRIPTION)?.retry(retry), handlers)
        .start()
        .await?;
    let started = Instant::now();
    let crash = async {
        halfway.notified().await;
        if let (Trouble::Crash, Some(private)) = (trouble, &server.private) {
            tokio::task::block_in_place(|| {
                private.stop("immediate");
                private.launch();
            });
        }
        std::future::pending::<()>().await;
    };
    let end = async {
        tokio::select! {
            () = all.notified() => {}
            () = crash => {}
        }
    };
    worker.run_until(end).await;
    let taken = started.elapsed().as_secs_f64();
    drop(outbox);
    database.drop().await?;
    Ok(taken)
}

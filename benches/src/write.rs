//! The request side: W1 to W4 on PostgreSQL, S1 on SQLite.

use std::time::Duration;

use axum::Router;
use outbox_core::{Ordering, Subscription};
use outbox_seaorm::Outbox;
use sea_orm::{
    ConnectOptions, DatabaseConnection,
    sqlx::sqlite::{SqliteJournalMode, SqliteSynchronous},
};
use tokio::task::JoinHandle;

use crate::{
    Setup, bare,
    database::{Database, migrate},
    events::{Happened, SUBSCRIPTION},
    http::{Load, Served, load},
    measure::{Measurement, Result, progress},
    processor::{Cost, Meter},
    shop,
};

const CLIENTS: usize = 16;
const TIME: Duration = Duration::from_secs(3);

pub(crate) async fn run(setup: &Setup) -> Result<Vec<Measurement>> {
    let mut w1 = Measurement::ratio("W1", "one event: layer ÷ by hand", "requests/s", 0.95, 1.1);
    let mut no_event = Measurement::shown("W0", "no event: layer ÷ by hand with event", "requests/s");
    let mut least = Measurement::shown("W1b", "the least these tables take, by hand ÷ by hand", "requests/s");
    let mut w2 = Measurement::ratio("W2", "10 events ÷ one event in a request", "requests/s", 0.8, 0.9);
    let mut w2b = Measurement::shown("W2b", "10 rows ÷ one row, both by hand", "requests/s");
    let mut w3 = Measurement::ratio("W3", "with a worker in the process ÷ without any", "requests/s", 0.95, 1.0);
    let mut w3b = Measurement::shown("W3b", "with a worker ÷ with a bare SQL consumer", "requests/s");
    let mut w3c = Measurement::shown("W3c", "with a bare SQL consumer ÷ without any", "requests/s");
    let mut w4 = Measurement::ratio("W4", "16 clients on one aggregate ÷ on distinct ones", "requests/s", 0.9, 0.98);
    let mut w4b = Measurement::ratio("W4b", "the same beside a worker and in a global order", "requests/s", 0.9, 0.98);
    let mut latency = Measurement::shown("W1 p99", "one event: layer ÷ by hand", "ms");
    let mut app = Measurement::shown("W1 app", "processor time of application and client: layer ÷ by hand", "µs");
    let mut db = Measurement::shown("W1 db", "processor time of the database: layer ÷ by hand", "µs");
    let mut s1 = Measurement::at_most("S1", "SQLite, 16 connections, p99: layer ÷ by hand", "ms", 25.0, 15.0);
    let time = TIME.mul_f64(setup.scale.min(1.0));
    let template = setup.server().await?.empty().await?;
    {
        let outbox = template.outbox().await?;
        shop::create_tables(outbox.writer(), shop::POSTGRES).await?;
        outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
    }
    for round in 0..setup.rounds {
        let by_hand = side(setup, &template, Shop::ByHand, "/1", time, Consumer::None).await?;
        let one = side(setup, &template, Shop::Layer, "/1", time, Consumer::None).await?;
        let with_least = side(setup, &template, Shop::ByHand, "/least", time, Consumer::None).await?;
        let ten = side(setup, &template, Shop::Layer, "/10", time, Consumer::None).await?;
        let ten_by_hand = side(setup, &template, Shop::ByHand, "/10", time, Consumer::None).await?;
        let zero = side(setup, &template, Shop::Layer, "/0", time, Consumer::None).await?;
        let with_worker = side(setup, &template, Shop::Layer, "/1", time, Consumer::Worker).await?;
        let with_bare = side(setup, &template, Shop::Layer, "/1", time, Consumer::Bare).await?;
        let hot = side(setup, &template, Shop::Layer, "/hot", time, Consumer::None).await?;
        let hot_in_order = side(setup, &template, Shop::Layer, "/hot", time, Consumer::InOrder).await?;
        progress(&format!(
            "write {} of {}: by hand {:.0}/s (p50 {:.1} ms), layer {:.0}/s, ten {:.0}/s, none {:.0}/s, with worker {:.0}/s",
            round + 1,
            setup.rounds,
            by_hand.load.per_second,
            by_hand.load.p50,
            one.load.per_second,
            ten.load.per_second,
            zero.load.per_second,
            with_worker.load.per_second,
        ));
        w1.add(one.load.per_second, by_hand.load.per_second);
        latency.add(one.load.p99, by_hand.load.p99);
        app.add(one.cost.app, by_hand.cost.app);
        db.add(one.cost.database, by_hand.cost.database);
        least.add(with_least.load.per_second, by_hand.load.per_second);
        no_event.add(zero.load.per_second, by_hand.load.per_second);
        w2.add(ten.load.per_second, one.load.per_second);
        w2b.add(ten_by_hand.load.per_second, by_hand.load.per_second);
        w3.add(with_worker.load.per_second, one.load.per_second);
        w3b.add(with_worker.load.per_second, with_bare.load.per_second);
        w4.add(hot.load.per_second, one.load.per_second);
        w4b.add(hot_in_order.load.per_second, with_worker.load.per_second);
        w3c.add(with_bare.load.per_second, one.load.per_second);
        let (ours, by_hand) = sqlite(time).await?;
        s1.add(ours.p99, by_hand.p99);
    }
    template.drop().await?;
    Ok(vec![w1, least, latency, app, db, no_event, w2, w2b, w3, w3b, w3c, w4, w4b, s1])
}

/// Who delivers meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Consumer {
    None,
    Worker,
    /// A worker whose subscription gets all events in one order.
    InOrder,
    Bare,
}

/// Who writes.
#[derive(Clone, Copy)]
enum Shop {
    Layer,
    ByHand,
}

impl Shop {
    fn router(self, outbox: &Outbox) -> Router {
        match self {
            Self::Layer => shop::with_layer(outbox),
            Self::ByHand => shop::by_hand(outbox.writer()),
        }
    }
}

/// A load, and what a request of it cost.
struct Side {
    load: Load,
    cost: Cost,
}

async fn side(
    setup: &Setup,
    template: &Database,
    shop: Shop,
    path: &str,
    time: Duration,
    consumer: Consumer,
) -> Result<Side> {
    let database = setup.server().await?.copy(template).await?;
    let outbox = database.outbox().await?;
    let consumer = match consumer {
        Consumer::None => None,
        Consumer::Worker => Some(worker(&outbox, Ordering::Aggregate).await?),
        Consumer::InOrder => Some(worker(&outbox, Ordering::Global).await?),
        Consumer::Bare => Some(bare_consumer(&database).await?),
    };
    let served = Served::start(shop.router(&outbox)).await?;
    // Connections, statements and pages are warm before anything is measured.
    load(&served, path, CLIENTS, time / 10).await?;
    let meter = Meter::start(setup.server().await?).await?;
    let load = load(&served, path, CLIENTS, time).await?;
    let cost = meter.for_each_of((load.per_second * time.as_secs_f64()) as usize).await?;
    if let Some(consumer) = consumer {
        consumer.abort();
    }
    drop((served, outbox));
    database.drop().await?;
    Ok(Side { load, cost })
}

async fn worker(outbox: &Outbox, ordering: Ordering) -> Result<JoinHandle<()>> {
    let handlers = outbox_apalis::Handlers::new().on(|_: Happened, _| std::future::ready(Ok(())));
    let subscription = Subscription::new(SUBSCRIPTION)?.ordering(ordering);
    let worker = outbox_apalis::Worker::new(outbox.clone()).handlers(subscription, handlers);
    let worker = worker.start().await?;
    Ok(tokio::spawn(worker.run_until(std::future::pending())))
}

/// Delivers what has come in every few milliseconds.
async fn bare_consumer(database: &Database) -> Result<JoinHandle<()>> {
    let pool = bare::pool(database).await?;
    let subscription = bare::subscription(&pool).await?;
    Ok(tokio::spawn(async move {
        while let Ok(delivered) = bare::marks_once(&pool, subscription).await {
            if delivered < 100 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }))
}

/// Ours and by hand, in one file each.
async fn sqlite(time: Duration) -> Result<(Load, Load)> {
    let mut loads = Vec::new();
    for shop in [Shop::Layer, Shop::ByHand] {
        let directory = tempfile::tempdir()?;
        let url = format!("sqlite://{}?mode=rwc", directory.path().join("bench.db").display());
        let (writer, reader) = (sqlite_pool(&url, 1).await?, sqlite_pool(&url, 4).await?);
        let outbox = Outbox::with_connections(writer.clone(), reader);
        migrate(&writer).await?;
        shop::create_tables(&writer, shop::SQLITE).await?;
        outbox.register(&Subscription::new(SUBSCRIPTION)?).await?;
        let served = Served::start(shop.router(&outbox)).await?;
        load(&served, "/1", CLIENTS, time / 10).await?;
        loads.push(load(&served, "/1", CLIENTS, time).await?);
    }
    let by_hand = loads.pop().ok_or("no load")?;
    Ok((loads.pop().ok_or("no load")?, by_hand))
}

async fn sqlite_pool(url: &str, connections: u32) -> Result<DatabaseConnection> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(connections).sqlx_logging(false).map_sqlx_sqlite_opts(|options| {
        options
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(Duration::from_secs(5))
    });
    Ok(sea_orm::Database::connect(options).await?)
}

//! What the database can do: consumers in bare SQL, without a worker, a lease that is renewed, retries or an error path.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use sea_orm::sqlx::{self, PgPool, Row, postgres::PgPoolOptions};

use crate::{
    child::nanoseconds,
    database::Database,
    events::Happened,
    measure::{Failure, Result},
};

const CONSUMERS: u32 = 2;
const BATCH: i32 = 100;

/// Claims lanes and reads the first deliveries of each with their events, in one statement.
const CLAIM_LANES: &str = "
    with lanes as (
           update outbox_lanes
              set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = 'bare',
                  due_at = clock_timestamp() + interval '1 minute'
            where subscription_id = $1 and key = any (array(
                  select key from outbox_lanes
                   where subscription_id = $1 and due_at <= clock_timestamp() and due_at < 'infinity'
                   order by due_at, key limit $2 for update skip locked))
           returning key, lease_token)
    select lanes.key, lanes.lease_token, run.position, e.event_id, e.event_type, e.payload::text as payload
      from lanes
     cross join lateral (
           select position from outbox_deliveries d
            where d.subscription_id = $1 and d.key = lanes.key order by seq limit $2) run
      join outbox_events e on e.position = run.position";

/// Moves finished deliveries to the history and advances their lanes, in one statement. Parameters: subscription; key
/// and position of each delivery; key, token and number of deliveries of each lane.
const ACKNOWLEDGE_LANES: &str = "
    with held as materialized (
           select l.key, t.n, l.pending
             from outbox_lanes l join unnest($4::text[], $5::bigint[], $6::int[]) as t(key, token, n)
               on l.key = t.key and l.lease_token = t.token
            where l.subscription_id = $1 order by l.key for update of l skip locked),
         emptied as (
           delete from outbox_lanes l using held
            where l.subscription_id = $1 and l.key = held.key and held.pending = held.n),
         advanced as (
           update outbox_lanes l
              set pending = l.pending - held.n, attempts = 0, leased_by = null, due_at = clock_timestamp()
             from held where l.subscription_id = $1 and l.key = held.key and held.pending > held.n),
         finished as (
           delete from outbox_deliveries d using unnest($2::text[], $3::bigint[]) as t(key, position), held
            where d.subscription_id = $1 and d.position = t.position and d.key = t.key and held.key = t.key
           returning d.position),
         history as (
           insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
           select $1, position, 1, clock_timestamp() from finished)
    select key from held";

/// Takes marks of events that nobody has routed and delivers the events at once: no lanes, no order, no lease.
const TAKE_MARKS: &str = "
    with taken as (
           delete from outbox_unrouted
            where position = any (array(
                  select position from outbox_unrouted order by position limit $2 for update skip locked))
           returning position),
         history as (
           insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
           select $1, position, 1, clock_timestamp() from taken)
    select e.event_id, e.event_type, e.payload::text as payload from taken join outbox_events e using (position)";

/// An ordinary outbox: no order, one row for each event.
const CREATE_ROWS: &str = "
    create table bare_rows (
      id bigint generated always as identity primary key, event_id uuid not null unique, event_type text not null,
      aggregate_type text not null, aggregate_id text not null, payload json not null,
      due_at timestamptz not null default clock_timestamp(), token bigint not null default 0)
      with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
    create index bare_rows_due on bare_rows (due_at, id);
    create table bare_delivered (id bigint primary key, attempts int not null, delivered_at timestamptz not null);
    insert into bare_rows (event_id, event_type, aggregate_type, aggregate_id, payload)
    select event_id, event_type, aggregate_type, aggregate_id, payload from outbox_events order by position;
    analyze bare_rows";

const CLAIM_ROWS: &str = "
    update bare_rows set token = token + 1, due_at = clock_timestamp() + interval '1 minute'
     where id = any (array(
           select id from bare_rows where due_at <= clock_timestamp()
            order by due_at, id limit $1 for update skip locked))
    returning id, token, event_id, event_type, payload::text as payload";

const ACKNOWLEDGE_ROWS: &str = "
    with gone as (
           delete from bare_rows r using unnest($1::bigint[], $2::bigint[]) as t(id, token)
            where r.id = t.id and r.token = t.token returning r.id)
    insert into bare_delivered (id, attempts, delivered_at) select id, 1, clock_timestamp() from gone";

pub(crate) async fn pool(database: &Database) -> Result<PgPool> {
    Ok(PgPoolOptions::new().max_connections(CONSUMERS).connect(&database.url).await?)
}

pub(crate) async fn subscription(pool: &PgPool) -> Result<i32> {
    Ok(sqlx::query_scalar("select id from outbox_subscriptions").fetch_one(pool).await?)
}

/// Claims, delivers to nobody and acknowledges one batch; returns how many deliveries that were.
pub(crate) async fn lanes_once(pool: &PgPool, subscription: i32) -> Result<usize> {
    deliver_lanes(pool, subscription).await
}

/// Delivers to nobody what was committed and not routed; returns how many deliveries that were.
pub(crate) async fn marks_once(pool: &PgPool, subscription: i32) -> Result<usize> {
    Ok(sqlx::query(TAKE_MARKS).bind(subscription).bind(BATCH).fetch_all(pool).await?.len())
}

/// As [`marks_once`]; returns the number of each event and when it was delivered.
pub(crate) async fn marks_numbers(pool: &PgPool, subscription: i32) -> Result<Vec<(usize, u128)>> {
    let rows = sqlx::query(TAKE_MARKS).bind(subscription).bind(BATCH).fetch_all(pool).await?;
    rows.iter()
        .map(|row| {
            let event: Happened = serde_json::from_str(&row.try_get::<String, _>("payload")?)?;
            Ok((event.n, nanoseconds()))
        })
        .collect()
}

async fn deliver_lanes(pool: &PgPool, subscription: i32) -> Result<usize> {
    let rows = sqlx::query(CLAIM_LANES).bind(subscription).bind(BATCH).fetch_all(pool).await?;
    if rows.is_empty() {
        return Ok(0);
    }
    let mut lanes: BTreeMap<String, (i64, Vec<i64>)> = BTreeMap::new();
    for row in &rows {
        let _payload: String = row.try_get("payload")?;
        let lane = lanes.entry(row.try_get("key")?).or_default();
        lane.0 = row.try_get("lease_token")?;
        lane.1.push(row.try_get("position")?);
    }
    // Lanes that a claim or a commit has locked at this moment are asked for again.
    while !lanes.is_empty() {
        let keys = lanes.iter().flat_map(|(key, (_, positions))| vec![key.as_str(); positions.len()]);
        let done: Vec<String> = sqlx::query_scalar(ACKNOWLEDGE_LANES)
            .bind(subscription)
            .bind(keys.collect::<Vec<_>>())
            .bind(lanes.values().flat_map(|(_, positions)| positions).copied().collect::<Vec<_>>())
            .bind(lanes.keys().cloned().collect::<Vec<_>>())
            .bind(lanes.values().map(|(token, _)| *token).collect::<Vec<_>>())
            .bind(lanes.values().map(|(_, positions)| positions.len() as i32).collect::<Vec<_>>())
            .fetch_all(pool)
            .await?;
        for key in done {
            lanes.remove(&key);
        }
    }
    Ok(rows.len())
}

async fn rows_once(pool: &PgPool) -> Result<usize> {
    let rows = sqlx::query(CLAIM_ROWS).bind(BATCH).fetch_all(pool).await?;
    let (mut ids, mut tokens) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
    for row in &rows {
        let _payload: String = row.try_get("payload")?;
        ids.push(row.try_get::<i64, _>("id")?);
        tokens.push(row.try_get::<i64, _>("token")?);
    }
    let done = sqlx::query(ACKNOWLEDGE_ROWS).bind(ids).bind(tokens).execute(pool).await?;
    Ok(usize::try_from(done.rows_affected())?)
}

/// Drains lanes in bare SQL, with order per key; the rate per second. They are routed before.
pub(crate) async fn drain_lanes(database: &Database, events: usize) -> Result<f64> {
    database.outbox().await?.route_waiting().await?;
    let pool = pool(database).await?;
    let subscription = subscription(&pool).await?;
    let consumer = pool.clone();
    let rate = drain(events, move || {
        let pool = consumer.clone();
        async move { lanes_once(&pool, subscription).await }
    })
    .await?;
    pool.close().await;
    Ok(rate)
}

/// Drains an ordinary outbox in bare SQL, without order; the rate per second.
pub(crate) async fn drain_rows(database: &Database, events: usize) -> Result<f64> {
    database.execute(CREATE_ROWS).await?;
    let pool = pool(database).await?;
    let consumer = pool.clone();
    let rate = drain(events, move || {
        let pool = consumer.clone();
        async move { rows_once(&pool).await }
    })
    .await?;
    pool.close().await;
    Ok(rate)
}

async fn drain<F, Fut>(events: usize, batch: F) -> Result<f64>
where
    F: Fn() -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<usize>> + Send,
{
    let delivered = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let consumers: Vec<_> = (0..CONSUMERS)
        .map(|_| {
            let (batch, delivered) = (batch.clone(), delivered.clone());
            tokio::spawn(async move {
                while delivered.load(Ordering::Relaxed) < events {
                    let done = batch().await?;
                    delivered.fetch_add(done, Ordering::Relaxed);
                    if done == 0 {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
                Ok::<(), Failure>(())
            })
        })
        .collect();
    for consumer in consumers {
        consumer.await??;
    }
    Ok(events as f64 / started.elapsed().as_secs_f64())
}

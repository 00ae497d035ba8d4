//! All SQL for SQLite.
//!
//! Lists travel as one JSON parameter, so a statement is the same for one row and for ten thousand. A write
//! transaction excludes all others, so nothing here needs row locks; what must be atomic is in one transaction.
//! Durations are in seconds. `strftime('%Y-%m-%dT%H:%M:%fZ', 'now', …)` is the database's clock in the tables' format.

pub(crate) const GENERATION: &str = "select generation from outbox_meta";

pub(crate) const BUMP_GENERATION: &str = "update outbox_meta set generation = generation + 1";

pub(crate) const SUBSCRIPTIONS: &str = "select id, name, filter, ordering from outbox_subscriptions order by id";

/// $1 events, in their order; $2 … $8 what they share.
pub(crate) const INSERT_EVENTS: &str = "
    insert into outbox_events (
        event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at,
        tags, max_attempts, tenant, actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate)
    select unhex(value->>'id'), value->>'event_type', value->>'schema_version', value->>'aggregate_type',
           value->>'aggregate_id', value->>'payload', value->>'occurred_at', value->>'tags', value->>'max_attempts',
           $2, $3, $4, $5, $6, $7, $8
      from json_each($1) order by key
    returning position, event_id";

/// $1 deliveries. `wait` is a delay, or a head start if negative; the later of it and `not_before` counts.
pub(crate) const INSERT_DELIVERIES: &str = "
    insert into outbox_deliveries (subscription_id, key, position, due_at)
    select value->>'subscription', value->>'key', value->>'position',
           max(strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', value->>'wait')),
               coalesce(value->>'not_before', ''))
      from json_each($1) where true
    on conflict do nothing";

/// $1 lanes with the number of their new deliveries. A lane that exists keeps its due time: it may be leased, backing
/// off, or waiting for a delayed event. A new one is due with its first delivery (primary key). Its token starts at
/// random: a lane that was deleted and came back must not repeat the tokens of its former life, or a late result from
/// then would pass the fence.
pub(crate) const UPSERT_LANES: &str = "
    insert into outbox_lanes (subscription_id, key, pending, lease_token, due_at)
    select value->>'subscription', value->>'key', value->>'deliveries', abs(random() / 2),
           (select due_at from outbox_deliveries d
             where d.subscription_id = value->>'subscription' and d.key = value->>'key' order by position limit 1)
      from json_each($1) where true
    on conflict (subscription_id, key) do update set pending = pending + excluded.pending";

/// $1 subscription, $2 keys. After a backfill: what it put before a delayed delivery does not wait for it. Lanes that a
/// worker has tried keep their lease or backoff.
pub(crate) const DUE_WITH_HEAD: &str = "
    update outbox_lanes
       set due_at = (select d.due_at from outbox_deliveries d
                      where d.subscription_id = outbox_lanes.subscription_id and d.key = outbox_lanes.key
                      order by position limit 1)
     where subscription_id = $1 and key in (select value from json_each($2)) and attempts = 0 and last_error is null";

/// $1 subscription: seconds until its next lane is due, negative if it is. Asked before a claim, so that an idle poll
/// takes no write lock. Index: outbox_lanes_due.
pub(crate) const NEXT_DUE: &str = "
    select (julianday(due_at) - julianday('now')) * 86400.0 as seconds from outbox_lanes
     where subscription_id = $1
       and exists (select 1 from outbox_subscriptions where id = $1 and paused_at is null and backfill_from is null)
     order by due_at limit 1";

/// $1 subscription, $2 lanes, $3 lease, $4 worker. Index: outbox_lanes_due.
pub(crate) const CLAIM: &str = "
    update outbox_lanes
       set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = $4,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $3))
     where subscription_id = $1
       and key in (select key from outbox_lanes
                    where subscription_id = $1 and due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                    order by due_at, key limit $2)
       and exists (select 1 from outbox_subscriptions where id = $1 and paused_at is null and backfill_from is null)
    returning key, lease_token, attempts, attempt_log";

/// $1 subscription, $2 keys, $3 run. Index: primary key of the deliveries; `cross join` holds the planner to it, which
/// otherwise reads all deliveries of the subscription.
pub(crate) const RUNS: &str = "
    select d.key, d.due_at, d.due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as due, e.*
      from json_each($2) lane
     cross join outbox_deliveries d on d.subscription_id = $1 and d.key = lane.value
       and d.position in (select position from outbox_deliveries
                           where subscription_id = $1 and key = lane.value order by position limit $3)
     cross join outbox_events e on e.position = d.position
     order by d.position";

/// $1 reports. The lanes whose lease is still held: neither taken over nor ended by its holder.
pub(crate) const HELD: &str = "
    select r.key as report from json_each($1) r
      join outbox_lanes l on l.subscription_id = r.value->>'subscription' and l.key = r.value->>'key'
       and l.lease_token = r.value->>'token' and l.leased_by is not null";

/// $1 finished deliveries. Returns those that were still there: a report that is stored twice counts once.
pub(crate) const DELETE_DELIVERIES: &str = "
    delete from outbox_deliveries
     where (subscription_id, key, position) in (
           select value->>'subscription', value->>'key', value->>'position' from json_each($1))
    returning subscription_id, key, position";

/// $1 finished deliveries. A replayed delivery replaces its history.
pub(crate) const INSERT_DELIVERED: &str = "
    insert into outbox_delivered (subscription_id, position, attempts, attempt_log, delivered_at)
    select value->>'subscription', value->>'position', value->>'attempts', value->>'log',
           strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, attempt_log = excluded.attempt_log, delivered_at = excluded.delivered_at";

/// $1 finished deliveries.
pub(crate) const INSERT_DEAD_LETTERS: &str = "
    insert into outbox_dead_letters (subscription_id, position, key, attempts, error, attempt_log, died_at)
    select value->>'subscription', value->>'position', value->>'key', value->>'attempts', value->>'error',
           value->>'log', strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is not null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, error = excluded.error, attempt_log = excluded.attempt_log,
           died_at = excluded.died_at";

/// $1 reports of lanes that are held. After `keep` the lease goes on; after `retry` the head waits; after `yield` and
/// `release` the lane is due with its next delivery.
pub(crate) const ADVANCE_LANES: &str = "
    update outbox_lanes
       set pending = outbox_lanes.pending - r.finished,
           attempts = r.attempts,
           leased_by = case r.next when 'keep' then leased_by end,
           due_at = case r.next
               when 'keep' then outbox_lanes.due_at
               when 'retry' then strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', r.wait))
               else coalesce((select d.due_at from outbox_deliveries d
                               where d.subscription_id = r.subscription and d.key = r.lane
                               order by position limit 1), outbox_lanes.due_at) end,
           last_error = case r.next when 'release' then last_error else r.error end,
           attempt_log = r.log
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'finished' as finished,
                   value->>'attempts' as attempts, value->>'next' as next, value->>'wait' as wait,
                   value->>'error' as error, value->>'log' as log
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane";

/// $1 reports of lanes that are held.
pub(crate) const DELETE_EMPTY_LANES: &str = "
    delete from outbox_lanes
     where pending <= 0
       and (subscription_id, key) in (select value->>'subscription', value->>'key' from json_each($1))";

/// $1 lanes, $2 lease. Returns the lanes whose lease was still held.
pub(crate) const RENEW: &str = "
    update outbox_lanes
       set due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by is not null
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token";

/// $1 name.
pub(crate) const SUBSCRIPTION_BY_NAME: &str = "
    select id, filter, ordering, backfill_from from outbox_subscriptions where name = $1";

/// $1 name, $2 filter, $3 ordering, $4 first position of the backfill.
pub(crate) const INSERT_SUBSCRIPTION: &str = "
    insert into outbox_subscriptions (name, filter, ordering, backfill_from) values ($1, $2, $3, $4) returning id";

/// $1 id, $2 filter, $3 ordering.
pub(crate) const UPDATE_SUBSCRIPTION: &str = "
    update outbox_subscriptions set filter = $2, ordering = $3 where id = $1";

/// The first position at or after time $1. Index: outbox_events_recorded.
pub(crate) const FIRST_POSITION_SINCE: &str = "
    select min(position) as position from outbox_events where recorded_at >= $1";

/// $1 first position, $2 number.
pub(crate) const EVENTS_FROM: &str = "
    select * from outbox_events where position >= $1 order by position limit $2";

/// $1 subscription, $2 first position; null ends the backfill.
pub(crate) const SET_BACKFILL: &str = "update outbox_subscriptions set backfill_from = $2 where id = $1";

/// $1 subscription, $2 positions: those that have a delivery, a history or a dead letter already.
pub(crate) const POSITIONS_KNOWN: &str = "
    select position from outbox_deliveries
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_delivered
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_dead_letters
     where subscription_id = $1 and position in (select value from json_each($2))";

/// $1 consumer, $2 event id.
pub(crate) const INBOX_INSERT: &str = "
    insert into outbox_inbox (consumer, event_id) values ($1, $2) on conflict do nothing";

/// $1 worker, $2 subscriptions.
pub(crate) const HEARTBEAT: &str = "
    insert into outbox_workers (id, subscriptions, started_at, last_seen_at)
    values ($1, $2, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
    on conflict (id) do update set subscriptions = excluded.subscriptions, last_seen_at = excluded.last_seen_at";

/// $1 seconds.
pub(crate) const FORGET_WORKERS: &str = "
    delete from outbox_workers
     where last_seen_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', $1))";

/// $1 worker.
pub(crate) const FORGET_WORKER: &str = "delete from outbox_workers where id = $1";

pub(crate) const WORKERS: &str = "
    select id, subscriptions, started_at, last_seen_at,
           (julianday('now') - julianday(last_seen_at)) * 86400 as last_seen_seconds
      from outbox_workers order by id";

pub(crate) const STATUS: &str = "
    select s.name, s.paused_at is not null as paused,
           (select coalesce(sum(pending), 0) from outbox_lanes where subscription_id = s.id) as pending,
           (select count(*) from outbox_lanes
             where subscription_id = s.id and leased_by is not null
               and due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) as leased,
           (select count(*) from outbox_delivered where subscription_id = s.id) as delivered,
           (select count(*) from outbox_dead_letters where subscription_id = s.id) as dead,
           (select (julianday('now') - julianday(recorded_at)) * 86400 from outbox_events
             where position = (select min(position) from outbox_deliveries where subscription_id = s.id)
           ) as oldest_pending_age_seconds,
           coalesce((select last_error from outbox_lanes
                      where subscription_id = s.id and last_error is not null order by due_at desc limit 1),
                    (select error from outbox_dead_letters
                      where subscription_id = s.id order by id desc limit 1)) as last_error
      from outbox_subscriptions s order by s.name";

/// $1 subscription: finished deliveries of each of the last seven days, `days_ago` 0 for today.
pub(crate) const ACTIVITY: &str = "
    select cast(julianday('now', 'start of day') - julianday(substr(delivered_at, 1, 10)) as integer) as days_ago,
           count(*) as deliveries
      from outbox_delivered
     where subscription_id = $1 and delivered_at >= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', 'start of day', '-6 days')
     group by 1";

/// $1 subscription, $2 whether leased, $3 number, $4 position of one event or null. A lease is on a lane's head.
pub(crate) const LIST_UNFINISHED: &str = "
    select l.attempts as lane_attempts, l.due_at as lane_due_at, l.leased_by, l.last_error, d.due_at,
           d.position = (select min(position) from outbox_deliveries h
                          where h.subscription_id = d.subscription_id and h.key = d.key) as head,
           e.*
      from outbox_deliveries d
      join outbox_lanes l on l.subscription_id = d.subscription_id and l.key = d.key
      join outbox_events e on e.position = d.position
     where d.subscription_id = $1 and ($4 is null or d.position = $4)
       and $2 = (l.leased_by is not null and l.due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                 and d.position = (select min(position) from outbox_deliveries h
                                    where h.subscription_id = d.subscription_id and h.key = d.key))
     order by d.position desc limit $3";

/// $1 subscription, $2 number, $3 position of one event or null.
pub(crate) const LIST_DELIVERED: &str = "
    select f.attempts, f.delivered_at as finished_at, null as error, e.*
      from outbox_delivered f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and ($3 is null or f.position = $3)
     order by f.position desc limit $2";

/// $1 subscription, $2 number, $3 position of one event or null.
pub(crate) const LIST_DEAD: &str = "
    select f.attempts, f.died_at as finished_at, f.error, e.*
      from outbox_dead_letters f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and ($3 is null or f.position = $3)
     order by f.position desc limit $2";

/// $1 event id.
pub(crate) const POSITION_OF: &str = "select position from outbox_events where event_id = $1";

//! All SQL for SQLite.
//!
//! A write transaction excludes all others, so nothing here needs row locks; what must be atomic is in one transaction.
//! `strftime('%Y-%m-%dT%H:%M:%fZ', 'now', …)` is the database's clock in the tables' format.

use crate::sql::{Flush, Settle, SettleSteps, Sql};

pub(crate) static SQLITE: Sql = Sql {
    schema_version: "select schema_version from outbox_meta",

    generation: "select generation from outbox_meta",

    instance: "select instance from outbox_meta",

    bump_generation: "update outbox_meta set generation = generation + 1",

    subscriptions: "select id, name, filter, ordering from outbox_subscriptions order by id",

    // Local statements cost no round trips.
    flush: Flush::InSteps {
        insert_events: "
    insert into outbox_events (
        event_id, event_type, schema_version, aggregate_type, aggregate_id, payload, occurred_at,
        tags, max_attempts, wait_seconds, not_before, tenant, actor_kind, actor_id, correlation_id, causation_id, traceparent, tracestate)
    select unhex(value->>'id'), value->>'event_type', value->>'schema_version', value->>'aggregate_type',
           value->>'aggregate_id', value->>'payload', value->>'occurred_at', value->>'tags', value->>'max_attempts',
           value->>'wait', value->>'not_before', $2, $3, $4, $5, $6, $7, $8
      from json_each($1) order by key
    returning position, event_id",
    },

    insert_deliveries: "
    insert into outbox_deliveries (subscription_id, key, position, due_at)
    select d.value->>'subscription', d.value->>'key', e.position,
           max(strftime('%Y-%m-%dT%H:%M:%fZ', e.recorded_at, printf('%+.3f seconds', e.wait_seconds)),
               coalesce(e.not_before, ''))
      from json_each($1) d
     cross join outbox_events e on e.position = d.value->>'position'
     where true
    on conflict do nothing",

    upsert_lanes: "
    insert into outbox_lanes (subscription_id, key, pending, lease_token, due_at)
    select value->>'subscription', value->>'key', value->>'deliveries', abs(random() / 2),
           (select due_at from outbox_deliveries d
             where d.subscription_id = value->>'subscription' and d.key = value->>'key' order by position limit 1)
      from json_each($1) where true
    on conflict (subscription_id, key) do update set pending = pending + excluded.pending",

    due_with_head: "
    update outbox_lanes
       set due_at = (select d.due_at from outbox_deliveries d
                      where d.subscription_id = outbox_lanes.subscription_id and d.key = outbox_lanes.key
                      order by position limit 1)
     where subscription_id = $1 and key in (select value from json_each($2)) and attempts = 0 and last_error is null",

    next_due: "
    select circuit_failures, (julianday(circuit_until) - julianday('now')) * 86400.0 as circuit_seconds,
           (select (julianday(nullif(due_at, '9999-12-31T23:59:59.999Z')) - julianday('now')) * 86400.0 from outbox_lanes
             where subscription_id = $1 order by due_at limit 1) as seconds
      from outbox_subscriptions where id = $1 and paused_at is null and backfill_from is null",

    claim: "
    update outbox_lanes
       set attempts = attempts + $6, lease_token = lease_token + 1, leased_by = $4,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $3))
     where subscription_id = $1
       and key in (select key from outbox_lanes
                    where subscription_id = $1 and due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
                    order by due_at, key limit $2)
       and exists (select 1 from outbox_subscriptions
                    where id = $1 and paused_at is null and backfill_from is null and (circuit_until is null or $5))
    returning key, lease_token, attempts + 1 - $6 as attempts, attempt_log",

    take_probe: "
    update outbox_subscriptions
       set circuit_until = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
     where id = $1 and circuit_until <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now')",

    open_circuit: "
    update outbox_subscriptions
       set circuit_until = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2)),
           circuit_failures = circuit_failures + $3
     where id = $1",

    close_circuit: "
    update outbox_subscriptions set circuit_until = null, circuit_failures = 0
     where id = $1 and circuit_until is not null",

    runs: "
    select d.key, d.position as queued, d.due_at, d.due_at <= strftime('%Y-%m-%dT%H:%M:%fZ', 'now') as due, e.*
      from json_each($2) lane
     cross join outbox_deliveries d on d.subscription_id = $1 and d.key = lane.value
       and d.position in (select position from outbox_deliveries
                           where subscription_id = $1 and key = lane.value order by position limit $3)
      left join outbox_events e on e.position = d.position
     order by d.position",

    held: "
    select r.key as report from json_each($1) r
      join outbox_lanes l on l.subscription_id = r.value->>'subscription' and l.key = r.value->>'key'
       and l.lease_token = r.value->>'token' and l.leased_by is not null",

    note_attempt: "
        update outbox_lanes set attempt_log = $4
         where subscription_id = $1 and key = $2 and lease_token = $3 and leased_by is not null",

    settle: Settle::InSteps(SettleSteps {
    delete_deliveries: "
    delete from outbox_deliveries
     where (subscription_id, key, position) in (
           select value->>'subscription', value->>'key', value->>'position' from json_each($1))
    returning subscription_id, key, position",

    insert_delivered: "
    insert into outbox_delivered (subscription_id, position, attempts, attempt_log, delivered_at)
    select value->>'subscription', value->>'position', value->>'attempts', value->>'log',
           strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, attempt_log = excluded.attempt_log, delivered_at = excluded.delivered_at",

    insert_dead_letters: "
    insert into outbox_dead_letters (subscription_id, position, key, attempts, error, attempt_log, died_at)
    select value->>'subscription', value->>'position', value->>'key', value->>'attempts', value->>'error',
           value->>'log', strftime('%Y-%m-%dT%H:%M:%fZ', 'now')
      from json_each($1) where value->>'error' is not null
    on conflict (subscription_id, position) do update
       set attempts = excluded.attempts, error = excluded.error, attempt_log = excluded.attempt_log,
           died_at = excluded.died_at",

    advance_lanes: "
    update outbox_lanes
       set pending = outbox_lanes.pending - r.finished,
           attempts = r.attempts,
           leased_by = case r.next when 'keep' then leased_by end,
           due_at = case r.next
               when 'keep' then outbox_lanes.due_at
               when 'retry' then strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', r.wait))
               when 'hold' then '9999-12-31T23:59:59.999Z'
               else coalesce((select d.due_at from outbox_deliveries d
                               where d.subscription_id = r.subscription and d.key = r.lane
                               order by position limit 1), outbox_lanes.due_at) end,
           last_error = case r.next when 'release' then last_error else r.error end,
           attempt_log = r.log,
           held_at = r.held_at
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'finished' as finished,
                   value->>'attempts' as attempts, value->>'next' as next, value->>'wait' as wait,
                   value->>'error' as error, value->>'log' as log, value->>'held_at' as held_at
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane",

    delete_empty_lanes: "
    delete from outbox_lanes
     where pending <= 0 and held_at is null
       and (subscription_id, key) in (select value->>'subscription', value->>'key' from json_each($1))",
    }),

    take_over: "
    update outbox_lanes
       set attempts = attempts + 1, lease_token = lease_token + 1, leased_by = $3,
           due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by is not null
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token, outbox_lanes.attempts,
              outbox_lanes.attempt_log",

    renew: "
    update outbox_lanes
       set due_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('%+.3f seconds', $2))
      from (select value->>'subscription' as subscription, value->>'key' as lane, value->>'token' as token
              from json_each($1)) r
     where outbox_lanes.subscription_id = r.subscription and outbox_lanes.key = r.lane
       and outbox_lanes.lease_token = r.token and outbox_lanes.leased_by is not null
    returning outbox_lanes.subscription_id, outbox_lanes.key, outbox_lanes.lease_token",

    subscription_by_name: "
    select id, filter, ordering, backfill_from from outbox_subscriptions where name = $1",

    insert_subscription: "
    insert into outbox_subscriptions (name, filter, ordering, backfill_from) values ($1, $2, $3, $4) returning id",

    update_subscription: "
    update outbox_subscriptions set filter = $2, ordering = $3 where id = $1",

    // A change excludes every other writer: no flush can have missed it.
    unsettled_subscriptions: "select name from outbox_subscriptions where false",

    missed_events: "select * from outbox_events where $1 is null",

    settle_subscription: "select $1 is not null as settled",

    forget_change: "select $1 is not null",

    pause: "update outbox_subscriptions
               set paused_at = coalesce(paused_at, strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) where name = $1",

    resume: "update outbox_subscriptions set paused_at = null where name = $1",

    remove: &[
        "delete from outbox_lanes where subscription_id = $1",
        "delete from outbox_deliveries where subscription_id = $1",
        "delete from outbox_delivered where subscription_id = $1",
        "delete from outbox_dead_letters where subscription_id = $1",
        "delete from outbox_subscriptions where id = $1",
    ],

    remove_orphans: &[],

    first_position_since: "
    select min(position) as position from outbox_events where recorded_at >= $1",

    events_from: "
    select * from outbox_events where position >= $1 order by position limit $2",

    set_backfill: "update outbox_subscriptions set backfill_from = $2 where id = $1",

    positions_known: "
    select position from outbox_deliveries
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_delivered
     where subscription_id = $1 and position in (select value from json_each($2))
    union select position from outbox_dead_letters
     where subscription_id = $1 and position in (select value from json_each($2))",

    inbox_insert: "
    insert into outbox_inbox (consumer, event_id) values ($1, $2) on conflict do nothing",

    heartbeat: "
    insert into outbox_workers (id, subscriptions, started_at, last_seen_at)
    values ($1, $2, strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))
    on conflict (id) do update set subscriptions = excluded.subscriptions, last_seen_at = excluded.last_seen_at",

    forget_workers: "
    delete from outbox_workers
     where last_seen_at < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', printf('-%.3f seconds', $1))",

    forget_worker: "delete from outbox_workers where id = $1",

    workers: "
    select id, subscriptions, started_at, last_seen_at,
           max(0.0, (julianday('now') - julianday(last_seen_at)) * 86400) as last_seen_seconds
      from outbox_workers order by id",

    status: "
    select s.name, s.paused_at is not null as paused,
           (select coalesce(sum(pending), 0) from outbox_lanes where subscription_id = s.id) as pending,
           (select count(*) from outbox_lanes
             where subscription_id = s.id and leased_by is not null
               and due_at > strftime('%Y-%m-%dT%H:%M:%fZ', 'now')) as leased,
           (select count(*) from outbox_delivered where subscription_id = s.id) as delivered,
           (select count(*) from outbox_dead_letters where subscription_id = s.id) as dead,
           (select max(0.0, (julianday('now') - julianday(recorded_at)) * 86400) from outbox_events
             where position = (select min(position) from outbox_deliveries where subscription_id = s.id)
           ) as oldest_pending_age_seconds,
           coalesce((select last_error from outbox_lanes
                      where subscription_id = s.id and last_error is not null order by due_at desc limit 1),
                    (select error from outbox_dead_letters
                      where subscription_id = s.id order by id desc limit 1)) as last_error
      from outbox_subscriptions s order by s.name",

    activity: "
    select cast(julianday('now', 'start of day') - julianday(substr(delivered_at, 1, 10)) as integer) as days_ago,
           count(*) as deliveries
      from outbox_delivered
     where subscription_id = $1 and delivered_at >= strftime('%Y-%m-%dT%H:%M:%fZ', 'now', 'start of day', '-6 days')
     group by 1",

    list_unfinished: "
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
     order by d.position desc limit $3",

    list_delivered: "
    select f.attempts, f.delivered_at as finished_at, null as error, e.*
      from outbox_delivered f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and ($3 is null or f.position = $3)
     order by f.position desc limit $2",

    list_dead: "
    select f.attempts, f.died_at as finished_at, f.error, e.*
      from outbox_dead_letters f join outbox_events e on e.position = f.position
     where f.subscription_id = $1 and ($3 is null or f.position = $3)
     order by f.position desc limit $2",

    position_of: "select position from outbox_events where event_id = $1",
};
